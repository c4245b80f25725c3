package cli

import (
	"testing"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func TestPolicyTestShowsWhatDecided(t *testing.T) {
	w := newWorld(t)
	allow, deny := symbolonv1.Verb_VERB_ALLOW, symbolonv1.Verb_VERB_DENY
	w.admin.tested = &symbolonv1.TestPolicyResponse{Cases: []*symbolonv1.TestCase{
		{Namespace: "/acme", PolicyTest: "t", Name: "fine", Passed: true},
		{
			Namespace: "/acme", PolicyTest: "t", Name: "web reaches db\x1b[2J", Message: "at tcp/1 want allow, got deny by default",
			File: "t.yaml", Line: 7, Protocol: "tcp", Port: 1,
			Sides: []*symbolonv1.ExplainSide{
				{Side: "client", Allow: true, Reason: symbolonv1.Reason_REASON_POLICY, Policy: "/acme/a", Candidates: []*symbolonv1.Candidate{
					{Policy: "/acme/a", Verb: allow, Matches: true}, {Policy: "/acme/d", Verb: deny, Matches: true},
				}},
				{Side: "server", Reason: symbolonv1.Reason_REASON_DEFAULT, Candidates: []*symbolonv1.Candidate{
					{Policy: "/acme/1", Verb: allow, Failed: "x"}, {Policy: "/acme/2", Verb: allow, Failed: "x"}, {Policy: "/acme/3", Verb: allow, Failed: "x"},
					{Policy: "/acme/4", Verb: allow, Failed: "x"}, {Policy: "/acme/5", Verb: allow, Failed: "x"}, {Policy: "/acme/6", Verb: allow, Failed: "x"},
					{Policy: "/acme/7", Verb: deny, Failed: "x"},
				}},
			},
		},
	}}
	r := w.run("policy", "test")
	if r.code != ExitNegative {
		t.Errorf("exit code %d", r.code)
	}
	golden(t, "policy-test", r.stdout+"--- stderr\n"+r.stderr)
	if r := w.run("policy", "test", "-o", "json"); r.code != ExitNegative {
		t.Errorf("json: exit code %d", r.code)
	}
	w.admin.tested.Cases = w.admin.tested.Cases[:1]
	if r := w.run("policy", "test"); r.code != ExitOK || r.stdout != "" || r.stderr != "1 of 1 tests passed\n" {
		t.Errorf("%+v", r)
	}
}

func TestPolicyLintExitCodes(t *testing.T) {
	w := newWorld(t)
	warning := &symbolonv1.LintFinding{
		Code: "too-broad", Severity: symbolonv1.LintSeverity_LINT_SEVERITY_WARNING, Kind: "Policy", Namespace: "/acme", Name: "x",
		Message: "it lets anybody in", Remedy: "name the workloads",
		File: "x.yaml", Line: 4, Column: 10, Excerpt: "  4 | subject: any\n    |          ^",
	}
	mistake := &symbolonv1.LintFinding{
		Code: "narrows-parent", Severity: symbolonv1.LintSeverity_LINT_SEVERITY_ERROR, Kind: "Policy", Namespace: "/acme", Name: "y",
		Message: "it denies nothing", Remedy: "put it above", Other: "/z",
	}
	for _, tt := range []struct {
		name     string
		findings []*symbolonv1.LintFinding
		args     []string
		want     int
	}{
		{"nothing", nil, []string{"--strict"}, ExitOK},
		{"a warning", []*symbolonv1.LintFinding{warning}, nil, ExitOK},
		{"a warning, strict", []*symbolonv1.LintFinding{warning}, []string{"--strict"}, ExitNegative},
		{"a warning, strict, JSON", []*symbolonv1.LintFinding{warning}, []string{"--strict", "-o", "json"}, ExitNegative},
		{"an error", []*symbolonv1.LintFinding{warning, mistake}, nil, ExitNegative},
	} {
		w.admin.linted = &symbolonv1.LintPolicyResponse{Findings: tt.findings}
		r := w.run(append([]string{"policy", "lint"}, tt.args...)...)
		if r.code != tt.want {
			t.Errorf("%s: exit code %d, want %d", tt.name, r.code, tt.want)
		}
		if tt.name == "an error" {
			golden(t, "policy-lint", r.stdout+"--- stderr\n"+r.stderr)
		}
	}
}
