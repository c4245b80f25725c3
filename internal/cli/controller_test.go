package cli_test

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/symbolon/symbolon/controller"
	"github.com/symbolon/symbolon/internal/cli"
)

// operator is somebody at the command line of a real controller.
type operator struct {
	t   *testing.T
	env map[string]string
}

func newOperator(t *testing.T) operator { return newOperatorOf(t, "acme.example") }

func newOperatorOf(t *testing.T, trustDomain string) operator {
	t.Helper()
	cfg := controller.DefaultConfig()
	cfg.TrustDomain, cfg.Listen, cfg.DataDir = trustDomain, "127.0.0.1:0", filepath.Join(t.TempDir(), "data")
	server, err := controller.New(t.Context(), cfg, controller.Options{Version: "0.1.0"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return operator{t, map[string]string{
		"HOME":                t.TempDir(),
		"SYMBOLON_CONTROLLER": server.Addr().String(),
		"SYMBOLON_TOKEN_FILE": filepath.Join(cfg.DataDir, "admin.token"),
		"SYMBOLON_CA_FILE":    filepath.Join(cfg.DataDir, "ca.pem"),
	}}
}

// runs runs a command line, and wants a certain exit code.
func (o operator) runs(want int, stdin string, args ...string) (stdout, stderr string) {
	o.t.Helper()
	var out, talk bytes.Buffer
	code := cli.Main(o.t.Context(), args, cli.Env{
		Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &talk,
		Getenv: func(k string) string { return o.env[k] },
	})
	if code != want {
		o.t.Fatalf("symbolon %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), code, want, out.String(), talk.String())
	}
	return out.String(), talk.String()
}

func contains(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("no %q in:\n%s", p, text)
		}
	}
}

// The tour of the README, up to the hosts.
func TestTourWithAController(t *testing.T) {
	o := newOperator(t)
	const files = "../../examples/quickstart/policy"
	ok, negative := cli.ExitOK, cli.ExitNegative

	out, _ := o.runs(ok, "", "status")
	contains(t, out, "acme.example", "none enrolled")

	out, _ = o.runs(negative, "", "policy", "diff", "-f", files)
	contains(t, out, "+ created policy:/acme/prod/web-uses-db")
	out, talk := o.runs(ok, "", "policy", "apply", "-f", files)
	contains(t, out, "namespace:/acme/prod")
	contains(t, talk, "generation", "4 of 4 tests passed")
	o.runs(ok, "", "policy", "diff", "-f", files)

	out, _ = o.runs(ok, "", "namespace", "list")
	contains(t, out, "/acme/prod")
	out, _ = o.runs(ok, "", "policy", "list", "--namespace", "/acme")
	contains(t, out, "allow app=web → app=db on tcp/5432 same env with encrypt with log")

	// What get prints is what apply takes, and changes nothing.
	refs, _ := o.runs(ok, "", "policy", "list", "-n", "/acme", "-o", "name")
	out, _ = o.runs(ok, "", append([]string{"policy", "get"}, strings.Fields(refs)...)...)
	o.runs(ok, out, "policy", "diff", "-f", "-")

	const report, web, db = "app=report,env=prod@/acme/prod", "app=web,env=prod@/acme/prod", "app=db,env=prod@/acme/prod"
	out, _ = o.runs(ok, "", "explain", "--from", web, "--to", db, "--port", "5432")
	contains(t, out, "✓ allowed, encrypted", "by /acme/prod/web-uses-db (policy)", "be logged")
	out, _ = o.runs(negative, "", "explain", "--from", report, "--to", db, "--port", "5432")
	contains(t, out, "✗ denied", "(default)")
	out, _ = o.runs(negative, "", "explain", "--from", "app=web,env=dev@/acme", "--to", db, "--port", "5432")
	contains(t, out, "by /acme/dev-never-reaches-prod (policy)")

	out, talk = o.runs(ok, "", "host", "token", "-n", "/acme/prod", "--label", "role=db")
	if parts := strings.Split(strings.TrimSpace(out), "."); len(parts) != 4 || parts[0] != "symbolon1" {
		t.Errorf("token of %d parts", len(parts))
	}
	contains(t, talk, "for one host in /acme/prod")

	o.runs(ok, "", "namespace", "create", "/acme/qa", "--default", "deny", "--label", "team=a,b")
	out, _ = o.runs(ok, "", "policy", "get", "namespace:/acme/qa")
	contains(t, out, "name: /acme/qa", "default: deny", "team")

	o.runs(ok, "", "policy", "delete", "--yes", "/acme/prod/report-reads-web", "policytest:/acme/prod/quickstart")
	o.runs(negative, "", "policy", "get", "/acme/prod/report-reads-web")
	o.runs(ok, "", "flows")
	o.runs(ok, "", "workload", "list")
	o.runs(ok, "", "host", "list")
}

// What was applied can be looked at, pruned and rolled back, and somebody else's change
// in between is a conflict.
func TestHistoryWithAController(t *testing.T) {
	o := newOperator(t)
	const files = "../../examples/quickstart/policy"
	ok, negative := cli.ExitOK, cli.ExitNegative
	o.runs(ok, "", "policy", "apply", "-m", "the quickstart", "-f", files)

	const less = "kind: Namespace\nname: /acme/prod\nmode: enforce\n"
	out, _ := o.runs(negative, less, "policy", "diff", "--prune", "-f", "-")
	contains(t, out, "- deleted policy:/acme/prod/web-uses-db")
	o.runs(ok, less, "policy", "apply", "--prune", "-f", "-")
	out, _ = o.runs(ok, "", "policy", "history")
	contains(t, out, "3 in force", "the quickstart", "history begins", "admin token from 127.0.0.1")
	out, _ = o.runs(ok, "", "policy", "history", "show", "3")
	contains(t, out, "- deleted policy:/acme/prod/web-uses-db")
	o.runs(negative, "", "policy", "history", "show", "9")

	// What history shows can be applied, and is what a rollback makes.
	second, _ := o.runs(ok, "", "policy", "history", "show", "2", "-o", "yaml")
	o.runs(negative, second, "policy", "diff", "--prune", "-f", "-")
	o.runs(cli.ExitConflict, "", "policy", "rollback", "--yes", "--if-generation", "2", "2")
	out, _ = o.runs(ok, "", "policy", "rollback", "--dry-run", "2")
	contains(t, out, "+ created policy:/acme/prod/web-uses-db")
	_, talk := o.runs(ok, "", "policy", "rollback", "--yes", "-m", "too much", "2")
	contains(t, talk, "generation 4", "4 of 4 tests passed")
	o.runs(ok, second, "policy", "diff", "--prune", "-f", "-")
	_, talk = o.runs(ok, "", "policy", "rollback", "--yes", "2")
	contains(t, talk, "nothing would change")
}

// Tests and lint are of what is in force or of files, and change nothing.
func TestTestAndLintWithAController(t *testing.T) {
	o := newOperator(t)
	const files = "../../examples/quickstart/policy"
	ok, negative := cli.ExitOK, cli.ExitNegative
	_, talk := o.runs(ok, "", "policy", "test", "-f", files)
	contains(t, talk, "4 of 4 tests passed")
	out, _ := o.runs(ok, "", "policy", "lint", "-f", files)
	contains(t, out, "policies.yaml:24:10: ! warning no-known-workload policy:/acme/dev-never-reaches-prod", "gives env=dev")
	o.runs(negative, "", "policy", "lint", "--strict", "-f", files)
	_, talk = o.runs(ok, "", "policy", "test")
	contains(t, talk, "0 of 0 tests passed")
	o.runs(ok, "", "policy", "apply", "-f", files)
	o.runs(ok, "", "policy", "test", "-n", "/acme/prod")
	o.runs(negative, "", "policy", "test", "-n", "/acme/nowhere")

	const wide = "kind: Policy\nnamespace: /acme\nname: wide\nsubject: {app: report}\nverb: allow\nobject: any\npropagate: true\n"
	out, talk = o.runs(negative, wide, "policy", "test", "-f", "-")
	contains(t, out, "✗ failed policytest:/acme/prod/quickstart: report does not reach db", "want deny, got allow by /acme/wide", "client: allow by /acme/wide (policy)")
	contains(t, talk, "3 of 4 tests passed")
	out, _ = o.runs(negative, wide, "policy", "lint", "--strict", "-f", "-")
	contains(t, out, "stdin:6:9: ! warning too-broad policy:/acme/wide", "object: any\n", "^",
		"! warning shadowed policy:/acme/prod/report-reads-web: it adds nothing")

	const narrow = "kind: Policy\nnamespace: /acme/prod\nname: narrow\nsubject: {app: report}\nverb: deny\nobject: {app: web}\n---\n"
	out, _ = o.runs(negative, narrow+wide, "policy", "lint", "-f", "-")
	contains(t, out, "stdin:5:7: ✗ error narrows-parent policy:/acme/prod/narrow: it denies nothing")
	o.runs(cli.ExitUsage, "kind: Policy\n", "policy", "lint", "-f", "-")
	o.runs(ok, "", "policy", "diff", "-f", files)
}

// A namespace is put into learn and taken out of it; what is accepted is a file like any.
func TestLearnWithAController(t *testing.T) {
	o := newOperator(t)
	ok := cli.ExitOK
	o.runs(ok, "", "policy", "apply", "-f", "../../examples/quickstart/policy")
	_, talk := o.runs(ok, "", "learn", "status")
	contains(t, talk, "no namespace is in learn")
	_, talk = o.runs(ok, "", "learn", "start", "/acme/prod")
	contains(t, talk, "/acme/prod learns", "generation 3")
	out, _ := o.runs(ok, "", "learn", "status", "-o", "wide")
	contains(t, out, "NAMESPACE", "LET THROUGH", "/acme/prod")
	out, talk = o.runs(ok, "", "learn", "suggest", "/acme/prod", "--keys", "app", "--since", "24h")
	contains(t, out, "# Suggested for /acme/prod: 0 policies.")
	contains(t, talk, "edges covered: 0")
	o.runs(cli.ExitUsage, "", "learn", "suggest", "/acme/prod", "--since", "-1h")
	o.runs(cli.ExitUsage, "", "learn", "accept", "/acme/prod", "-f", "-", "--keys", "app")

	const policy = "kind: Policy\nnamespace: /acme/prod\nname: learned\nsubject: {app: web}\nverb: allow\nobject: {app: report}\n"
	out, talk = o.runs(ok, policy, "learn", "accept", "/acme/prod", "-f", "-", "--enforce", "--dry-run")
	contains(t, out, "+ created   policy:/acme/prod/learned", "~ updated   namespace:/acme/prod")
	contains(t, talk, "dry run")
	_, talk = o.runs(ok, policy, "learn", "accept", "/acme/prod", "-f", "-", "--enforce", "-m", "learned it")
	contains(t, talk, "generation 4")
	_, talk = o.runs(ok, "", "learn", "status")
	contains(t, talk, "no namespace is in learn")
	out, _ = o.runs(ok, "", "policy", "history")
	contains(t, out, "learned it", "learn start")
}

func TestRefusalsOfAController(t *testing.T) {
	o := newOperator(t)
	_, before := o.runs(cli.ExitOK, "kind: Namespace\nname: /acme\nmode: enforce\nattributes: {app: {}}\n", "policy", "apply", "-f", "-")

	_, talk := o.runs(cli.ExitUsage, "kind: Policy\nnamespace: /acme\nname: x\nsubject: {app: web}\nverb: alow\nobject: any\n",
		"policy", "apply", "-f", "-")
	contains(t, talk, "stdin:5:7", "verb: alow\n", "^", "allow")

	// A failed PolicyTest is an answer, not a mistake.
	const failing = "kind: PolicyTest\nnamespace: /acme\nname: t\ntests:\n- {name: open, from: {app: a}, to: {app: b}, port: tcp/1, expect: allow}\n"
	for _, command := range []string{"apply", "diff"} {
		_, talk = o.runs(cli.ExitNegative, failing, "policy", command, "-f", "-")
		contains(t, talk, "want allow, got deny")
	}

	o.runs(cli.ExitConflict, "", "namespace", "create", "/acme")
	o.runs(cli.ExitUsage, "", "namespace", "create", "/nobody/here")
	o.runs(cli.ExitNegative, "", "policy", "delete", "--yes", "/acme/nothing")
	o.runs(cli.ExitNegative, "", "host", "remove", "--yes", "nobody")

	// None of it changed anything.
	_, after := o.runs(cli.ExitOK, "kind: Namespace\nname: /acme\nmode: enforce\nattributes: {app: {}}\n", "policy", "apply", "-f", "-")
	if before != after {
		t.Errorf("%q became %q", before, after)
	}

	o.env["SYMBOLON_TOKEN_FILE"] = o.env["SYMBOLON_CA_FILE"]
	o.runs(cli.ExitUsage, "", "status")
	o.env["SYMBOLON_CONTROLLER"] = "127.0.0.1:1"
	o.runs(cli.ExitUsage, "", "status")
}

func TestScansWithAController(t *testing.T) {
	o := newOperator(t)
	ok, usage := cli.ExitOK, cli.ExitUsage
	_, talk := o.runs(ok, "", "scan", "push", "-f", "../../examples/quarantine/findings.yaml")
	contains(t, talk, "1 findings of trivy", "1 changed", "0 hosts told")
	out, _ := o.runs(ok, "", "scan", "list", "-o", "wide")
	contains(t, out, "9f86d081", "trivy", "vuln.critical=CVE-2026-1001", "admin token from")

	// JSON is YAML; more than the controller takes at once goes in several calls.
	var many strings.Builder
	many.WriteString(`{"findings": [`)
	for i := range 1001 {
		fmt.Fprintf(&many, `%s{"exe_sha256": "%064x", "attributes": {"vuln.low": "x"}}`, strings.Repeat(",", min(i, 1)), i)
	}
	many.WriteString("]}")
	_, talk = o.runs(ok, many.String(), "scan", "push", "-f", "-", "--scanner", "grype", "--ttl", "1h")
	contains(t, talk, "1001 findings of grype", "1001 changed")

	_, talk = o.runs(ok, "", "scan", "remove", "--scanner", "grype", "--yes")
	contains(t, talk, "removed 1001 findings")
	o.runs(ok, "", "scan", "remove", "--yes", "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08")
	o.runs(cli.ExitNegative, "", "scan", "remove", "--yes", "--scanner", "grype")

	for _, tt := range []struct {
		in    string
		words []string
	}{
		{"findings: []\nscanner: s\n", []string{"no findings"}},
		{"findings:\n- exe_sha256: a\n", []string{"scanner: NAME"}},
		{"scanner: s\nfindings:\n- exe_sha256: a\n  attribs: {}\n", []string{"4", "attribs"}},
		{"scanner: s\nfindings:\n- exe_sha256: a\n  attributes: {vuln.count: 3}\n", []string{"finding 1", "vuln.count", "quotes"}},
		{"scanner: s\nfindings:\n- exe_sha256: a\n  attributes: {vuln.x: [true]}\n", []string{"finding 1", "vuln.x", "quotes"}},
		{"scanner: s\nfindings:\n- exe_sha256: a\n", []string{"finding 1", "sha256sum"}},
	} {
		_, talk := o.runs(usage, tt.in, "scan", "push", "-f", "-")
		contains(t, talk, tt.words...)
	}
	o.runs(usage, "", "scan", "remove", "--yes")
	o.runs(usage, "", "scan", "push")
}

// What is revoked is listed with its reason, and can be ended.
func TestRevocationWithAController(t *testing.T) {
	o := newOperator(t)
	const web = "spiffe://acme.example/acme/prod/web"
	out, _ := o.runs(cli.ExitOK, "", "ca", "revocations", "-o", "name")
	if out != "" {
		t.Errorf("revoked from the start: %s", out)
	}
	o.runs(cli.ExitUsage, "", "ca", "revoke", web)
	o.runs(cli.ExitUsage, "", "ca", "revoke", "--reason", "r")
	o.runs(cli.ExitUsage, "", "ca", "revoke", web, "--serial", "01", "--reason", "r")
	o.runs(cli.ExitUsage, "", "ca", "revoke", "--label", "app", "--reason", "r")
	o.runs(cli.ExitUsage, "", "ca", "revoke", "--label", "app=a", "--label", "app=b", "--reason", "r")
	o.runs(cli.ExitNegative, "", "ca", "revoke", "--host", "web-1", "--reason", "r")
	id, talk := o.runs(cli.ExitOK, "", "ca", "revoke", web, "--reason", "key leaked")
	contains(t, talk, "revoked: "+web, "workloads known to have it: 0")
	again, talk := o.runs(cli.ExitOK, "", "ca", "revoke", web, "--reason", "key leaked")
	if contains(t, talk, "revoked already"); again != id {
		t.Errorf("revocation %s, and again %s", id, again)
	}
	labels, _ := o.runs(cli.ExitOK, "", "ca", "revoke", "--label", "env=prod", "--label", "app=web", "--reason", "r")
	o.runs(cli.ExitOK, "", "ca", "revoke", "--serial", "0A:0B", "--trust-domain", "partner.example", "--reason", "r")
	out, _ = o.runs(cli.ExitOK, "", "ca", "revocations", "-o", "wide")
	contains(t, out, strings.TrimSpace(id), web, "key leaked", "label app=web,env=prod", "serial 0a0b of partner.example", "unrevoked", "admin token from 127.0.0.1")
	out, _ = o.runs(cli.ExitOK, "", "status")
	contains(t, out, "revocations   3, known to all connected hosts")
	o.runs(cli.ExitOK, "", "ca", "unrevoke", web)
	o.runs(cli.ExitOK, "", "ca", "unrevoke", strings.TrimSpace(labels))
	o.runs(cli.ExitNegative, "", "ca", "unrevoke", web)
	out, _ = o.runs(cli.ExitOK, "", "ca", "revocations", "-o", "name")
	if n := len(strings.Fields(out)); n != 1 {
		t.Errorf("%d are left", n)
	}
}

// The root's rotation from end to end, by a CLI whose copy of ca.pem is the controller's.
func TestRootRotationWithAController(t *testing.T) {
	o := newOperator(t)
	out, _ := o.runs(cli.ExitOK, "", "ca", "rotate", "--root")
	contains(t, out, "publish")
	_, talk := o.runs(cli.ExitNegative, "", "ca", "rotate", "--root", "--finish")
	contains(t, talk, "does not sign yet")
	out, _ = o.runs(cli.ExitOK, "", "ca", "status")
	contains(t, out, "root rotation", "publish", "next root", "nobody", "by admin token from 127.0.0.1")
	_, talk = o.runs(cli.ExitOK, "", "ca", "rotate", "--root", "--sign")
	contains(t, talk, "the new root signs")
	_, talk = o.runs(cli.ExitNegative, "", "ca", "rotate", "--root", "--abort")
	contains(t, talk, "signs already")
	o.runs(cli.ExitOK, "", "ca", "rotate", "--root", "--finish")
	out, talk = o.runs(cli.ExitOK, "", "ca", "rotate", "--root", "--finish")
	contains(t, out, "none")
	contains(t, talk, "nothing has changed")
	out, _ = o.runs(cli.ExitOK, "", "ca", "status")
	contains(t, out, "root rotation", "finished")
}

// What signs is shown, and rotated with what is asked for said.
func TestIntermediateRotationWithAController(t *testing.T) {
	o := newOperator(t)
	out, _ := o.runs(cli.ExitOK, "", "ca", "status")
	contains(t, out, "acme.example", "made by the controller", "ECDSA P-256", "never", "replaced by itself in", "valid for 24h")
	if strings.Contains(out, "of earlier") {
		t.Errorf("something of an earlier intermediate from the start:\n%s", out)
	}
	_, talk := o.runs(cli.ExitUsage, "", "ca", "rotate")
	contains(t, talk, "--intermediate or --root")
	serial, talk := o.runs(cli.ExitOK, "", "ca", "rotate", "--intermediate")
	contains(t, talk, "0 connected hosts")
	out, _ = o.runs(cli.ExitOK, "", "ca", "status")
	contains(t, out, strings.TrimSpace(serial), "by admin token from 127.0.0.1", "known of no host")
	out, _ = o.runs(cli.ExitOK, "", "ca", "status", "-o", "json")
	contains(t, out, `"earlierUntil"`, `"rotatedBy"`, strings.TrimSpace(serial))
}
