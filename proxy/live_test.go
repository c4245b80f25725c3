package proxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/policydb"
)

var denied = strings.Replace(baseline, "verb: allow", "verb: deny", 1)

// Of connections that register while the policy changes, none that the new one
// denies survives, whichever came first.
func TestRegistrationRacesWithThePolicy(t *testing.T) {
	compile := func(g uint64) *policydb.Compiled { return must(policydb.Compile(nil, g))(t) }
	for round := range 200 {
		open, closed := compile(1), compile(2)
		var tab table
		quietly := func() {}
		tab.setPolicy(open, quietly, time.Now())
		var cut, kept atomic.Int64
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				l := &live{
					judge: func(c *policydb.Compiled, _ time.Time) (bool, time.Time) { return c == open, time.Time{} },
					cut:   func() { cut.Add(1) },
				}
				tab.add(l, time.Now()) // decided by what was in force a moment ago
				if l.cutReason() == symbolonv1.Reason_REASON_UNSPECIFIED {
					kept.Add(1)
				}
			})
		}
		wg.Go(func() { tab.setPolicy(closed, quietly, time.Now()) })
		wg.Wait()
		if cut.Load() != 8 {
			t.Fatalf("round %d: %d of 8 were cut", round, cut.Load())
		}
	}
}

// A credential that changes while the policy does must not bring the old policy back.
func TestCredentialChangeKeepsTheNewestPolicy(t *testing.T) {
	ca := newAuthority(t, "acme.example")
	cred := ca.workload("/prod/web", nil)
	key := identity.Key{UID: 7}
	p := New(Options{Records: newRecorder(t), Log: zap.NewNop()})
	p.parties.get(&identity.Workload{Key: key}, cred, time.Now())
	for g := uint64(1); g < 500; g++ {
		var wg sync.WaitGroup
		wg.Go(func() { p.CredentialChanged(key, cred) })
		wg.Go(func() {
			if err := p.SetPolicy(nil, g); err != nil {
				t.Error(err)
			}
		})
		wg.Wait()
		if inForce := p.table.policy.Generation(); inForce != g {
			t.Fatalf("live connections are judged by generation %d, new ones by %d", inForce, g)
		}
	}
}

// What registers when everything has been ended is ended too, or a drain would wait
// for it for ever.
func TestNothingOpensAfterTheEnd(t *testing.T) {
	var tab table
	tab.endAll(symbolonv1.Reason_REASON_SHUTTING_DOWN)
	cut := false
	l := &live{cut: func() { cut = true }}
	tab.add(l, time.Now())
	if !cut || l.cutReason() != symbolonv1.Reason_REASON_SHUTTING_DOWN {
		t.Errorf("cut %v, reason %v", cut, l.cutReason())
	}
}

// openEcho is an open tunnel from web to the echoing application, and what the
// application sees of its end.
func (w *world) openEcho(cred *identity.Credential) (*mtls.Conn, <-chan error) {
	w.Helper()
	saw := make(chan error, 1)
	w.app.handle(func(c *net.TCPConn) { _, err := io.Copy(c, c); saw <- err })
	c, err := w.tunnel(cred, encrypted)
	if err != nil {
		w.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	speaks(w, c)
	return c, saw
}

// wasCut holds that both ends saw a reset, and what was recorded.
func (w *world) wasCut(c io.Reader, saw <-chan error, reason string) {
	w.Helper()
	if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		w.Errorf("the client sees %v, want a reset", err)
	}
	if err := within(w, saw, "the application's end"); !errors.Is(err, syscall.ECONNRESET) {
		w.Errorf("the application sees %v, want a reset", err)
	}
	r := w.records.next()
	want := map[bool]string{true: "error", false: "deny"}[reason == "shutting-down"]
	if r.Reason != reason || r.Outcome != want || r.BytesSent == 0 {
		w.Errorf("recorded %s %s (%s), want %s %s", r.Outcome, r.Reason, r.Detail, want, reason)
	}
}

func TestPolicyChangeCutsTheDeniedAndOnlyThem(t *testing.T) {
	w := newWorld(t)
	const second = "---\nkind: Policy\nnamespace: /prod\nname: batch-calls-db\nsubject: {app: batch}\nverb: allow\nobject: {app: db}\n"
	w.policy(baseline + second)
	stays, sawStay := w.openEcho(w.ca.workload("/prod/batch", map[string][]string{"app": {"batch"}}))
	goes, sawGo := w.openEcho(w.web())
	w.policy(denied + second)
	w.wasCut(goes, sawGo, "policy-changed")
	speaks(t, stays)
	if _, err := w.tunnel(w.web(), encrypted); err == nil {
		t.Error("a new connection is still allowed")
	}
	w.records.next()
	if err := stays.CloseWrite(); err != nil {
		t.Error(err)
	}
	if err := within(t, sawStay, "the application's end"); err != nil {
		t.Errorf("what stays ends with %v", err)
	}
	stays.Close()
	if r := w.records.next(); r.Outcome != "allow" {
		t.Errorf("what stays is recorded as %+v", r)
	}
}

// A stricter protection than the tunnel has cuts it; the same does not.
func TestPolicyThatDemandsMoreProtectionCuts(t *testing.T) {
	w := newWorld(t)
	weak := strings.Replace(baseline, "protection: encrypted", "protection: authenticated", 1)
	w.policy(weak)
	saw := make(chan error, 1)
	w.app.handle(func(c *net.TCPConn) { _, err := io.Copy(c, c); saw <- err })
	c, err := w.tunnel(w.web(), authenticated)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	speaks(t, c)
	w.policy(weak)
	speaks(t, c)
	w.policy(baseline)
	w.wasCut(c, saw, "policy-changed")
}

// What was allowed for a time only is cut when it has passed, by the sweep.
func TestSweep(t *testing.T) {
	const day = 24 * time.Hour
	for _, tc := range []struct {
		name          string
		policy        func(now time.Time) string
		own, peer     time.Duration // validity of the SVIDs
		ahead, reason string
	}{
		{"our SVID expires", nil, time.Hour, day, "61m", "svid-expired"},
		{"the peer's SVID expires", nil, day, time.Hour, "61m", "svid-expired"},
		{"the window closes", func(now time.Time) string {
			return baseline + fmt.Sprintf("when: {hours: %q, timezone: UTC}\n", now.Add(-time.Hour).Format("15:04-")+now.Add(time.Hour).Format("15:04"))
		}, day, day, "2h", "policy-changed"},
		{"the policy expires", func(now time.Time) string {
			return baseline + fmt.Sprintf("expires: %s\n", now.Add(time.Hour).Format(time.RFC3339))
		}, day, day, "61m", "policy-changed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			svid := func(path, app string, valid time.Duration) *identity.Credential {
				l := w.ca.leaf(path, map[string][]string{"app": {app}})
				l.NotAfter = time.Now().Add(valid)
				return w.ca.credential(l, identity.NewSVID)
			}
			w.creds.set("0", svid("/prod/db", "db", tc.own))
			if tc.policy != nil {
				w.policy(tc.policy(time.Now().UTC()))
			}
			c, saw := w.openEcho(svid("/prod/web", "web", tc.peer))
			ahead, err := time.ParseDuration(tc.ahead)
			if err != nil {
				t.Fatal(err)
			}
			w.clock.advance(ahead / 4)
			w.p.table.sweep(w.p.now())
			speaks(t, c) // not yet
			w.clock.advance(ahead)
			w.wasCut(c, saw, tc.reason)
		})
	}
}

// A new credential of ours judges our connections again, by its claims.
func TestRotation(t *testing.T) {
	w := newWorld(t)
	c, saw := w.openEcho(w.web())
	rotate := func(app string) {
		cred := w.ca.workload("/prod/db", map[string][]string{"app": {app}})
		w.p.CredentialChanged(w.creds.set("0", cred), cred)
	}
	rotate("db")
	speaks(t, c)
	rotate("cache")
	w.wasCut(c, saw, "policy-changed")
}

// A handshake that takes its time is judged by the policy that holds at its end:
// the application is not reached by leave of an older one.
func TestDecisionIsTheNewestPolicys(t *testing.T) {
	w := newWorld(t)
	c := w.call(w.app.addr)
	x := w.handshake(c, w.web().SVID.TLS, nil)
	open := w.open(encrypted)
	_, _ = x.Write(open[:10])
	// The proxy has read the handshake, and waits for the rest.
	w.policy(denied)
	_, _ = x.Write(append(open[10:], "secret"...))
	_, _ = ended(t, c)
	c.Close()
	if r := w.records.next(); r.Reason != "policy" || r.Outcome != "deny" || r.Generation != w.gen {
		t.Errorf("recorded %s %s, generation %d of %d", r.Outcome, r.Reason, r.Generation, w.gen)
	}
	if w.app.accepts.Load() != 0 {
		t.Error("the application was reached")
	}
}

// Stopping ends what is open and what is still being set up, and takes no longer
// than the drain allows.
func TestDrain(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Timeouts.Handshake, o.Timeouts.Setup = patience, patience })
	c, saw := w.openEcho(w.web())
	silent := w.call(w.app.addr)
	half := w.call(w.app.addr)
	w.handshake(half, w.web().SVID.TLS, nil)
	began := time.Now()
	if err := w.stop(); err != nil {
		t.Error(err)
	}
	if d := time.Since(began); d < testTimeouts.Drain || d > testTimeouts.Drain+patience/2 {
		t.Errorf("stopping took %v", d)
	}
	if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client sees %v", err)
	}
	if err := within(t, saw, "the application's end"); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the application sees %v", err)
	}
	_, _ = ended(t, silent)
	_, _ = ended(t, half)
	for range 3 {
		if r := w.records.next(); r.Reason != "shutting-down" || r.Outcome != "error" {
			t.Errorf("recorded %s %s (%s)", r.Outcome, r.Reason, r.Detail)
		}
	}
}

// A reader of the proxy's own page, who keeps the connection open, does not keep
// the proxy from stopping.
func TestDrainWithAnAdminReader(t *testing.T) {
	admin := listen(t, "127.0.0.1:15020")
	accepted := make(chan *net.TCPConn, 1)
	go func() {
		if c, err := admin.AcceptTCP(); err == nil {
			accepted <- c
		}
	}()
	w := newWorld(t, func(o *Options) { o.Admin = admin.Addr().(*net.TCPAddr).AddrPort() })
	c := w.connect(admin.Addr().(*net.TCPAddr).AddrPort())
	page := within(t, accepted, "the page's connection")
	defer page.Close()
	_ = page.SetDeadline(time.Now().Add(patience))
	speaksRaw(t, c, page)
	w.policy(denied) // says nothing of it
	speaksRaw(t, c, page)
	if err := w.stop(); err != nil {
		t.Error(err)
	}
	if _, err := ended(t, c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the reader sees %v", err)
	}
	if r := w.records.next(); r.Reason != "shutting-down" || !r.Local {
		t.Errorf("recorded %+v", r)
	}
}
