package loop

import (
	"io"
	"testing"

	"golang.org/x/sys/unix"
)

// byHand is a loop that the test runs, to look at it between its turns.
type byHand struct {
	*Loop
	testing.TB
}

func handLoop(t testing.TB) *byHand {
	t.Helper()
	x, err := newLoop(func(f func()) { go f() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(x.shut)
	return &byHand{x, t}
}

// pass handles the events that there are, and then gives each who waits one turn.
func (x *byHand) pass() {
	n, err := unix.EpollWait(x.epoll, x.events[:], 0)
	if err != nil && err != unix.EINTR {
		x.Fatal(err)
	}
	x.now++
	turn := append([]*direction(nil), x.ready...)
	x.ready = x.ready[:0]
	x.serve(x.events[:max(n, 0)])
	for _, d := range turn {
		if d.queued = false; !d.relay.over {
			x.turn(d)
		}
	}
}

// flood writes as long as anybody takes it.
func flood(w io.Writer) {
	for {
		if _, err := w.Write(make([]byte, 1<<20)); err != nil {
			return
		}
	}
}

// A relay that could carry for ever leaves the others their turn: a small one is
// served in the pass in which its byte is seen.
func TestFairness(t *testing.T) {
	each(t, func(t *testing.T, k kind) {
		if k.buffers > 0 {
			return
		}
		x := handLoop(t)
		bulk, small := newLink(t, k), newLink(t, kind{})
		x.add(bulk.relay)
		x.add(small.relay)
		go flood(bulk.app)
		go func() { _, _ = io.Copy(io.Discard, struct{ io.Reader }{bulk.peer}) }()
		eventually(t, "much flows", func() bool { x.pass(); return bulk.relay.ToFar.Load() > 4<<20 })
		for range 50 {
			was := small.relay.ToFar.Load()
			if _, err := io.WriteString(small.app, "ping"); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the byte is there", func() bool {
				n, _ := unix.IoctlGetInt(small.near.FD, unix.TIOCINQ)
				return n == 4
			})
			carried := bulk.relay.ToFar.Load()
			x.pass()
			if n := small.relay.ToFar.Load() - was; n != 4 {
				t.Fatalf("%d bytes of the small relay's were carried", n)
			}
			// By an event of either end, and by the turn that it was promised.
			if n := bulk.relay.ToFar.Load() - carried; n > 3*(budget+pipeSize) {
				t.Fatalf("one pass carried %d bytes", n)
			}
		}
		x.finish(bulk.relay, ErrCut)
		x.finish(small.relay, ErrCut)
	})
}

// A side that never reads costs one read's worth a direction, and what flows without
// waiting, or not at all, costs no buffer.
func TestBounds(t *testing.T) {
	each(t, func(t *testing.T, k kind) {
		x := handLoop(t)
		l := newLink(t, k)
		x.add(l.relay)
		idle := func() {
			t.Helper()
			for _, d := range []*direction{&l.relay.up, &l.relay.down} {
				if d.pending.buf != nil || d.pipe != nil || d.src.carry.buf != nil {
					t.Error("a relay at rest holds a buffer")
				}
			}
		}
		for range 3 {
			if _, err := io.WriteString(l.app, "ping"); err != nil {
				t.Fatal(err)
			}
			want := l.relay.ToFar.Load() + 4
			eventually(t, "it is carried", func() bool { x.pass(); return l.relay.ToFar.Load() == want })
			idle()
		}
		go flood(l.app)
		go flood(l.peer)
		still(t, "both are held back", func() uint64 {
			x.pass()
			for _, d := range []*direction{&l.relay.up, &l.relay.down} {
				n := len(d.pending.data) + len(d.src.carry.data)
				if d.pipe != nil {
					n += d.pipe.held
				}
				if n > max(inSize, pipeSize)+len(x.out)-readSize {
					t.Fatalf("%d bytes wait in one direction", n)
				}
			}
			return l.relay.ToFar.Load() + l.relay.ToNear.Load()
		})
		if l.relay.up.flushed() && l.relay.down.flushed() {
			t.Error("nothing waits: nothing is tested")
		}
		x.finish(l.relay, ErrCut)
		if l.relay.up.pending.buf != nil || l.relay.down.pending.buf != nil || l.relay.far.carry.buf != nil {
			t.Error("a relay that is over holds a buffer")
		}
	})
}

// What pipes hold is bounded for all relays together: where it is much, each gets little.
func TestPipesTogether(t *testing.T) {
	x := handLoop(t)
	for _, others := range []int{0, heldMost} {
		x.held += others
		l := newLink(t, kind{})
		x.add(l.relay)
		go flood(l.app)
		still(t, "it is held back", func() uint64 { x.pass(); return l.relay.ToFar.Load() })
		d := &l.relay.up
		if d.pipe == nil || d.pipe.held == 0 {
			t.Fatal("no pipe holds anything: nothing is tested")
		}
		if x.held != others+d.pipe.held {
			t.Errorf("%d bytes are held beside %d of others, the loop counts %d", d.pipe.held, others, x.held)
		}
		if others > 0 && d.pipe.held > heldLittle {
			t.Errorf("%d bytes are held where there is much already", d.pipe.held)
		}
		x.finish(l.relay, ErrCut)
		if x.held -= others; x.held != 0 {
			t.Errorf("%d bytes are still counted", x.held)
		}
	}
}
