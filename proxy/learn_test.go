package proxy

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/mtls"
)

// learning is baseline with /prod, which this host's workload is in, in learn. /lab is
// in learn in both, or enforced in both: see inLab.
var (
	learning = strings.Replace(baseline, "name: /prod\nmode: enforce", "name: /prod\nmode: learn", 1)
	inLab    = "---\nkind: Namespace\nname: /lab\nmode: learn\n"
)

// knownPeers makes these addresses those of hosts with a proxy.
func (w *world) knownPeers(addresses ...string) {
	var out [][]byte
	for _, a := range addresses {
		out = append(out, netip.MustParseAddr(a).AsSlice())
	}
	w.p.SetPeers(out)
}

// passed holds that a record tells of bytes that went unprotected, by learn alone.
func passed(t *testing.T, r *flow.Line, why string) {
	t.Helper()
	if r.Outcome != "allow" || r.Reason != "learn" || r.WouldVerdict != "deny" || r.Protection != "none" {
		t.Errorf("%s: recorded %+v", why, r)
	}
}

func TestLearnPassesUntouchedWhatHasNoProxy(t *testing.T) {
	w := newWorld(t)
	w.policy(learning)
	w.knownPeers(protected4, "10.9.9.9")
	for _, address := range []string{otherB, other6} {
		t.Run(address, func(t *testing.T) {
			w := w.in(t)
			first := make(chan string, 1)
			to := w.serveOther(net.JoinHostPort(address, "0"), func(c *net.TCPConn) {
				b := make([]byte, 64)
				n, _ := c.Read(b)
				first <- string(b[:n])
				_, _ = c.Write(b[:n])
				_, _ = io.Copy(c, c)
				_ = c.CloseWrite()
			})
			c := w.connect(to)
			speaks(t, c)
			_ = c.CloseWrite()
			if got, err := ended(t, c); err != nil || len(got) > 0 {
				t.Errorf("the end: %q, %v", got, err)
			}
			if got := within(t, first, "the server's read"); got != "are you there?" {
				t.Errorf("the server was sent %q first: nobody asked for a probe", got)
			}
			r := w.records.next()
			passed(t, r, "to nobody known")
			if r.Destination.SPIFFEID != "" || r.Destination.External != "" || r.Destination.Address != to.String() || r.BytesSent != 14 {
				t.Errorf("recorded %+v", r)
			}
		})
	}
}

// A peer that is known to have a proxy gets a tunnel, and one that does not answer as
// one gets nothing: no fallback, in learn neither.
func TestLearnNeverFallsBackFromATunnel(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Timeouts.Handshake = 3 * time.Second })
	w.policy(learning)
	w.knownPeers(otherB)
	read := make(chan string, 1)
	to := w.serveOther(otherB+":0", func(c *net.TCPConn) {
		b := make([]byte, 4096)
		n, _ := c.Read(b)
		_, _ = io.WriteString(c, "220 welcome\r\n")
		rest, _ := io.ReadAll(c)
		read <- string(b[:n]) + string(rest)
	})
	if got, err := w.ask(to, "secret"); !errors.Is(err, syscall.ECONNRESET) || len(got) > 0 {
		t.Errorf("the application reads %q, %v", got, err)
	}
	if r := w.records.next(); r.Outcome != "deny" || r.Reason != "peer-unprotected" {
		t.Errorf("recorded %s %s", r.Outcome, r.Reason)
	}
	if s := within(t, read, "the server's read"); strings.Contains(s, "secret") || !strings.Contains(s, mtls.ALPN) {
		t.Errorf("the server read %q", s)
	}
}

// A tunnel in learn is let through by what policy would deny, and protected as ever.
func TestLearnUsesTunnels(t *testing.T) {
	w := newWorld(t)
	w.policy(learning)
	w.knownPeers(otherB)
	to := w.serveOther(otherB+":0", func(c *net.TCPConn) {
		cert := *w.ca.workload("/prod/other", map[string][]string{"app": {"other"}}).SVID.TLS
		x := w.server(c, cert, nil)
		o, err := readOpen(x)
		if err != nil {
			return
		}
		_, _ = x.Write(message(&symbolonv1.Verdict{Accept: true, Protection: o.GetProtection(), FlowId: o.GetFlowId(), Reason: symbolonv1.Reason_REASON_POLICY}))
		b := make([]byte, len(frame("hello")))
		_, _ = io.ReadFull(x, b)
		_, _ = io.WriteString(x, frame(strings.ToUpper(string(b[len(frame("")):])))+frame(""))
		_, _ = io.Copy(io.Discard, x)
	})
	if got, err := w.ask(to, "hello"); string(got) != "HELLO" {
		t.Errorf("the application reads %q, %v", got, err)
	}
	if r := w.records.next(); r.Outcome != "allow" || r.Reason != "learn" || r.WouldVerdict != "deny" || r.Protection != "encrypted" ||
		r.Destination.Workload != "other" {
		t.Errorf("recorded %+v", r)
	}
	// The server's side: nobody but web has a policy.
	c, err := w.tunnel(w.ca.workload("/prod/batch", map[string][]string{"app": {"batch"}}), encrypted)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	speaks(t, c)
	_ = c.CloseWrite()
	_, _ = io.ReadAll(c)
	c.Close()
	if r := w.records.next(); r.Outcome != "allow" || r.Reason != "learn" || r.WouldVerdict != "deny" || r.Protection != "encrypted" || r.Source.Workload != "batch" {
		t.Errorf("recorded %+v", r)
	}
	w.good()
}

func TestLearnLetsInClientsWithoutAProxy(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Timeouts.Handshake = time.Second })
	w.policy(learning)
	c := w.call(w.app.addr)
	speaks(t, c)
	_ = c.CloseWrite()
	if got, err := ended(t, c); err != nil || len(got) > 0 {
		t.Errorf("the end: %q, %v", got, err)
	}
	r := w.records.next()
	passed(t, r, "from nobody known")
	if r.Source.External != "" || r.Source.SPIFFEID != "" {
		t.Errorf("recorded %+v", r)
	}
	w.good() // a tunnel is one all the same

	// A client that waits for the server to speak first: after a moment; where a proxy is
	// to be expected, after the deadline for its ClientHello.
	w.app.handle(func(c *net.TCPConn) { _, _ = io.WriteString(c, "220 welcome\r\n"); w.app.echo(c) })
	for _, wait := range []time.Duration{testTimeouts.Quiet, time.Second} {
		began := time.Now()
		c := w.call(w.app.addr)
		expect(t, c, "220 welcome\r\n")
		if d := time.Since(began); d < wait {
			t.Errorf("taken for a silent client after %v, want at least %v", d, wait)
		}
		_ = reset(c)
		passed(t, w.records.next(), "a silent client")
		w.knownPeers(other4)
	}
}

// What learn let through is cut when the namespace enforces, in both directions.
func TestEndOfLearnCutsWhatPolicyDenies(t *testing.T) {
	w := newWorld(t)
	w.policy(learning)
	saw := make(chan error, 1)
	w.app.handle(func(c *net.TCPConn) { _, err := io.Copy(c, c); saw <- err })
	in := w.call(w.app.addr)
	speaks(t, in)
	w.policy(baseline)
	w.wasCut(in, saw, "policy-changed")

	w.policy(learning)
	to := w.serveOther(otherB+":0", func(c *net.TCPConn) { _, err := io.Copy(c, c); saw <- err })
	out := w.connect(to)
	speaks(t, out)
	w.policy(baseline)
	w.wasCut(out, saw, "policy-changed")

	w.policy(learning)
	tunnel, sawTunnel := w.openEcho(w.ca.workload("/prod/batch", map[string][]string{"app": {"batch"}}))
	w.policy(baseline)
	w.wasCut(tunnel, sawTunnel, "policy-changed")
}

// The attacks: a workload that enforces is opened by nobody else's learn.
func TestLearnOpensNothingThatEnforces(t *testing.T) {
	w := newWorld(t)
	w.policy(baseline + inLab + "---\nkind: Policy\nnamespace: /prod\nname: out\nsubject: {app: db}\nverb: allow\nobject: any\n")
	if w.p.policy.Load().Learns("/prod") || !w.p.policy.Load().Learns("/lab") {
		t.Fatal("the set-up is wrong: /lab learns, /prod does not")
	}
	// A peer in learn asks a server that enforces.
	if _, err := w.tunnel(w.ca.workload("/lab/web", map[string][]string{"app": {"lab"}}), encrypted); mtls.ReasonOf(err) != symbolonv1.Reason_REASON_PEER_REFUSED {
		t.Errorf("a client in learn: %v", err)
	}
	if r := w.records.next(); r.Outcome != "deny" || r.Reason != "default" || r.WouldVerdict != "" {
		t.Errorf("recorded %+v", r)
	}
	// A plain client, from an address that is and one that is not a host's.
	for _, known := range []string{"10.9.9.9", other4} {
		w.knownPeers(known)
		c := w.call(w.app.addr)
		_, _ = io.WriteString(c, "secret")
		_, _ = ended(t, c)
		if r := w.records.next(); r.Outcome != "deny" || r.Reason != "peer-unprotected" {
			t.Errorf("recorded %s %s", r.Outcome, r.Reason)
		}
	}
	// A client that enforces, and a server that says it is one in learn, or says nothing
	// of itself: whoever controls the address, known or unknown, gets no plain byte.
	for _, known := range []string{"10.9.9.9", otherB} {
		w.knownPeers(known)
		read := make(chan string, 1)
		to := w.serveOther(otherB+":0", func(c *net.TCPConn) {
			b := make([]byte, 4096)
			n, _ := c.Read(b)
			_, _ = io.WriteString(c, "220 no proxy here\r\n")
			rest, _ := io.ReadAll(c)
			read <- string(b[:n]) + string(rest)
		})
		if got, err := w.ask(to, "secret"); !errors.Is(err, syscall.ECONNRESET) || len(got) > 0 {
			t.Errorf("the application reads %q, %v", got, err)
		}
		if s := within(t, read, "the server's read"); strings.Contains(s, "secret") {
			t.Errorf("the server read %q", s)
		}
		if r := w.records.next(); r.Outcome != "deny" || r.Reason != "peer-unprotected" {
			t.Errorf("recorded %s %s", r.Outcome, r.Reason)
		}
	}
	if w.app.accepts.Load() != 0 || strings.Contains(w.app.received(), "secret") {
		t.Error("the application was reached")
	}
}

// An address list is from the network: whatever is in it, it is no more than a list.
func TestPeersThatAreNoAddresses(t *testing.T) {
	var p Proxy
	p.SetPeers([][]byte{nil, {1}, {10, 0, 0, 1}, make([]byte, 17), netip.MustParseAddr("::ffff:10.0.0.2").AsSlice()})
	for a, want := range map[string]bool{"10.0.0.1": true, "10.0.0.2": true, "::ffff:10.0.0.1": true, "10.0.0.3": false, "::": false} {
		if got := p.peers.has(netip.MustParseAddr(a)); got != want {
			t.Errorf("%s: %t", a, got)
		}
	}
}

// What a namespace above denies stays denied in learn, to and from addresses as well.
func TestLearnDoesNotGetRoundAParent(t *testing.T) {
	w := newWorld(t)
	above := func(name, subject, object string) string {
		return "---\nkind: Policy\nnamespace: /\nname: " + name + "\nsubject: " + subject + "\nverb: deny\nobject: " + object + "\npropagate: true\n"
	}
	w.policy(learning + above("db-stays-in", "{app: db}", "{app: {exists: false}}") + above("nobody-in", "{app: {exists: false}}", "{app: db}"))
	reached := make(chan struct{}, 1)
	to := w.serveOther(otherB+":0", func(*net.TCPConn) { reached <- struct{}{} })
	if got, err := w.ask(to, "secret"); !errors.Is(err, syscall.ECONNRESET) || len(got) > 0 {
		t.Errorf("the application reads %q, %v", got, err)
	}
	if r := w.records.next(); r.Outcome != "deny" || r.Reason != "policy" || r.ClientPolicy != "/db-stays-in" {
		t.Errorf("recorded %+v", r)
	}
	c := w.call(w.app.addr)
	_, _ = io.WriteString(c, "secret")
	_, _ = ended(t, c)
	if r := w.records.next(); r.Outcome != "deny" || r.Reason != "policy" || r.ServerPolicy != "/nobody-in" {
		t.Errorf("recorded %+v", r)
	}
	if len(reached) > 0 || w.app.accepts.Load() != 0 {
		t.Error("what a parent denies was reached")
	}
	w.good()
}
