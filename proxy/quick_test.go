package proxy

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// reusing is another host's proxy, in front of an application that repeats five bytes.
// It keeps its tunnels, and answers every Open but the first on each by second;
// handshakes counts the tunnels.
func (w *world) reusing(second func(x *tls.Conn, o *symbolonv1.Open)) (at netip.AddrPort, handshakes *atomic.Int32) {
	w.Helper()
	handshakes = &atomic.Int32{}
	db := w.db()
	at = w.serveOther(other4+":0", func(c *net.TCPConn) {
		x := w.server(c, db, nil)
		handshakes.Add(1)
		for n := 1; ; n++ {
			o, err := readOpen(x)
			if err != nil {
				return
			}
			if n > 1 {
				second(x, o)
			} else {
				_, _ = x.Write(accepts(o))
			}
			if !repeats(x) {
				return
			}
		}
	})
	return at, handshakes
}

func accepts(o *symbolonv1.Open) []byte {
	return message(&symbolonv1.Verdict{Accept: true, Protection: encrypted, FlowId: o.GetFlowId(), Keep: true})
}

// repeats serves one connection, and tells whether it ended in order.
func repeats(x *tls.Conn) bool {
	b := make([]byte, len(frame("hello")))
	if _, err := io.ReadFull(x, b); err != nil {
		return false
	}
	_, _ = x.Write(b)
	if _, err := io.ReadFull(x, b[:4]); err != nil {
		return false
	}
	_, err := io.WriteString(x, frame(""))
	return err == nil
}

// kept makes a connection whose tunnel is kept for the next one.
func (w *world) kept(at netip.AddrPort) {
	w.Helper()
	w.asks(at, "hello", nil)
	if r := w.records.next(); r.Outcome != "allow" || r.Reused {
		w.Fatalf("the first connection: recorded %+v", r)
	}
	eventually(w.T, "a tunnel that waits", func() bool {
		w.p.pool.mu.Lock()
		defer w.p.pool.mu.Unlock()
		return w.p.pool.total == 1
	})
}

// asks is an application of this host that says five bytes, reads as many as it wants,
// and ends.
func (w *world) asks(at netip.AddrPort, want string, fails func(error) bool) {
	w.Helper()
	w.asksAfter(at, nil, want, fails)
}

// asksAfter is asks, which says nothing before wait ends; nil: it does not wait.
func (w *world) asksAfter(at netip.AddrPort, wait <-chan struct{}, want string, fails func(error) bool) {
	w.Helper()
	c := w.connect(at)
	defer c.Close()
	if wait != nil {
		within(w, wait, "the Open")
	}
	_, _ = io.WriteString(c, "hello")
	got := make([]byte, len(want))
	n, err := io.ReadFull(c, got)
	if err == nil {
		_ = c.CloseWrite()
		var rest []byte
		rest, err = ended(w, c)
		got = append(got, rest...)
	}
	switch {
	case fails != nil && (err == nil || !fails(err)):
		w.Errorf("read %q, %v, want another error", got[:n], err)
	case fails == nil && err != nil:
		w.Error(err)
	case fails == nil && string(got) != want:
		w.Errorf("read %q, want %q", got, want)
	}
}

func isReset(err error) bool { return strings.Contains(err.Error(), "reset") }

// The next connection on a tunnel that is kept is served by acceptor and event loop,
// without a goroutine, unless something has to be waited for. What a client sees and
// what is recorded is the same either way.
func TestNextConnectionOfATunnel(t *testing.T) {
	for _, a := range []struct {
		name   string
		second func(x *tls.Conn, o *symbolonv1.Open)
		said   string // by the server's application, before it is asked
		fails  func(error) bool
		// Of the second connection's record.
		outcome, reason string
		reused          bool
		handshakes      int32
		// late: the client's application waits for the Open, so that nothing goes along
		// with it.
		late bool
	}{
		{
			name:    "the verdict comes at once",
			second:  func(x *tls.Conn, o *symbolonv1.Open) { _, _ = x.Write(accepts(o)) },
			outcome: "allow", reason: "policy", reused: true, handshakes: 1,
		},
		{
			name: "the verdict takes its time",
			second: func(x *tls.Conn, o *symbolonv1.Open) {
				time.Sleep(3 * patient)
				_, _ = x.Write(accepts(o))
			},
			outcome: "allow", reason: "policy", reused: true, handshakes: 1,
		},
		{
			name: "the verdict comes with data",
			second: func(x *tls.Conn, o *symbolonv1.Open) {
				_, _ = x.Write(append(accepts(o), frame("hi ")...))
			},
			said:    "hi ",
			outcome: "allow", reason: "policy", reused: true, handshakes: 1,
		},
		{
			name:    "the server has gone just now",
			second:  func(x *tls.Conn, _ *symbolonv1.Open) { _ = x.NetConn().Close() },
			outcome: "allow", reason: "policy", handshakes: 2, late: true,
		},
		{
			name: "the server has gone after a while",
			second: func(x *tls.Conn, _ *symbolonv1.Open) {
				time.Sleep(3 * patient)
				_ = x.NetConn().Close()
			},
			outcome: "allow", reason: "policy", handshakes: 2, late: true,
		},
		{
			name:    "the server takes no more",
			second:  func(x *tls.Conn, _ *symbolonv1.Open) { _ = x.Close() },
			outcome: "allow", reason: "policy", handshakes: 2,
		},
		{
			name: "the server refuses by now",
			second: func(x *tls.Conn, o *symbolonv1.Open) {
				_, _ = x.Write(message(&symbolonv1.Verdict{Reason: symbolonv1.Reason_REASON_POLICY, FlowId: o.GetFlowId()}))
			},
			fails: isReset, outcome: "deny", reason: "peer-refused", handshakes: 1,
		},
		{
			name: "the server grants less than was asked for",
			second: func(x *tls.Conn, o *symbolonv1.Open) {
				_, _ = x.Write(message(&symbolonv1.Verdict{Accept: true, Protection: authenticated, FlowId: o.GetFlowId(), Keep: true}))
			},
			outcome: "allow", reason: "policy", handshakes: 2, late: true,
		},
		{
			name:   "the server never answers",
			second: func(x *tls.Conn, _ *symbolonv1.Open) { _, _ = io.Copy(io.Discard, x) },
			fails:  isReset, outcome: "error", reason: "timed-out", handshakes: 1,
		},
	} {
		t.Run(a.name, func(t *testing.T) {
			w := newWorld(t, func(o *Options) {
				if a.reason == "timed-out" {
					o.Timeouts.Setup = time.Second
				}
			})
			w.creds.set("0", w.web())
			asked := make(chan struct{})
			var once sync.Once
			at, handshakes := w.reusing(func(x *tls.Conn, o *symbolonv1.Open) {
				once.Do(func() { close(asked) })
				a.second(x, o)
			})
			w.kept(at)
			wait := asked
			if !a.late {
				wait = nil
			}
			w.asksAfter(at, wait, a.said+"hello", a.fails)
			if r := w.records.next(); r.Outcome != a.outcome || r.Reason != a.reason || r.Reused != a.reused {
				t.Errorf("recorded %+v, want %s, %s, reused %t", r, a.outcome, a.reason, a.reused)
			}
			if n := handshakes.Load(); n != a.handshakes {
				t.Errorf("%d tunnels, want %d", n, a.handshakes)
			}
		})
	}
}

// Who goes while its Open is under way takes the tunnel along: the server must not
// serve nobody.
func TestApplicationGivesUpOnAKeptTunnel(t *testing.T) {
	w := newWorld(t)
	w.creds.set("0", w.web())
	gone, asked := make(chan error, 1), make(chan struct{})
	at, _ := w.reusing(func(x *tls.Conn, _ *symbolonv1.Open) {
		close(asked)
		_, err := io.Copy(io.Discard, x)
		gone <- err
	})
	w.kept(at)
	c := w.connect(at)
	within(t, asked, "the Open")
	_ = reset(c)
	if err := within(t, gone, "the tunnel's end"); err == nil {
		t.Error("the tunnel ended in order")
	}
	if r := w.records.next(); r.Reason != "reset" {
		t.Errorf("recorded %+v", r)
	}
}

// A proxy that stops does not wait for a verdict.
func TestStopsWhileAVerdictIsAwaited(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Timeouts.Drain = 100 * time.Millisecond })
	w.creds.set("0", w.web())
	asked := make(chan struct{})
	at, _ := w.reusing(func(x *tls.Conn, _ *symbolonv1.Open) {
		close(asked)
		_, _ = io.Copy(io.Discard, x)
	})
	w.kept(at)
	c := w.connect(at)
	within(t, asked, "the Open")
	if err := w.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := ended(t, c); err == nil || !isReset(err) {
		t.Errorf("the application saw %v, want a reset", err)
	}
	if r := w.records.next(); r.Reason != "shutting-down" {
		t.Errorf("recorded %+v", r)
	}
}

// What gives an Open up may have begun when the Verdict comes, and go on when its
// connection has been taken apart already, for its bytes to flow.
func TestGivesUpWhatFlows(t *testing.T) {
	w := newWorld(t)
	tunnel := must(w.tunnel(w.web(), encrypted))(t)
	near, client := pair(t)
	ctx, cancel := context.WithCancel(w.Context())
	defer cancel()
	r := &relay{near: &socket{TCPConn: near, fd: -1}, tunnel: kept{Conn: tunnel}}
	x := w.p.newConn(r.near, &slot{p: w.p}, symbolonv1.Reporter_REPORTER_CLIENT)
	a := &asked{outgoing: &outgoing{conn: x}, ctx: ctx, relay: r}
	a.linger(time.Hour)
	defer a.late.Stop()
	if err := a.watch.stop(); err != nil {
		t.Fatal(err)
	}
	x.accepted, r.near, r.tunnel = nil, nil, kept{} // as conn.open and relay.detach do
	cancel()
	if _, err := ended(t, client); err == nil || !isReset(err) {
		t.Errorf("the application saw %v, want a reset", err)
	}
}
