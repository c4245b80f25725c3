package loop

import (
	"bytes"
	"context"
	"errors"
	"io"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls"
)

// What was read before the hand-over may fill the loop's buffer, or nearly: a peer
// that sends its next connection behind the end of the last decides how much it is.
func TestMuchWasReadBefore(t *testing.T) {
	for _, size := range []int{1, 100 << 10, inSize - smallRead, inSize - smallRead + 1, inSize - 1, inSize} {
		l, f := forgedLink(t, true)
		want := make([]byte, 200<<10)
		_, _ = io.ReadFull(source(7, len(want)), want)
		sealed := f.seal(t, append(frame(want), frame(nil)...))
		l.far.Sealed = sealed[:size]
		l.relay = New(l.near, l.far, func(err error, k *Tunnel) { l.done <- ending{err, k} })
		loops := start(t, 1)
		loops.Add(l.relay)
		f.send(t, sealed[size:])
		got, err := io.ReadAll(l.app)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes read before: %d of %d bytes, or others, %v", size, len(got), len(want), err)
		}
		_ = l.app.CloseWrite()
		if kept := l.clean(t); kept != nil {
			kept.Close()
		}
	}
}

// One connection directly behind the other, in as few segments as there can be: each
// gets its own bytes.
func TestConnectionsBackToBack(t *testing.T) {
	c, f := forged(t, true, nil)
	loops := start(t, 1)
	const rounds = 6
	var plain []byte
	want := make([][]byte, rounds)
	for i := range want {
		want[i] = make([]byte, 1+i*90_000)
		_, _ = io.ReadFull(source(uint64(i), len(want[i])), want[i])
		if i > 0 {
			plain = append(plain, openMessage(t, true)...)
		}
		plain = append(append(plain, frame(want[i])...), frame(nil)...)
	}
	sent := make(chan error, 1)
	sealed := f.seal(t, plain)
	go func() { _, err := f.wire.TCPConn.Write(sealed); sent <- err }()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for i := range want {
		if i > 0 {
			if _, err := c.NextOpen(ctx); err != nil {
				t.Fatal(err)
			}
			if err := c.Grant(ctx, &symbolonv1.Verdict{Protection: encrypted, Keep: true}); err != nil {
				t.Fatal(err)
			}
			f.verdict(t)
		}
		l := newLinkTo(t, c, true)
		loops.Add(l.relay)
		got, err := io.ReadAll(l.app)
		if err != nil || !bytes.Equal(got, want[i]) {
			t.Fatalf("connection %d: %d of %d bytes, or others, %v", i, len(got), len(want[i]), err)
		}
		_ = l.app.CloseWrite()
		kept := l.clean(t)
		if kept == nil {
			t.Fatal("not handed back")
		}
		if b := f.frame(t); len(b) > 0 {
			t.Fatalf("the peer read %q", b)
		}
		if err := attach(c, kept); err != nil || !c.Reusable() {
			t.Fatalf("attached: %v, reusable %v", err, c.Reusable())
		}
		if n := l.relay.ToFar.Load() + l.relay.ToNear.Load(); n != uint64(len(want[i])) {
			t.Errorf("counted %d", n)
		}
	}
	c.Close()
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

// Records that were read before are opened although the socket has nothing to tell:
// nothing to read, and no room to write.
func TestReadBeforeOnAFullSocket(t *testing.T) {
	l, f := forgedLink(t, false)
	// Nobody reads this. What is on its way still makes room once or twice; written a
	// byte at a time, the last segment alone would take tens of thousands.
	for settled := time.Now(); time.Since(settled) < 200*time.Millisecond; {
		_, err := write(l.far.FD, make([]byte, 64<<10))
		switch {
		case err == nil:
			settled = time.Now()
		case errors.Is(err, errAgain):
			time.Sleep(time.Millisecond)
		default:
			t.Fatal(err)
		}
	}
	l.far.Sealed = f.seal(t, []byte("hello"))
	l.relay = New(l.near, l.far, func(err error, k *Tunnel) { l.done <- ending{err, k} })
	start(t, 1).Add(l.relay)
	b := make([]byte, 5)
	if _, err := io.ReadFull(l.app, b); err != nil || string(b) != "hello" {
		t.Errorf("read %q, %v", b, err)
	}
	l.relay.Cut()
	l.ended(t)
}

// A reset gets through to a side that takes nothing: the relay does not wait for it.
func TestResetBehindBackpressure(t *testing.T) {
	each(t, func(t *testing.T, k kind) {
		for _, fromApp := range []bool{true, false} {
			l := begin(t, k)
			from, count := conn(l.app), &l.relay.ToFar
			if !fromApp {
				from, count = l.peer, &l.relay.ToNear
			}
			go func() {
				for {
					if _, err := from.Write(make([]byte, 100_000)); err != nil {
						return
					}
				}
			}()
			still(t, "the sender is held back", count.Load)
			_ = from.Reset()
			if e := l.ended(t); !errors.Is(e.err, syscall.ECONNRESET) && !errors.Is(e.err, syscall.EPIPE) {
				t.Errorf("from the application %v: ends with %v", fromApp, e.err)
			}
		}
	})
}

// An end and a reset behind it, while the other side takes nothing.
func TestEndAndResetBehindBackpressure(t *testing.T) {
	l := begin(t, kind{buffers: 16 << 10})
	go func() {
		for {
			if _, err := l.app.Write(make([]byte, 100_000)); err != nil {
				return
			}
		}
	}()
	still(t, "the sender is held back", l.relay.ToFar.Load)
	control(t, l.app.TCPConn, func(fd int) { _ = unix.Shutdown(fd, unix.SHUT_WR) })
	_ = l.app.Reset()
	if e := l.ended(t); e.err == nil {
		t.Error("ends cleanly")
	}
}

// A socket tells its error once. Who looks why splice(2) moves nothing must not take
// it, or what follows looks like a clean end.
func TestResetSeenByALook(t *testing.T) {
	app, near := tcpPair(t, 0)
	_ = reset(app)
	fd, err := mtls.DetachTCP(near)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	e := &end{fd: fd, readable: true}
	d := &direction{src: e, bulk: true}
	eventually(t, "the reset arrives", func() bool {
		err = d.stuck()
		return err != nil || e.readable == false || !d.bulk
	})
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the reset is seen as %v", err)
	}
}

// Cut before it was added, a relay does not carry a byte.
func TestCutBeforeAddCarriesNothing(t *testing.T) {
	loops := start(t, 1)
	for range 50 {
		l := newLink(t, kind{})
		_, _ = l.app.Write([]byte("secret"))
		eventually(t, "the bytes are there", func() bool {
			n, _ := unix.IoctlGetInt(l.near.FD, unix.TIOCINQ)
			return n == 6
		})
		l.relay.Cut()
		loops.Add(l.relay)
		if e := l.ended(t); !errors.Is(e.err, ErrCut) {
			t.Errorf("ends with %v", e.err)
		}
		if n := l.relay.ToFar.Load(); n > 0 {
			t.Fatalf("%d bytes carried", n)
		}
	}
}

// What counts towards a turn is what was read: a peer that wraps every byte into a
// record of its own gets no longer one than the others.
func TestTurnCountsRecordsNotData(t *testing.T) {
	l, f := forgedLink(t, false)
	const records, size = 1000, 5 + 1 + 1 + 16
	for range records {
		f.send(t, f.seal(t, []byte{1}))
	}
	// On no loop's goroutine, to look at it between its turns.
	x, err := newLoop(func(f func()) { go f() })
	if err != nil {
		t.Fatal(err)
	}
	defer x.shut()
	x.place(&l.relay.near)
	x.place(&l.relay.far)
	eventually(t, "all is there", func() bool {
		n, _ := unix.IoctlGetInt(l.far.FD, unix.TIOCINQ)
		return n == records*size
	})
	l.relay.far.readable = true
	x.pump(&l.relay.down)
	if n := l.relay.down.spent; n != records*size || l.relay.ToNear.Load() != records {
		t.Errorf("%d bytes of %d records: %d bytes of the turn spent, %d carried", records*size, records, n, l.relay.ToNear.Load())
	}
	x.finish(l.relay, ErrCut)
	l.ended(t)
}

// An alert does not go into the middle of a record.
func TestAlertBetweenRecords(t *testing.T) {
	l := newLink(t, kind{tunnel: true})
	a := l.far.Alerts
	if _, err := a.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	l.relay.up.pending.add([]byte("the rest of a record"))
	if _, err := a.Write([]byte("x")); err == nil {
		t.Error("written into a record")
	}
	start(t, 1).Add(l.relay)
	l.relay.Cut()
	l.ended(t)
	if _, err := a.Write([]byte("x")); err == nil {
		t.Error("written to a descriptor that is closed")
	}
}
