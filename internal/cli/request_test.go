package cli

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// What the command line says is what the controller is asked.
func TestRequests(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		want proto.Message
	}{
		{"host token", []string{"host", "token", "--namespace", "/acme/prod", "--label", "role=db", "--label", "note=a=b", "--ttl", "15m"},
			&symbolonv1.CreateJoinTokenRequest{
				Namespace: "/acme/prod", Labels: map[string]string{"role": "db", "note": "a=b"}, Ttl: durationpb.New(15 * time.Minute),
			}},
		{"host remove", []string{"host", "remove", "db-1", "--yes"}, &symbolonv1.RemoveHostRequest{Id: "h1"}},
		{"workloads", []string{"workload", "list", "-n", "/acme"}, &symbolonv1.ListWorkloadsRequest{Namespace: "/acme"}},
		{"policy list", []string{"policy", "list", "--kind", "policies", "-n", "/a"}, &symbolonv1.ListResourcesRequest{Kind: "Policy", Namespace: "/a"}},
		{"policy delete", []string{"policy", "delete", "--yes", "/acme/prod/x", "namespace:/acme", "PolicyTest:/y"},
			&symbolonv1.DeleteRequest{Keys: []*symbolonv1.ResourceKey{
				{Kind: "Policy", Namespace: "/acme/prod", Name: "x"},
				{Kind: "Namespace", Namespace: "/acme"},
				{Kind: "PolicyTest", Namespace: "/", Name: "y"},
			}}},
		{"policy apply", []string{"policy", "apply", "--prune", "-m", "why", "-f", "-"},
			&symbolonv1.ApplyRequest{Prune: true, Message: "why", Files: []*symbolonv1.SourceFile{{Name: "stdin"}}}},
		{"policy history", []string{"policy", "history", "--last", "3"}, &symbolonv1.ListGenerationsRequest{Last: 3}},
		{"policy history show", []string{"policy", "history", "show", "7"}, &symbolonv1.GetGenerationRequest{Generation: 7}},
		{"policy history show yaml", []string{"policy", "history", "show", "7", "-o", "yaml"}, &symbolonv1.GetGenerationRequest{Generation: 7, Content: true}},
		{"policy rollback", []string{"policy", "rollback", "--yes", "-m", "why", "7"},
			&symbolonv1.RollbackRequest{Generation: 7, BaseGeneration: 12, Message: "why"}},
		{"policy rollback if", []string{"policy", "rollback", "--yes", "--if-generation", "11", "7"},
			&symbolonv1.RollbackRequest{Generation: 7, BaseGeneration: 11}},
		{"policy rollback, dry", []string{"policy", "rollback", "--dry-run", "7"},
			&symbolonv1.RollbackRequest{Generation: 7, BaseGeneration: 12, DryRun: true}},
		{"explain", []string{"explain", "--from", "spiffe://acme.example/a/b", "--to", "::ffff:192.0.2.1", "--port", "udp/53"},
			&symbolonv1.ExplainRequest{
				From:     &symbolonv1.ExplainEndpoint{SpiffeId: "spiffe://acme.example/a/b"},
				To:       &symbolonv1.ExplainEndpoint{Address: "192.0.2.1"},
				Protocol: "udp", Port: 53,
			}},
		{"explain attributes", []string{"explain", "--from", "app=web,app=api,mail=x@/y@/acme/prod", "--to", "@/", "--port", "443"},
			&symbolonv1.ExplainRequest{
				From: &symbolonv1.ExplainEndpoint{Namespace: "/acme/prod", Attributes: map[string]*symbolonv1.LabelValues{
					"app": values("web", "api"), "mail": values("x@/y"),
				}},
				To:       &symbolonv1.ExplainEndpoint{Namespace: "/"},
				Protocol: "tcp", Port: 443,
			}},
		{"explain a flow", []string{"explain", "--flow", "5f0c2a91"}, &symbolonv1.ExplainRequest{Flow: "5f0c2a91"}},
		{"flows", []string{"flows", "--outcome", "deny", "--namespace", "/acme", "--last", "7"},
			&symbolonv1.WatchFlowsRequest{Outcome: symbolonv1.Outcome_OUTCOME_DENY, Namespace: "/acme", Last: 7}},
		{"namespace create", []string{"namespace", "create", "/acme/prod", "--default", "deny", "--label", "app", "--label", "env=dev,prod"},
			&symbolonv1.ApplyRequest{Files: []*symbolonv1.SourceFile{{Name: "command line", Content: []byte(
				"kind: Namespace\nname: /acme/prod\nmode: enforce\ndefault: deny\nprotection: inherit\n" +
					"attributes:\n  app: {}\n  env:\n    values:\n    - dev\n    - prod\n")}}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			populate(w.admin)
			w.admin.explain = explanation(true)
			w.admin.applied = &symbolonv1.ApplyResponse{}
			if r := w.run(tt.args...); r.code != ExitOK {
				t.Fatalf("exit code %d; stderr:\n%s", r.code, r.stderr)
			}
			if diff := cmp.Diff(tt.want, w.admin.asked(), protocmp.Transform()); diff != "" {
				t.Errorf("request (-want +got):\n%s", diff)
			}
		})
	}
}

func TestBadInputIsNotSent(t *testing.T) {
	for _, args := range [][]string{
		{"host", "token"},
		{"host", "token", "-n", "acme"},
		{"host", "token", "-n", "/acme/"},
		{"host", "token", "-n", "/acme", "--label", "role"},
		{"host", "token", "-n", "/acme", "--label", "a=1", "--label", "a=2"},
		{"host", "token", "-n", "/acme", "--ttl", "-1s"},
		{"explain", "--from", "app=web", "--to", "@/", "--port", "1"},
		{"explain", "--from", "app@/a", "--to", "@/", "--port", "1"},
		{"explain", "--from", "@/a", "--to", "@/", "--port", "0"},
		{"explain", "--from", "@/a", "--to", "@/", "--port", "65536"},
		{"explain", "--from", "@/a", "--to", "@/", "--port", "sctp/1"},
		{"explain", "--from", "@/a", "--to", "@/"},
		{"explain", "--flow", "5f0c2a91", "--from", "@/a"},
		{"explain", "--flow", "5f0c2a91", "--port", "1"},
		{"namespace", "create", "acme"},
		{"namespace", "create", "/acme", "--label", "a", "--label", "a=b"},
		{"policy", "apply", "-f", "-", "-f", "-"},
		{"policy", "delete", "/acme/prod/"},
		{"policy", "delete", "pod:/acme/x"},
		{"flows", "-n", "acme"},
		{"policy", "history", "show", "first"},
		{"policy", "rollback", "0"},
	} {
		w := newWorld(t)
		if r := w.run(args...); r.code != ExitUsage {
			t.Errorf("%q: exit code %d, want %d", args, r.code, ExitUsage)
		}
		if w.admin.calls != 0 {
			t.Errorf("%q: the controller was asked", args)
		}
	}
}

// $(symbolon host token ...) is the token and nothing else.
func TestHostTokenPrintsTheTokenAlone(t *testing.T) {
	w := newWorld(t)
	r := w.run("host", "token", "--namespace", "/acme/prod")
	if r.stdout != "symbolon1.id.secret.pin\n" {
		t.Errorf("stdout %q", r.stdout)
	}
	if want := "for one host in /acme/prod, until 2026-11-03T13:00:00Z\n"; r.stderr != want {
		t.Errorf("stderr %q, want %q", r.stderr, want)
	}
}

func TestNamespaceCreateDoesNotChangeWhatExists(t *testing.T) {
	w := newWorld(t)
	populate(w.admin)
	if r := w.run("namespace", "create", "/acme"); r.code != ExitConflict {
		t.Errorf("exit code %d, want %d", r.code, ExitConflict)
	}
	if _, applied := w.admin.asked().(*symbolonv1.ApplyRequest); applied {
		t.Error("it was applied")
	}
}

func TestApplyReadsFilesAndDirectories(t *testing.T) {
	w := newWorld(t)
	w.admin.applied = &symbolonv1.ApplyResponse{Generation: 13}
	w.stdin = "from stdin"
	for _, name := range []string{"p/b.yaml", "p/sub/a.yml", "p/readme.md", "p/.hidden.yaml", "p/.git/c.yaml", "one.txt"} {
		w.write(name, name)
	}
	dir := filepath.Join(w.dir, "p")
	r := w.run("policy", "apply", "--strict", "-f", dir, "-f", filepath.Join(w.dir, "one.txt"), "-f", "-", "-f", dir+"/b.yaml")
	if r.code != ExitOK {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	got := w.admin.asked().(*symbolonv1.ApplyRequest)
	want := &symbolonv1.ApplyRequest{Strict: true, Files: []*symbolonv1.SourceFile{
		{Name: dir + "/b.yaml", Content: []byte("p/b.yaml")},
		{Name: dir + "/sub/a.yml", Content: []byte("p/sub/a.yml")},
		{Name: w.dir + "/one.txt", Content: []byte("one.txt")},
		{Name: "stdin", Content: []byte("from stdin")},
	}}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
}

func TestApplyOfADirectoryWithoutPolicy(t *testing.T) {
	w := newWorld(t)
	w.write("empty/readme.md", "")
	r := w.run("policy", "apply", "-f", filepath.Join(w.dir, "empty"))
	if r.code != ExitUsage || !strings.Contains(r.stderr, "no *.yaml or *.yml") {
		t.Errorf("exit code %d, stderr %q", r.code, r.stderr)
	}
}

func TestApplyOfTooMuch(t *testing.T) {
	w := newWorld(t)
	path := w.write("big.yaml", "")
	if err := os.Truncate(path, maxApply+1); err != nil {
		t.Fatal(err)
	}
	r := w.run("policy", "apply", "-f", path)
	if r.code != ExitUsage || w.admin.calls != 0 {
		t.Errorf("exit code %d, %d calls", r.code, w.admin.calls)
	}
}

var changes = &symbolonv1.ApplyResponse{
	Generation: 13,
	Changes: []*symbolonv1.Change{
		{Type: symbolonv1.ChangeType_CHANGE_TYPE_CREATED, Kind: "Namespace", Namespace: "/acme"},
		{Type: symbolonv1.ChangeType_CHANGE_TYPE_UPDATED, Kind: "Policy", Namespace: "/acme", Name: "x", Fields: []*symbolonv1.FieldChange{
			{Path: "verb", Before: "allow", After: "deny"}, {Path: "ports", After: "[tcp/443]"}, {Path: "with", Before: "[log]"},
		}},
		{Type: symbolonv1.ChangeType_CHANGE_TYPE_UNCHANGED, Kind: "Policy", Namespace: "/", Name: "y"},
	},
	Warnings: []string{"policy /acme/x: subject matches no known workload"},
	Tests:    []*symbolonv1.TestResult{{Test: "/acme/t: web reaches api", Passed: true}},
}

func TestApplyAndDiff(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		code int
		dry  bool
	}{
		{"policy-apply", []string{"policy", "apply"}, ExitOK, false},
		{"policy-apply-dry", []string{"policy", "apply", "--dry-run"}, ExitOK, true},
		{"policy-diff", []string{"policy", "diff"}, ExitNegative, true},
		{"policy-diff-color", []string{"policy", "diff", "--color=always"}, ExitNegative, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.admin.applied = changes
			r := w.run(append(tt.args, "-f", w.write("p.yaml", "x"))...)
			if r.code != tt.code {
				t.Errorf("exit code %d, want %d", r.code, tt.code)
			}
			if got := w.admin.asked().(*symbolonv1.ApplyRequest).GetDryRun(); got != tt.dry {
				t.Errorf("dry_run %t", got)
			}
			golden(t, tt.name, r.stdout+"--- stderr\n"+r.stderr)
		})
	}
}

func TestDiffOfNothing(t *testing.T) {
	w := newWorld(t)
	w.admin.applied = &symbolonv1.ApplyResponse{Changes: changes.GetChanges()[2:]}
	r := w.run("policy", "diff", "-f", w.write("p.yaml", "x"))
	if r.code != ExitOK || r.stdout != "" {
		t.Errorf("exit code %d, stdout %q", r.code, r.stdout)
	}
}

func TestFailedTestIsANegativeAnswer(t *testing.T) {
	w := newWorld(t)
	w.admin.applied = &symbolonv1.ApplyResponse{Tests: []*symbolonv1.TestResult{
		{Test: "t1", Passed: true}, {Test: "t2", Message: "want deny, got allow by /acme/x"},
	}}
	r := w.run("policy", "diff", "-f", w.write("p.yaml", "x"))
	if r.code != ExitNegative {
		t.Errorf("exit code %d, want %d", r.code, ExitNegative)
	}
	if want := "✗ failed t2: want deny, got allow by /acme/x\n1 of 2 tests passed\n"; r.stderr != want {
		t.Errorf("stderr %q, want %q", r.stderr, want)
	}
}

// The caret has to stand below what it points at.
func TestPolicyErrorIsPrintedAsItIs(t *testing.T) {
	text := "p.yaml:3:8: unknown verb \"alow\"\n  3 | verb: alow\n           ^ did you mean allow?"
	w := newWorld(t)
	w.admin.fail = connect.NewError(connect.CodeInvalidArgument, errString(text))
	r := w.run("policy", "apply", "-f", w.write("p.yaml", "x"))
	if r.code != ExitUsage || r.stderr != "error: "+text+"\n" {
		t.Errorf("exit code %d, stderr:\n%s", r.code, r.stderr)
	}
}

func TestFlowsFollowStreamsUntilInterrupted(t *testing.T) {
	w := newWorld(t)
	populate(w.admin)
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	lines := 0
	tee := &lineWatcher{line: func(s string) {
		// The last record arrives while the stream is still open.
		if lines += strings.Count(s, "\n"); lines == 1+len(w.admin.flows) {
			interrupt()
		}
	}}
	r := w.runContext(ctx, tee, "flows", "--follow")
	if r.code != ExitOK {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	if !strings.Contains(r.stderr, "3 records are missing") {
		t.Errorf("stderr %q does not tell of the loss", r.stderr)
	}
	golden(t, "flows-follow", r.stdout)
}

func TestFlowsEndsInTime(t *testing.T) {
	w := newWorld(t)
	w.admin.fail = nil
	// Not a follow: a controller that does not end the stream must not hang it.
	w.admin.flows = nil
	if r := w.run("flows", "--timeout", "5s"); r.code != ExitOK || r.stdout != "" || r.stderr != "no such flows\n" {
		t.Errorf("exit code %d, stdout %q, stderr %q", r.code, r.stdout, r.stderr)
	}
}
