package proxy

import (
	"testing"
	"time"

	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/policydb"
)

// A workload that another CA has named is judged where its host is, and is there in
// records; policy and the host's place may change under it.
func TestNamespaceOfAnotherCAsWorkload(t *testing.T) {
	site := newAuthority(t, "site.example")
	p := New(Options{Records: newRecorder(t), Log: zap.NewNop()})
	generation := uint64(0)
	policy := func(yaml string) *policydb.Compiled {
		docs, err := policydb.Parse("test.yaml", []byte(yaml))
		if err != nil {
			t.Fatal(err)
		}
		var rs []*symbolonv1.Resource
		for _, d := range docs {
			rs = append(rs, d.Resource)
		}
		generation++
		if err := p.SetPolicy(rs, generation); err != nil {
			t.Fatal(err)
		}
		return p.policy.Load()
	}
	const namespaces = "kind: Namespace\nname: /\nmode: enforce\ndefault: deny\nattributes: {app: {}}\n---\n{kind: Namespace, name: /prod, mode: enforce}\n"
	c := policy(namespaces)
	w := p.parties.get(&identity.Workload{Key: identity.Key{UID: 7}}, site.workload("/prod/shop/web", map[string][]string{"app": {"web"}}), time.Now())
	ends := make(map[string]*flow.End)
	expect := func(c *policydb.Compiled, want string) {
		t.Helper()
		if got := w.namespace(c); got != want {
			t.Errorf("namespace %s, want %s", got, want)
		}
		if got := w.endpoint(c); got.Namespace != want || got.Attributes.Get("app") != "web" {
			t.Errorf("judged as %+v, want in %s", got, want)
		}
		if got := w.known(c).Namespace; got != want {
			t.Errorf("known in %s, want %s", got, want)
		}
		if was, moved := ends[want], principalEnd(w.known(c)); was == nil {
			ends[want] = moved
		} else if was != moved {
			t.Errorf("two ends of edges for one workload in %s", want)
		}
	}
	expect(c, "/prod/shop") // the controller names nobody into a namespace that is not
	p.SetHostNamespace("/prod")
	expect(c, "/prod")
	c = policy(namespaces + "---\n{kind: Namespace, name: /prod/shop, mode: enforce}\n")
	expect(c, "/prod/shop")
	p.SetHostNamespace("/dev")
	expect(c, "/dev")
	if ends["/prod"] == ends["/prod/shop"] || ends["/prod"] == ends["/dev"] {
		t.Error("an edge is recorded in a namespace where it is not any more")
	}
	if w.principal().Namespace != "/prod/shop" {
		t.Error("the credential itself was changed")
	}
}

// An identity that is withdrawn ends what stands on it, at once, and for good.
func TestWithdrawnIdentity(t *testing.T) {
	w := newWorld(t)
	c, saw := w.openEcho(w.web())
	key := w.creds.set("0", nil)
	w.p.CredentialChanged(key, nil)
	w.wasCut(c, saw, "no-identity")
	if _, err := w.tunnel(w.web(), encrypted); err == nil {
		t.Error("a new connection is let in")
	}
	if r := w.records.next(); r.Reason != "no-identity" {
		t.Errorf("recorded %+v", r)
	}
	// Who was identified just before is found out.
	l := &live{question: question{kind: toAddress, near: w.p.parties.byKey[key]}, judge: func(*policydb.Compiled, time.Time) (bool, time.Time) { return true, time.Time{} }, cut: func() {}}
	w.p.table.add(l, w.p.now())
	if l.cutReason() != symbolonv1.Reason_REASON_NO_IDENTITY {
		t.Errorf("one that was late lives: %s", l.cutReason())
	}
	w.p.table.remove(l)

	cred := w.ca.workload("/prod/db", map[string][]string{"app": {"db"}})
	w.p.CredentialChanged(w.creds.set("0", cred), cred)
	w.good()
}

// Who asked for a workload's credential before it was replaced and then withdrawn, and
// comes late with it, brings neither back.
func TestLateCredentialUndoesNoWithdrawal(t *testing.T) {
	ca := newAuthority(t, "acme.example")
	first, second := ca.workload("/prod/db", nil), ca.workload("/prod/db", nil)
	var s parties
	key := identity.Key{UID: 7}
	w := s.get(&identity.Workload{Key: key}, first, time.Now())
	s.update(key, second)
	s.get(&identity.Workload{Key: key}, first, time.Now())
	if w.current.Load().Credential() != second {
		t.Error("the credential of before is back")
	}
	s.withdraw(key)
	s.get(&identity.Workload{Key: key}, first, time.Now())
	s.get(&identity.Workload{Key: key}, second, time.Now())
	if !w.withdrawn.Load() {
		t.Error("the withdrawal is undone")
	}
	var tab table
	l := &live{question: question{kind: toAddress, near: w}, judge: func(*policydb.Compiled, time.Time) (bool, time.Time) { return true, time.Time{} }, cut: func() {}}
	tab.add(l, time.Now())
	if l.cutReason() != symbolonv1.Reason_REASON_NO_IDENTITY {
		t.Errorf("a connection that was late lives: %s", l.cutReason())
	}
	s.update(key, first) // the source's word, which counts whatever it was before
	if w.withdrawn.Load() || w.current.Load().Credential() != first {
		t.Error("a new credential is not in force")
	}
}

// A workload that is let go of while its connection comes about is found by who withdraws
// its identity afterwards; if another stands in its place, the connection does not live.
func TestForgottenWhileAConnectionComesAbout(t *testing.T) {
	ca := newAuthority(t, "acme.example")
	cred := ca.workload("/prod/db", nil)
	key := identity.Key{UID: 7}
	opening := func(s *parties, w *party) *live {
		s.keep(w) // as hold does, before the connection registers
		return &live{question: question{kind: toAddress, near: w}, judge: func(*policydb.Compiled, time.Time) (bool, time.Time) { return true, time.Time{} }, cut: func() {}}
	}
	t.Run("found", func(t *testing.T) {
		var s parties
		var tab table
		w := s.get(&identity.Workload{Key: key}, cred, time.Now())
		s.forget(key)
		l := opening(&s, w)
		tab.add(l, time.Now())
		if l.cutReason() != 0 {
			t.Fatalf("cut: %s", l.cutReason())
		}
		s.forget(key) // with a live connection: it stays
		if found := s.withdraw(key); found != w {
			t.Fatal("who withdraws its identity does not find it")
		}
		tab.changed(w, time.Now())
		if l.cutReason() != symbolonv1.Reason_REASON_NO_IDENTITY {
			t.Errorf("after the withdrawal it lives: %s", l.cutReason())
		}
	})
	t.Run("another in its place", func(t *testing.T) {
		var s parties
		var tab table
		w := s.get(&identity.Workload{Key: key}, cred, time.Now())
		s.forget(key)
		other := s.get(&identity.Workload{Key: key}, cred, time.Now())
		l := opening(&s, w)
		tab.add(l, time.Now())
		if l.cutReason() != symbolonv1.Reason_REASON_NO_IDENTITY || other.withdrawn.Load() {
			t.Errorf("it lives (%s), or the other does not (withdrawn: %t)", l.cutReason(), other.withdrawn.Load())
		}
	})
}
