package policydb

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// newDB is a working set with text applied, of generation 1.
func newDB(t testing.TB, text string) *DB {
	t.Helper()
	db := NewDB()
	db.Now = func() time.Time { return noon }
	commit(t, db, text, 1)
	return db
}

func commit(t testing.TB, db *DB, text string, generation uint64) *Plan {
	t.Helper()
	p, err := db.Plan(parse(t, text), nil, false)
	if err != nil {
		t.Fatalf("plan: %v", err)
	}
	if err := db.Commit(p, generation); err != nil {
		t.Fatalf("commit: %v", err)
	}
	return p
}

func refs(rs []*symbolonv1.Resource) []string {
	var out []string
	for _, r := range rs {
		out = append(out, KeyOf(r).String())
	}
	return out
}

func changes(p *Plan) []string {
	var out []string
	for _, c := range p.Changes {
		out = append(out, strings.ToLower(strings.TrimPrefix(c.Type.String(), "CHANGE_TYPE_"))+" "+c.Key().String())
	}
	return out
}

const allowAny = "subject: any\nverb: allow\nobject: any"

func TestPlanTellsChangesAndCommitsThemAtOnce(t *testing.T) {
	db := newDB(t, tree+policyYAML("/acme", "stays", allowAny)+policyYAML("/acme", "moves", allowAny)+policyYAML("/acme", "goes", allowAny))
	docs := parse(t, policyYAML("/acme", "new", allowAny)+policyYAML("/acme", "moves", "subject: any\nverb: deny\nobject: any")+policyYAML("/acme", "stays", allowAny))
	p, err := db.Plan(docs, []Key{{KindPolicy, "/acme", "goes"}}, false)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"deleted Policy /acme/goes", "updated Policy /acme/moves", "created Policy /acme/new", "unchanged Policy /acme/stays"}
	if diff := cmp.Diff(want, changes(p)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	old := db.Snapshot()
	if err := db.Commit(p, 2); err != nil {
		t.Fatal(err)
	}
	now := db.Snapshot()
	if now.Generation() != 2 || now.Get(KindPolicy, "/acme", "goes") != nil || now.Get(KindPolicy, "/acme", "moves").GetPolicy().GetVerb() != symbolonv1.Verb_VERB_DENY {
		t.Errorf("after commit: generation %d, %v", now.Generation(), refs(now.List(KindPolicy, "/")))
	}
	// A snapshot never changes.
	if old.Generation() != 1 || old.Get(KindPolicy, "/acme", "new") != nil || old.Get(KindPolicy, "/acme", "goes") == nil {
		t.Errorf("the old snapshot moved: %v", refs(old.All()))
	}
}

func TestCommitOfAPlanWhoseBaseMovedIsAConflict(t *testing.T) {
	db := newDB(t, tree)
	first, err := db.Plan(parse(t, policyYAML("/acme", "a", allowAny)), nil, false)
	if err != nil {
		t.Fatal(err)
	}
	commit(t, db, policyYAML("/acme", "b", allowAny), 2)
	if err := db.Commit(first, 3); !errors.Is(err, ErrConflict) {
		t.Errorf("got %v", err)
	}
	if got := db.Snapshot(); got.Generation() != 2 || got.Get(KindPolicy, "/acme", "a") != nil {
		t.Errorf("the refused plan left traces: %v", refs(got.All()))
	}
	again, err := db.Plan(parse(t, policyYAML("/acme", "a", allowAny)), nil, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Commit(again, 2); err == nil {
		t.Error("a generation came twice")
	}
}

func TestConcurrentPlansLoseNothing(t *testing.T) {
	db := newDB(t, tree)
	var (
		wg         sync.WaitGroup
		mu         sync.Mutex
		generation = uint64(1)
	)
	for i := range 8 {
		wg.Go(func() {
			docs := parse(t, policyYAML("/acme", "p-"+string(rune('a'+i)), allowAny))
			for {
				p, err := db.Plan(docs, nil, false)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				err = db.Commit(p, generation+1)
				if err == nil {
					generation++
				}
				mu.Unlock()
				if !errors.Is(err, ErrConflict) {
					return
				}
			}
		})
	}
	wg.Wait()
	if n := len(db.Snapshot().List(KindPolicy, "")); n != 8 {
		t.Errorf("%d policies, want 8", n)
	}
}

func TestListIsInOrderAndOfWholeElements(t *testing.T) {
	db := newDB(t, tree+`
kind: Namespace
name: /acme-labs
mode: enforce
---
`+policyYAML("/acme/prod", "b", allowAny)+policyYAML("/acme/prod", "a", allowAny)+policyYAML("/acme", "z", allowAny)+policyYAML("/acme-labs", "x", allowAny)+policyYAML("/", "r", allowAny))
	s := db.Snapshot()
	for _, c := range []struct {
		kind, under string
		want        []string
	}{
		{KindPolicy, "/acme", []string{"Policy /acme/z", "Policy /acme/prod/a", "Policy /acme/prod/b"}},
		{KindPolicy, "/acme/prod", []string{"Policy /acme/prod/a", "Policy /acme/prod/b"}},
		{KindPolicy, "/none", nil},
		{KindNamespace, "", []string{"Namespace /", "Namespace /acme-labs", "Namespace /acme", "Namespace /acme/prod"}},
		{"", "/acme-labs", []string{"Namespace /acme-labs", "Policy /acme-labs/x"}},
		{"", "/", []string{"Namespace /", "Policy /r", "Namespace /acme-labs", "Policy /acme-labs/x", "Namespace /acme", "Policy /acme/z",
			"Namespace /acme/prod", "Policy /acme/prod/a", "Policy /acme/prod/b"}},
	} {
		if diff := cmp.Diff(c.want, refs(s.List(c.kind, c.under))); diff != "" {
			t.Errorf("%s under %s: -want +got:\n%s", c.kind, c.under, diff)
		}
	}
	if diff := cmp.Diff(refs(s.List("", "/")), refs(s.All())); diff != "" {
		t.Errorf("All is not all:\n%s", diff)
	}
}

func TestVisibleToIsWhatAHostCanNeed(t *testing.T) {
	db := newDB(t, tree+`
kind: Namespace
name: /acme/prod/db
mode: enforce
---
kind: Namespace
name: /acme/shop
mode: enforce
---
kind: External
namespace: /
name: internet
addresses: {cidrs: [0.0.0.0/0]}
---
kind: Service
namespace: /acme
name: lb
addresses: {cidrs: [198.51.100.7/32]}
---
kind: Profile
namespace: /acme
name: nginx
match: {proc.exe: /usr/sbin/nginx}
workload: web
---
kind: PolicyTest
namespace: /acme/prod
name: t
tests: [{name: closed, from: {app: a}, to: {app: b}, port: any, expect: deny}]
---
`+policyYAML("/acme", "reaches-down", "subject: {tier: x}\nverb: allow\nobject: any\npropagate: true")+policyYAML("/acme", "stays", allowAny)+
		policyYAML("/acme/prod", "own", "subject: {tier: x}\nverb: allow\nobject: any")+policyYAML("/acme/prod/db", "below", allowAny)+policyYAML("/acme/shop", "beside", allowAny))
	want := []string{
		"Namespace /", "External /internet",
		"Namespace /acme", "Profile /acme/nginx", "Policy /acme/reaches-down", "Service /acme/lb",
		"Namespace /acme/prod", "Policy /acme/prod/own",
		"Namespace /acme/prod/db", "Policy /acme/prod/db/below",
	}
	got := refs(db.Snapshot().VisibleTo("/acme/prod"))
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	// A host decides with it as the controller does with all.
	part, err := Compile(db.Snapshot().VisibleTo("/acme/prod"), 1)
	if err != nil {
		t.Fatal(err)
	}
	whole, err := Compile(db.Snapshot().All(), 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, ns := range []string{"/acme/prod", "/acme/prod/db"} {
		q := &Query{From: endpoint("tier=x@/acme/shop"), To: endpoint("app=a@" + ns), Protocol: "tcp", Port: 1}
		if diff := diffDecisions(part.Decide(Server, q, noon), whole.Decide(Server, q, noon)); diff != "" {
			t.Errorf("in %s: %s", ns, diff)
		}
	}
}

func TestLoadTakesWhatAllGives(t *testing.T) {
	from := newDB(t, tree+policyYAML("/acme", "p", allowAny))
	to := NewDB()
	if err := to.Load(from.Snapshot().All(), 41); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(refs(from.Snapshot().All()), refs(to.Snapshot().All())); diff != "" || to.Snapshot().Generation() != 41 {
		t.Errorf("generation %d:\n%s", to.Snapshot().Generation(), diff)
	}
	commit(t, to, policyYAML("/acme", "q", allowAny), 42)

	broken := proto.CloneOf(from.Snapshot().Get(KindPolicy, "/acme", "p"))
	broken.GetPolicy().Verb = symbolonv1.Verb_VERB_UNSPECIFIED
	var ve *ValidationErrors
	if err := to.Load([]*symbolonv1.Resource{broken}, 50); !errors.As(err, &ve) || to.Snapshot().Generation() != 42 {
		t.Errorf("a policy without a verb: %v, generation %d", err, to.Snapshot().Generation())
	}
	twice := from.Snapshot().Get(KindPolicy, "/acme", "p")
	if err := to.Load([]*symbolonv1.Resource{twice, twice}, 50); err == nil {
		t.Error("the same resource twice was loaded")
	}
}
