package controller_test

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
	"github.com/symbolon/symbolon/controller"
	"github.com/symbolon/symbolon/controller/seal"
)

func (w *world) resources(kind string) *symbolonv1.ListResourcesResponse {
	w.t.Helper()
	res, err := w.admin().ListResources(w.t.Context(), connect.NewRequest(&symbolonv1.ListResourcesRequest{Kind: kind}))
	if err != nil {
		w.t.Fatal(err)
	}
	return res.Msg
}

func TestFirstStart(t *testing.T) {
	w := newWorld(t)
	res := w.resources("")
	want := []*symbolonv1.Resource{{Namespace: "/", Kind: &symbolonv1.Resource_NamespaceKind{NamespaceKind: &symbolonv1.Namespace{
		Mode: symbolonv1.Mode_MODE_ENFORCE, Default: symbolonv1.Default_DEFAULT_DENY, Protection: symbolonv1.Protection_PROTECTION_ENCRYPTED,
	}}}}
	if diff := cmp.Diff(want, res.GetResources(), protocmp.Transform()); diff != "" || res.GetGeneration() != 1 {
		t.Errorf("generation %d\n%s", res.GetGeneration(), diff)
	}
	for name, mode := range map[string]os.FileMode{"": 0o700, "admin.token": 0o600, "seal.key": 0o600, "controller.db": 0o600, "ca.pem": 0o644} {
		if st, err := os.Stat(filepath.Join(w.cfg.DataDir, name)); err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v; want %v", name, st.Mode(), err, mode)
		}
	}
}

func TestAdminNeedsTheToken(t *testing.T) {
	w := newWorld(t)
	h := w.enrol("/", nil)
	for name, config := range map[string]http.RoundTripper{
		"nothing":     w.client(w.tls()).Transport,
		"wrong token": bearer{"wrong", w.client(w.tls()).Transport},
		"empty token": bearer{"", w.client(w.tls()).Transport},
		"a host SVID": w.client(h.TLS()).Transport,
	} {
		t.Run(name, func(t *testing.T) {
			client := symbolonv1connect.NewAdminServiceClient(&http.Client{Transport: config}, "https://"+w.address())
			_, err := client.GetStatus(t.Context(), connect.NewRequest(&symbolonv1.GetStatusRequest{}))
			wantCode(t, err, connect.CodeUnauthenticated, "admin token")
			flows, err := client.WatchFlows(t.Context(), connect.NewRequest(&symbolonv1.WatchFlowsRequest{}))
			if err == nil {
				flows.Receive()
				err = flows.Err()
				_ = flows.Close()
			}
			wantCode(t, err, connect.CodeUnauthenticated, "admin token")
		})
	}
}

// TestPlainHTTP: curl and probes need no client library.
func TestPlainHTTP(t *testing.T) {
	w := newWorld(t)
	client := w.client(w.tls())
	get := func(path string) (int, string) {
		res, err := client.Get("https://" + w.address() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = res.Body.Close() }()
		b, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(b)
	}
	eventually(t, "ready", func() bool { code, _ := get("/readyz"); return code == 200 })
	if code, body := get("/healthz"); code != 200 || body != "ok\n" {
		t.Errorf("healthz: %d %q", code, body)
	}
	pem, _ := os.ReadFile(filepath.Join(w.cfg.DataDir, "ca.pem"))
	if code, body := get("/ca.pem"); code != 200 || body != string(pem) {
		t.Errorf("ca.pem: %d %q", code, body)
	}
	if code, _ := get("/admin.token"); code != 404 {
		t.Errorf("admin.token: %d", code)
	}
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+w.address()+symbolonv1connect.AdminServiceGetStatusProcedure, strings.NewReader("{}"))
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+w.adminToken())
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(res.Body)
	_ = res.Body.Close()
	if res.StatusCode != 200 || !bytes.Contains(body, []byte(`"trustDomain":"acme.example"`)) {
		t.Errorf("%d %s", res.StatusCode, body)
	}
}

func TestApplyReportsChanges(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	res := w.apply(strings.Replace(tree, "tcp/5432", "tcp/5433", 1) + "---\nkind: Policy\nnamespace: /\nname: new\nsubject: {app: web}\nverb: deny\nobject: any\n")
	types := map[symbolonv1.ChangeType]int{}
	for _, c := range res.GetChanges() {
		types[c.GetType()]++
		if c.GetName() == "web-to-db" {
			for _, line := range []string{"-ports: [tcp/5432]", "+ports: [tcp/5433]"} {
				if !strings.Contains(c.GetDiff(), line) || strings.Contains(c.GetDiff(), "+++") {
					t.Errorf("diff %q, want %q", c.GetDiff(), line)
				}
			}
		}
	}
	want := map[symbolonv1.ChangeType]int{
		symbolonv1.ChangeType_CHANGE_TYPE_CREATED: 1, symbolonv1.ChangeType_CHANGE_TYPE_UPDATED: 1, symbolonv1.ChangeType_CHANGE_TYPE_UNCHANGED: 8,
	}
	if diff := cmp.Diff(want, types); diff != "" || res.GetGeneration() != 3 {
		t.Errorf("generation %d\n%s", res.GetGeneration(), diff)
	}
	// The same again changes nothing, and makes no generation.
	if again := w.apply(tree); again.GetGeneration() != 4 {
		t.Errorf("generation %d", again.GetGeneration())
	}
	if again := w.apply(tree); again.GetGeneration() != 4 {
		t.Errorf("generation %d after an apply of the same", again.GetGeneration())
	}
	// What is listed can be applied.
	if again := w.apply(w.resources("").GetYaml()); again.GetGeneration() != 4 {
		t.Errorf("generation %d after an apply of what is listed", again.GetGeneration())
	}
	policies := w.resources("policy")
	for _, r := range policies.GetResources() {
		if r.GetPolicy() == nil {
			t.Errorf("%v among the policies", r)
		}
	}
	if len(policies.GetResources()) != 3 {
		t.Errorf("%d policies, want 3", len(policies.GetResources()))
	}
}

// TestApplyErrorKeepsGeneration: a mistake anywhere changes nothing anywhere, and
// shows where it is.
func TestApplyErrorKeepsGeneration(t *testing.T) {
	w := newWorld(t)
	before := w.apply(tree).GetGeneration()
	good := "kind: Policy\nnamespace: /acme\nname: fine\nsubject: {app: web}\nverb: allow\nobject: {app: db}\n"
	for name, test := range map[string]struct {
		files []string
		words []string
	}{
		"unknown key":       {[]string{good, "kind: Policy\nnamespace: /acme\nname: x\nsubjct: {app: web}\nverb: allow\nobject: any\n"}, []string{"1.yaml:4:", "^", "subject"}},
		"unknown label":     {[]string{good, "kind: Policy\nnamespace: /acme\nname: x\nsubject: {ap: web}\nverb: allow\nobject: any\n"}, []string{"1.yaml:4:", "^", "app"}},
		"unknown namespace": {[]string{good, "kind: Policy\nnamespace: /nowhere\nname: x\nsubject: {app: web}\nverb: allow\nobject: any\n"}, []string{"1.yaml:", "/nowhere"}},
		"two broken files":  {[]string{"kind: Polcy\n", "kind: Namspace\n"}, []string{"0.yaml:1:", "1.yaml:1:", "Policy", "Namespace"}},
		"failing test": {[]string{good, "kind: PolicyTest\nnamespace: /acme/prod\nname: t\ntests:\n- {name: closed, from: {app: web}, to: {app: db}, port: tcp/5432, expect: deny}\n"},
			[]string{"closed"}},
	} {
		t.Run(name, func(t *testing.T) {
			req := &symbolonv1.ApplyRequest{}
			for i, content := range test.files {
				req.Files = append(req.Files, &symbolonv1.SourceFile{Name: string(rune('0'+i)) + ".yaml", Content: []byte(content)})
			}
			_, err := w.tryApply(req)
			code := connect.CodeInvalidArgument
			if name == "failing test" {
				code = connect.CodeFailedPrecondition // a good question, and the answer is no
			}
			wantCode(t, err, code, test.words...)
			res := w.resources("Policy")
			if res.GetGeneration() != before || len(res.GetResources()) != 2 {
				t.Errorf("generation %d with %d policies, want %d with 2", res.GetGeneration(), len(res.GetResources()), before)
			}
		})
	}
	dry, err := w.tryApply(&symbolonv1.ApplyRequest{DryRun: true, Files: []*symbolonv1.SourceFile{{Name: "a", Content: []byte(good)}}})
	if err != nil || dry.GetGeneration() != before || len(dry.GetChanges()) != 1 || w.resources("").GetGeneration() != before {
		t.Errorf("dry run: %v, %v", dry, err)
	}
}

// TestFailedPolicyTestIsANegativeAnswer, whatever asks: apply, dry run or delete. A
// warning under strict is a mistake in the file, though the tests that ran passed.
func TestFailedPolicyTestIsANegativeAnswer(t *testing.T) {
	w := newWorld(t)
	w.apply(tree + "---\nkind: PolicyTest\nnamespace: /acme/prod\nname: open\ntests:\n- {name: open, from: {app: web}, to: {app: db}, port: tcp/5432, expect: allow}\n")
	deny := []*symbolonv1.SourceFile{{Name: "a.yaml", Content: []byte("kind: Policy\nnamespace: /\nname: shut\nsubject: any\nverb: deny\nobject: any\npropagate: true\n")}}
	for _, dry := range []bool{false, true} {
		_, err := w.tryApply(&symbolonv1.ApplyRequest{Files: deny, DryRun: dry})
		wantCode(t, err, connect.CodeFailedPrecondition, "open", "want allow, got deny by /shut")
	}
	_, err := w.admin().Delete(t.Context(), connect.NewRequest(&symbolonv1.DeleteRequest{Keys: []*symbolonv1.ResourceKey{{Kind: "Policy", Namespace: "/acme", Name: "web-to-db"}}}))
	wantCode(t, err, connect.CodeFailedPrecondition, "open", "want allow")
	_, err = w.tryApply(&symbolonv1.ApplyRequest{Strict: true, Files: []*symbolonv1.SourceFile{
		{Name: "a.yaml", Content: []byte("kind: Policy\nnamespace: /acme\nname: x\nsubject: {app: nobody}\nverb: allow\nobject: any\n")},
	}})
	wantCode(t, err, connect.CodeInvalidArgument, "nobody", "strict")
}

func TestApplyConcurrently(t *testing.T) {
	w := newWorld(t)
	before := w.apply(tree).GetGeneration()
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			w.apply("kind: Policy\nnamespace: /acme\nname: p" + string(rune('a'+i)) + "\nsubject: {app: web}\nverb: allow\nobject: {app: db}\n")
		})
	}
	wg.Wait()
	if res := w.resources("Policy"); res.GetGeneration() != before+20 || len(res.GetResources()) != 22 {
		t.Errorf("generation %d with %d policies", res.GetGeneration(), len(res.GetResources()))
	}
}

func TestDelete(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	h := w.enrol("/acme/dev", nil)
	del := func(kind, namespace, name string) error {
		_, err := w.admin().Delete(t.Context(), connect.NewRequest(&symbolonv1.DeleteRequest{Keys: []*symbolonv1.ResourceKey{{Kind: kind, Namespace: namespace, Name: name}}}))
		return err
	}
	wantCode(t, del("Policy", "/acme", "no-such"), connect.CodeNotFound, "/acme/no-such")
	wantCode(t, del("Namespace", "/", ""), connect.CodeInvalidArgument, "root")
	wantCode(t, del("Namespace", "/acme/prod", ""), connect.CodeInvalidArgument)
	wantCode(t, del("Namespace", "/acme/dev", ""), connect.CodeFailedPrecondition, h.HostID)
	if _, err := w.admin().RemoveHost(t.Context(), connect.NewRequest(&symbolonv1.RemoveHostRequest{Id: h.HostID})); err != nil {
		t.Fatal(err)
	}
	if err := del("Namespace", "/acme/dev", ""); err != nil {
		t.Error(err)
	}
	if err := del("Policy", "/acme", "web-to-db"); err != nil {
		t.Error(err)
	}
	if got := len(w.resources("").GetResources()); got != 7 {
		t.Errorf("%d resources left, want 7", got)
	}
}

// TestRestartKeepsEverything that is not a flow or a connection.
func TestRestartKeepsEverything(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	h := w.enrol("/acme/prod", map[string]string{"role": "db"})
	unused := w.token("/acme/prod", nil)
	if _, err := h.issue(t.Context(), t, "proc.exe", "/usr/sbin/nginx"); err != nil {
		t.Fatal(err)
	}
	state := func() []any {
		status, err := w.admin().GetStatus(t.Context(), connect.NewRequest(&symbolonv1.GetStatusRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		workloads, err := w.admin().ListWorkloads(t.Context(), connect.NewRequest(&symbolonv1.ListWorkloadsRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		x := w.hostOf(h)
		status.Msg.Started = nil
		return []any{status.Msg, workloads.Msg, x, w.resources(""), w.adminToken()}
	}
	before := state()
	if status := before[0].(*symbolonv1.GetStatusResponse); status.GetHosts() != 1 || status.GetWorkloads() != 1 || status.GetPolicies() != 2 || status.GetNamespaces() != 4 {
		t.Errorf("status %v", status)
	}
	w.halt()
	w.start()
	if diff := cmp.Diff(before, state(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	h.ProxyServiceClient = w.proxy(h.TLS())
	if _, err := h.issue(t.Context(), t, "proc.exe", "/usr/sbin/nginx"); err != nil {
		t.Errorf("the host of before: %v", err)
	}
	// The token that was not used still is good, for once.
	if _, err := enrolWith(t, w, unused.Reveal()); err != nil {
		t.Error(err)
	}
}

// TestWorkloadsExpire: what has no valid SVID is not a workload.
func TestWorkloadsExpire(t *testing.T) {
	w := newWorld(t)
	h := w.enrol("/", nil)
	if _, err := h.issue(t.Context(), t, "os.user", "x"); err != nil {
		t.Fatal(err)
	}
	w.halt() // the certificate of the server is of today's clock, and the client's is too
	w.offset.Store(int64(25 * time.Hour))
	w.start()
	w.offset.Store(0)
	res, err := w.admin().ListWorkloads(t.Context(), connect.NewRequest(&symbolonv1.ListWorkloadsRequest{}))
	if err != nil || len(res.Msg.GetWorkloads()) != 0 {
		t.Errorf("%v, %v", res, err)
	}
}

// TestStartRefuses what an operator must look at first.
func TestStartRefuses(t *testing.T) {
	w := newWorld(t)
	address := w.address()
	try := func(change func(*controller.Config)) error {
		cfg := w.cfg
		change(&cfg)
		s, err := controller.New(t.Context(), cfg, controller.Options{})
		if err == nil {
			_ = s.Close()
		}
		return err
	}
	want := func(name string, err error, words ...string) {
		t.Helper()
		for _, word := range words {
			if err == nil || !strings.Contains(err.Error(), word) {
				t.Errorf("%s: %v, want %q", name, err, word)
			}
		}
	}
	want("a second controller", try(func(*controller.Config) {}), "in use")
	want("a port that is taken", try(func(c *controller.Config) { c.DataDir, c.Listen = t.TempDir(), address }), "address already in use")
	w.halt()
	want("another trust domain", try(func(c *controller.Config) { c.TrustDomain = "other.example" }), "acme.example", "other.example")
	wrong := filepath.Join(t.TempDir(), "wrong.key")
	if _, err := seal.LoadOrCreate(wrong); err != nil {
		t.Fatal(err)
	}
	want("a wrong key file", try(func(c *controller.Config) { c.CA.KeyFile = wrong }), wrong, "does not open")
	token := filepath.Join(w.cfg.DataDir, "admin.token")
	if err := os.Chmod(token, 0o644); err != nil {
		t.Fatal(err)
	}
	want("a readable admin token", try(func(*controller.Config) {}), token, "chmod 600")
	if err := os.Chmod(token, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(token, 3); err != nil {
		t.Fatal(err)
	}
	want("a short admin token", try(func(*controller.Config) {}), token, "3 characters")
}

// TestCloseWithoutServe leaves nothing running and nothing locked.
func TestCloseWithoutServe(t *testing.T) {
	cfg := controller.DefaultConfig()
	cfg.TrustDomain, cfg.Listen, cfg.DataDir = "acme.example", "127.0.0.1:0", t.TempDir()
	for range 2 {
		s, err := controller.New(context.Background(), cfg, controller.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}
