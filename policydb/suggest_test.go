package policydb

import (
	"errors"
	"fmt"
	"math/rand"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// edgeLine reads "app=web app=db 5432": endpoints as endpoint reads them.
func edgeLine(allowed bool, s string) Edge {
	f := strings.Fields(s)
	e := Edge{Protocol: "tcp", Allowed: allowed, Encrypted: true, Connections: 3, First: noon.Add(-time.Hour), Last: noon}
	for i, end := range []struct {
		at      *Endpoint
		address *netip.Addr
	}{{&e.From, &e.FromAddress}, {&e.To, &e.ToAddress}} {
		if a, err := netip.ParseAddr(f[i]); err == nil {
			*end.address, e.AddressOnly = a, true
		} else {
			*end.at = endpoint(f[i])
			e.AddressOnly = e.AddressOnly || end.at.External != ""
		}
	}
	if _, err := fmt.Sscan(f[2], &e.Port); err != nil {
		panic(err)
	}
	return e
}

func edges(allowed, denied []string) []Edge {
	var out []Edge
	for _, s := range allowed {
		out = append(out, edgeLine(true, s))
	}
	for _, s := range denied {
		out = append(out, edgeLine(false, s))
	}
	return out
}

func suggest(t *testing.T, yaml string, es []Edge, o SuggestOptions) *Suggestion {
	t.Helper()
	db := newDB(t, strings.TrimSuffix(yaml, "---\n"))
	o.Namespace, o.Now = "/acme/prod", noon
	g, err := db.Snapshot().Suggest(es, o)
	if err != nil {
		t.Fatal(err)
	}
	checkSuggestion(t, db, es, g)
	return g
}

// checkSuggestion is what must hold of every suggestion: it can be applied as it is
// printed, its test passes; every edge that was allowed is allowed, or told not to be;
// none that was denied is, unless it was before.
func checkSuggestion(t *testing.T, db *DB, es []Edge, g *Suggestion) {
	t.Helper()
	text := g.YAML()
	if len(g.Resources()) > 0 {
		docs, err := Parse("suggested.yaml", text)
		if err != nil {
			t.Fatalf("the suggestion cannot be read: %v\n%s", err, text)
		}
		if _, err := db.Plan(docs, nil, false); err != nil {
			t.Fatalf("the suggestion cannot be applied: %v\n%s", err, text)
		}
	}
	before, err := db.Snapshot().compileAsEnforced(nil)
	if err != nil {
		t.Fatal(err)
	}
	after, err := db.Snapshot().compileAsEnforced(g.Resources())
	if err != nil {
		t.Fatal(err)
	}
	told := func(e *Edge) bool {
		return slices.ContainsFunc(g.Uncovered, func(u Uncovered) bool { return sameEdge(&u.Edge, e) && u.Why != "" })
	}
	for i := range es {
		e := &es[i]
		if len(e.sides(g.Namespace)) == 0 {
			continue
		}
		lastAllowed, lastDenied := time.Time{}, time.Time{}
		for j := range es {
			if x := &es[j]; sameEdge(x, e) && x.Allowed && x.Last.After(lastAllowed) {
				lastAllowed = x.Last
			} else if sameEdge(x, e) && !x.Allowed && x.Last.After(lastDenied) {
				lastDenied = x.Last
			}
		}
		is := after.allows(e, g.Namespace, noon)
		switch denied := !lastAllowed.After(lastDenied); {
		case denied && is && !before.allows(e, g.Namespace, noon):
			t.Fatalf("allowed, and was denied: %s\n%s", describeEdge(e), text)
		case !denied && is == told(e):
			t.Fatalf("allowed %t, told %t: %s\n%s", is, told(e), describeEdge(e), text)
		}
	}
}

func (g *Suggestion) says() []string {
	var out []string
	for _, p := range g.Policies {
		x := p.Resource.GetPolicy()
		f := &formatter{}
		f.selector("s", x.GetSubject())
		f.selector("o", x.GetObject())
		out = append(out, strings.ReplaceAll(strings.TrimSpace(f.String()), "\n", " ")+" "+flowPorts(x.GetPorts()))
	}
	return out
}

func TestSuggest(t *testing.T) {
	for name, c := range map[string]struct {
		allowed, denied []string
		keys            []string
		base            string
		want            []string
		uncovered       int
		already         int
	}{
		"one":                   {allowed: []string{"app=web app=db 5432"}, want: []string{"s: {app: web} o: {app: db} [tcp/5432]"}},
		"ports are one policy":  {allowed: []string{"app=web app=db 5432", "app=web app=db 22", "app=web app=db 23"}, want: []string{"s: {app: web} o: {app: db} [tcp/22-23, tcp/5432]"}},
		"clients are a list":    {allowed: []string{"app=web app=db 1", "app=job app=db 1"}, want: []string{"s: {app: [job, web]} o: {app: db} [tcp/1]"}},
		"a grid is one":         {allowed: []string{"app=a app=p 1", "app=a app=q 1", "app=b app=p 1", "app=b app=q 1"}, want: []string{"s: {app: [a, b]} o: {app: [p, q]} [tcp/1]"}},
		"no grid with a hole":   {allowed: []string{"app=a app=p 1", "app=a app=q 1", "app=b app=p 1"}, want: []string{"s: {app: a} o: {app: q} [tcp/1]", "s: {app: [a, b]} o: {app: p} [tcp/1]"}},
		"all labels":            {allowed: []string{"app=web,env=prod app=db,env=prod 1"}, want: []string{"s: {app: web, env: prod} o: {app: db, env: prod} [tcp/1]"}},
		"chosen labels":         {allowed: []string{"app=web,env=prod app=db,env=prod 1", "app=web,env=qa app=db,env=qa 1"}, keys: []string{"app"}, want: []string{"s: {app: web} o: {app: db} [tcp/1]"}},
		"denied and told apart": {allowed: []string{"app=web,env=prod app=db 1"}, denied: []string{"app=web,env=dev app=db 1"}, want: []string{"s: {app: web, env: prod} o: {app: db} [tcp/1]"}},
		"denied and the same":   {allowed: []string{"app=web,env=prod app=db 1"}, denied: []string{"app=web,env=dev app=db 1"}, keys: []string{"app"}, uncovered: 1},
		"told apart by a label that is not there": {
			allowed: []string{"app=web app=db 1"}, denied: []string{"app=web,tier=x app=db 1"},
			want: []string{`s: {app: web, env: {exists: false}, ext: {exists: false}, tier: {exists: false}, zone: {exists: false}} o: {app: db, env: {exists: false}, ext: {exists: false}, tier: {exists: false}, zone: {exists: false}} [tcp/1]`},
		},
		"another port is another matter": {allowed: []string{"app=web app=db 1"}, denied: []string{"app=web app=db 2"}, want: []string{"s: {app: web} o: {app: db} [tcp/1]"}},
		"no labels: the SPIFFE ID":       {allowed: []string{"spiffe.id=spiffe://a/acme/prod/unprofiled.nc app=db 1"}, want: []string{`s: {spiffe.id: "spiffe://a/acme/prod/unprofiled.nc"} o: {app: db} [tcp/1]`}},
		"an External by its labels":      {allowed: []string{"app=web ext=cards!/acme/cards 443"}, want: []string{"s: {app: web} o: {ext: cards} [tcp/443]"}},
		"an External without":            {allowed: []string{"app=web x.y=z!/acme/cards 443"}, uncovered: 1},
		"an address":                     {allowed: []string{"app=web 10.9.9.9 443", "10.8.8.8 app=web 80"}, uncovered: 2},
		"others' traffic":                {allowed: []string{"app=web@/acme/dev app=db@/acme/dev 1"}},
		"from another namespace":         {allowed: []string{"app=web@/acme/dev app=db 1"}, want: []string{"s: {app: web} o: {app: db} [tcp/1]"}},
		"allowed already":                {allowed: []string{"app=web app=db 1"}, base: policyYAML("/acme/prod", "p", "subject: {app: web}\nverb: allow\nobject: any"), already: 1},
		"a parent denies": {
			allowed: []string{"app=web app=db 1", "app=job app=db 1"}, base: policyYAML("/acme", "p", "subject: {app: web}\nverb: deny\nobject: any\npropagate: true"),
			want: []string{"s: {app: job} o: {app: db} [tcp/1]"}, uncovered: 1,
		},
		"a label outside the vocabulary": {allowed: []string{"app=web,other=x app=db 1"}, want: []string{"s: {app: web} o: {app: db} [tcp/1]"}},
		"the wider makes the narrower superfluous": {
			allowed: []string{"app=web app=db 1", "app=web,tier=x app=db 1"}, want: []string{"s: {app: web} o: {app: db} [tcp/1]"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := suggest(t, learning+c.base, edges(c.allowed, c.denied), SuggestOptions{Keys: c.keys})
			if diff := cmp.Diff(c.want, g.says()); diff != "" {
				t.Errorf("-want +got:\n%s\n%s", diff, g.YAML())
			}
			if len(g.Uncovered) != c.uncovered || g.Already != c.already {
				t.Errorf("%d uncovered, %d allowed already; want %d and %d\n%s", len(g.Uncovered), g.Already, c.uncovered, c.already, g.YAML())
			}
		})
	}
}

// What was denied before learn, and let through since, is no reason to leave it out;
// what is denied since is.
func TestSuggestCountsAnEdgeAsItWasSeenLast(t *testing.T) {
	was, is := edgeLine(false, "app=web app=db 1"), edgeLine(true, "app=web app=db 1")
	was.Last = is.Last.Add(-time.Minute)
	if g := suggest(t, learning, []Edge{was, is}, SuggestOptions{}); len(g.Policies) != 1 {
		t.Errorf("denied first:\n%s", g.YAML())
	}
	was.Last = is.Last.Add(time.Minute)
	if g := suggest(t, learning, []Edge{is, was}, SuggestOptions{}); len(g.Policies) != 0 {
		t.Errorf("denied last:\n%s", g.YAML())
	}
}

func TestSuggestionTellsWhatItRestsOn(t *testing.T) {
	es := edges([]string{"app=web app=db 5432", "app=web ext=cards!/acme/cards 443", "10.8.8.8 app=web 80"}, []string{"app=job app=db 5432"})
	known := []Known{
		{"/acme/prod/web", endpoint("app=web")}, {"/acme/prod/web2", endpoint("app=web,tier=x")}, {"/acme/prod/db", endpoint("app=db")},
		{"/acme/dev/web", endpoint("app=web@/acme/dev")},
	}
	text := string(suggest(t, learning, es, SuggestOptions{Keys: []string{"app", "ext"}, Known: known}).YAML())
	wantText(t, text,
		"# Suggested for /acme/prod: 2 policies. Of the edges seen, allowed already: 0; denied, and denied further on: 1; not covered: 1.",
		"# NOT COVERED: 10.8.8.8 to {app=web}@/acme/prod, tcp/80: 3 connections, 2026-07-15 11:00Z to 2026-07-15 12:00Z; RESTS ON ADDRESSES ONLY",
		"#   it rests on the address 10.8.8.8 alone: make an External for it",
		"# - {app=web}@/acme/prod to {app=db}@/acme/prod, tcp/5432: 3 connections",
		"# - {app=web}@/acme/prod to /acme/cards, tcp/443: 3 connections, 2026-07-15 11:00Z to 2026-07-15 12:00Z; RESTS ON ADDRESSES ONLY",
		`# Would newly allow 2 pairs not seen: "/acme/prod/web2" to "/acme/prod/db", "/acme/dev/web" to "/acme/prod/db".`,
		"name: learned-web-to-db\nsubject: {app: web}\nverb: allow\nobject: {app: db}\nports: [tcp/5432]",
		"kind: PolicyTest\nnamespace: /acme/prod\nname: learned\n",
		"{name: \"learned-web-to-db on tcp/5432\", from: {app: web}, to: {app: db}, port: tcp/5432, expect: allow, by: /acme/prod/learned-web-to-db}",
		"from: {app: job}, to: {app: db}, port: tcp/5432, expect: deny}")
}

// The attack: what a workload is called must not become a line of YAML.
func TestSuggestionsAreNotWrittenByWorkloads(t *testing.T) {
	evil := edgeLine(true, "app=web app=db 1")
	evil.From.Attributes = attributes("app=x\nkind: Policy\n---\n,spiffe.id=spiffe://a/b\n# }\r\nverb: allow")
	other := edgeLine(true, "app=job,env=prod app=db 1")
	other.From.Attributes = append(other.From.Attributes, evil.From.Attributes...)
	g := suggest(t, learning, []Edge{evil, other}, SuggestOptions{})
	if len(g.Uncovered) != 1 || len(g.Policies) != 1 {
		t.Errorf("%d uncovered, %d policies", len(g.Uncovered), len(g.Policies))
	}
	for i, line := range strings.Split(string(g.YAML()), "\n") {
		if strings.HasPrefix(line, "kind: Policy") && i < 3 || strings.HasPrefix(line, "verb: allow\r") || strings.Contains(line, "\r") {
			t.Errorf("line %d: %q", i+1, line)
		}
	}
	if n := strings.Count(string(g.YAML()), "\nkind: Policy\n"); n != 1 {
		t.Errorf("%d policies in\n%s", n, g.YAML())
	}
}

func TestSuggestErrors(t *testing.T) {
	s := newDB(t, strings.TrimSuffix(learning, "---\n")).Snapshot()
	if _, err := s.Suggest(nil, SuggestOptions{Namespace: "/nowhere"}); !errors.Is(err, ErrNoNamespace) {
		t.Errorf("got %v", err)
	}
	if _, err := s.Suggest(nil, SuggestOptions{Namespace: "/acme/prod", Keys: []string{"ap"}}); err == nil {
		t.Error("a key outside the vocabulary was taken")
	}
}

// A second suggestion does not take the names of the first.
func TestSuggestAgainAfterAccepting(t *testing.T) {
	first := suggest(t, learning, edges([]string{"app=web app=db 1"}, nil), SuggestOptions{})
	yaml := learning + strings.TrimSpace(string(first.YAML())) + "\n---\n"
	g := suggest(t, yaml, edges([]string{"app=web app=db 1", "app=web app=db 2"}, nil), SuggestOptions{})
	if g.Already != 1 || len(g.Policies) != 1 || g.Policies[0].Resource.GetName() != "learned-web-to-db-2" || g.Test.GetName() != "learned-2" {
		t.Errorf("got\n%s", g.YAML())
	}
}

// Bare addresses come as comments, grouped; uncommented they allow what was seen, and no
// more. Nothing of them is part of the suggestion itself.
func TestSuggestExternalsForBareAddresses(t *testing.T) {
	db := newDB(t, strings.TrimSuffix(learning, "---\n"))
	es := edges([]string{
		"app=web 10.0.0.1 443", "app=web 10.0.0.2 443", "app=job 10.0.0.1 443", "app=job 10.0.0.2 443", // one group
		"app=web 10.0.0.3 443", "app=web 10.0.0.3 80", // another
		"app=web 10.0.0.5 443", "app=job 10.0.0.5 80", // as the first, on ports of their own
		"10.0.0.9 app=web 8080",
	}, nil)
	g, err := db.Snapshot().Suggest(es, SuggestOptions{Namespace: "/acme/prod", Now: noon})
	if err != nil {
		t.Fatal(err)
	}
	if len(g.Resources()) != 0 || len(g.Externals) != 4 || len(g.Uncovered) != len(es) {
		t.Fatalf("%d resources, %d Externals:\n%s", len(g.Resources()), len(g.Externals), g.YAML())
	}
	var uncommented strings.Builder
	for line := range strings.Lines(string(g.YAML())) {
		if !strings.HasPrefix(line, "#") {
			t.Errorf("not a comment: %q", line)
		}
		if text, ok := strings.CutPrefix(line, "#| "); ok {
			uncommented.WriteString(text)
		}
	}
	p, err := db.Plan(parse(t, strings.TrimPrefix(uncommented.String(), "---\n")), nil, false)
	if err != nil {
		t.Fatalf("%v in\n%s", err, uncommented.String())
	}
	_, after := p.Snapshots()
	c, err := after.compileAsEnforced(nil)
	if err != nil {
		t.Fatal(err)
	}
	allowed := func(e Edge) bool { return c.judge(&e, noon, nil).Allow }
	for _, e := range es {
		if !allowed(e) {
			t.Errorf("still denied: %s", describeEdge(&e))
		}
	}
	for _, e := range edges([]string{"app=web 10.0.0.4 443", "app=job 10.0.0.3 443", "app=web 10.0.0.5 80", "app=job 10.0.0.5 443", "app=web 10.0.0.1 80", "app=db 10.0.0.1 443", "10.0.0.9 app=web 443", "10.0.0.1 app=web 8080"}, nil) {
		if allowed(e) {
			t.Errorf("allowed, and was not seen: %s", describeEdge(&e))
		}
	}
}

// What was seen both ways counts as it was seen last, and all of that counts, whatever
// stood between.
func TestSuggestPutsTogetherWhatWentOneWay(t *testing.T) {
	db := newDB(t, strings.TrimSuffix(learning, "---\n"))
	at := func(allowed bool, minute time.Duration) Edge {
		e := edgeLine(allowed, "app=web app=db 1")
		e.Connections, e.Last = 3, noon.Add(minute*time.Minute)
		return e
	}
	es := []Edge{at(true, 1), at(false, 2), at(true, 3)}
	for _, order := range [][]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}} {
		var in []Edge
		for _, i := range order {
			in = append(in, es[i])
		}
		g, err := db.Snapshot().Suggest(in, SuggestOptions{Namespace: "/acme/prod", Now: noon})
		if err != nil {
			t.Fatal(err)
		}
		if len(g.Policies) != 1 || g.Denied != 0 || g.Policies[0].Edges[0].Connections != 6 {
			t.Errorf("in order %v:\n%s", order, g.YAML())
		}
	}
}

// fuzzEdges makes edges of bytes, five to each.
func fuzzEdges(data []byte) ([]Edge, []string) {
	ends := []string{
		"app=a", "app=b", "app=c", "app=a,env=dev", "app=a,env=prod", "app=a,app=b", "env=qa", "app=a,tier=1", "app=b,tier=1",
		"spiffe.id=spiffe://t/x", "spiffe.id=spiffe://t/y,app=a", "zone=z,app=c",
		"app=a@/acme/dev", "app=b@/acme/dev", "ext=e!/acme/e", "ext=f,app=a!/acme/f", "x.y=1!/acme/g", "10.0.0.1", "10.0.0.2",
		"app=a~partner", "app=c,env=prod~partner", "x.y=2~other",
	}
	keySets := [][]string{nil, {"app"}, {"app", "env"}, {"tier", "app"}, {"env"}, {"ext", "app", "spiffe.id"}}
	var keys []string
	if len(data) > 0 {
		keys, data = keySets[int(data[0])%len(keySets)], data[1:]
	}
	var es []Edge
	for ; len(data) >= 5 && len(es) < 60; data = data[5:] {
		from, to := ends[int(data[0])%len(ends)], ends[int(data[1])%len(ends)]
		e := edgeLine(data[3]%4 != 0, fmt.Sprintf("%s %s %d", from, to, 1+data[2]%3))
		e.Last = noon.Add(time.Duration(data[4]%3) * time.Minute)
		es = append(es, e)
	}
	return es, keys
}

const fuzzSuggestBase = "kind: Policy\nnamespace: /acme\nname: no-qa\nsubject: {env: qa}\nverb: deny\nobject: any\npropagate: true\n---\n" +
	"kind: Policy\nnamespace: /acme/prod\nname: c-anywhere\nsubject: {app: c}\nverb: allow\nobject: any\nports: [tcp/1]\n"

func holdSuggestion(t *testing.T, db *DB, data []byte) *Suggestion {
	t.Helper()
	es, keys := fuzzEdges(data)
	o := SuggestOptions{Namespace: "/acme/prod", Keys: keys, Now: noon}
	g, err := db.Snapshot().Suggest(es, o)
	if err != nil {
		t.Fatal(err)
	}
	checkSuggestion(t, db, es, g)
	shuffled := slices.Clone(es)
	rand.New(rand.NewSource(1)).Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
	again, err := db.Snapshot().Suggest(shuffled, o)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(g.YAML()), string(again.YAML())); diff != "" {
		t.Fatalf("another order, another suggestion:\n%s", diff)
	}
	return g
}

func FuzzSuggest(f *testing.F) {
	db := newDB(f, learning+fuzzSuggestBase)
	rng := rand.New(rand.NewSource(3))
	for range 16 {
		f.Add(randomBytes(rng, 1+5*rng.Intn(40)))
	}
	f.Fuzz(func(t *testing.T, data []byte) { holdSuggestion(t, db, data) })
}

// TestSuggestionsHold is the fuzz target on random sets, in every run.
func TestSuggestionsHold(t *testing.T) {
	db := newDB(t, learning+fuzzSuggestBase)
	rng := rand.New(rand.NewSource(4))
	policies, merged, uncovered, already := 0, 0, 0, 0
	for range 150 {
		g := holdSuggestion(t, db, randomBytes(rng, 1+5*rng.Intn(60)))
		policies, uncovered, already = policies+len(g.Policies), uncovered+len(g.Uncovered), already+g.Already
		for _, p := range g.Policies {
			if len(p.Edges) > 1 {
				merged++
			}
			if p.Resource.GetPolicy().GetVerb() != symbolonv1.Verb_VERB_ALLOW {
				t.Errorf("a suggestion that is no allow: %s", p.Resource.GetName())
			}
		}
	}
	// A generator that reaches but one case would prove nothing.
	if policies < 100 || merged < 20 || uncovered < 100 || already < 20 {
		t.Errorf("%d policies, %d of several edges; %d edges uncovered, %d allowed already", policies, merged, uncovered, already)
	}
}
