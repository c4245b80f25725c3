package proxy

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/proxy/loop"
)

// relayedFunc makes an application and a far side with a relay between them.
type relayedFunc func() (app, peer *net.TCPConn, r *relay, done <-chan error)

// onBoth runs a test with either way to carry bytes: an event loop, and goroutines.
func onBoth(t *testing.T, test func(*testing.T, relayedFunc)) {
	for _, looped := range []bool{true, false} {
		t.Run(map[bool]string{true: "loop", false: "copier"}[looped], func(t *testing.T) {
			test(t, func() (app, peer *net.TCPConn, r *relay, done <-chan error) { return relayed(t, looped) })
		})
	}
}

// relayed is an application and a far side with a relay between them.
func relayed(t *testing.T, looped bool) (app, peer *net.TCPConn, r *relay, done <-chan error) {
	t.Helper()
	app, near := pair(t)
	far, peer := pair(t)
	_ = near.SetDeadline(time.Time{})
	_ = far.SetDeadline(time.Time{})
	r = &relay{near: &socket{TCPConn: near}, plain: &socket{TCPConn: far}, started: time.Now()}
	ch := make(chan error, 1)
	if !looped {
		c, err := r.copy()
		if err != nil {
			t.Fatal(err)
		}
		go func() { ch <- c.finish() }()
		return app, peer, r, ch
	}
	loops, err := loop.Start(1, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(loops.Close)
	if err := r.detach(func(err error, _ *loop.Tunnel) { ch <- err }); err != nil {
		t.Fatal(err)
	}
	loops.Add(r.loop)
	return app, peer, r, ch
}

func TestRelayHalfClose(t *testing.T) { onBoth(t, relayHalfClose) }

func relayHalfClose(t *testing.T, relayed relayedFunc) {
	app, peer, r, done := relayed()
	blob := make([]byte, 1<<20)
	_, _ = rand.Read(blob)
	go func() {
		_, _ = app.Write(blob)
		_ = app.CloseWrite()
	}()
	got, err := ended(t, peer) // the application's half ends, and only that
	if err != nil || !bytes.Equal(got, blob) {
		t.Fatalf("read %d bytes, %v", len(got), err)
	}
	if _, err := io.WriteString(peer, "the other half"); err != nil {
		t.Fatal(err)
	}
	_ = peer.CloseWrite()
	if got, err := ended(t, app); err != nil || string(got) != "the other half" {
		t.Errorf("read %q, %v", got, err)
	}
	if err := within(t, done, "the relay's end"); err != nil {
		t.Error(err)
	}
	if counted(r)[0] != 1<<20 || counted(r)[1] != 14 || counted(r)[2] == 0 {
		t.Errorf("counted %d, %d, first byte at %d", counted(r)[0], counted(r)[1], counted(r)[2])
	}
}

func TestRelayPassesResetsOn(t *testing.T) { onBoth(t, relayPassesResetsOn) }

func relayPassesResetsOn(t *testing.T, relayed relayedFunc) {
	for _, fromApp := range []bool{true, false} {
		a, b, _, done := relayed()
		if !fromApp {
			a, b = b, a
		}
		speaksRaw(t, a, b)
		_ = reset(a)
		if _, err := ended(t, b); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("from the application %v: the other side reads %v, want a reset", fromApp, err)
		}
		if err := within(t, done, "the relay's end"); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("from the application %v: the relay ends with %v", fromApp, err)
		}
	}
}

// A half-closed direction does not hide a reset of the other.
func TestRelayResetAfterHalfClose(t *testing.T) { onBoth(t, relayResetAfterHalfClose) }

func relayResetAfterHalfClose(t *testing.T, relayed relayedFunc) {
	app, peer, _, done := relayed()
	_ = app.CloseWrite()
	if _, err := ended(t, peer); err != nil {
		t.Fatal(err)
	}
	_ = reset(peer)
	if _, err := ended(t, app); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the application reads %v, want a reset", err)
	}
	if err := within(t, done, "the relay's end"); err == nil {
		t.Error("a reset relay says that it ended cleanly")
	}
}

// Urgent data stops splice(2), which is neither an end nor a reason to wait:
// nothing is lost, the urgent byte included, and nothing is late.
func TestRelayUrgentData(t *testing.T) { onBoth(t, relayUrgentData) }

func relayUrgentData(t *testing.T, relayed relayedFunc) {
	for _, bulk := range []bool{false, true} {
		app, peer, r, done := relayed()
		if bulk { // the kernel splices from here on
			go func() { _, _ = app.Write(make([]byte, 4<<20)) }()
			if _, err := io.CopyN(io.Discard, peer, 4<<20); err != nil {
				t.Fatal(err)
			}
		}
		for range 3 {
			_, _ = io.WriteString(app, "AB")
			expect(t, peer, "AB")
			urgent(t, app, "!")
			expect(t, peer, "!")
			_, _ = io.WriteString(app, "CD")
			urgent(t, app, "?")
			_, _ = io.WriteString(app, "EF")
			expect(t, peer, "CD?EF")
		}
		_, _ = io.WriteString(app, "GH")
		urgent(t, app, "#")
		_ = app.CloseWrite()
		if got, err := ended(t, peer); err != nil || string(got) != "GH#" {
			t.Errorf("bulk %v: read %q, %v; want GH#", bulk, got, err)
		}
		_ = peer.CloseWrite()
		if err := within(t, done, "the relay's end"); err != nil {
			t.Error(err)
		}
		if want := uint64(3*8 + 3); counted(r)[0]%(1<<20) != want {
			t.Errorf("bulk %v: counted %d", bulk, counted(r)[0])
		}
	}
}

func TestRelayAbort(t *testing.T) { onBoth(t, relayAbort) }

func relayAbort(t *testing.T, relayed relayedFunc) {
	app, peer, r, done := relayed()
	speaksRaw(t, app, peer)
	r.abort()
	r.abort() // harmless
	for _, c := range []*net.TCPConn{app, peer} {
		if _, err := ended(t, c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read %v, want a reset", err)
		}
	}
	if err := within(t, done, "the relay's end"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the relay ends with %v", err)
	}
}

func counted(r *relay) [3]uint64 {
	toFar, toNear, first := r.counts()
	return [3]uint64{toFar, toNear, first}
}

// speaksRaw holds that bytes pass both ways.
func speaksRaw(t *testing.T, a, b net.Conn) {
	t.Helper()
	for range 2 {
		if _, err := io.WriteString(a, "ping"); err != nil {
			t.Fatal(err)
		}
		expect(t, b, "ping")
		a, b = b, a
	}
}

func expect(t *testing.T, c io.Reader, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if n, err := io.ReadFull(c, b); err != nil || string(b) != want {
		t.Fatalf("read %q, %v; want %q", b[:n], err, want)
	}
}

// Through a whole proxy, with either protection: the meaning of TCP is kept.
func TestTCPThroughTheTunnel(t *testing.T) {
	for _, protection := range []symbolonv1.Protection{encrypted, authenticated} {
		t.Run(protection.String(), func(t *testing.T) {
			w := newWorld(t)
			if protection == authenticated {
				w.policy(strings.Replace(baseline, "protection: encrypted", "protection: authenticated", 1))
			}
			wantProtection := map[symbolonv1.Protection]string{encrypted: "encrypted", authenticated: "authenticated"}[protection]
			open := func() *mtls.Conn {
				t.Helper()
				c, err := w.tunnel(w.web(), protection)
				if err != nil {
					t.Fatal(err)
				}
				_ = c.SetReadDeadline(time.Now().Add(patience))
				if c.Protection() != protection {
					t.Errorf("granted %v", c.Protection())
				}
				return c
			}

			t.Run("half-close and counts", func(t *testing.T) {
				w := w.in(t)
				c := open()
				speaks(t, c)
				if _, err := io.WriteString(c, "and the rest"); err != nil {
					t.Error(err)
				}
				if err := c.CloseWrite(); err != nil {
					t.Error(err)
				}
				if got, err := io.ReadAll(c); err != nil || string(got) != "and the rest" {
					t.Errorf("read %q, %v", got, err)
				}
				c.Close()
				r := w.records.next()
				if r.Outcome != "allow" || r.BytesSent != 26 || r.BytesReceived != 26 || r.Protection != wantProtection || r.FirstByteMicros == 0 {
					t.Errorf("recorded %+v", r)
				}
			})
			t.Run("the client's reset", func(t *testing.T) {
				w := w.in(t)
				saw := make(chan error, 1)
				w.app.handle(func(c *net.TCPConn) { _, err := io.Copy(c, c); saw <- err })
				defer w.app.handle(w.app.echo)
				c := open()
				speaks(t, c)
				_ = c.Reset()
				if err := within(t, saw, "the application's end"); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the application sees %v, want a reset", err)
				}
				if r := w.records.next(); r.Outcome != "allow" || r.Detail != "reset" {
					t.Errorf("recorded %s %s (%s)", r.Outcome, r.Reason, r.Detail)
				}
			})
			t.Run("the application's reset", func(t *testing.T) {
				w := w.in(t)
				w.app.handle(func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 100)); _ = reset(c) })
				defer w.app.handle(w.app.echo)
				c := open()
				_, _ = io.WriteString(c, "x")
				if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the client sees %v, want a reset", err)
				}
				if r := w.records.next(); r.Outcome != "allow" || r.Detail != "reset" {
					t.Errorf("recorded %s %s (%s)", r.Outcome, r.Reason, r.Detail)
				}
			})
			t.Run("a client that never reads", func(t *testing.T) { w.in(t).neverReads(open) })
		})
	}
}

// neverReads holds that a client which takes nothing stops the application, that
// nothing piles up here meanwhile, and that the connection can still be cut.
func (w *world) neverReads(open func() *mtls.Conn) {
	w.Helper()
	var sent atomic.Int64
	ended := make(chan error, 1)
	w.app.handle(func(c *net.TCPConn) {
		b := make([]byte, 64<<10)
		for {
			n, err := c.Write(b)
			sent.Add(int64(n))
			if err != nil {
				ended <- err
				return
			}
		}
	})
	defer w.app.handle(w.app.echo)
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	c := open()
	defer c.Close()
	stalled, last := 0, int64(-1)
	eventually(w, "the application is held back", func() bool {
		time.Sleep(10 * time.Millisecond) // a stall is that nothing happens
		if now := sent.Load(); now == last && now > 0 {
			stalled++
		} else {
			stalled, last = 0, now
		}
		return stalled == 30
	})
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 4<<20 {
		w.Errorf("%d bytes pile up in the proxy", grown)
	}
	if sent.Load() > 64<<20 {
		w.Errorf("the application wrote %d bytes that nobody reads", sent.Load())
	}
	w.policy(strings.Replace(baseline, "verb: allow", "verb: deny", 1))
	if err := within(w, ended, "the application's end"); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		w.Errorf("the application sees %v", err)
	}
	if r := w.records.next(); r.Reason != "policy-changed" || r.Outcome != "deny" {
		w.Errorf("recorded %s %s (%s)", r.Outcome, r.Reason, r.Detail)
	}
	w.policy(baseline)
}

// What this host lacks is not taken for a reset by one of the ends.
func TestWanting(t *testing.T) {
	for _, err := range []error{
		unix.EMFILE, os.NewSyscallError("fcntl", unix.ENFILE), &loop.WatchError{Err: unix.ENOSPC}, &loop.WatchError{Err: unix.ENOMEM},
	} {
		if got := mtls.ReasonOf(wanting(err)); got != symbolonv1.Reason_REASON_OVERLOADED {
			t.Errorf("%v counts as %v", err, got)
		}
	}
	for _, err := range []error{nil, net.ErrClosed, unix.ECONNRESET, mtls.ErrTruncated} {
		if got := wanting(err); got != err { //nolint:errorlint // the very same
			t.Errorf("%v becomes %v", err, got)
		}
	}
}
