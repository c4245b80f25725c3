package loop

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls"
)

// said is what an Await was called with.
type said struct {
	m   []byte
	err error
}

func await(k *Tunnel) <-chan said {
	ch := make(chan said, 2) // room for a call too many
	k.Await(func(m []byte, err error) { ch <- said{m, err} })
	return ch
}

func heard(t testing.TB, ch <-chan said) said {
	t.Helper()
	select {
	case s := <-ch:
		if len(ch) > 0 {
			t.Error("told twice")
		}
		return s
	case <-time.After(patience):
		t.Fatal("nothing is told")
	}
	return said{}
}

// left is a tunnel that a relay has left behind, and the peer at its other end.
func left(t testing.TB, loops *Loops) (*Tunnel, *mtls.Conn, *forger) {
	t.Helper()
	c, f := forged(t, true, append(frame([]byte("hi")), frame(nil)...))
	l := newLinkTo(t, c, true)
	loops.Add(l.relay)
	if got, err := io.ReadAll(l.app); err != nil || string(got) != "hi" {
		t.Fatalf("read %q, %v", got, err)
	}
	_ = l.app.CloseWrite()
	k := l.clean(t)
	if k == nil {
		t.Fatal("not kept")
	}
	f.frame(t) // the end
	return k, c, f
}

// next serves the Open that comes on k.
func next(t testing.TB, c *mtls.Conn, k *Tunnel) {
	t.Helper()
	s := heard(t, await(k))
	if _, err := c.TakeOpen(s.m, s.err); err != nil {
		t.Fatal(err)
	}
	if err := k.Send(func(b []byte) ([]byte, error) {
		return c.SealVerdict(b, &symbolonv1.Verdict{Protection: encrypted, Keep: true})
	}); err != nil {
		t.Fatal(err)
	}
}

// resume is a link whose far side is k.
func resume(t testing.TB, k *Tunnel) *link {
	t.Helper()
	l := &link{done: make(chan ending, 2)}
	app, near := tcpPair(t, 0)
	l.app = wire{app}
	_ = app.SetDeadline(time.Now().Add(patience))
	var err error
	if l.near.FD, err = mtls.DetachTCP(near); err != nil {
		t.Fatal(err)
	}
	l.relay = Resume(l.near, k, func(err error, k *Tunnel) { l.done <- ending{err, k} })
	return l
}

// The Open may come before somebody waits for it, or after, all at once or in pieces,
// alone or with data behind it.
func TestNextOnTheLoop(t *testing.T) {
	loops := start(t, 1)
	k, c, f := left(t, loops)
	for i := range 12 {
		if !k.Idle() {
			t.Fatal("something has arrived")
		}
		plain := openMessage(t, true)
		if i%2 == 0 {
			plain = append(append(plain, frame([]byte("again"))...), frame(nil)...)
		}
		sealed := f.seal(t, plain)
		send := func() {
			if i%3 == 0 {
				f.send(t, sealed[:7])
				time.Sleep(time.Millisecond)
				sealed = sealed[7:]
			}
			f.send(t, sealed)
		}
		var ch <-chan said
		if i%4 < 2 {
			send()
			eventually(t, "the loop sees it", func() bool { return !k.Idle() })
			ch = await(k)
		} else {
			ch = await(k)
			send()
		}
		s := heard(t, ch)
		if _, err := c.TakeOpen(s.m, s.err); err != nil {
			t.Fatal(err)
		}
		if err := k.Send(func(b []byte) ([]byte, error) {
			return c.SealVerdict(b, &symbolonv1.Verdict{Protection: encrypted, Keep: true})
		}); err != nil {
			t.Fatal(err)
		}
		f.verdict(t)
		l := resume(t, k)
		loops.Add(l.relay)
		if i%2 == 1 {
			f.send(t, f.seal(t, append(frame([]byte("again")), frame(nil)...)))
		}
		if got, err := io.ReadAll(l.app); err != nil || string(got) != "again" {
			t.Fatalf("use %d: read %q, %v", i, got, err)
		}
		_, _ = io.WriteString(l.app, "pong")
		_ = l.app.CloseWrite()
		if got := string(f.frame(t)); got != "pong" {
			t.Fatalf("use %d: the peer reads %q", i, got)
		}
		f.frame(t)
		if k = l.clean(t); k == nil || !c.Reusable() {
			t.Fatal("not kept")
		}
	}
	k.Close()
}

// While nobody has begun to relay, nothing is taken from the peer but the message: what
// stands behind it waits in the kernel, or in what was read with it.
func TestNothingPassesBeforeTheVerdict(t *testing.T) {
	loops := start(t, 1)
	k, c, f := left(t, loops)
	ch := await(k)
	f.send(t, f.seal(t, append(openMessage(t, true), frame([]byte("secret"))...)))
	s := heard(t, ch)
	if _, err := c.TakeOpen(s.m, s.err); err != nil {
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	bulk := f.seal(t, frame(make([]byte, 1<<20)))
	go func() { // much more than anybody may make us keep
		_, err := f.wire.TCPConn.Write(bulk)
		sent <- err
	}()
	eventually(t, "more arrives", func() bool { return !k.Idle() })
	k.mu.Lock()
	held := len(k.end.carry.data)
	k.mu.Unlock()
	if held > smallRead+inSmall {
		t.Errorf("%d bytes are held for a peer that is not let in", held)
	}
	k.Reset()
	<-sent // by the reset, or into the kernel
}

// Whoever waits hears of the end, whatever it is; and nobody else waits any more.
func TestTunnelEnds(t *testing.T) {
	for name, end := range map[string]struct {
		end  func(k *Tunnel, f *forger)
		want func(error) bool
	}{
		"FIN":          {func(_ *Tunnel, f *forger) { _ = f.wire.TCPConn.CloseWrite() }, func(err error) bool { return errors.Is(err, mtls.ErrTruncated) }},
		"close_notify": {func(_ *Tunnel, f *forger) { f.send(t, f.closeNotify(t)) }, func(err error) bool { return errors.Is(err, io.EOF) }},
		"RST":          {func(_ *Tunnel, f *forger) { _ = reset(f.wire.TCPConn) }, isReset},
		"too large":    {func(_ *Tunnel, f *forger) { f.send(t, f.seal(t, []byte{0, 0, 0x40, 1})) }, func(err error) bool { return errors.Is(err, mtls.ErrOpenTooLarge) }},
		"no record":    {func(_ *Tunnel, f *forger) { f.send(t, []byte("GET / HTTP/1.1\r\n")) }, func(err error) bool { return mtls.NetworkReason(err) == symbolonv1.Reason_REASON_PROTOCOL }},
		"half a message, FIN": {func(_ *Tunnel, f *forger) {
			f.send(t, f.seal(t, openMessage(t, true)[:9]))
			_ = f.wire.TCPConn.CloseWrite()
		}, func(err error) bool { return errors.Is(err, mtls.ErrTruncated) }},
		"we close": {func(k *Tunnel, _ *forger) { k.Close() }, func(err error) bool { return errors.Is(err, ErrCut) }},
		"we reset": {func(k *Tunnel, _ *forger) { k.Reset() }, func(err error) bool { return errors.Is(err, ErrCut) }},
	} {
		t.Run(name, func(t *testing.T) {
			for _, before := range []bool{true, false} {
				loops := start(t, 1)
				k, _, f := left(t, loops)
				var ch <-chan said
				if before {
					ch = await(k)
					end.end(k, f)
				} else {
					end.end(k, f)
					eventually(t, "it is seen", func() bool { return !k.Idle() })
					ch = await(k)
				}
				if s := heard(t, ch); !end.want(s.err) {
					t.Errorf("awaited before %v: told %q, %v", before, s.m, s.err)
				}
				k.Close()
				k.Reset() // and again
				if s := heard(t, await(k)); !errors.Is(s.err, ErrCut) {
					t.Errorf("after the end: told %v", s.err)
				}
				if err := k.Send(func([]byte) ([]byte, error) { t.Error("sealed"); return nil, nil }); !errors.Is(err, ErrCut) {
					t.Errorf("after the end: sent, %v", err)
				}
				if _, err := k.Detach(); !errors.Is(err, ErrCut) {
					t.Errorf("after the end: detached, %v", err)
				}
				l := resume(t, k)
				loops.Add(l.relay)
				if e := l.ended(t); !errors.Is(e.err, ErrCut) {
					t.Errorf("after the end: relays, %v", e.err)
				}
				if _, err := l.app.Read(make([]byte, 1)); !isReset(err) {
					t.Errorf("the application reads %v", err)
				}
			}
		})
	}
}

// A relay that was cut before it began carries nothing, and its tunnel goes with it.
func TestCutBeforeItResumes(t *testing.T) {
	loops := start(t, 1)
	k, c, f := left(t, loops)
	f.send(t, f.seal(t, append(openMessage(t, true), frame([]byte("secret"))...)))
	next(t, c, k)
	f.verdict(t)
	l := resume(t, k)
	l.relay.Cut()
	loops.Add(l.relay)
	if e := l.ended(t); !errors.Is(e.err, ErrCut) || e.kept != nil {
		t.Errorf("ends with %v", e.err)
	}
	if got, err := io.ReadAll(l.app); !isReset(err) || len(got) > 0 {
		t.Errorf("the application reads %q, %v", got, err)
	}
	if _, err := f.wire.TCPConn.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("the peer reads %v", err)
	}
}

// A peer that takes nothing is told nothing; it is not waited for.
func TestSendDoesNotWait(t *testing.T) {
	k, c, f := left(t, start(t, 1))
	f.send(t, f.seal(t, openMessage(t, true)))
	s := heard(t, await(k))
	if _, err := c.TakeOpen(s.m, s.err); err != nil {
		t.Fatal(err)
	}
	var err error
	for range 10_000 {
		if err = k.Send(func(b []byte) ([]byte, error) { return b, nil }); err != nil {
			break
		}
	}
	if !errors.Is(err, mtls.ErrProtocol) {
		t.Errorf("sent with %v", err)
	}
	k.Reset()
}

// The loops end, and with them what waits on them.
func TestLoopsEndTunnels(t *testing.T) {
	loops, err := Start(1, nil)
	if err != nil {
		t.Fatal(err)
	}
	k, _, f := left(t, loops)
	ch := await(k)
	loops.Close()
	if s := heard(t, ch); !errors.Is(s.err, ErrCut) {
		t.Errorf("told %v", s.err)
	}
	if _, err := f.wire.TCPConn.Read(make([]byte, 1)); err == nil {
		t.Error("the peer reads")
	}
}

// Many tunnels at once, each of which serves, goes, is reset or closed at any moment:
// nothing is mixed up, and nothing is left.
func TestTunnelChurn(t *testing.T) {
	before := descriptors(t)
	loops, err := Start(2, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("tunnels", func(t *testing.T) {
		for i := range 40 {
			t.Run("", func(t *testing.T) {
				t.Parallel()
				churn(t, loops, i)
			})
		}
	})
	for _, l := range loops.loops {
		l.mu.Lock()
		if n := l.relays.Load(); n != 0 || len(l.free) != len(l.ends) {
			t.Errorf("%d relays are left, %d of %d slots are free", n, len(l.free), len(l.ends))
		}
		l.mu.Unlock()
	}
	loops.Close()
	eventually(t, "no descriptor is left", func() bool { return descriptors(t) <= before })
}

// churn is one tunnel with crypto/tls and goroutines at its other end.
func churn(t *testing.T, loops *Loops, seed int) {
	a, b := tcpPair(t, 0)
	defer a.Close()
	defer b.Close()
	own, peer := tunnels(t, a, b, kind{tunnel: true, framed: true})
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	l := newLinkTo(t, own, true)
	for use := range 8 {
		loops.Add(l.relay)
		n := rand.IntN(50_000)
		sent := make(chan error, 1)
		go func() { sent <- pour(peer, uint64(seed*100+use), n, 9_000) }()
		go func() { _ = l.app.CloseWrite() }()
		if err := drink(l.app, uint64(seed*100+use), n, 30_000); err != nil {
			t.Error(err)
			return
		}
		if _, err := io.Copy(io.Discard, peer); err != nil {
			t.Error(err)
			return
		}
		if err := <-sent; err != nil {
			t.Error(err)
		}
		k := l.clean(t)
		_ = l.app.Close()
		if k == nil || !own.Reusable() {
			t.Error("not kept")
			return
		}
		switch rand.IntN(8) {
		case 0:
			peer.Close()
			s := heard(t, await(k))
			if s.err == nil {
				t.Errorf("told %q", s.m)
			}
			k.Close()
			return
		case 1:
			go k.Close()
			if s := heard(t, await(k)); !errors.Is(s.err, ErrCut) {
				t.Errorf("told %v", s.err)
			}
			return
		}
		o := mtls.NewOpen(mtls.NewFlowID(), netip.MustParseAddrPort("10.0.0.9:5432"), encrypted, 1)
		o.Framed = true
		asked := make(chan error, 1)
		go func() {
			err := peer.Reopen(ctx, o)
			if err == nil {
				_, err = peer.ReadVerdict(ctx)
			}
			asked <- err
		}()
		next(t, own, k)
		if err := <-asked; err != nil {
			t.Error(err)
			k.Close()
			return
		}
		l = resume(t, k)
	}
	l.relay.Cut()
	loops.Add(l.relay)
	l.ended(t)
}
