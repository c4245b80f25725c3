package policydb

import (
	"slices"
	"strings"
	"testing"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// learning is tree, with /acme/prod in learn and a neighbour that enforces.
var learning = strings.Replace(tree, "name: /acme/prod\nmode: enforce", "name: /acme/prod\nmode: learn", 1) +
	"kind: Namespace\nname: /acme/dev\nmode: enforce\n---\n" +
	"kind: Namespace\nname: /acme/prod/below\nmode: enforce\n---\n"

func TestRule7ANamespaceInLearnLetsThroughAndSaysWhatItWouldHaveDone(t *testing.T) {
	w := compile(t, learning+
		policyYAML("/acme/prod", "allows", "subject: {app: web}\nverb: allow\nobject: {app: api}")+
		policyYAML("/acme/prod", "denies", "subject: {app: web}\nverb: deny\nobject: {app: db}")+
		policyYAML("/acme/prod", "tries", "subject: {app: job}\nverb: allow\nobject: {app: db}\nmode: observe")+
		policyYAML("/acme/prod", "secret", "subject: any\nverb: encrypt\nobject: {tier: secret}"))
	for _, side := range []Side{Client, Server} {
		w.want(side, "app=web", "app=api", 1, "allow policy /acme/prod/allows")
		w.want(side, "app=web", "app=db", 1, "allow learn would deny /acme/prod/denies")
		w.want(side, "app=x", "app=y", 1, "allow learn would deny")
		// What a policy on trial would do is not what enforce would do today.
		w.want(side, "app=job", "app=db", 1, "allow learn would deny")
	}
	// An External is let through, too, where encryption would have been asked of it.
	w.want(Client, "app=x", "tier=secret!/acme/ext", 1, "allow learn would deny")
	w.want(Client, "app=web", "tier=secret,app=api!/acme/ext", 1, "allow learn would deny /acme/prod/secret")
}

// What a namespace above denies holds: nobody gets round a parent by learning. What the
// namespace could have allowed by a policy of its own passes.
func TestRule7LearnHoldsToAParentsDeny(t *testing.T) {
	const parent = "subject: {app: bad}\nverb: deny\nobject: any\npropagate: true"
	w := compile(t, learning+
		policyYAML("/acme", "parent", parent)+
		policyYAML("/", "root", "subject: {app: worse}\nverb: deny\nobject: {tier: secret}\npropagate: true")+
		policyYAML("/acme", "tries", "subject: {app: tried}\nverb: deny\nobject: any\npropagate: true\nmode: observe")+
		policyYAML("/acme", "falls", "subject: {app: fallen}\nverb: deny\nobject: any\npropagate: true\nfallback: true")+
		policyYAML("/acme", "stays", "subject: {app: x}\nverb: deny\nobject: any")+
		policyYAML("/acme/prod", "denies", "subject: any\nverb: deny\nobject: {app: db}")+
		policyYAML("/acme/prod/below", "below", "subject: any\nverb: deny\nobject: any"))
	for _, side := range []Side{Client, Server} {
		w.want(side, "app=bad", "app=y", 1, "deny policy /acme/parent")
		w.want(side, "app=bad", "app=db", 1, "deny policy /acme/parent")
		w.want(side, "app=worse", "tier=secret", 1, "deny policy /root")
		w.want(side, "app=worse", "app=y", 1, "allow learn would deny")
		w.want(side, "app=tried", "app=y", 1, "allow learn would deny")
		w.want(side, "app=fallen", "app=y", 1, "allow learn would deny /acme/falls")
		w.want(side, "app=x", "app=y", 1, "allow learn would deny") // it does not propagate
		w.want(side, "app=x", "app=db", 1, "allow learn would deny /acme/prod/denies")
	}
	w.want(Client, "app=bad", "app=y!/acme/ext", 1, "deny policy /acme/parent")
	// An address of which nothing is known is somebody, too.
	bad, other := endpoint("app=bad@/acme/prod"), endpoint("app=x@/acme/prod")
	for _, x := range []struct {
		side Side
		own  *Endpoint
		want string
	}{{Client, &bad, "deny policy /acme/parent"}, {Server, &bad, "allow learn would deny"}, {Client, &other, "allow learn would deny"}} {
		if got := say(w.compiled.DecideUnprotected(x.side, x.own, "tcp", 1, noon)); got != x.want {
			t.Errorf("%s side, %v to an address: %q, want %q", x.side, x.own.Attributes, got, x.want)
		}
	}
	// While a parent's window is shut its deny is not, and that is known to end.
	night := compile(t, learning+policyYAML("/acme", "parent", parent+"\nwhen: {hours: \"22:00-06:00\", timezone: UTC}"))
	d := night.compiled.DecideUnprotected(Client, &bad, "tcp", 1, noon)
	if !d.Allow || d.Until.IsZero() {
		t.Errorf("by day: %s until %s", say(d), d.Until)
	}
	if d := night.compiled.DecideUnprotected(Client, &bad, "tcp", 1, d.Until); d.Allow {
		t.Errorf("at %s: %s", d.Until, say(d))
	}
}

func TestRule7LearnKeepsObligations(t *testing.T) {
	w := compile(t, strings.Replace(learning, "default: deny", "default: deny\nprotection: authenticated", 1)+
		policyYAML("/acme/prod", "secret", "subject: any\nverb: encrypt\nobject: {tier: secret}")+
		policyYAML("/acme/prod", "told", "subject: any\nverb: log\nobject: {tier: secret}"))
	if d := w.want(Client, "app=x", "app=y", 1, "allow learn would deny"); d.Protection != symbolonv1.Protection_PROTECTION_AUTHENTICATED || d.Log {
		t.Errorf("protection %s, log %t", d.Protection, d.Log)
	}
	if d := w.want(Client, "app=x", "tier=secret", 1, "allow learn would deny"); d.Protection != symbolonv1.Protection_PROTECTION_ENCRYPTED || !d.Log {
		t.Errorf("protection %s, log %t: what matches obliges, whoever decided", d.Protection, d.Log)
	}
}

// The attacks: nobody but the namespace itself may open its side.
func TestRule7LearnOpensNoOtherNamespace(t *testing.T) {
	w := compile(t, learning)
	w.want(Server, "app=x@/acme/prod", "app=y@/acme/dev", 1, "deny default") // a client in learn, a server that enforces
	w.want(Client, "app=x@/acme/dev", "app=y@/acme/prod", 1, "deny default") // a client that enforces, a server in learn
	w.want(Client, "app=x@/acme/prod/below", "app=y", 1, "deny default")     // the mode is no legacy
	w.want(Server, "app=x", "app=y@/acme", 1, "deny default")                // and rises to no parent
	w.want(Client, "app=x@/acme/prod/unknown", "app=y", 1, "deny no-policy")
	for ns, learns := range map[string]bool{"/acme/prod": true, "/acme": false, "/acme/dev": false, "/acme/prod/below": false, "/nowhere": false, "": false} {
		if got := w.compiled.Learns(ns); got != learns {
			t.Errorf("%s learns: %t", ns, got)
		}
	}
	// A child in learn whose chain has a hole is as unknown as any.
	holed, err := Compile(resources(t, "kind: Namespace\nname: /\nmode: enforce\ndefault: deny\n---\nkind: Namespace\nname: /a/b\nmode: learn\n"), 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, side := range []Side{Client, Server} {
		if d := holed.Decide(side, &Query{From: endpoint("app=x@/a/b"), To: endpoint("app=y@/a/b"), Protocol: "tcp", Port: 1}, noon); d.Allow {
			t.Errorf("%s side: %s", side, say(d))
		}
	}
}

func TestRule7WhatIsNotProtectedPassesInLearnOnly(t *testing.T) {
	c := compile(t, learning+policyYAML("/", "open", "subject: any\nverb: allow\nobject: any\npropagate: true")).compiled
	for own, want := range map[string]string{
		"app=x@/acme/prod": "allow learn would deny",
		// No policy, however broad, stands for an External.
		"app=x@/acme/dev": "deny peer-unprotected",
		"app=x@/nowhere":  "deny no-policy",
		"app=x!/acme/ext": "deny no-policy",
	} {
		e := endpoint(own)
		if got := say(c.DecideUnprotected(Client, &e, "tcp", 1, noon)); got != want {
			t.Errorf("%s: %q, want %q", own, got, want)
		}
	}
}

// A PolicyTest asks what the policies say: in learn it fails where it would in enforce.
func TestPolicyTestsJudgeANamespaceInLearnAsEnforced(t *testing.T) {
	const test = `
kind: PolicyTest
namespace: /acme/prod
name: closed
tests:
- {name: x stays out, from: {app: web}, to: {app: db}, port: tcp/1, expect: %EXPECT%}
`
	base := strings.TrimSuffix(learning, "---\n") + "---"
	if _, err := NewDB().Plan(parse(t, base+strings.Replace(test, "%EXPECT%", "deny", 1)), nil, false); err != nil {
		t.Errorf("a denial that learn lets through: %v", err)
	}
	wantText(t, refused(t, NewDB(), base+strings.Replace(test, "%EXPECT%", "allow", 1)), "want allow, got deny")
}

// learnCases are seeds for the fuzz target: what learn must turn, and what it must not.
func learnCases() []fuzzCase {
	f := fuzzCase{policies: []fuzzPolicy{
		{namespace: 1, verb: 1, propagate: 1, encrypt: 3, hours: len(fuzzHours)}, // a parent denies
		{namespace: 2, verb: 0, observe: 3, hours: len(fuzzHours)},               // the child would allow
		{namespace: 2, verb: 2, hours: len(fuzzHours)},                           // and obliges
	}}
	f.namespaces[2].known = fuzzLearns
	f.ends[0].namespace, f.ends[1].namespace = 2, 1
	hole, outside, own := f, f, f
	hole.namespaces[1].known = 7
	outside.ends[1].external = 3
	own.policies = slices.Clone(f.policies) // the namespace itself denies
	own.policies[0].namespace = 2
	return []fuzzCase{f, hole, outside, own}
}

func TestLearnCasesAgreeWithTheReference(t *testing.T) {
	for _, f := range learnCases() {
		rs, q, now := f.build()
		holdToReference(t, rs, q, now)
	}
	for i, want := range map[int]string{0: "deny policy /a/p", 3: "allow learn would deny /a/b/p"} {
		f := learnCases()[i]
		rs, q, now := f.build()
		if got := say(Reference(rs, Client, q, now)); !strings.HasPrefix(got, want) {
			t.Errorf("seed %d says %q, want %q", i, got, want)
		}
	}
}
