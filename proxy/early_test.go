package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls"
)

// trials is how often a connection is made until its first bytes were there in time.
const trials = 50

// early reads what has come along with an Open, within a moment; "": nothing.
func early(x *tls.Conn) string {
	_ = x.NetConn().SetReadDeadline(time.Now().Add(time.Second))
	defer x.NetConn().SetReadDeadline(time.Now().Add(patience))
	b := make([]byte, len(frame("hello")))
	if _, err := io.ReadFull(x, b); err != nil {
		return ""
	}
	return string(b)
}

// What an application says at once goes along with the Open, once.
func TestFirstBytesGoAlong(t *testing.T) {
	w := newWorld(t)
	w.creds.set("0", w.web())
	var seen atomic.Bool
	at, handshakes := w.reusing(func(x *tls.Conn, o *symbolonv1.Open) {
		// crypto/tls gives no read another try after a deadline: whoever waits is through.
		got := early(x)
		_, _ = x.Write(accepts(o))
		if got == frame("hello") {
			seen.Store(true)
			_, _ = io.WriteString(x, got)
			_, _ = io.ReadFull(x, make([]byte, len(frame(""))))
			_, _ = io.WriteString(x, frame(""))
		}
		_ = x.NetConn().Close()
	})
	for i := 0; i < trials && !seen.Load(); i++ {
		w.kept(at)
		c := w.connect(at)
		_, _ = io.WriteString(c, "hello")
		_ = c.CloseWrite()
		got, _ := io.ReadAll(c)
		c.Close()
		r := w.records.next()
		if !seen.Load() {
			continue // and the tunnel is over, without an answer
		}
		if string(got) != "hello" || r.Outcome != "allow" || !r.Reused || r.BytesSent != 5 || r.BytesReceived != 5 {
			t.Errorf("answered %q, recorded %+v", got, r)
		}
	}
	if !seen.Load() {
		t.Errorf("not once in %d connections", handshakes.Load())
	}
}

// A tunnel that ends in place of a verdict has served nobody, if TLS says so: the
// application is served on another one, and what it has said arrives there, once. One that
// is cut may have served, or somebody on the way would like the bytes a second time:
// nobody sends them again.
func TestFirstBytesOnATunnelThatEnds(t *testing.T) {
	for name, tc := range map[string]struct {
		end   func(x *tls.Conn)
		again bool
	}{
		"in order": {func(x *tls.Conn) { _ = x.Close() }, true},
		"by FIN":   {func(x *tls.Conn) { _ = x.NetConn().Close() }, false},
		"by RST": {func(x *tls.Conn) {
			if c, ok := x.NetConn().(interface{ SetLinger(int) error }); ok {
				_ = c.SetLinger(0)
			}
			_ = x.NetConn().Close()
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.creds.set("0", w.web())
			var ended atomic.Bool
			at, handshakes := w.reusing(func(x *tls.Conn, _ *symbolonv1.Open) {
				if early(x) != "" {
					ended.Store(true)
					tc.end(x)
				}
				_ = x.NetConn().Close()
			})
			for range trials {
				w.kept(at)
				before := handshakes.Load()
				c := w.connect(at)
				_, _ = io.WriteString(c, "hello")
				got := make([]byte, 5)
				_, err := io.ReadFull(c, got)
				_ = c.CloseWrite()
				_, _ = io.Copy(io.Discard, c)
				c.Close()
				r := w.records.next()
				w.p.pool.drop(func(*mtls.Conn) bool { return true })
				if !ended.Load() {
					continue
				}
				if tc.again {
					if string(got) != "hello" || err != nil || r.Outcome != "allow" || r.BytesSent != 5 || r.Reused || handshakes.Load() != before+1 {
						t.Errorf("answered %q, %v, on %d other tunnels; recorded %+v", got, err, handshakes.Load()-before, r)
					}
				} else if !errors.Is(err, syscall.ECONNRESET) || r.Outcome == "allow" || handshakes.Load() != before {
					t.Errorf("answered %q, %v, on %d other tunnels; recorded %s %s (%s)", got, err, handshakes.Load()-before, r.Outcome, r.Reason, r.Detail)
				}
				return
			}
			t.Errorf("no first bytes went along in %d connections", trials)
		})
	}
}

// A tunnel that our side ends says so, and does not reset what the client is sending.
func TestEndOfAWaitingTunnelIsNoReset(t *testing.T) {
	w := newWorld(t)
	x := w.firstUse()
	eventually(t, "the tunnel waits", func() bool {
		w.p.lot.mu.Lock()
		defer w.p.lot.mu.Unlock()
		return w.p.lot.parked.Len() == 1
	})
	w.p.lot.end(func(*incoming) bool { return true })
	_, _ = x.Write(append(w.framed(), frame("secret")...)) // has crossed the end
	if b, err := io.ReadAll(x); err != nil || len(b) > 0 {
		t.Errorf("the client reads %q, %v, want TLS's end", b, err)
	}
	if w.app.accepts.Load() != 1 {
		t.Error("the application was reached")
	}
	w.records.none()
}

// An application that resets its connection before it has said anything, and before the
// proxy looks at it, asks nobody: the kernel tells of a reset once, and the peer's
// application must not take it for a clean end. The tunnel waits on for the next one.
func TestResetBeforeATunnelIsAsked(t *testing.T) {
	for name, quick := range map[string]bool{"at once": true, "on a goroutine": false} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(o *Options) {
				if !quick {
					o.Credentials.(*credentials).stall = func(context.Context, string) {}
				}
			})
			w.creds.set("0", w.web())
			at, handshakes := w.reusing(func(x *tls.Conn, o *symbolonv1.Open) { _, _ = x.Write(accepts(o)) })
			w.kept(at)
			w.creds.mu.Lock() // the proxy does not go on with a connection
			c := w.connect(at)
			local := c.LocalAddr().(*net.TCPAddr).AddrPort().Port()
			_ = reset(c)
			eventually(t, "the proxy's socket is reset", func() bool { return !established(t, local) })
			w.creds.mu.Unlock()
			if r := w.records.next(); r.Reason != "reset" || r.Outcome != "error" || r.BytesSent != 0 {
				t.Errorf("recorded %+v, want a reset", r)
			}
			w.asks(at, "hello", nil)
			if r := w.records.next(); r.Outcome != "allow" || !r.Reused || handshakes.Load() != 1 {
				t.Errorf("the next connection: recorded %+v on %d tunnels", r, handshakes.Load())
			}
		})
	}
}

// established tells whether a TCP connection over IPv4 from or to a local port is open.
func established(t testing.TB, port uint16) bool {
	t.Helper()
	all, err := os.ReadFile("/proc/self/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(all)) {
		f := strings.Fields(line) // sl local remote state
		if end := fmt.Sprintf(":%04X", port); f[3] == "01" && (strings.HasSuffix(f[1], end) || strings.HasSuffix(f[2], end)) {
			return true
		}
	}
	return false
}
