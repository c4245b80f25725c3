package policydb

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// TestAllTestsAreRun: of what is in force and of a candidate, also those that would
// refuse it, each with its grounds.
func TestAllTestsAreRun(t *testing.T) {
	const tests = `kind: PolicyTest
namespace: /acme/prod
name: t
tests:
- {name: web reaches db, from: {app: web}, to: {app: db}, port: tcp/5432, expect: allow}
- {name: nobody else does, from: {app: api}, to: {app: db}, port: any, expect: deny}
`
	db := newDB(t, tree+policyYAML("/acme/prod", "web-db", "subject: {app: web}\nverb: allow\nobject: {app: db}\nports: [tcp/5432]")+tests)
	cases, err := db.Test(nil, "")
	if err != nil || len(cases) != 2 || cases[0].Failure != "" || cases[1].Failure != "" || cases[0].Sides != nil {
		t.Fatalf("%+v, %v", cases, err)
	}
	docs := parse(t, policyYAML("/acme/prod", "open", "subject: any\nverb: allow\nobject: {app: db}\nports: [tcp/6000-7000]")+
		policyYAML("/acme/prod", "closed", "subject: {app: web}\nverb: deny\nobject: any")+tests)
	cases, err = db.Test(docs, "/acme")
	if err != nil || len(cases) != 2 {
		t.Fatalf("%+v, %v", cases, err)
	}
	wantText(t, cases[0].Failure, "at tcp/5432 want allow, got deny by /acme/prod/closed")
	wantText(t, cases[1].Failure, "at tcp/6000 want deny, got allow by /acme/prod/open")
	for i, want := range []int{5, 6} {
		x := cases[i]
		if x.File != "test.yaml" || x.Line-docs[2].Line != want-1 || len(x.Sides) != 2 || x.Protocol != "tcp" {
			t.Errorf("%+v", x)
		}
	}
	// Allowed by "open": the deny that does not match, and what matches.
	if got := cases[1].Sides[0].Candidates; len(got) != 2 || got[0].Failed == "" || !got[1].Matches {
		t.Errorf("%+v", got)
	}
	if cases, err := db.Test(docs, "/acme/other"); err != nil || len(cases) != 0 {
		t.Errorf("%v, %v", cases, err)
	}
	var wrong *ValidationErrors
	if _, err := db.Test(parse(t, policyYAML("/nowhere", "p", allowAny)), ""); !errors.As(err, &wrong) {
		t.Errorf("err = %v", err)
	}
}

// TestGroundsAreBounded: many failures on a long chain do not make an answer that
// nobody can take.
func TestGroundsAreBounded(t *testing.T) {
	var b strings.Builder
	for i := range 2 * maxCandidates {
		b.WriteString(policyYAML("/acme/prod", fmt.Sprintf("a%d", i), fmt.Sprintf("subject: {tier: t%d}\nverb: allow\nobject: any", i)))
	}
	b.WriteString("kind: PolicyTest\nnamespace: /acme/prod\nname: t\ntests:\n")
	for i := range maxGrounds + 10 {
		fmt.Fprintf(&b, "- {name: n%d, from: {app: web}, to: {app: db}, port: tcp/1, expect: allow}\n", i)
	}
	cases, err := newDB(t, tree).Test(parse(t, b.String()), "")
	if err != nil || len(cases) != maxGrounds+10 {
		t.Fatal(len(cases), err)
	}
	for i, c := range cases {
		if c.Failure == "" || (c.Sides != nil) != (i < maxGrounds) || c.Sides != nil && len(c.Sides[0].Candidates) != maxCandidates {
			t.Fatalf("%d: %q, %d sides", i, c.Failure, len(c.Sides))
		}
	}
}
