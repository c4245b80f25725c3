package proxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/policydb"
)

func revokedID(id string) *symbolonv1.Revocation {
	return &symbolonv1.Revocation{Id: "id " + id, Subject: &symbolonv1.Revocation_SpiffeId{SpiffeId: id}}
}

func revokedSerial(c *identity.Credential) *symbolonv1.Revocation {
	return &symbolonv1.Revocation{Id: "serial", Subject: &symbolonv1.Revocation_Serial{Serial: &symbolonv1.RevokedSerial{
		TrustDomain: c.SVID.ID.TrustDomain().Name(), Serial: []byte(c.SVID.Serial()),
	}}}
}

func revokedLabel(key, value string) *symbolonv1.Revocation {
	return &symbolonv1.Revocation{Id: "label", Subject: &symbolonv1.Revocation_Labels{Labels: &symbolonv1.RevokedLabels{Labels: map[string]string{key: value}}}}
}

func revocationsOf(t testing.TB, all ...*symbolonv1.Revocation) *identity.Revocations {
	t.Helper()
	return must((*identity.Revocations)(nil).Update(&symbolonv1.Revocations{Number: 1, Added: all}))(t)
}

func (w *world) revoke(all ...*symbolonv1.Revocation) {
	w.Helper()
	w.p.SetRevocations(revocationsOf(w, all...))
}

const dbID = "spiffe://acme.example/prod/db"

// A thousand real connections, a hundred of them a workload's that is revoked: those are
// reset at both ends, and the others go on.
func TestRevocationAmongRealConnections(t *testing.T) {
	if testing.Short() {
		t.Skip("a thousand handshakes one after the other")
	}
	const all, going = 1000, 100
	w := newWorld(t)
	const second = "---\nkind: Policy\nnamespace: /prod\nname: batch-calls-db\nsubject: {app: batch}\nverb: allow\nobject: {app: db}\n"
	w.policy(baseline + second)
	w.app.handle(func(c *net.TCPConn) { _, _ = io.Copy(c, c) })
	web := mtls.NewEndpoint(w.web(), mtls.Options{})
	batch := mtls.NewEndpoint(w.ca.workload("/prod/batch", map[string][]string{"app": {"batch"}}), mtls.Options{})
	var stays, goes []*mtls.Conn
	for i := range all {
		e, list := web, &stays
		if i%(all/going) == 0 {
			e, list = batch, &goes
		}
		ctx := w.ctx()
		c, err := mtls.Dial(ctx, w.call(w.app.addr), e, func(*mtls.Peer) (*symbolonv1.Open, error) {
			return mtls.NewOpen(mtls.NewFlowID(), w.app.addr, encrypted, 1), nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.ReadVerdict(ctx); err != nil {
			t.Fatal(err)
		}
		*list = append(*list, c)
	}
	eventually(t, "all are open", func() bool { return w.p.table.size() == all })
	began := time.Now()
	w.revoke(revokedID("spiffe://acme.example/prod/batch"))
	applied := time.Since(began)
	for _, c := range goes {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("what is revoked ends with %v, want a reset", err)
		}
	}
	t.Logf("%d of %d connections: applied in %v, all reset after %v", going, all, applied, time.Since(began))
	for range going {
		if r := w.records.next(); r.Reason != "revoked" || r.Outcome != "deny" {
			t.Fatalf("recorded %s %s (%s)", r.Outcome, r.Reason, r.Detail)
		}
	}
	w.records.none()
	for _, c := range stays {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		speaks(t, c)
	}
	if n := w.p.table.size(); n != all-going {
		t.Errorf("%d connections are open, want %d", n, all-going)
	}
}

// Whoever is revoked, peer or own workload, by whatever names it: its connection is cut,
// no other comes in, in a full handshake or in a resumed one, and all is well again when
// the revocation ends.
func TestRevocationInbound(t *testing.T) {
	for name, by := range map[string]func(web, db *identity.Credential) *symbolonv1.Revocation{
		"the peer's ID":          func(_, _ *identity.Credential) *symbolonv1.Revocation { return revokedID(webID) },
		"the peer's certificate": func(web, _ *identity.Credential) *symbolonv1.Revocation { return revokedSerial(web) },
		"the peer's label":       func(_, _ *identity.Credential) *symbolonv1.Revocation { return revokedLabel("app", "web") },
		"our ID":                 func(_, _ *identity.Credential) *symbolonv1.Revocation { return revokedID(dbID) },
		"our certificate":        func(_, db *identity.Credential) *symbolonv1.Revocation { return revokedSerial(db) },
		"our label":              func(_, _ *identity.Credential) *symbolonv1.Revocation { return revokedLabel("app", "db") },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			web, db := w.web(), w.creds.byUID["0"]
			c, saw := w.openEcho(web)
			w.revoke(by(web, db))
			w.wasCut(c, saw, "revoked")
			reached := w.app.accepts.Load()
			for range 2 {
				x := w.handshake(w.call(w.app.addr), web.SVID.TLS, nil)
				_, _ = x.Write(append(w.open(encrypted), "secret"...))
				_, _ = ended(t, x)
				if r := w.records.next(); r.Reason != "revoked" || r.Outcome != "deny" {
					t.Errorf("recorded %s %s (%s)", r.Outcome, r.Reason, r.Detail)
				}
			}
			if w.app.accepts.Load() != reached || strings.Contains(w.app.received(), "secret") {
				t.Error("the application was reached")
			}
			w.revoke()
			w.good()
		})
	}
}

// A certificate that is revoked is refused, and no other one of its workload's.
func TestRevokedCertificateIsReplaced(t *testing.T) {
	w := newWorld(t)
	web, db := w.web(), w.creds.byUID["0"]
	w.revoke(revokedSerial(web), &symbolonv1.Revocation{Id: "ours", Subject: revokedSerial(db).Subject})
	if _, err := w.tunnel(web, encrypted); err == nil {
		t.Error("the revoked certificate was let in")
	}
	w.records.next()
	next := w.ca.workload("/prod/db", map[string][]string{"app": {"db"}})
	w.p.CredentialChanged(w.creds.set("0", next), next)
	w.good()
}

// A tunnel that waits is no way around: the next Open on it is refused.
func TestRevokedPeerReuses(t *testing.T) {
	w := newWorld(t)
	x := w.firstUse()
	w.revoke(revokedID(webID))
	_, _ = x.Write(append(w.framed(), frame("secret")...))
	_, _ = ended(t, x)
	if r := w.records.next(); r.Reason != "revoked" || r.Outcome != "deny" || !r.Reused || r.Source.SPIFFEID != webID {
		t.Errorf("recorded %+v", r)
	}
	if strings.Contains(w.app.received(), "secret") {
		t.Error("the application was reached")
	}
}

// Nor is the kernel's loopback, where no certificate is shown.
func TestRevocationOfALocalConnection(t *testing.T) {
	w := newWorld(t)
	w.policy(strings.Replace(baseline, "subject: {app: web}", "subject: {app: db}", 1)) // this process is both
	c := w.connect(w.app.addr)
	speaks(t, c)
	w.revoke(revokedID(dbID))
	if _, err := ended(t, c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the application sees %v", err)
	}
	if r := w.records.next(); r.Reason != "revoked" || r.Outcome != "deny" {
		t.Errorf("recorded %s %s (%s)", r.Outcome, r.Reason, r.Detail)
	}
	_, _ = w.ask(w.app.addr, "secret")
	if r := w.records.next(); r.Reason != "revoked" || r.Outcome != "deny" {
		t.Errorf("recorded %s %s (%s)", r.Outcome, r.Reason, r.Detail)
	}
	if strings.Contains(w.app.received(), "secret") {
		t.Error("the application was reached")
	}
}

// Of connections that register while somebody is revoked, none of the revoked survives,
// whichever came first, and no other is cut.
func TestRegistrationRacesWithARevocation(t *testing.T) {
	ca := newAuthority(t, "acme.example")
	peer := func(path string) *mtls.Peer {
		c := ca.workload(path, nil)
		return &mtls.Peer{Principal: c.SVID.Principal, Leaf: c.SVID.Chain[0]}
	}
	own := ca.workload("/prod/db", nil)
	good, bad := peer("/prod/web"), peer("/prod/batch")
	set := revocationsOf(t, revokedID(bad.ID.String()))
	for round := range 200 {
		var tab table
		var me party
		me.current.Store(mtls.NewEndpoint(own, mtls.Options{}))
		var wg sync.WaitGroup
		conns := make([]*live, 8)
		for i := range conns {
			p := []*mtls.Peer{good, bad}[i%2]
			conns[i] = &live{question: question{near: &me}, peer: &p.Principal, leaf: p.Leaf, judge: func(*policydb.Compiled, time.Time) (bool, time.Time) { return true, time.Time{} }, cut: func() {}}
			wg.Go(func() { tab.add(conns[i], time.Now()) })
		}
		wg.Go(func() { tab.setRevocations(set) })
		wg.Wait()
		for i, l := range conns {
			if cut := l.cutReason() == symbolonv1.Reason_REASON_REVOKED; cut != (i%2 == 1) {
				t.Fatalf("round %d: connection %d is cut: %v", round, i, cut)
			}
		}
	}
}

// A workload that becomes one that is revoked, by what it is called or by its labels, is
// cut when it does.
func TestWorkloadBecomesRevoked(t *testing.T) {
	w := newWorld(t)
	w.policy(baseline + "---\nkind: Policy\nnamespace: /prod\nname: web-calls-cache\nsubject: {app: web}\nverb: allow\nobject: {ext: cache}\n")
	w.revoke(revokedLabel("ext", "cache"))
	c, saw := w.openEcho(w.web())
	cred := w.ca.workload("/prod/db", map[string][]string{"app": {"db"}, "ext": {"cache"}})
	w.p.CredentialChanged(w.creds.set("0", cred), cred)
	w.wasCut(c, saw, "revoked")
}

// What a set of the largest size costs those whom it does not name.
func BenchmarkRevocations(b *testing.B) {
	ca := newAuthority(b, "acme.example")
	c := ca.workload("/prod/web", map[string][]string{"app": {"web"}, "env": {"prod"}})
	m := &symbolonv1.Revocations{Number: 1}
	for i := range 100_000 {
		r := revokedID(fmt.Sprintf("spiffe://acme.example/prod/w%d", i))
		if i%2 == 0 {
			r = revokedLabel("app", fmt.Sprint("w", i))
		}
		r.Id = fmt.Sprint(i)
		m.Added = append(m.Added, r)
	}
	set := must((*identity.Revocations)(nil).Update(m))(b)
	serial := c.SVID.Serial()
	b.Run("check", func(b *testing.B) {
		for b.Loop() {
			if set.Check(serial, &c.SVID.Principal) != nil {
				b.Fatal("revoked")
			}
		}
	})
	b.Run("update", func(b *testing.B) {
		for b.Loop() {
			if _, err := set.Update(&symbolonv1.Revocations{Number: 2, Base: 1, Removed: []string{"7"}}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// A handshake judges a peer by the labels that decisions go by: those of the namespace that
// the local workload is in, which its ID's path need not name.
func TestRevokedLabelCountsWhereTheWorkloadIs(t *testing.T) {
	site := newAuthority(t, "site.example")
	p := New(Options{Records: newRecorder(t), Log: zap.NewNop()})
	docs := must(policydb.Parse("test.yaml", []byte(`
kind: Namespace
name: /
mode: enforce
default: deny
attributes: {app: {}}
---
{kind: Namespace, name: /dev, mode: enforce}
---
{kind: Namespace, name: /prod, mode: enforce}
---
{kind: Profile, namespace: /dev, name: bad, match: {spiffe.id: "spiffe://other.example/x/bad"}, labels: {app: bad}}
---
{kind: Profile, namespace: /prod, name: elsewhere, match: {spiffe.id: "spiffe://other.example/x/good"}, labels: {app: bad}}
`)))(t)
	var rs []*symbolonv1.Resource
	for _, d := range docs {
		rs = append(rs, d.Resource)
	}
	p.SetHostNamespace("/dev")
	if err := p.SetPolicy(rs, 1); err != nil {
		t.Fatal(err)
	}
	p.SetRevocations(revocationsOf(t, revokedLabel("app", "bad")))
	// SPIRE calls it so; its host is in /dev, and so is it.
	local := site.workload("/prod/web", map[string][]string{"app": {"web"}})
	other := newAuthority(t, "other.example")
	for path, revoked := range map[string]bool{"/x/bad": true, "/x/good": false} {
		svid := other.workload(path, nil).SVID
		who := svid.Principal
		who.Attributes, who.Issuer = nil, identity.FromNobody
		if err := p.refuseRevokedPeer(local, &mtls.Peer{Principal: who, Leaf: svid.Chain[0]}); (err != nil) != revoked {
			t.Errorf("%s: %v", path, err)
		}
	}
}
