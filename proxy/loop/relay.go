package loop

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/mtls"
)

// Side is one end of a relay.
type Side struct {
	// FD is a connected stream socket, non-blocking, that nobody else uses. The relay
	// closes it.
	FD int
	// Stream is what is on it; nil: plain bytes. At most one side has one.
	Stream *mtls.Stream
	// Sealed is what was read of Stream's records already.
	Sealed []byte
	// Early is what has come from it before, application bytes. It is New's, which copies
	// it, and for far only.
	Early []byte
	// Alerts is where Stream's go; nil: nowhere.
	Alerts *Alerts
	// Inline: SO_OOBINLINE is set on FD already.
	Inline bool
	// Held: the last ACK of its handshake waits for the first bytes to bring it. The relay
	// lets it go where there are none.
	Held bool
	// Keep: do not close FD after a clean end, but hand it on as a Tunnel.
	Keep bool
}

// Relay carries bytes between two sides until both directions have ended. Its
// methods may be called by anyone; the counters too may be read at any time.
type Relay struct {
	// ToFar and ToNear count application bytes by direction.
	ToFar, ToNear atomic.Uint64
	// FirstToFar and FirstToNear are when the first byte of a direction came, Unix
	// nanoseconds; 0: not yet.
	FirstToFar, FirstToNear atomic.Int64
	half                    atomic.Bool // one of the two directions has ended

	near, far end
	up, down  direction // from near to far, and back
	done      func(err error, kept *Tunnel)
	from      *Tunnel // where far comes from; nil: it is New's

	loop atomic.Pointer[Loop]
	cut  atomic.Bool
	why  atomic.Pointer[error] // it cannot be carried; nil: somebody wanted the cut
	mu   sync.Mutex
	told [][]byte // control messages for far; guarded by mu
	over bool     // the loop's
}

// end is one side as its loop sees it.
type end struct {
	fd       int
	slot     int32
	relay    *Relay  // nil: tunnel's
	tunnel   *Tunnel // nil: relay's
	stream   *mtls.Stream
	alerts   *Alerts
	carry    store // the beginning of a record
	reads    *direction
	writes   *direction
	keep     bool
	readable bool // there may be something to read
	read     bool // and all of it is in carry already, as far as events tell
	greedy   bool // read until there is nothing: a short read does not say so
	failed   bool // there is an error to ask for
	held     bool // see Side
}

// direction is one of the two.
type direction struct {
	relay    *Relay
	src, dst *end
	count    *atomic.Uint64
	first    *atomic.Int64
	pending  store // taken from src, and not by dst
	pipe     *pipe // the same, within the kernel
	much     bool  // flows: a large read pays
	bulk     bool  // so much that splice(2) does
	spent    int   // bytes read in this turn, with what is around an application's
	eof      bool  // src has ended it
	ended    bool  // dst was told
	queued   bool  // its turn comes
}

// ErrCut: the relay was cut by Cut. It is net.ErrClosed.
var ErrCut = net.ErrClosed

// New prepares a relay. done is called once: without an error both directions have
// ended cleanly; kept is far, if it is to be kept. It must not wait for anything then,
// since the loop calls it. In any other case both sides are reset and closed, and the
// loops' spawn calls it. The error is the first that cut a
// direction short: ErrCut, mtls.ErrTruncated, *WatchError, the kernel's, the tunnel's.
func New(near, far Side, done func(err error, kept *Tunnel)) *Relay {
	r := &Relay{done: done}
	r.near.use(r, near, &r.up, &r.down)
	r.far.use(r, far, &r.down, &r.up)
	r.up = direction{relay: r, src: &r.near, dst: &r.far, count: &r.ToFar, first: &r.FirstToFar}
	r.down = direction{relay: r, src: &r.far, dst: &r.near, count: &r.ToNear, first: &r.FirstToNear}
	if len(far.Early) > 0 {
		r.down.pending.add(far.Early) // which near's first event lets go
		r.ToNear.Store(uint64(len(far.Early)))
		r.FirstToNear.Store(time.Now().UnixNano())
	}
	return r
}

func (e *end) use(r *Relay, s Side, reads, writes *direction) {
	*e = end{fd: s.FD, relay: r, stream: s.Stream, alerts: s.Alerts, keep: s.Keep, held: s.Held, reads: reads, writes: writes}
	if e.alerts != nil {
		e.alerts.end = e
	}
	if s.FD < 0 {
		return
	}
	if e.stream != nil {
		e.carry.add(s.Sealed)
		e.readable = len(s.Sealed) > 0 || s.Stream.Buffered() // which gives no edge
		return
	}
	if !s.Inline {
		_ = unix.SetsockoptInt(s.FD, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) // TCP has it always
	}
}

// Alerts writes to a Side's socket what that takes at once, as long as the relay
// lasts, and not into the middle of a record. It is for mtls.Conn.Detach, which is
// called before the descriptor is known.
type Alerts struct{ end *end }

func (a *Alerts) Write(b []byte) (int, error) {
	if a.end == nil {
		return 0, net.ErrClosed
	}
	if a.end.writes != nil && !a.end.writes.flushed() {
		return 0, errAgain
	}
	return write(a.end.fd, b)
}

// Cut resets both sides.
func (r *Relay) Cut() {
	r.cut.Store(true)
	if l := r.loop.Load(); l != nil {
		l.post(r)
	}
}

// Tell sends a control message on far, which carries a tunnel, behind what is on its way.
// It may come to nothing: once that direction has ended, or the relay.
func (r *Relay) Tell(m []byte) {
	r.mu.Lock()
	r.told = append(r.told, m)
	l := r.loop.Load()
	r.mu.Unlock()
	if l != nil { // or begin looks
		l.post(r)
	}
}

// broken is why it cannot be carried, or was cut.
func (r *Relay) broken() error {
	if why := r.why.Load(); why != nil {
		return *why
	}
	return ErrCut
}

// HalfClosed tells whether exactly one direction has ended.
func (r *Relay) HalfClosed() bool { return r.half.Load() }

// socketError is what a socket has to report, once.
func socketError(fd int) error {
	n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && n != 0 {
		err = unix.Errno(n)
	}
	return err
}

// gone is why a connected socket says that it is not: the other side has reset it.
func gone(fd int, err error) error {
	if !errors.Is(err, unix.ENOTCONN) {
		return err
	}
	if said := socketError(fd); said != nil {
		return said
	}
	return unix.ECONNRESET
}

// close ends a relay: with err by resets. kept is what far has become, if it was kept.
func (r *Relay) close(err error, kept *Tunnel, spawn func(func())) {
	r.over = true
	for _, d := range []*direction{&r.up, &r.down} {
		d.pending.drop()
	}
	for _, e := range []*end{&r.near, &r.far} {
		if e.fd < 0 {
			continue // kept, or never here
		}
		if e.alerts != nil {
			e.alerts.end = nil
		}
		e.carry.drop()
		if err != nil {
			_ = unix.SetsockoptLinger(e.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		}
		_ = unix.Close(e.fd)
		if e.stream != nil {
			e.stream.Release()
		}
	}
	done := r.done
	r.done = nil
	if err == nil {
		done(nil, kept) // the loop's own; what failed may be a longer story
		return
	}
	spawn(func() { done(err, kept) })
}

// isEnd tells a direction's clean end from a failure.
func isEnd(err error) bool { return errors.Is(err, io.EOF) }
