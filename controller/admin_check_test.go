package controller_test

import (
	"testing"

	"connectrpc.com/connect"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// TestTestAndLintChangeNothing, and answer for a candidate as for what is in force.
func TestTestAndLintChangeNothing(t *testing.T) {
	w := newWorld(t)
	w.apply(tree + `---
kind: PolicyTest
namespace: /acme/prod
name: t
tests:
- {name: web reaches db, from: {app: web}, to: {app: db}, port: tcp/5432, expect: allow}
`)
	before := w.yamlNow()
	draft := []*symbolonv1.SourceFile{{Name: "d.yaml", Content: []byte(`
kind: Policy
namespace: /acme/prod
name: closed
subject: {app: web}
verb: deny
object: {app: db}
---
kind: Policy
namespace: /
name: closed
subject: {app: web}
verb: deny
object: any
propagate: true
`)}}
	test := func(files []*symbolonv1.SourceFile, namespace string) (*symbolonv1.TestPolicyResponse, error) {
		res, err := w.admin().TestPolicy(t.Context(), connect.NewRequest(&symbolonv1.TestPolicyRequest{Files: files, Namespace: namespace}))
		if err != nil {
			return nil, err
		}
		return res.Msg, nil
	}
	lint := func(files []*symbolonv1.SourceFile, namespace string) (*symbolonv1.LintPolicyResponse, error) {
		res, err := w.admin().LintPolicy(t.Context(), connect.NewRequest(&symbolonv1.LintPolicyRequest{Files: files, Namespace: namespace}))
		if err != nil {
			return nil, err
		}
		return res.Msg, nil
	}

	res, err := test(nil, "")
	if err != nil || len(res.GetCases()) != 1 || !res.GetCases()[0].GetPassed() || res.GetGeneration() != 2 {
		t.Errorf("%v, %v", res, err)
	}
	if res, err = test(draft, "/acme/prod"); err != nil || len(res.GetCases()) != 1 {
		t.Fatalf("%v, %v", res, err)
	}
	if c := res.GetCases()[0]; c.GetPassed() || c.GetPort() != 5432 || len(c.GetSides()) != 2 || c.GetSides()[0].GetPolicy() != "/closed" {
		t.Errorf("%v", c)
	}
	if res, err = test(draft, "/acme/dev"); err != nil || len(res.GetCases()) != 0 {
		t.Errorf("%v, %v", res, err)
	}

	found, err := lint(draft, "/acme/prod")
	if err != nil || len(found.GetFindings()) != 2 {
		t.Fatalf("%v, %v", found, err)
	}
	for i, want := range []struct {
		name, other string
		line        uint32
	}{{"closed", "/closed", 4}, {"web-to-cards", "/closed", 0}} {
		if f := found.GetFindings()[i]; f.GetCode() != "shadowed" || f.GetName() != want.name || f.GetOther() != want.other || f.GetLine() != want.line || f.GetRemedy() == "" {
			t.Errorf("%v", f)
		}
	}

	bad := []*symbolonv1.SourceFile{{Name: "d.yaml", Content: []byte("kind: Polcy\n")}}
	nowhere := []*symbolonv1.SourceFile{{Name: "d.yaml", Content: []byte("kind: Policy\nnamespace: /nowhere\nname: x\nsubject: any\nverb: deny\nobject: any\n")}}
	for _, files := range [][]*symbolonv1.SourceFile{bad, nowhere} {
		_, err = test(files, "")
		wantCode(t, err, connect.CodeInvalidArgument, "d.yaml:", "^")
		_, err = lint(files, "")
		wantCode(t, err, connect.CodeInvalidArgument, "d.yaml:", "^")
	}
	_, err = test(nil, "/nowhere")
	wantCode(t, err, connect.CodeNotFound, "/nowhere")
	if w.yamlNow() != before || len(w.history()) != 2 {
		t.Error("something was changed")
	}
}
