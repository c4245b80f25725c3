package policydb

import (
	"strings"
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// noon is a Wednesday, 12:00 in UTC.
var noon = time.Date(2026, 7, 15, 12, 0, 0, 0, time.UTC)

// tree is three namespaces that most tests stand in.
const tree = `
kind: Namespace
name: /
mode: enforce
default: deny
attributes: {app: {}, env: {values: [dev, qa, prod]}, tier: {}, zone: {}, ext: {}}
---
kind: Namespace
name: /acme
mode: enforce
---
kind: Namespace
name: /acme/prod
mode: enforce
---
`

func parse(t testing.TB, text string) []Document {
	t.Helper()
	docs, err := Parse("test.yaml", []byte(text))
	if err != nil {
		t.Fatalf("parse: %v", err)
	}
	return docs
}

func resources(t testing.TB, text string) []*symbolonv1.Resource {
	t.Helper()
	var out []*symbolonv1.Resource
	for _, d := range parse(t, text) {
		out = append(out, d.Resource)
	}
	return out
}

// world is a compiled set beside its source, so that each question can be put to
// both evaluators.
type world struct {
	testing.TB
	resources []*symbolonv1.Resource
	compiled  *Compiled
	now       time.Time
}

func compile(t testing.TB, text string) *world {
	t.Helper()
	w := &world{TB: t, resources: resources(t, text), now: noon}
	c, err := Compile(w.resources, 7)
	if err != nil {
		t.Fatalf("compile: %v", err)
	}
	w.compiled = c
	return w
}

// attributes reads "app=web,env=prod"; a key may come again with another value.
func attributes(s string) identity.Attributes {
	m := make(map[string][]string)
	for _, kv := range strings.Split(s, ",") {
		if k, v, ok := strings.Cut(kv, "="); ok {
			m[k] = append(m[k], v)
		}
	}
	return identity.NewAttributes(m)
}

// endpoint reads "app=web@/acme/prod"; "ext=x!/acme/y" is an External, "app=web~partner"
// a workload of that trust domain.
func endpoint(s string) Endpoint {
	if a, td, ok := strings.Cut(s, "~"); ok {
		return Endpoint{Foreign: true, Attributes: attributes(a + ",spiffe.id=spiffe://" + td + "/" + a + ",spiffe.trust_domain=" + td)}
	}
	if a, ref, ok := strings.Cut(s, "!"); ok {
		return Endpoint{Attributes: attributes(a), External: ref}
	}
	a, ns, ok := strings.Cut(s, "@")
	if !ok {
		ns = "/acme/prod"
	}
	return Endpoint{Namespace: ns, Attributes: attributes(a)}
}

// ask decides one side, by both evaluators, which must agree.
func (w *world) ask(side Side, from, to string, port uint16) Decision {
	w.Helper()
	q := &Query{From: endpoint(from), To: endpoint(to), Protocol: "tcp", Port: port}
	d := w.compiled.Decide(side, q, w.now)
	if side == Client && d.Allow && !w.compiled.MayReach(&q.From, w.now) {
		w.Errorf("MayReach denies what Decide allows: %+v", q)
	}
	if diff := diffDecisions(d, Reference(w.resources, side, q, w.now)); diff != "" {
		w.Fatalf("%s side, %s to %s: Decide and Reference differ: %s", side, from, to, diff)
	}
	return d
}

// say is a decision in short: "allow policy /acme/x encrypted log".
func say(d Decision) string {
	s := verdictWord(d.Allow) + " " + strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(d.Reason.String(), "REASON_"), "_", "-"))
	if d.Policy != "" {
		s += " " + d.Policy
	}
	if d.WouldAllow != nil {
		s += " would " + strings.TrimSpace(verdictWord(*d.WouldAllow)+" "+d.WouldPolicy)
	}
	return s
}

func verdictWord(allow bool) string {
	if allow {
		return "allow"
	}
	return "deny"
}

func (w *world) want(side Side, from, to string, port uint16, want string) Decision {
	w.Helper()
	d := w.ask(side, from, to, port)
	if got := say(d); got != want {
		w.Errorf("%s side, %s to %s, port %d: got %q, want %q", side, from, to, port, got, want)
	}
	return d
}

// diffDecisions compares all but Until, which Reference leaves out.
func diffDecisions(a, b Decision) string {
	would := func(d Decision) string {
		if d.WouldAllow == nil {
			return "-"
		}
		return verdictWord(*d.WouldAllow)
	}
	as := strings.Join([]string{say(a), a.Protection.String(), would(a)}, " ")
	bs := strings.Join([]string{say(b), b.Protection.String(), would(b)}, " ")
	if a.Log {
		as += " log"
	}
	if b.Log {
		bs += " log"
	}
	if as == bs {
		return ""
	}
	return as + " | " + bs
}
