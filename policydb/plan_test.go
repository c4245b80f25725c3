package policydb

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// refused plans and returns the error's text; the plan must be refused.
func refused(t *testing.T, db *DB, text string, deletes ...Key) string {
	t.Helper()
	p, err := db.Plan(parse(t, text), deletes, false)
	var ve *ValidationErrors
	if p != nil || !errors.As(err, &ve) {
		t.Fatalf("want ValidationErrors, got %v, %v", p, err)
	}
	return err.Error()
}

func wantText(t *testing.T, got string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(got, p) {
			t.Errorf("%q is not in:\n%s", p, got)
		}
	}
}

func TestTheTreeOfNamespacesStaysWhole(t *testing.T) {
	wantText(t, refused(t, NewDB(), "kind: Namespace\nname: /acme\nmode: enforce\n"), "there is no root Namespace")

	db := newDB(t, tree+policyYAML("/acme/prod", "p", allowAny))
	root, prod, p := Key{KindNamespace, "/", ""}, Key{KindNamespace, "/acme/prod", ""}, Key{KindPolicy, "/acme/prod", "p"}
	wantText(t, refused(t, db, "", root), "the root cannot be deleted")
	wantText(t, refused(t, db, "", prod), "Namespace /acme/prod", "still holds Policy /acme/prod/p")
	wantText(t, refused(t, db, "", Key{KindNamespace, "/acme", ""}), "still holds Namespace /acme/prod, Policy /acme/prod/p")
	wantText(t, refused(t, db, "", Key{KindPolicy, "/acme", "p"}), "Policy /acme/p: it cannot be deleted: there is none")
	wantText(t, refused(t, db, policyYAML("/acme/prod", "p", allowAny), p), "at once")
	wantText(t, refused(t, db, policyYAML("/acme/prod", "q", allowAny), p, prod), "namespace /acme/prod does not exist")

	// With what it holds it goes, and whole branches come at once, in any order.
	plan, err := db.Plan(nil, []Key{prod, p, p}, false)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"deleted Namespace /acme/prod", "deleted Policy /acme/prod/p"}, changes(plan)); diff != "" {
		t.Error(diff)
	}
	if err := db.Commit(plan, 2); err != nil {
		t.Fatal(err)
	}
	commit(t, db, policyYAML("/x/y/z", "p", allowAny)+"kind: Namespace\nname: /x/y/z\nmode: enforce\n---\nkind: Namespace\nname: /x/y\nmode: enforce\n---\nkind: Namespace\nname: /x\nmode: enforce\n", 3)
}

func TestAChangedVocabularyIsHeldAgainstAllBelow(t *testing.T) {
	db := newDB(t, tree+policyYAML("/acme/prod", "uses-qa", "subject: {env: qa}\nverb: allow\nobject: {tier: x}"))
	got := refused(t, db, "kind: Namespace\nname: /\nmode: enforce\ndefault: deny\nattributes: {app: {}, env: {values: [dev, prod]}, zone: {}, ext: {}}\n")
	wantText(t, got, `Policy /acme/prod/uses-qa: label env has no value "qa"`, `Policy /acme/prod/uses-qa: label "tier" is not in the vocabulary`)

	// A declaration below narrows, and adds labels of its own.
	commit(t, db, "kind: Namespace\nname: /acme\nmode: enforce\nattributes: {env: {values: [qa, prod, other]}, team: {}}\n", 2)
	commit(t, db, policyYAML("/acme", "team", "subject: {team: a}\nverb: allow\nobject: {env: prod}"), 3)
	wantText(t, refused(t, db, policyYAML("/", "team", "subject: {team: a}\nverb: allow\nobject: any")), `label "team" is not in the vocabulary of /`)
	wantText(t, refused(t, db, policyYAML("/acme", "x", "subject: {env: dev}\nverb: allow\nobject: any")), `label env has no value "dev"`)
	wantText(t, refused(t, db, policyYAML("/acme", "x", "subject: {env: other}\nverb: allow\nobject: any")), `label env has no value "other"`)
}

func TestWarningsAndStrict(t *testing.T) {
	db := newDB(t, tree+`
kind: Profile
namespace: /acme/prod
name: web
match: {proc.exe: /usr/sbin/nginx}
workload: web
labels: {app: web}
---
kind: External
namespace: /acme
name: office
labels: {ext: office}
addresses: {cidrs: [203.0.113.0/24]}
`)
	docs := parse(t, policyYAML("/acme", "good", "subject: {app: web}\nverb: allow\nobject: {ext: office}")+
		policyYAML("/acme", "half", "subject: [{app: nobody}, {app: web}]\nverb: allow\nobject: any")+
		policyYAML("/acme", "source", "subject: {os.user: anybody, tier: {exists: false}}\nverb: allow\nobject: any")+
		policyYAML("/acme", "dead", "subject: {app: nobody}\nverb: allow\nobject: {tier: {prefix: x}}\nexpires: 2026-01-01T00:00:00Z"))
	p, err := db.Plan(docs, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"Policy /acme/dead expired at 2026-01-01T00:00:00Z",
		"Policy /acme/dead: subject matches no known workload: none of 1 Profiles and 1 Externals gives app=nobody",
		"Policy /acme/dead: object matches no known workload: none of 1 Profiles and 1 Externals gives tier=x…",
	}
	if diff := cmp.Diff(want, p.Warnings); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	var ve *ValidationErrors
	if p, err := db.Plan(docs, nil, true); p != nil || !errors.As(err, &ve) || len(ve.Errors) != 3 {
		t.Errorf("strict: %v", err)
	}
	// What is not touched is not complained of again.
	if err := db.Commit(p, 2); err != nil {
		t.Fatal(err)
	}
	if p, err := db.Plan(docs, nil, true); err != nil || len(p.Warnings) != 0 {
		t.Errorf("unchanged: %v", err)
	}
}

// TestProfilesThatAnyUserFitsAreWarnedOf: to run a program is to decide what it does.
func TestProfilesThatAnyUserFitsAreWarnedOf(t *testing.T) {
	const sum = "proc.exe_sha256: 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for match, want := range map[string]string{
		"proc.exe: /usr/sbin/nginx":                            "proc.exe",
		"proc.exe: {prefix: /usr/lib/postgresql/}":             "proc.exe",
		"proc.exe: [/usr/bin/a, /usr/bin/b], host.role: web":   "proc.exe",
		"proc.exe: /usr/sbin/nginx, os.distribution: debian":   "proc.exe",
		"proc.exe: /usr/sbin/nginx, os.user: {exists: true}":   "proc.exe",
		"proc.exe: /usr/sbin/nginx, os.user: {not: [root]}":    "proc.exe",
		"proc.exe: /usr/sbin/nginx, proc.user_unit: x.service": "proc.exe", // the user's own choice
		sum:                                 "proc.exe_sha256",
		"proc.exe: /usr/sbin/nginx, " + sum: "proc.exe",

		"proc.exe: /usr/sbin/nginx, os.user: www-data":           "",
		"proc.exe: /usr/sbin/nginx, os.group: web":               "",
		"proc.exe: /usr/sbin/nginx, proc.uid: [\"0\", \"33\"]":   "",
		"proc.exe: /usr/sbin/nginx, proc.unit: nginx.service":    "",
		"proc.exe: /usr/sbin/nginx, os.user: {prefix: svc-}":     "",
		"proc.exe: /usr/bin/x, container.id: {prefix: \"0123\"}": "",
		sum + ", os.user: www-data":                              "",
		"proc.unit: nginx.service":                               "",
		"os.user: www-data":                                      "",
		"proc.exe: {not: [/usr/sbin/nginx]}":                     "",
	} {
		db := newDB(t, tree)
		profile := "kind: Profile\nnamespace: /acme/prod\nname: web\nmatch: {" + match + "}\n"
		for gives, risky := range map[string]bool{"workload: web": true, "labels: {app: web}": true, "claims: [proc.exe]": false} {
			p, err := db.Plan(parse(t, profile+gives+"\n"), nil, false)
			if err != nil {
				t.Fatal(err)
			}
			if want == "" || !risky {
				if len(p.Warnings) != 0 {
					t.Errorf("{%s}, %s: warned %q", match, gives, p.Warnings)
				}
				continue
			}
			if len(p.Warnings) != 1 {
				t.Errorf("{%s}, %s: warnings %q", match, gives, p.Warnings)
				continue
			}
			wantText(t, p.Warnings[0], "Profile /acme/prod/web matches on "+want+" without a user")
		}
	}
	if _, err := newDB(t, tree).Plan(parse(t, "kind: Profile\nnamespace: /acme\nname: web\nmatch: {proc.exe: /bin/x}\nworkload: web\n"), nil, true); err == nil {
		t.Error("strict let it pass")
	}
}

const closedTest = `
kind: PolicyTest
namespace: /acme/prod
name: closed
tests:
- {name: nobody reaches db, from: {app: web}, to: {app: db}, port: any, expect: deny}
---
`

func TestPolicyTestsOfAllBelowRun(t *testing.T) {
	db := newDB(t, tree+closedTest+policyYAML("/acme", "unrelated", "subject: {app: web}\nverb: allow\nobject: {app: api}\npropagate: true"))
	open := policyYAML("/", "open", "subject: any\nverb: allow\nobject: {app: db}\nports: [tcp/5432]\npropagate: true")
	p, err := db.Plan(parse(t, open), nil, false)
	var ve *ValidationErrors
	if p != nil || !errors.As(err, &ve) {
		t.Fatalf("a change far above went past the test: %v, %v", p, err)
	}
	// One port in 65535 is enough to fail "any".
	wantText(t, err.Error(), `test "nobody reaches db" failed: at tcp/5432 want deny, got allow by /open`, "PolicyTest /acme/prod/closed")
	if len(ve.TestResults) != 1 || ve.TestResults[0].GetPassed() || ve.TestResults[0].GetTest() != "/acme/prod/closed: nobody reaches db" {
		t.Errorf("results %v", ve.TestResults)
	}
	// Deleting what held the door is a change as well.
	db = newDB(t, tree+closedTest+open+policyYAML("/", "shut", "subject: any\nverb: deny\nobject: {app: db}\npropagate: true"))
	wantText(t, refused(t, db, "", Key{KindPolicy, "/", "shut"}), `test "nobody reaches db" failed`)
	// A change elsewhere runs no test.
	plan := commit(t, db, "kind: Namespace\nname: /other\nmode: enforce\n", 2)
	if len(plan.TestResults) != 0 {
		t.Errorf("results %v", plan.TestResults)
	}
	plan = commit(t, db, policyYAML("/acme", "more", "subject: {app: web}\nverb: log\nobject: any"), 3)
	if len(plan.TestResults) != 1 || !plan.TestResults[0].GetPassed() {
		t.Errorf("results %v", plan.TestResults)
	}
}

// TestAnyPortIsEveryPort: the gap behind a range is found as the range is.
func TestAnyPortIsEveryPort(t *testing.T) {
	db := newDB(t, tree+policyYAML("/acme", "nearly-all", "subject: {app: web}\nverb: allow\nobject: {app: api}\nports: [tcp/1-1000, tcp/1002-65535, udp/1-65535]"))
	test := func(port string) string {
		return "kind: PolicyTest\nnamespace: /acme\nname: t\ntests: [{name: open, from: {app: web}, to: {app: api}, port: " + port + ", expect: allow}]\n"
	}
	wantText(t, refused(t, db, test("any")), "at tcp/1001 want allow, got deny by default")
	wantText(t, refused(t, db, test("tcp/900-1100")), "at tcp/1001 want allow")
	commit(t, db, test("tcp/1002-65535"), 2)
	commit(t, db, test("udp/1-65535"), 3)
}

// TestPolicyTestsDoNotDependOnTheHour: windows count as open at any time; what has
// expired is gone.
func TestPolicyTestsDoNotDependOnTheHour(t *testing.T) {
	text := tree + policyYAML("/acme/prod", "office-hours", "subject: {app: web}\nverb: allow\nobject: {app: db}\nwhen: {days: mon-fri, hours: \"08:00-09:00\", timezone: UTC}\nexpires: 2026-08-01T00:00:00Z") + `
kind: PolicyTest
namespace: /acme/prod
name: t
tests:
- {name: web reaches db, from: {app: web}, to: {app: db}, port: tcp/5432, expect: allow, by: /acme/prod/office-hours, encrypted: true}
`
	for hour := range 24 {
		db := NewDB()
		db.Now = func() time.Time { return noon.Add(time.Duration(hour) * time.Hour) }
		commit(t, db, text, 1)
	}
	db := NewDB()
	db.Now = func() time.Time { return noon.AddDate(0, 1, 0) }
	wantText(t, refused(t, db, text), "want allow, got deny by default")
}

// TestAnApplyOfManyPolicies: a large installation's whole set, at once.
func TestAnApplyOfManyPolicies(t *testing.T) {
	const n = 20_000
	db := NewDB()
	db.Now = func() time.Time { return noon }
	p, err := db.Plan(parseLarge(t, benchYAML(n)), nil, false)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Changes) != n+3 || len(p.Warnings) != maxWarnings+1 {
		t.Errorf("%d changes, %d warnings", len(p.Changes), len(p.Warnings))
	}
	if err := db.Commit(p, 1); err != nil {
		t.Fatal(err)
	}
	if got := len(db.Snapshot().List(KindPolicy, "/acme/prod")); got != n*4/5 {
		t.Errorf("%d policies", got)
	}
}

func TestResourcesThatNoFileHoldsAreChecked(t *testing.T) {
	db := newDB(t, tree)
	for i, r := range []*symbolonv1.Resource{
		nil,
		{},
		{Namespace: "/acme", Name: "p"},
		{Namespace: "/acme", Name: "p", Kind: &symbolonv1.Resource_Policy{}},
		{Namespace: "/acme", Name: "p", Kind: &symbolonv1.Resource_Policy{Policy: &symbolonv1.Policy{}}},
		{Namespace: "/acme", Name: "x", Kind: &symbolonv1.Resource_NamespaceKind{NamespaceKind: &symbolonv1.Namespace{Mode: symbolonv1.Mode_MODE_ENFORCE, Default: symbolonv1.Default_DEFAULT_DENY}}},
		{Namespace: "/acme", Name: "p", Kind: &symbolonv1.Resource_Policy{Policy: &symbolonv1.Policy{
			Verb: symbolonv1.Verb_VERB_ALLOW, Object: &symbolonv1.Selector{Any: true},
			Subject: &symbolonv1.Selector{Terms: []*symbolonv1.Term{{Clauses: []*symbolonv1.Clause{{Key: "app"}}}}},
		}}},
		{Namespace: "/acme", Name: "p", Kind: &symbolonv1.Resource_External{External: &symbolonv1.External{}}},
		{Namespace: "/acme", Name: "p", Kind: &symbolonv1.Resource_PolicyTest{PolicyTest: &symbolonv1.PolicyTest{}}},
	} {
		var ve *ValidationErrors
		if p, err := db.Plan([]Document{{Resource: r}}, nil, false); p != nil || !errors.As(err, &ve) {
			t.Errorf("%d: %v was taken: %v", i, r, err)
		} else if ve.Error() == "" {
			t.Errorf("%d: no words", i)
		}
	}
}

func TestErrorsBeyondTheBoundAreCounted(t *testing.T) {
	var b strings.Builder
	for i := range 200 {
		b.WriteString(policyYAML("/nowhere", fmt.Sprintf("p-%d", i), allowAny))
	}
	_, err := newDB(t, tree).Plan(parse(t, b.String()), nil, false)
	var ve *ValidationErrors
	if !errors.As(err, &ve) || len(ve.Errors) != maxErrors || ve.Omitted != 150 {
		t.Fatalf("%v", err)
	}
	wantText(t, err.Error(), "test.yaml:2:12: namespace /nowhere does not exist", "and 150 more errors")
}
