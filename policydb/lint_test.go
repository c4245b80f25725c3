package policydb

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// profiled gives the labels that the tests of lint use.
const profiled = `
kind: Profile
namespace: /acme/prod
name: all
match: {proc.exe: /bin/x, os.user: x}
workload: x
labels: {app: [web, api, db], env: [dev, qa, prod], tier: [a, b], zone: [z1, z2]}
---
`

// lintOf lints policies applied to an empty tree: "severity code Kind ref [other]".
func lintOf(t *testing.T, text string) []string {
	t.Helper()
	db := newDB(t, tree+profiled)
	db.Now = func() time.Time { return noon }
	findings, omitted, err := db.LintCandidate(parse(t, text), "")
	if err != nil || omitted != 0 {
		t.Fatal(omitted, err)
	}
	var out []string
	for _, f := range findings {
		if f.Line == 0 || !strings.Contains(f.Excerpt, "^") || f.Hint == "" {
			t.Errorf("without place or remedy: %+v", f)
		}
		s := strings.ToLower(strings.TrimPrefix(f.Severity.String(), "LINT_SEVERITY_")) + " " + f.Code + " " + f.Key.String()
		if f.Other != (Key{}) {
			s += " by " + f.Other.Ref()
		}
		out = append(out, s)
	}
	return out
}

func TestLint(t *testing.T) {
	const web2api = "subject: {app: web}\nverb: allow\nobject: {app: api}\n"
	deny := func(s string) string { return strings.Replace(s, "allow", "deny", 1) }
	up := func(s string) string { return s + "propagate: true\n" }
	for _, tt := range []struct {
		name string
		text string
		want []string
	}{
		{"nothing to say", policyYAML("/acme/prod", "p", web2api), nil},
		{"the same twice", policyYAML("/acme/prod", "p", web2api) + policyYAML("/acme/prod", "q", "object: {app: [api]}\nverb: allow\nsubject: {app: web}"),
			[]string{"warning duplicate Policy /acme/prod/q by /acme/prod/p"}},
		{"the same, but for an obligation", policyYAML("/acme/prod", "p", web2api) + policyYAML("/acme/prod", "q", web2api+"with: [log]"),
			[]string{"warning shadowed Policy /acme/prod/p by /acme/prod/q"}},
		{"narrower, same verb", policyYAML("/acme/prod", "a", "subject: {app: web, env: {not: [dev]}}\nverb: allow\nobject: {app: api, tier: a}\nports: [tcp/443]\nwhere: {same: [env]}") +
			policyYAML("/acme/prod", "b", "subject: [{app: [web, db]}, {app: api}]\nverb: allow\nobject: {app: {exists: true}}\nports: [tcp/400-500, udp/1]"),
			[]string{"warning shadowed Policy /acme/prod/a by /acme/prod/b"}},
		{"deny beats allow", policyYAML("/acme/prod", "a", web2api) + policyYAML("/acme/prod", "d", "subject: any\nverb: deny\nobject: {app: {prefix: ap}}"),
			[]string{"warning shadowed Policy /acme/prod/a by /acme/prod/d"}},
		{"a parent's deny", policyYAML("/acme/prod", "a", web2api) + policyYAML("/acme", "d", up(deny(web2api))),
			[]string{"warning shadowed Policy /acme/prod/a by /acme/d"}},
		{"a parent's deny that does not propagate", policyYAML("/acme/prod", "a", web2api) + policyYAML("/acme", "d", deny(web2api)), nil},
		{"a parent's allow", policyYAML("/acme/prod", "d", deny(web2api)) + policyYAML("/acme", "a", up(web2api)),
			[]string{"error narrows-parent Policy /acme/prod/d by /acme/a"}},
		{"a parent's allow, in part", policyYAML("/acme/prod", "d", "subject: {env: dev}\nverb: deny\nobject: any") + policyYAML("/acme", "a", up(web2api)),
			[]string{"warning narrows-parent Policy /acme/prod/d by /acme/a"}},
		{"a parent's allow of something else", policyYAML("/acme/prod", "d", "subject: {app: db}\nverb: deny\nobject: {app: api}") + policyYAML("/acme", "a", up(web2api)), nil},
		{"a parent's allow on other ports", policyYAML("/acme/prod", "d", deny(web2api)+"ports: [tcp/80]") + policyYAML("/acme", "a", up(web2api)+"ports: [udp/1-65535]"), nil},
		{"a parent's fallback can be narrowed", policyYAML("/acme/prod", "d", deny(web2api)) + policyYAML("/acme", "a", up(web2api)+"fallback: true\n"), nil},
		{"a parent that observes decides nothing", policyYAML("/acme/prod", "d", deny(web2api)) + policyYAML("/acme", "a", up(web2api)+"mode: observe\n"), nil},
		{"a fallback behind its like", policyYAML("/acme/prod", "f", deny(web2api)+"fallback: true") + policyYAML("/acme/prod", "a", web2api),
			[]string{"warning shadowed Policy /acme/prod/f by /acme/prod/a"}},
		{"a child that obliges", policyYAML("/acme/prod", "e", web2api+"with: [encrypt]") + policyYAML("/acme", "a", up(web2api)), nil},
		{"an obligation that is there already", policyYAML("/acme/prod", "e", strings.Replace(web2api, "allow", "encrypt", 1)) + policyYAML("/acme", "a", up(web2api)+"with: [encrypt]"),
			[]string{"warning shadowed Policy /acme/prod/e by /acme/a"}},
		{"windows", policyYAML("/acme/prod", "a", web2api+"when: {days: mon, timezone: UTC}") + policyYAML("/acme/prod", "b", web2api+"when: {days: tue, timezone: UTC}"), nil},
		{"not says nothing of a key that is absent", policyYAML("/acme/prod", "a", web2api) + policyYAML("/acme/prod", "b", "subject: {app: {not: [db]}}\nverb: deny\nobject: any"), nil},

		{"expired", policyYAML("/acme/prod", "p", web2api+"expires: 2026-07-15T12:00:00Z"), []string{"warning expired Policy /acme/prod/p"}},
		{"anybody in", policyYAML("/acme/prod", "p", "subject: any\nverb: allow\nobject: {app: api}\nports: [tcp/1-65535]"), []string{"warning too-broad Policy /acme/prod/p"}},
		{"out to anybody", policyYAML("/acme/prod", "p", "subject: {app: web}\nverb: allow\nobject: any"), []string{"warning too-broad Policy /acme/prod/p"}},
		{"any on a port", policyYAML("/acme/prod", "p", "subject: any\nverb: allow\nobject: any\nports: [tcp/53]"), nil},
		{"denying anybody", policyYAML("/acme/prod", "p", "subject: any\nverb: deny\nobject: any"), nil},
		{"default allow", "kind: Namespace\nname: /acme/prod\nmode: enforce\ndefault: allow\n", []string{"warning too-broad Namespace /acme/prod"}},
		{"nobody has the label", policyYAML("/acme/prod", "p", "subject: {app: nobody}\nverb: allow\nobject: {app: api}"), []string{"warning no-known-workload Policy /acme/prod/p"}},
		{"not in the vocabulary", policyYAML("/acme/prod", "p", "subject: {env: test}\nverb: allow\nobject: {app: api}"),
			[]string{"error never-matches Policy /acme/prod/p", "warning no-known-workload Policy /acme/prod/p"}},
		{"every value excluded", policyYAML("/acme/prod", "p", "subject: {env: {not: [dev, qa, prod]}}\nverb: deny\nobject: any"), []string{"error never-matches Policy /acme/prod/p"}},
		{"some alternative is left", policyYAML("/acme/prod", "p", "subject: [{env: {not: [dev, qa, prod]}}, {app: web}]\nverb: deny\nobject: any"), nil},
		{"same and different", policyYAML("/acme/prod", "p", web2api+"where: {same: [env], different: [env]}"), []string{"error never-matches Policy /acme/prod/p"}},
		{"different, of one value", policyYAML("/acme/prod", "p", "subject: {env: dev}\nverb: deny\nobject: {env: dev}\nwhere: {different: [env]}"), []string{"error never-matches Policy /acme/prod/p"}},
		{"different, of two values", policyYAML("/acme/prod", "p", "subject: {env: [dev, qa]}\nverb: deny\nobject: {env: [dev, qa]}\nwhere: {different: [env]}"), nil},
		{"compared and absent", policyYAML("/acme/prod", "p", "subject: {zone: {exists: false}}\nverb: deny\nobject: any\nwhere: {same: [zone]}"), []string{"error never-matches Policy /acme/prod/p"}},
		{"anybody's program", strings.Replace(strings.Replace(profiled, ", os.user: x", "", 1), "name: all", "name: weak", 1), []string{"warning weak-profile Profile /acme/prod/weak"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, lintOf(t, tt.text)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// TestLintShowsThePlace as an apply's errors do, and says what to do.
func TestLintShowsThePlace(t *testing.T) {
	db := newDB(t, tree+profiled)
	docs := parse(t, policyYAML("/acme/prod", "p", "subject: {app: nobody}\nverb: allow\nobject: {app: api}"))
	findings, _, err := db.LintCandidate(docs, "")
	if err != nil || len(findings) != 1 {
		t.Fatal(findings, err)
	}
	wantText(t, findings[0].String(), "test.yaml:4:10: no-known-workload: subject matches no known workload: none of 1 Profiles and 0 Externals gives app=nobody",
		"  4 | subject: {app: nobody}\n    |          ^", "give the label in a Profile")

	if findings, _, err := db.LintCandidate(docs, "/acme/other"); err != nil || len(findings) != 0 {
		t.Fatal(findings, err)
	}

	// What is in force has no file, and only what the files touch is told of.
	commit(t, db, policyYAML("/acme/prod", "p", "subject: {app: nobody}\nverb: allow\nobject: {app: api}"), 2)
	findings, _, err = db.LintCandidate(nil, "")
	if err != nil || len(findings) != 1 || findings[0].Line != 0 {
		t.Fatal(findings, err)
	}
	wantText(t, findings[0].String(), "Policy /acme/prod/p: no-known-workload: subject")
	if findings, _, err = db.LintCandidate(parse(t, policyYAML("/acme", "q", "subject: {app: web}\nverb: allow\nobject: {app: api}")), ""); err != nil || len(findings) != 0 {
		t.Fatal(findings, err)
	}
	// An allow above that overrules what was there is told of, though not in a file.
	commit(t, db, policyYAML("/acme/prod", "d", "subject: {app: web}\nverb: deny\nobject: {app: api}"), 3)
	findings, _, err = db.LintCandidate(parse(t, policyYAML("/acme", "q", "subject: {app: web}\nverb: allow\nobject: {app: api}\npropagate: true")), "")
	if err != nil || len(findings) != 1 || findings[0].Code != LintNarrowsParent || findings[0].Other.Ref() != "/acme/q" {
		t.Fatal(findings, err)
	}
	if _, _, err := db.LintCandidate(parse(t, policyYAML("/nowhere", "q", allowAny)), ""); err == nil {
		t.Error("a namespace that does not exist")
	}
}

// TestWhatLintCallsCoveredIsCovered: over all pairs of a small world of conditions,
// whatever satisfies the covered one satisfies the other, and what excludes each other
// has no single value that satisfies both.
func TestWhatLintCallsCoveredIsCovered(t *testing.T) {
	var texts []string
	for _, op := range []string{"a", "ab", "[a, ab]", "[b, ab]", "{not: [a]}", "{not: [a, b]}", "{prefix: a}", "{prefix: ab}", "{exists: true}", "{exists: false}"} {
		texts = append(texts, "{app: "+op+"}")
	}
	texts = append(texts, "any", "[{app: a}, {app: b}]", "{app: a, tier: x}", "{tier: {exists: false}}", "[{tier: x}, {app: {prefix: a}, tier: {not: [x]}}]")
	var policies []string
	for i, s := range texts {
		policies = append(policies, policyYAML("/acme", fmt.Sprintf("p%d", i), "subject: "+s+"\nverb: allow\nobject: any"))
	}
	rs := resources(t, strings.Join(policies, ""))
	var worlds []string
	for _, app := range []string{"", "app=a", "app=b", "app=ab", "app=abc", "app=a,app=b", "app=b,app=ab", "app=a,app=c"} {
		for _, tier := range []string{"", "tier=x", "tier=y", "tier=x,tier=y"} {
			worlds = append(worlds, strings.Trim(app+","+tier, ","))
		}
	}
	covered, excluded := 0, 0
	for i, x := range rs {
		for j, y := range rs {
			q, p := x.GetPolicy(), y.GetPolicy()
			for _, w := range worlds {
				attrs := attributes(w)
				a, b := matchSelector(q.GetSubject(), attrs), matchSelector(p.GetSubject(), attrs)
				if covers(q, p) && b && !a {
					t.Errorf("%s does not cover %s: %s", texts[i], texts[j], w)
				}
				if single := strings.Count(w, "app=") < 2 && strings.Count(w, "tier=") < 2; single && !overlaps(q, p) && a && b {
					t.Errorf("%s overlaps %s: %s", texts[i], texts[j], w)
				}
			}
			if covers(q, p) {
				covered++
			}
			if !overlaps(q, p) {
				excluded++
			}
		}
	}
	if covered < 2*len(rs) || excluded < len(rs) {
		t.Errorf("of %d pairs %d cover and %d exclude each other", len(rs)*len(rs), covered, excluded)
	}
}

// TestLintOfManyPolicies: the index finds what covers without comparing all with all.
func TestLintOfManyPolicies(t *testing.T) {
	db := newDB(t, tree+profiled)
	var b strings.Builder
	for i := range 20_000 {
		fmt.Fprintf(&b, "kind: Policy\nnamespace: /acme/prod\nname: p%d\nsubject: {app: web, os.user: u%d}\nverb: allow\nobject: {app: api}\n---\n", i, i)
	}
	b.WriteString("kind: Policy\nnamespace: /acme\nname: all\nsubject: {os.user: [u7, u8]}\nverb: deny\nobject: any\npropagate: true\n")
	plan, err := db.Plan(parse(t, b.String()), nil, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Commit(plan, 2); err != nil {
		t.Fatal(err)
	}
	findings, _ := Lint(db.Snapshot(), nil, noon)
	if len(findings) != 2 || findings[0].Key.Name != "p7" || findings[1].Key.Name != "p8" {
		t.Errorf("%v", findings)
	}
}
