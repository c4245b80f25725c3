package policydb

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// TestCompileRefusesWhatItCannotRead: a policy that is half understood would allow
// too much, so the whole set is refused.
func TestCompileRefusesWhatItCannotRead(t *testing.T) {
	good := resources(t, tree+policyYAML("/acme", "p", "subject: {app: web}\nverb: allow\nobject: {app: api}\nports: [tcp/443]\nwhen: {days: mon, timezone: UTC}")+
		"kind: External\nnamespace: /acme\nname: x\naddresses: {cidrs: [203.0.113.0/24]}\n")
	newer := protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1)
	policyOf := func(rs []*symbolonv1.Resource) *symbolonv1.Policy { return rs[3].GetPolicy() }
	for name, spoil := range map[string]func(rs []*symbolonv1.Resource){
		"unknown kind":   func(rs []*symbolonv1.Resource) { rs[3].Kind = nil },
		"newer resource": func(rs []*symbolonv1.Resource) { rs[3].ProtoReflect().SetUnknown(newer) },
		"newer policy":   func(rs []*symbolonv1.Resource) { policyOf(rs).ProtoReflect().SetUnknown(newer) },
		"newer selector": func(rs []*symbolonv1.Resource) { policyOf(rs).Subject.ProtoReflect().SetUnknown(newer) },
		"newer term":     func(rs []*symbolonv1.Resource) { policyOf(rs).Object.Terms[0].ProtoReflect().SetUnknown(newer) },
		"newer operator": func(rs []*symbolonv1.Resource) {
			policyOf(rs).Object.Terms[0].Clauses[0].ProtoReflect().SetUnknown(newer)
		},
		"newer window":           func(rs []*symbolonv1.Resource) { policyOf(rs).When.ProtoReflect().SetUnknown(newer) },
		"newer port":             func(rs []*symbolonv1.Resource) { policyOf(rs).Ports[0].ProtoReflect().SetUnknown(newer) },
		"newer namespace":        func(rs []*symbolonv1.Resource) { rs[0].GetNamespaceKind().ProtoReflect().SetUnknown(newer) },
		"newer External":         func(rs []*symbolonv1.Resource) { rs[4].GetExternal().Addresses.ProtoReflect().SetUnknown(newer) },
		"no operator":            func(rs []*symbolonv1.Resource) { policyOf(rs).Object.Terms[0].Clauses[0].Operator = nil },
		"no verb":                func(rs []*symbolonv1.Resource) { policyOf(rs).Verb = 0 },
		"unknown verb":           func(rs []*symbolonv1.Resource) { policyOf(rs).Verb = 9 },
		"unknown mode":           func(rs []*symbolonv1.Resource) { policyOf(rs).Mode = symbolonv1.Mode_MODE_LEARN },
		"no subject":             func(rs []*symbolonv1.Resource) { policyOf(rs).Subject = nil },
		"empty selector":         func(rs []*symbolonv1.Resource) { policyOf(rs).Subject = &symbolonv1.Selector{} },
		"empty term":             func(rs []*symbolonv1.Resource) { policyOf(rs).Subject.Terms[0].Clauses = nil },
		"any and terms":          func(rs []*symbolonv1.Resource) { policyOf(rs).Subject.Any = true },
		"port beyond the ports":  func(rs []*symbolonv1.Resource) { policyOf(rs).Ports[0].Last = 70000 },
		"port of no protocol":    func(rs []*symbolonv1.Resource) { policyOf(rs).Ports[0].Protocol = "sctp" },
		"zone that is none":      func(rs []*symbolonv1.Resource) { policyOf(rs).When.Timezone = "../../etc/passwd" },
		"days beyond the week":   func(rs []*symbolonv1.Resource) { policyOf(rs).When.Days = 1 << 7 },
		"hours beyond the day":   func(rs []*symbolonv1.Resource) { policyOf(rs).When.EndMinute = 1441 },
		"address that is none":   func(rs []*symbolonv1.Resource) { rs[4].GetExternal().Addresses.Cidrs = []string{"office"} },
		"namespace that is none": func(rs []*symbolonv1.Resource) { rs[1].Namespace = "/acme/" },
		"unknown default":        func(rs []*symbolonv1.Resource) { rs[0].GetNamespaceKind().Default = 9 },
		"unknown protection":     func(rs []*symbolonv1.Resource) { rs[0].GetNamespaceKind().Protection = 9 },
	} {
		var rs []*symbolonv1.Resource
		for _, r := range good {
			rs = append(rs, proto.CloneOf(r))
		}
		if _, err := Compile(rs, 1); err != nil {
			t.Fatalf("before: %v", err)
		}
		spoil(rs)
		if c, err := Compile(rs, 1); c != nil || !errors.Is(err, ErrUnreadable) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, err := Compile(append(good, good[3]), 1); err == nil {
		t.Error("a resource that is there twice was taken")
	}
}

func TestADecisionOnKnownEndpointsAllocatesNothing(t *testing.T) {
	w := compile(t, tree+policyYAML("/acme", "p", "subject: {app: web}\nverb: allow\nobject: {app: {prefix: a}}\nports: [tcp/443]\nwith: [encrypt, log]\npropagate: true")+
		policyYAML("/acme", "o", "subject: {app: web}\nverb: deny\nobject: any\nmode: observe\npropagate: true"))
	q := &Query{From: endpoint("app=web,env=prod"), To: endpoint("app=api,zone=x"), Protocol: "tcp", Port: 443}
	if d := w.compiled.Decide(Client, q, noon); !d.Allow || d.WouldAllow == nil {
		t.Fatal(say(d))
	}
	if n := testing.AllocsPerRun(100, func() { w.compiled.Decide(Client, q, noon) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestIdentitiesAreFoundAgain: at another address by what policies see of them, so
// that attributes which no policy uses do not tell two peers apart.
func TestIdentitiesAreFoundAgain(t *testing.T) {
	w := compile(t, tree+policyYAML("/acme/prod", "p", "subject: {app: web}\nverb: allow\nobject: any"))
	a := w.compiled.identify(attributes("app=web,host.id=1"))
	if b := w.compiled.identify(attributes("app=web,host.id=2,zone=z")); a != b {
		t.Error("two peers that policies see alike are two identities")
	}
	if b := w.compiled.identify(attributes("app=api")); a == b {
		t.Error("two apps are one identity")
	}
	// A part of a set begins where the set does, and is another.
	whole := attributes("app=api,app=web")
	if w.compiled.identify(whole) == w.compiled.identify(whole[:1]) {
		t.Error("a set and its beginning are one identity")
	}
}

func TestCachesAreBounded(t *testing.T) {
	w := compile(t, tree+policyYAML("/acme/prod", "p", "subject: {app: {prefix: a}}\nverb: allow\nobject: any"))
	to := endpoint("app=db")
	for i := range 3 * maxPointers {
		q := &Query{From: Endpoint{Namespace: "/acme/prod", Attributes: attributes(fmt.Sprintf("app=a%d", i))}, To: to, Protocol: "tcp", Port: 1}
		if d := w.compiled.Decide(Client, q, noon); !d.Allow {
			t.Fatalf("peer %d: %s", i, say(d))
		}
	}
	n, pointers := 0, w.compiled.known.pointers.Load()
	for i := range pointers.slots {
		if pointers.slots[i].Load() != nil {
			n++
		}
	}
	if n < maxPointers/2 {
		t.Errorf("%d of %d addresses are remembered", n, maxPointers)
	}
	// A full cache of bits starts anew, and goes on answering.
	w.compiled.known.hashes.Load().bytes.Store(maxBitsetBytes)
	w.want(Client, "app=a-new-one", "app=db", 1, "allow policy /acme/prod/p")
	if b := w.compiled.known.hashes.Load().bytes.Load(); b >= maxBitsetBytes {
		t.Errorf("%d bytes are kept", b)
	}
}

func TestDecideIsSafeForConcurrentUse(t *testing.T) {
	w := compile(t, tree+policyYAML("/acme/prod", "p", "subject: {app: {prefix: a}}\nverb: allow\nobject: {app: db}"))
	shared := make([]identity.Attributes, 64)
	for i := range shared {
		shared[i] = attributes(fmt.Sprintf("app=%c%d", "ab"[i%2], i))
	}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 2000 {
				n := (i*7 + g) % len(shared)
				q := &Query{From: Endpoint{Namespace: "/acme/prod", Attributes: shared[n]}, To: endpoint("app=db"), Protocol: "tcp", Port: 1}
				if cache := w.compiled.known.hashes.Load(); i%500 == 0 && cache != nil {
					cache.bytes.Store(maxBitsetBytes) // drops the caches under way
				}
				if d := w.compiled.Decide(Client, q, noon); d.Allow != (n%2 == 0) {
					t.Errorf("identity %d: %s", n, say(d))
				}
			}
		})
	}
	wg.Wait()
}
