package policydb

import (
	"sync"
	"testing"
	"time"
)

const answersYAML = tree + `kind: Policy
namespace: /acme/prod
name: by-day
subject: {app: web}
verb: allow
object: {app: api}
when: {hours: "08:00-18:00", timezone: UTC}
---
kind: Policy
namespace: /acme/prod
name: until-one
subject: {app: batch}
verb: allow
object: {app: api}
expires: 2026-07-15T13:00:00Z
---
kind: Policy
namespace: /acme/prod
name: same-zone
subject: {app: log}
verb: allow
object: {app: api}
where: {same: [cloud.zone]}
`

// A decision that is remembered holds by the clock on the wall, set forward or back.
func TestRememberedDecisionsFollowTheClock(t *testing.T) {
	w := compile(t, answersYAML)
	for _, x := range []struct {
		app  string
		at   time.Duration // after noon; in turn
		want bool
	}{
		{"web", 0, true}, {"web", 5 * time.Hour, true}, {"web", 7 * time.Hour, false}, {"web", 0, true}, {"web", -6 * time.Hour, false}, {"web", 0, true},
		{"batch", 2 * time.Hour, false}, {"batch", 0, true}, {"batch", time.Hour - 1, true}, {"batch", time.Hour, false}, {"batch", 0, true},
	} {
		w.now = noon.Add(x.at)
		if d := w.ask(Client, "app="+x.app, "app=api", 443); d.Allow != x.want {
			t.Errorf("%s at noon and %v: %s", x.app, x.at, say(d))
		}
	}
}

// Whom nothing but a comparison tells apart is not taken for one another.
func TestRememberedDecisionsTellComparedKeysApart(t *testing.T) {
	w := compile(t, answersYAML)
	for range 2 {
		w.want(Client, "app=log,cloud.zone=a", "app=api,cloud.zone=a", 443, "allow policy /acme/prod/same-zone")
		w.want(Client, "app=log,cloud.zone=a", "app=api,cloud.zone=b", 443, "deny default")
		w.want(Client, "app=log,cloud.zone=b", "app=api,cloud.zone=a", 443, "deny default")
	}
}

// More questions than there are places, from several at once: every answer is its own.
func TestRememberedDecisionsDoNotMixUnderPressure(t *testing.T) {
	c := compile(t, answersYAML).compiled
	from := map[string]Endpoint{"web": endpoint("app=web"), "nobody": endpoint("app=nobody")}
	to := endpoint("app=api")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for port := range 2 * maxAnswers {
				for app, own := range from {
					q := &Query{From: own, To: to, Protocol: "tcp", Port: uint16(port + 1)}
					if d := c.Decide(Client, q, noon); d.Allow != (app == "web") {
						t.Errorf("%s at %d: %s", app, q.Port, say(d))
						return
					}
				}
			}
		})
	}
	wg.Wait()
}

// What was decided by the clock does not stand when windows count as open: learn asks both
// of one set.
func TestRememberedDecisionsGoWhenWindowsOpen(t *testing.T) {
	w := compile(t, answersYAML)
	night := noon.Add(12 * time.Hour)
	q := &Query{From: endpoint("app=web"), To: endpoint("app=api"), Protocol: "tcp", Port: 443}
	if d := w.compiled.Decide(Client, q, night); d.Allow {
		t.Fatalf("by night: %s", say(d))
	}
	w.compiled.openWindows()
	if d := w.compiled.Decide(Client, q, night); !d.Allow {
		t.Errorf("with open windows: %s", say(d))
	}
	learns := compile(t, answersYAML[:len(tree)-len("mode: enforce\n---\n")]+"mode: learn\n---\n"+answersYAML[len(tree):]).compiled
	q.From = endpoint("app=nobody")
	if d := learns.Decide(Client, q, noon); !d.Allow {
		t.Fatalf("in learn: %s", say(d))
	}
	learns.enforceAll()
	if d := learns.Decide(Client, q, noon); d.Allow {
		t.Errorf("as if enforced: %s", say(d))
	}
}

// A test that learn suggests holds at any hour, whatever the hour it is made at: here a deny
// is closed for now.
func TestSuggestedTestsDoNotDependOnTheHour(t *testing.T) {
	db := newDB(t, learning+policyYAML("/acme", "not-by-night", "subject: {app: web}\nverb: deny\nobject: {app: db}\nwhen: {hours: \"22:00-06:00\", timezone: UTC}\npropagate: true"))
	es := []Edge{edgeLine(true, "app=web app=db 5432")}
	g, err := db.Snapshot().Suggest(es, SuggestOptions{Namespace: "/acme/prod", Now: noon})
	if err != nil {
		t.Fatal(err)
	}
	checkSuggestion(t, db, es, g)
	if g.Covered != 1 || len(g.Policies) != 1 {
		t.Errorf("%s", g.YAML())
	}
}
