package proxy

import (
	"errors"
	"io"
	"maps"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/symbolon/symbolon/mtls"
)

// office is the other host's first address, which has no proxy, and what it may do
// in both directions; its second address is nobody's.
var office = strings.Replace(baseline, "protection: encrypted", "protection: authenticated", 1) + `---
kind: External
namespace: /prod
name: office
labels: {ext: office}
addresses: {cidrs: [` + other4 + `/32, "` + other6 + `/128"]}
---
kind: Policy
namespace: /prod
name: office-calls-db
subject: {ext: office}
verb: allow
object: {app: db}
---
kind: Policy
namespace: /prod
name: db-calls-office
subject: {app: db}
verb: allow
object: {ext: office}
`

func TestInboundExternal(t *testing.T) {
	w := newWorld(t)
	w.policy(office)
	for _, address := range []string{protected4, protected6} {
		t.Run(address, func(t *testing.T) {
			w := w.in(t)
			c := w.call(netip.AddrPortFrom(netip.MustParseAddr(address), appPort))
			speaks(t, c)
			_ = c.CloseWrite()
			if got, err := ended(t, c); err != nil || len(got) > 0 {
				t.Errorf("the end: %q, %v", got, err)
			}
			r := w.records.next()
			if r.Outcome != "allow" || r.Protection != "none" || r.Source.External != "/prod/office" || r.Source.SPIFFEID != "" ||
				r.ServerPolicy != "/prod/office-calls-db" || r.BytesSent != 14 || r.BytesReceived != 14 {
				t.Errorf("recorded %+v", r)
			}
		})
	}
	t.Run("a tunnel from the same address is a tunnel", func(t *testing.T) { w.in(t).good() })
	t.Run("nobody's address", func(t *testing.T) {
		w := w.in(t)
		reached := w.app.accepts.Load()
		c := w.callFrom(netip.MustParseAddr(otherB), w.app.addr)
		_, _ = io.WriteString(c, "secret")
		_, _ = ended(t, c)
		if r := w.records.next(); r.Reason != "peer-unprotected" || r.Outcome != "deny" || w.app.accepts.Load() != reached {
			t.Errorf("recorded %s %s, reached %d times", r.Outcome, r.Reason, w.app.accepts.Load()-reached)
		}
	})
	t.Run("an obligation to encrypt", func(t *testing.T) {
		w := w.in(t)
		w.policy(office + "---\nkind: Policy\nnamespace: /prod\nname: all-encrypted\nsubject: any\nverb: encrypt\nobject: {app: db}\n")
		defer w.policy(office)
		reached := w.app.accepts.Load()
		c := w.call(w.app.addr)
		_, _ = io.WriteString(c, "secret")
		_, _ = ended(t, c)
		if r := w.records.next(); r.Reason != "encryption-unavailable" || r.Outcome != "deny" || w.app.accepts.Load() != reached {
			t.Errorf("recorded %s %s, reached %d times", r.Outcome, r.Reason, w.app.accepts.Load()-reached)
		}
	})
	if strings.Contains(w.app.received(), "secret") {
		t.Error("the application was sent what policy denies")
	}
}

// A server that speaks first is heard by a client that waits, after a moment, if an
// External covers the client; anybody else who says nothing is reset, unheard.
func TestServerSpeaksFirst(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Timeouts.Handshake = time.Second })
	w.policy(office)
	w.app.handle(func(c *net.TCPConn) { _, _ = io.WriteString(c, "220 welcome\r\n"); w.app.echo(c) })
	began := time.Now()
	c := w.call(w.app.addr)
	expect(t, c, "220 welcome\r\n")
	if d := time.Since(began); d < testTimeouts.Quiet {
		t.Errorf("taken for a silent client after %v", d)
	}
	speaks(t, c)
	_ = reset(c)
	if r := w.records.next(); r.Outcome != "allow" || r.Source.External != "/prod/office" {
		t.Errorf("recorded %+v", r)
	}

	stranger := w.callFrom(netip.MustParseAddr(otherB), w.app.addr)
	if got, err := ended(t, stranger); !errors.Is(err, syscall.ECONNRESET) || len(got) > 0 {
		t.Errorf("a silent stranger reads %q, %v", got, err)
	}
	if r := w.records.next(); r.Reason != "silent-client" || r.Outcome != "deny" || r.Source.External != "" {
		t.Errorf("recorded %s %s of %q", r.Outcome, r.Reason, r.Source.External)
	}
	if n := w.app.accepts.Load(); n != 1 {
		t.Errorf("the application saw %d connections, want 1", n)
	}
}

func TestOutboundExternal(t *testing.T) {
	w := newWorld(t)
	w.policy(office)
	for _, address := range []string{other4, other6} {
		t.Run(address, func(t *testing.T) {
			w := w.in(t)
			to := w.serveOther(net.JoinHostPort(address, "0"), func(c *net.TCPConn) { _, _ = io.Copy(c, c); _ = c.CloseWrite() })
			c := w.connect(to)
			speaks(t, c)
			_ = c.CloseWrite()
			if got, err := ended(t, c); err != nil || len(got) > 0 {
				t.Errorf("the end: %q, %v", got, err)
			}
			r := w.records.next()
			if r.Outcome != "allow" || r.Protection != "none" || r.Destination.External != "/prod/office" || r.Destination.Address != to.String() ||
				r.ClientPolicy != "/prod/db-calls-office" || r.BytesSent != 14 || r.BytesReceived != 14 {
				t.Errorf("recorded %+v", r)
			}
		})
	}
	t.Run("cut by policy", func(t *testing.T) {
		w := w.in(t)
		saw := make(chan error, 1)
		to := w.serveOther(other4+":0", func(c *net.TCPConn) { _, err := io.Copy(c, c); saw <- err })
		c := w.connect(to)
		speaks(t, c)
		w.policy(strings.Replace(office, "ext: office}\naddresses", "ext: lab}\naddresses", 1)) // another label
		defer w.policy(office)
		w.wasCut(c, saw, "policy-changed")
	})
	t.Run("nobody there", func(t *testing.T) {
		w := w.in(t)
		if got, err := w.ask(netip.AddrPortFrom(netip.MustParseAddr(other4), 1), "x"); !errors.Is(err, syscall.ECONNRESET) || len(got) > 0 {
			t.Errorf("the application reads %q, %v", got, err)
		}
		if r := w.records.next(); r.Outcome != "error" || r.Reason != "refused" {
			t.Errorf("recorded %s %s", r.Outcome, r.Reason)
		}
	})
	t.Run("what is no External must be a tunnel", func(t *testing.T) {
		w := w.in(t)
		got := make(chan string, 1)
		to := w.serveOther(otherB+":0", func(c *net.TCPConn) {
			b := make([]byte, 4096)
			n, _ := c.Read(b)
			_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n")
			got <- string(b[:n])
		})
		w.policy(office + "---\nkind: Policy\nnamespace: /prod\nname: db-calls-db\nsubject: {app: db}\nverb: allow\nobject: {app: db}\n")
		defer w.policy(office)
		if read, err := w.ask(to, "secret"); !errors.Is(err, syscall.ECONNRESET) || len(read) > 0 {
			t.Errorf("the application reads %q, %v", read, err)
		}
		if r := w.records.next(); r.Outcome != "deny" || r.Reason != "peer-unprotected" {
			t.Errorf("recorded %s %s", r.Outcome, r.Reason)
		}
		if s := within(t, got, "the server's read"); strings.Contains(s, "secret") || !strings.Contains(s, mtls.ALPN) {
			t.Errorf("the server read %q", s)
		}
	})
}

// Hundreds of handshakes that never end keep nobody from being served, and end at
// the deadline, each with its record.
func TestSlowHandshakes(t *testing.T) {
	const each = 100
	w := newWorld(t)
	w.good()
	before := w.cost()
	full := hello(t, mtls.ALPN)
	var slow []*net.TCPConn
	for range each {
		for _, b := range [][]byte{full, full[:len(full)/2]} {
			c := w.call(w.app.addr)
			_, _ = c.Write(b)
			slow = append(slow, c)
		}
	}
	w.exchange()
	reasons := make(map[string]int)
	for range len(slow) + 1 {
		reasons[w.records.next().Reason]++
	}
	if want := map[string]int{"handshake-timeout": each, "peer-unprotected": each, "policy": 1}; !maps.Equal(reasons, want) {
		t.Errorf("recorded %v, want %v", reasons, want)
	}
	for _, c := range slow {
		_, _ = ended(t, c)
		c.Close()
	}
	w.nothingLeft(before)
	w.good()
	w.records.none()
	if n := w.app.accepts.Load(); n != 3 {
		t.Errorf("the application saw %d connections, want 3", n)
	}
}

// A source that has too many connections waiting for their authorization is shut
// out; another is not, and the first comes back when it behaves.
func TestFlood(t *testing.T) {
	w := newWorld(t, unhurried)
	w.p.strangers.mu.Lock()
	w.p.strangers.each = 20
	w.p.strangers.mu.Unlock()
	var idle []*net.TCPConn
	for range 20 {
		idle = append(idle, w.call(w.app.addr))
	}
	eventually(t, "they wait", func() bool {
		w.p.strangers.mu.Lock()
		defer w.p.strangers.mu.Unlock()
		return w.p.strangers.total == 20
	})
	if c, err := w.tryCall(netip.Addr{}, w.app.addr); err == nil { // or it is reset in its connect
		if _, err := ended(t, c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("one more from the same source: %v, want a reset", err)
		}
	}
	if r := w.records.next(); r.Reason != "overloaded" || !strings.Contains(r.Detail, "limits.handshakes_per_source") {
		t.Errorf("one more from the same source: recorded %s (%s)", r.Reason, r.Detail)
	}
	c := w.callFrom(netip.MustParseAddr(otherB), w.app.addr)
	_, _ = io.WriteString(c, "GET /")
	_, _ = ended(t, c)
	if r := w.records.next(); r.Reason != "peer-unprotected" {
		t.Errorf("another source: recorded %s", r.Reason)
	}
	for _, c := range idle {
		_ = reset(c)
	}
	for range idle {
		w.records.next()
	}
	w.good()
}
