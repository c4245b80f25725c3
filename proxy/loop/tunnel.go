package loop

import (
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/mtls/record"
)

// Tunnel is a relay's far side after a clean end. Its socket stays where it is, watched
// by the same loop, until it serves again: whoever has it sends and awaits the messages
// in between, and Resume makes the next relay of it. Its methods may be called by
// anyone.
type Tunnel struct {
	l *Loop

	// mu guards everything, the stream too. It comes before the loop's.
	mu    sync.Mutex
	end   end
	told  func(m []byte, err error) // of the next message; nil: nobody waits for it
	next  *Relay                    // that has it now
	ended bool
}

// errFull: a message could not be written at once. Whoever has read all that came
// before has room for it, so that somebody has not.
var errFull = fmt.Errorf("%w: no room for a message behind what has been read", mtls.ErrProtocol)

// leave makes a Tunnel of a relay's far side, which keeps its slot; with the loop's lock.
func (l *Loop) leave(r *Relay) *Tunnel {
	t := &Tunnel{l: l}
	t.end.take(&r.far)
	t.end.tunnel = t
	l.ends[t.end.slot] = &t.end
	return t
}

// take moves a side's state, but for what belongs to its relay.
func (e *end) take(from *end) {
	e.fd, e.slot, e.stream, e.carry, e.alerts = from.fd, from.slot, from.stream, from.carry, from.alerts
	e.readable, e.greedy, e.failed, e.keep = from.readable, from.greedy, from.failed, from.keep
	if e.alerts != nil {
		e.alerts.end = e
	}
	from.fd, from.stream, from.carry, from.alerts = -1, nil, store{}, nil
}

// Idle tells whether nothing has arrived, as far as the loop has seen, and nobody waits:
// a byte could only be a protocol error, an end means that the peer does not wait any
// more.
func (t *Tunnel) Idle() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended || t.next != nil || t.told != nil {
		return false
	}
	if t.end.readable && nothing(t.end.fd) {
		t.end.readable = false // the event was of what the relay has read
	}
	return !t.arrived()
}

// nothing tells whether a socket has nothing to read, no end and no error, which is not
// taken from it.
func nothing(fd int) bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP}}, 0)
	return n == 0 && err == nil
}

// arrived tells whether there may be something to read.
func (t *Tunnel) arrived() bool {
	return t.end.readable || !t.end.carry.empty() || t.end.stream.Buffered()
}

// Send writes a message that seal makes in a buffer of mtls.MessageBuffer bytes. It does
// not wait. After an error the tunnel is of no more use, and to be closed.
func (t *Tunnel) Send(seal func(buf []byte) ([]byte, error)) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended || t.next != nil {
		return ErrCut
	}
	s := newStore(mtls.MessageBuffer)
	defer s.drop()
	b, err := seal((*s.buf)[:mtls.MessageBuffer])
	if err != nil {
		return err
	}
	n, err := write(t.end.fd, b)
	if err == errAgain || err == nil && n < len(b) { //nolint:errorlint // one value, made for this
		return errFull
	}
	return err
}

// Await has told called once: with the next message, or why there is none. It must not
// wait for anything: it may be the loop that calls it. Nobody else may be waiting.
func (t *Tunnel) Await(told func(m []byte, err error)) {
	t.mu.Lock()
	if t.ended || t.next != nil {
		t.mu.Unlock()
		told(nil, ErrCut)
		return
	}
	t.told = told
	var m []byte
	var err error
	if t.arrived() { // before somebody waited for it
		s := newStore(max(inSmall, len(t.end.carry.data)+record.MaxRecord))
		m, err = t.receive((*s.buf)[:cap(s.data)])
		s.drop()
	}
	t.tell(m, err)
}

// tell unlocks, and calls told if there is anything to be told.
func (t *Tunnel) tell(m []byte, err error) {
	told := t.told
	if m != nil || err != nil {
		t.told = nil
	}
	t.mu.Unlock()
	if m != nil || err != nil {
		told(m, err)
	}
}

// happened handles events of a tunnel that is between two relays, or was when they were
// looked up.
func (t *Tunnel) happened(events uint32) {
	t.mu.Lock()
	if r := t.next; r != nil {
		t.mu.Unlock()
		t.l.happened(&r.far, events)
		return
	}
	e := &t.end
	if events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR|unix.EPOLLPRI) != 0 {
		e.greedy = true
	}
	if events&unix.EPOLLERR != 0 {
		e.failed = true
	}
	if events&^unix.EPOLLOUT != 0 {
		e.readable = true
	}
	if t.ended || t.told == nil {
		t.mu.Unlock()
		return
	}
	t.tell(t.receive(t.l.in))
}

// receive reads into in, which holds a record and more, until there is a message, or
// nothing more to read: neither.
func (t *Tunnel) receive(in []byte) (m []byte, err error) {
	e := &t.end
	have := copy(in, e.carry.data)
	e.carry.drop()
	for {
		n, m, err := e.stream.Message(in[:have])
		have = copy(in, in[n:have])
		if m != nil || err != nil || !e.readable {
			e.carry.add(in[:have])
			return m, err
		}
		asked := min(len(in)-have, smallRead)
		got, err := read(e.fd, in[have:have+asked])
		switch {
		case err == errAgain: //nolint:errorlint // one value, made for this
			e.readable = false
		case err != nil:
			return nil, err
		case got == 0:
			return nil, mtls.ErrTruncated
		case got < asked:
			e.readable = e.greedy
		}
		have += got
	}
}

// Close ends the tunnel. Whoever waits for a message is told so.
func (t *Tunnel) Close() { t.close(false) }

// Reset is Close with an RST.
func (t *Tunnel) Reset() { t.close(true) }

func (t *Tunnel) close(reset bool) {
	t.mu.Lock()
	if t.ended || t.next != nil {
		t.mu.Unlock()
		return
	}
	e := &t.end
	t.give()
	if reset {
		_ = unix.SetsockoptLinger(e.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	_ = unix.Close(e.fd)
	e.stream.Release()
	e.carry.drop()
	told := t.told
	t.told = nil
	t.mu.Unlock()
	if told != nil {
		told(nil, ErrCut)
	}
}

// Leave ends the tunnel for a peer that may be sending an Open just now: its own direction
// at once, by close_notify, which nobody on the way can make up; the rest after linger, so
// that the peer reads it before any reset. after is called then; also where the tunnel has
// ended already, or is in use.
func (t *Tunnel) Leave(linger time.Duration, after func()) {
	t.mu.Lock()
	if t.ended || t.next != nil {
		t.mu.Unlock()
		after()
		return
	}
	e := &t.end
	_ = unix.EpollCtl(t.l.epoll, unix.EPOLL_CTL_DEL, e.fd, nil)
	t.give()
	s := newStore(mtls.MessageBuffer)
	if b, err := e.stream.Close((*s.buf)[:mtls.MessageBuffer]); err == nil {
		_, _ = write(e.fd, b) // there is room, or the peer has not read its last verdict
	}
	s.drop()
	_ = unix.Shutdown(e.fd, unix.SHUT_WR) // fails only where the peer has reset it
	e.stream.Release()
	e.carry.drop()
	told, fd := t.told, e.fd
	t.told = nil
	t.mu.Unlock()
	if told != nil {
		told(nil, ErrCut)
	}
	time.AfterFunc(linger, func() { _ = unix.Close(fd); after() })
}

// give gives up the loop's slot: from here on nothing happens any more.
func (t *Tunnel) give() {
	t.ended = true
	if t.end.alerts != nil {
		t.end.alerts.end = nil
	}
	t.l.mu.Lock()
	t.l.leaves(&t.end)
	t.l.mu.Unlock()
}

// Kept is a tunnel's descriptor that is handed back, and what was read from it.
type Kept struct {
	FD     int
	Stream *mtls.Stream
	Sealed []byte
}

// Detach takes the tunnel's socket from the loop, for mtls.Conn.Attach. Errors: ErrCut,
// it has ended, or is in use.
func (t *Tunnel) Detach() (Kept, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended || t.next != nil {
		return Kept{}, ErrCut
	}
	e := &t.end
	_ = unix.EpollCtl(t.l.epoll, unix.EPOLL_CTL_DEL, e.fd, nil)
	t.give()
	k := Kept{FD: e.fd, Stream: e.stream, Sealed: append([]byte(nil), e.carry.data...)}
	e.carry.drop()
	return k, nil
}

// Resume prepares a relay whose far side is t, for Add. t is of no more use.
func Resume(near Side, t *Tunnel, done func(err error, kept *Tunnel)) *Relay {
	r := New(near, Side{FD: -1}, done)
	r.from = t
	return r
}

// resume takes r, whose far side is on the loop already.
func (l *Loop) resume(r *Relay) {
	t := r.from
	r.from = nil
	l.relays.Add(1)
	t.mu.Lock()
	l.mu.Lock()
	if l.closed || r.cut.Load() || t.ended { // cut before, it must not carry a byte
		l.mu.Unlock()
		t.mu.Unlock()
		l.relays.Add(-1)
		t.Reset()
		r.close(ErrCut, nil, l.spawn)
		return
	}
	was, unread := t.arrived(), t.end.readable
	r.far.take(&t.end)
	r.far.readable, r.far.read = was, !unread // or it would wait for an edge
	t.next = r
	l.ends[r.far.slot] = &r.far
	l.begin(r)
	t.mu.Unlock()
}
