package proxy

import (
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
)

// inTheClear is baseline without encryption: there is no TLS to renew in.
var inTheClear = strings.Replace(baseline, "protection: encrypted", "protection: authenticated", 1)

// dialled is a tunnel with cred whose Open change has made what it is.
func (w *world) dialled(cred *identity.Credential, id mtls.FlowID, change func(*symbolonv1.Open)) (*mtls.Conn, error) {
	w.Helper()
	ctx := w.ctx()
	t, err := mtls.Dial(ctx, w.call(w.app.addr), mtls.NewEndpoint(cred, mtls.Options{}), func(*mtls.Peer) (*symbolonv1.Open, error) {
		o := mtls.NewOpen(id, w.app.addr, authenticated, 1)
		change(o)
		return o, nil
	})
	if err == nil {
		_, err = t.ReadVerdict(ctx)
	}
	return t, err
}

// bare is an open connection without encryption that can be renewed, and what names it.
func (w *world) bare(cred *identity.Credential) (*mtls.Conn, mtls.Claim, <-chan error) {
	w.Helper()
	saw := make(chan error, 1)
	w.app.handle(func(c *net.TCPConn) { _, err := io.Copy(c, c); saw <- err })
	id := mtls.NewFlowID()
	t, err := w.dialled(cred, id, func(o *symbolonv1.Open) { o.Renewable = true })
	if err != nil {
		w.Fatal(err)
	}
	if !t.Renewable() || t.Renewal() != nil {
		w.Fatal("the connection is to be renewed aside")
	}
	claim, err := t.Claim(id)
	if err != nil {
		w.Fatal(err)
	}
	_ = t.SetReadDeadline(time.Now().Add(patience))
	speaks(w, t)
	return t, claim, saw
}

func (w *world) renew(cred *identity.Credential, claim mtls.Claim) error {
	t, err := w.dialled(cred, mtls.NewFlowID(), func(o *symbolonv1.Open) { o.Renews = claim[:] })
	if err == nil {
		defer t.Close()
		_ = t.SetReadDeadline(time.Now().Add(patience))
		if b, err := io.ReadAll(t); err != nil || len(b) > 0 {
			w.Errorf("behind the verdict came %q, %v", b, err)
		}
	}
	return err
}

// A connection whose bytes are in the clear outlives its certificates, too: another tunnel
// shows the newer ones, which reaches no application and is no flow.
func TestRenewedAside(t *testing.T) {
	w := newWorld(t)
	w.policy(inTheClear)
	w.creds.set("0", w.lasting("/prod/db", "db", time.Hour))
	c, claim, saw := w.bare(w.lasting("/prod/web", "web", time.Hour))
	w.clock.advance(45 * time.Minute)
	own := w.lasting("/prod/db", "db", 4*time.Hour)
	w.p.CredentialChanged(w.creds.set("0", own), own)
	newer := w.lasting("/prod/web", "web", 4*time.Hour)
	if err := w.renew(newer, claim); err != nil {
		t.Fatal(err)
	}
	w.stood(newer)
	w.clock.advance(time.Hour)
	w.p.table.sweep(w.p.now())
	speaks(t, c)
	if n := w.app.accepts.Load(); n != 1 {
		t.Errorf("the application was reached %d times", n)
	}
	w.records.none()
	w.clock.advance(3 * time.Hour)
	w.wasCut(c, saw, "svid-expired")
	if len(w.p.asides.all) != 0 {
		t.Error("what has ended can still be renewed")
	}
	if err := w.renew(w.lasting("/prod/web", "web", 24*time.Hour), claim); !isPeerReason(err, symbolonv1.Reason_REASON_PROOF_INVALID) {
		t.Errorf("what has ended: %v", err)
	}
	w.records.next()
}

func isPeerReason(err error, r symbolonv1.Reason) bool {
	var d *mtls.DeniedError
	return errors.As(err, &d) && d.Peer == r
}

// Nobody renews a connection who is not its peer, or cannot name it.
func TestRenewedAsideByOthers(t *testing.T) {
	w := newWorld(t)
	w.policy(inTheClear + "---\nkind: Policy\nnamespace: /prod\nname: spy-calls-db\nsubject: {app: spy}\nverb: allow\nobject: {app: db}\n")
	w.creds.set("0", w.lasting("/prod/db", "db", 24*time.Hour))
	c, claim, saw := w.bare(w.lasting("/prod/web", "web", time.Hour))
	guess := claim
	guess[len(guess)-1] ^= 1
	for name, tc := range map[string]struct {
		cred  *identity.Credential
		claim mtls.Claim
	}{
		"another workload, which has heard the name": {w.lasting("/prod/spy", "spy", 24*time.Hour), claim},
		"the peer, with a name like it":              {w.lasting("/prod/web", "web", 24*time.Hour), guess},
	} {
		if err := w.renew(tc.cred, tc.claim); !isPeerReason(err, symbolonv1.Reason_REASON_PROOF_INVALID) {
			t.Errorf("%s: %v", name, err)
		}
		if r := w.records.next(); r.Reason != "proof-invalid" || r.Outcome != "deny" {
			t.Errorf("%s: recorded %s %s (%s)", name, r.Outcome, r.Reason, r.Detail)
		}
	}
	speaks(t, c)
	for _, l := range w.p.table.snapshot() {
		if l.notAfter.After(time.Now().Add(2 * time.Hour)) {
			t.Error("the connection stands on another certificate")
		}
	}
	// The peer itself, whose newer certificate says what policy denies.
	if err := w.renew(w.lasting("/prod/web", "other", 24*time.Hour), claim); !isPeerReason(err, symbolonv1.Reason_REASON_POLICY_CHANGED) {
		t.Errorf("denied by policy: %v", err)
	}
	if _, err := io.ReadAll(c); err == nil {
		t.Error("the client sees a clean end")
	}
	within(t, saw, "the application's end")
	for range 2 {
		if r := w.records.next(); r.Reason != "policy-changed" {
			t.Errorf("recorded %s %s (%s)", r.Outcome, r.Reason, r.Detail)
		}
	}
	if n := w.app.accepts.Load(); n != 1 {
		t.Errorf("the application was reached %d times", n)
	}
}

// When another CA signs, the other tunnel is made soon: the former may be retired.
func TestRenewsAsideWithTheCA(t *testing.T) {
	w := newWorld(t)
	w.policy(inTheClear)
	w.creds.set("0", w.lasting("/prod/web", "web", 24*time.Hour))
	opens := make(chan *symbolonv1.Open, 2)
	to := w.serveOther(other4+":0", func(c *net.TCPConn) {
		x, open, err := mtls.Accept(w.ctx(), c, mtls.NewEndpoint(w.lasting("/prod/db", "db", 24*time.Hour), mtls.Options{}))
		if err == nil {
			err = x.Grant(w.ctx(), &symbolonv1.Verdict{FlowId: open.GetFlowId()})
		}
		if err != nil {
			t.Error(err)
		}
		opens <- open
		_, _ = io.Copy(x, x)
	})
	app := w.connect(to)
	speaks(t, app)
	within(t, opens, "the connection")
	rotate := func() {
		own := w.lasting("/prod/web", "web", 24*time.Hour)
		w.p.CredentialChanged(w.creds.set("0", own), own)
		w.clock.advance(2 * askAfter)
		w.p.table.askAll(w.p.now())
	}
	rotate()
	speaks(t, app)
	if len(opens) > 0 {
		t.Error("another tunnel, though the CA is the same")
	}
	w.ca.issues = newKey(t)
	w.ca.issuer = sign(t, caTemplate(t, "next issuer"), w.ca.root, &w.ca.issues.PublicKey, w.ca.rootKey)
	rotate()
	if o := within(t, opens, "another tunnel"); len(o.GetRenews()) == 0 {
		t.Errorf("the tunnel brings %v", o)
	}
	speaks(t, app)
}

// The client's side makes the other tunnel, and takes nobody else for its server.
func TestRenewsAside(t *testing.T) {
	w := newWorld(t)
	w.policy(inTheClear)
	w.creds.set("0", w.lasting("/prod/web", "web", time.Hour))
	// who the server is for each tunnel in turn
	presents := make(chan *identity.Credential, 3)
	presents <- w.lasting("/prod/db", "db", time.Hour)
	opens := make(chan *symbolonv1.Open, 3)
	to := w.serveOther(other4+":0", func(c *net.TCPConn) {
		x, open, err := mtls.Accept(w.ctx(), c, mtls.NewEndpoint(<-presents, mtls.Options{}))
		if err != nil {
			opens <- nil
			return
		}
		if len(open.GetRenews()) > 0 {
			claim := mtls.Claim(open.GetRenews())
			open.Renews = claim[:]
		} else if claim, err := x.Claim(mtls.FlowID(open.GetFlowId())); err == nil {
			open.Renews = claim[:] // for the test to compare
		}
		if err := x.Grant(w.ctx(), &symbolonv1.Verdict{FlowId: open.GetFlowId()}); err != nil {
			t.Error(err)
		}
		opens <- open
		_, _ = io.Copy(x, x)
		_ = x.CloseWrite()
		_, _ = io.Copy(io.Discard, x)
	})
	app := w.connect(to)
	speaks(t, app)
	first := within(t, opens, "the connection")
	own := w.lasting("/prod/web", "web", 4*time.Hour)
	w.p.CredentialChanged(w.creds.set("0", own), own)

	presents <- w.lasting("/prod/web", "db", 4*time.Hour) // somebody else has the address
	w.clock.advance(45 * time.Minute)
	if o := within(t, opens, "a tunnel"); o != nil {
		t.Errorf("an Open for somebody else: %v", o)
	}
	speaks(t, app)
	newer := w.lasting("/prod/db", "db", 4*time.Hour)
	presents <- newer
	for range 20 { // when the first has failed, and so when it is tried again, is not known here
		w.clock.advance(2 * askAfter)
		for end := time.Now().Add(2 * sweepEvery); len(opens) == 0 && time.Now().Before(end); {
			time.Sleep(10 * time.Millisecond)
		}
		if len(opens) > 0 {
			break
		}
	}
	again := within(t, opens, "another tunnel")
	if again == nil || string(again.GetRenews()) != string(first.GetRenews()) || again.GetFramed() {
		t.Errorf("the tunnel renews %v, the connection is %v", again, first)
	}
	w.stood(newer)
	w.clock.advance(time.Hour)
	w.p.table.sweep(w.p.now())
	speaks(t, app)
	_ = app.CloseWrite()
	if _, err := io.ReadAll(app); err != nil {
		t.Errorf("the application sees %v, want an end", err)
	}
	if r := w.records.next(); r.Outcome != "allow" || r.Protection != "authenticated" {
		t.Errorf("recorded %+v", r)
	}
	w.records.none()
}
