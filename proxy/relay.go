package proxy

import (
	"context"
	"errors"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/proxy/loop"
)

// relayBuffer is one direction's, bytes: what fills two TLS records of a tunnel.
const relayBuffer = mtls.MaxFrameData

var buffers = sync.Pool{New: func() any { b := make([]byte, relayBuffer); return &b }}

// relay is an open connection's bytes: between near, the local application's side,
// and far, the side away from it, a tunnel or plain TCP. It is carried by an event
// loop where the socket can be taken away from the runtime, and by goroutines (copier)
// where crypto/tls has the tunnel's data phase.
type relay struct {
	near, plain *socket // plain: far, where it is no tunnel
	tunnel      kept    // far, where it is one
	// back takes a tunnel that has ended cleanly and may serve again; nil: it is
	// closed.
	back func(kept)
	// started is when the connection was accepted.
	started time.Time
	// serverIsNear tells which side the first byte is measured from.
	serverIsNear bool

	early  uint64 // bytes that went to far before the loop took over
	ahead  bool   // and are in near's socket still
	loop   *loop.Relay
	copier *copier
}

// say reads what the application has said already into b, for a new tunnel's Open to take
// along: it saves a round trip, and the peer's proxy holds it back until it has decided.
// Without read it stays in near's socket: the verdict says how much of it has been taken.
func (r *relay) say(b []byte, read bool) (said []byte, err error) {
	if !read {
		return r.near.peek(b[:mtls.MaxEarly])
	}
	said, err = r.near.receive(b[:maxEarly], 0)
	r.early = uint64(len(said))
	return said, err
}

// copyEarly begins to copy before the verdict, where crypto/tls has the data phase and the
// Open may have taken nothing along.
func (r *relay) copyEarly() error {
	if r.tunnel.Detachable() {
		return nil
	}
	c, err := r.copy()
	if err == nil {
		c.start()
	}
	return err
}

// patient is how long a verdict may take before somebody looks whether the
// application still waits for it.
const patient = 100 * time.Millisecond

// watch looks after an application that waits for a verdict.
type watch struct {
	timer   *time.Timer // until it begins; nil: somebody else watches
	off     bool        // it never began
	waiting chan *waiter
	over    chan struct{}
	said    error
}

// watch calls gone when the application resets its connection, from after on until stop.
func (r *relay) watch(after time.Duration, gone func()) *watch {
	w := &watch{}
	if r.copier != nil {
		return w // it watches
	}
	w.waiting, w.over = make(chan *waiter, 1), make(chan struct{})
	w.timer = time.AfterFunc(after, func() {
		defer close(w.over)
		on, err := r.near.waiter()
		if w.waiting <- on; err != nil {
			return // whatever there is to be told, the relay will be
		}
		if w.said = hangup(on); w.said != nil {
			gone()
		}
	})
	return w
}

// unneeded stops it if it has not begun; otherwise stop has to be called.
func (w *watch) unneeded() bool {
	w.off = w.off || w.timer == nil || w.timer.Stop()
	return w.off
}

// stop returns why the application does not wait any more; nil: it does. It is called
// once.
func (w *watch) stop() error {
	if w.unneeded() {
		return nil
	}
	on := <-w.waiting
	if on != nil {
		_ = on.SetReadDeadline(time.Unix(1, 0))
		defer on.done()
	}
	<-w.over
	return w.said
}

// verdict waits for the server's half. gone: the application has not waited for it,
// which is the error then, and the tunnel has been reset.
func (r *relay) verdict(ctx context.Context) (v *symbolonv1.Verdict, gone bool, err error) {
	w := r.watch(patient, func() { _ = r.tunnel.Reset() })
	v, err = r.tunnel.ReadVerdict(ctx)
	up := w.stop()
	if r.copier != nil && err != nil {
		if up = r.copier.wait(); !errors.Is(err, net.ErrClosed) {
			up = nil // the server went first
		}
	}
	if up != nil {
		_ = r.tunnel.Reset()
		return nil, true, networkError(up)
	}
	return v, false, err
}

// hangup waits until c is reset, or its read deadline passes: nil. Nothing is read.
func hangup(c syscall.Conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil
	}
	var said error
	_ = raw.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		if err == nil { // an error stands behind what has not been read
			if n, _ := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); n != 0 {
				err = unix.Errno(n)
			}
		}
		if err == nil || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			return false // whatever else happens wakes us up again
		}
		said = err
		return true
	})
	return said
}

// maxEarly is how much may go out before the verdict, bytes: a record or two with the
// Open, which no socket's buffer is too small for.
const maxEarly = 16<<10 - 64

// detach prepares the event loop's relay. mtls.ErrNotDetachable: there is only the
// copier.
func (r *relay) detach(done func(error, *loop.Tunnel)) error {
	if r.ahead {
		if err := r.near.skip(int(r.early)); err != nil {
			return err
		}
		r.ahead = false // the copier may follow
	}
	if r.tunnel.on != nil {
		near, err := r.near.side()
		if err != nil {
			return err
		}
		r.near = nil // closed, and of some size
		r.loop = loop.Resume(near, r.tunnel.on, done)
		r.tunnel.on = nil
		r.countEarly()
		return nil
	}
	far := loop.Side{}
	if r.tunnel.Conn != nil {
		far.Alerts = &loop.Alerts{}
		far.Keep = r.back != nil && r.tunnel.Kept()
		var err error
		if far.FD, far.Stream, far.Sealed, err = r.tunnel.Detach(far.Alerts); err != nil {
			return err
		}
		far.Early = r.tunnel.TakeEarly()
	} else {
		var err error
		if far, err = r.plain.side(); err != nil {
			return err
		}
	}
	near, err := r.near.side()
	if err != nil {
		_ = unix.Close(far.FD)
		if far.Stream != nil {
			far.Stream.Release()
		}
		return err
	}
	r.near, r.plain = nil, nil // closed, and of some size
	r.loop = loop.New(near, far, done)
	r.countEarly()
	return nil
}

// countEarly gives the loop's relay what went before it.
func (r *relay) countEarly() {
	if r.early > 0 {
		r.loop.ToFar.Store(r.early)
		r.loop.FirstToFar.Store(time.Now().UnixNano())
	}
}

// keep gives the tunnel, whose socket stays on its loop, to whoever keeps it.
func (r *relay) keep(on *loop.Tunnel) {
	if r.tunnel.Reusable() {
		r.back(kept{r.tunnel.Conn, on})
	} else {
		on.Close()
	}
}

// abort resets both sides, which ends both directions.
func (r *relay) abort() {
	switch {
	case r.loop != nil:
		r.loop.Cut()
	case r.tunnel.Conn != nil:
		_ = r.tunnel.Reset()
		r.near.reset()
	default:
		r.plain.reset()
		r.near.reset()
	}
}

// counts are the bytes each way so far, and the microseconds until the server's
// first byte, 0: there was none.
func (r *relay) counts() (toFar, toNear, firstByte uint64) {
	if r.copier != nil {
		return r.copier.toFar.Load(), r.copier.toNear.Load(), r.copier.firstByte.Load()
	}
	if r.loop == nil {
		return r.early, 0, 0
	}
	first := r.loop.FirstToNear.Load()
	if r.serverIsNear {
		first = r.loop.FirstToFar.Load()
	}
	if first > 0 {
		firstByte = uint64(max(time.Unix(0, first).Sub(r.started).Microseconds(), 1))
	}
	return r.loop.ToFar.Load(), r.loop.ToNear.Load(), firstByte
}

// moved is how many bytes have gone either way, and whether one end has closed.
func (r *relay) moved() (bytes uint64, half bool) {
	toFar, toNear, _ := r.counts()
	if r.loop != nil {
		half = r.loop.HalfClosed()
	} else if r.copier != nil {
		half = r.copier.half.Load()
	}
	return toFar + toNear, half
}

// copy is the relay by goroutines.
func (r *relay) copy() (*copier, error) {
	if r.copier != nil {
		return r.copier, nil
	}
	near, err := r.near.attach()
	if err != nil {
		return nil, err
	}
	var f far = tunnelled{r.tunnel.Conn, r.back}
	if r.tunnel.Conn == nil {
		c, err := r.plain.attach()
		if err != nil {
			return nil, err
		}
		f = plain{c}
	}
	r.copier = &copier{near: near, far: f, started: r.started, serverIsNear: r.serverIsNear}
	r.copier.toFar.Store(r.early)
	return r.copier, nil
}

// reset closes c with an RST instead of a FIN.
func reset(c *net.TCPConn) error {
	_ = c.SetLinger(0) // fails only on a closed socket
	return c.Close()
}

// inlineUrgent keeps TCP's urgent byte, which nobody reads out of band here, in its
// place in the stream. It loses its mark, as it would on many a router, but does
// not get lost itself.
func inlineUrgent(c *net.TCPConn) {
	if c == nil {
		return
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return // closed
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) // TCP has it always
	})
}
