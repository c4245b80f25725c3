package loop

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/mtls/record"
	"github.com/symbolon/symbolon/redirect"
)

const (
	// batch is how many events one epoll_wait(2) brings.
	batch = 128
	// budget is how much a direction may carry before others have their turn, bytes.
	budget = 256 << 10

	interest = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET
)

// Loops are the event loops of a process.
type Loops struct {
	loops []*Loop
	next  atomic.Uint32
	done  sync.WaitGroup
}

// Start starts n loops, which call what a relay has to be told at its end by spawn;
// nil: on a new goroutine. Errors: the kernel's, out of descriptors.
func Start(n int, spawn func(func())) (*Loops, error) {
	if spawn == nil {
		spawn = func(f func()) { go f() }
	}
	s := &Loops{}
	for range max(n, 1) {
		l, err := newLoop(spawn)
		if err != nil {
			s.Close()
			return nil, fmt.Errorf("event loop: %w", err)
		}
		s.loops = append(s.loops, l)
		s.done.Go(l.run)
	}
	return s, nil
}

// Close stops the loops, and cuts the relays that are still on them.
func (s *Loops) Close() {
	for _, l := range s.loops {
		l.stop()
	}
	s.done.Wait()
}

// Add begins to relay, on the loop that has the least to do, or has the far side
// already.
func (s *Loops) Add(r *Relay) {
	if r.from != nil {
		r.from.l.resume(r)
		return
	}
	best := s.loops[int(s.next.Add(1))%len(s.loops)]
	for _, l := range s.loops {
		if l.relays.Load() < best.relays.Load() {
			best = l
		}
	}
	best.add(r)
}

// Loop is one event loop.
type Loop struct {
	epoll, wake int
	spawn       func(func())
	relays      atomic.Int64

	mu     sync.Mutex
	ends   []*end // by slot; nil: free
	free   []int32
	ages   []int32 // of slots: an event for an earlier use is none
	posted []*Relay
	closed bool
	warm   atomic.Bool // the next rest may find something to drop
	asleep atomic.Bool // or about to be: it has to be rung for. Set with the lock.

	// Only the loop's own goroutine uses what follows.
	now    int64
	rested int64 // when the last rest was
	events [batch]unix.EpollEvent
	ready  []*direction // have something to do, and no event to tell so
	spare  []*direction
	in     []byte // read into, opened in
	out    []byte // sealed in
	vec    [record.MaxSlots * 4]unix.Iovec
	data   [record.MaxSlots * 4][]byte
	pipes  []*pipe
	held   int // bytes in those that directions have
}

func newLoop(spawn func(func())) (*Loop, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err == nil {
		err = unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, wake, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: -1})
	}
	if err != nil {
		_ = unix.Close(ep)
		return nil, err
	}
	return &Loop{epoll: ep, wake: wake, spawn: spawn, in: make([]byte, inSize), out: make([]byte, record.SealBuffer(slots))}, nil
}

// add takes r, which has not been on a loop.
func (l *Loop) add(r *Relay) {
	l.relays.Add(1)
	l.mu.Lock()
	if l.closed || r.cut.Load() || r.why.Load() != nil { // cut before, it must not carry a byte
		l.mu.Unlock()
		l.relays.Add(-1)
		r.close(r.broken(), nil, l.spawn)
		return
	}
	l.place(&r.far)
	l.begin(r, &r.far)
}

// begin lets r run, whose far side has its slot; with the lock, which it gives back.
// also is what is to be watched beside the near side.
func (l *Loop) begin(r *Relay, also ...*end) {
	l.place(&r.near)
	r.mu.Lock()
	r.loop.Store(l)
	told := len(r.told) > 0
	r.mu.Unlock()
	// All under the lock, without which the loop handles no event: the first comes at
	// once, and might end r before its second descriptor is in.
	err := l.watch(&r.near)
	for _, e := range also {
		err = errors.Join(err, l.watch(e))
	}
	if r.near.readable || r.far.readable || told {
		// What was read already has no event, if the socket is full as well.
		l.posted = append(l.posted, r)
		l.ring()
	}
	l.mu.Unlock()
	if err != nil {
		err = &WatchError{err}
		r.why.Store(&err)
	}
	if err != nil || r.cut.Load() {
		r.Cut()
	}
}

// WatchError is that the kernel does not let a loop watch a socket, for want of memory or
// by fs.epoll.max_user_watches.
type WatchError struct{ Err error }

func (e *WatchError) Error() string { return "watching a socket: " + e.Err.Error() }
func (e *WatchError) Unwrap() error { return e.Err }

// place gives an end a slot; with the lock.
func (l *Loop) place(e *end) {
	if n := len(l.free); n > 0 {
		e.slot = l.free[n-1]
		l.free = l.free[:n-1]
		l.ends[e.slot] = e
		return
	}
	e.slot = int32(len(l.ends))
	l.ends = append(l.ends, e)
	l.ages = append(l.ages, 0)
}

// watch asks for an end's events; with the lock.
func (l *Loop) watch(e *end) error {
	return unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, e.fd, &unix.EpollEvent{Events: interest, Fd: e.slot, Pad: l.ages[e.slot]})
}

// post asks the loop to look at r. A loop that stops cuts all there are.
func (l *Loop) post(r *Relay) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		l.posted = append(l.posted, r)
		l.ring()
	}
}

// ring wakes the loop up, if it sleeps; with the lock, since the descriptor lives as long
// as closed is not set.
func (l *Loop) ring() {
	if !l.asleep.Swap(false) {
		return // it looks before it sleeps
	}
	one := [8]byte{1}
	_, _ = unix.Write(l.wake, one[:]) // full: it will wake up
}

func (l *Loop) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		l.closed = true
		l.ring()
	}
}

// run is the loop.
func (l *Loop) run() {
	defer l.shut()
	wait := forever
	for {
		if len(l.ready) > 0 {
			wait = dont
		}
		if l.awaited() {
			wait = dont
		}
		n, err := poll(l.epoll, l.events[:], wait)
		l.asleep.Store(false)
		if err != nil {
			panic(fmt.Sprintf("epoll_wait: %v", err)) // our own descriptor is broken
		}
		l.now = time.Now().UnixNano()
		switch {
		case n > 0 || len(l.ready) > 0:
			wait = soon // more is likely to come
			l.warm.Store(true)
		case l.warm.Load():
			wait = long
		default:
			wait = forever
		}
		if l.warm.Load() && l.now-l.rested >= int64(restEvery) {
			l.rest()
		}
		turn := l.ready
		l.ready, l.spare = l.spare[:0], nil
		l.serve(l.events[:n])
		if !l.attend() {
			return
		}
		for i, d := range turn {
			turn[i] = nil
			if d.queued = false; !d.relay.over {
				l.turn(d)
			}
		}
		l.spare = turn[:0]
	}
}

// restEvery is how long a stream may be without a record before its ciphers are dropped;
// twice as long at most.
const restEvery = 2 * time.Second

// rest has idle streams drop what they can do without: of ten thousand connections most
// have nothing to say most of the time.
func (l *Loop) rest() {
	l.rested = l.now
	warm := false
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.ends {
		if e == nil || e.relay == nil || e != &e.relay.near {
			continue // of a tunnel that serves one relay after another the slot is not the far end's
		}
		if s := e.relay.far.stream; s != nil && s.Rest() {
			warm = true
		}
	}
	l.warm.Store(warm)
}

// awaited tells whether somebody waits for the loop; if not, it is to be rung for from
// now on.
func (l *Loop) awaited() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	none := len(l.posted) == 0 && !l.closed
	l.asleep.Store(none)
	return !none
}

// serve handles events.
func (l *Loop) serve(events []unix.EpollEvent) {
	for i := range events {
		v := &events[i]
		if v.Fd < 0 {
			var b [8]byte
			_, _ = unix.Read(l.wake, b[:])
			continue
		}
		l.mu.Lock()
		e := l.ends[v.Fd]
		if v.Pad != l.ages[v.Fd] {
			e = nil
		}
		l.mu.Unlock()
		switch {
		case e == nil:
		case e.tunnel != nil:
			e.tunnel.happened(v.Events)
		default:
			l.happened(e, v.Events)
		}
	}
}

// attend looks after those who wait for the loop. False: it is to stop.
func (l *Loop) attend() bool {
	l.mu.Lock()
	posted, closed := l.posted, l.closed
	l.posted = nil
	l.mu.Unlock()
	for _, r := range posted {
		if !r.over && r.cut.Load() {
			l.finish(r, r.broken())
		}
		l.tell(r)
		for _, e := range []*end{&r.near, &r.far} {
			if e.readable && !r.over {
				l.turn(e.reads)
			}
		}
		r.acknowledge()
	}
	return !closed
}

// happened handles one end's events.
func (l *Loop) happened(e *end, events uint32) {
	r := e.relay
	if r.over {
		return
	}
	if events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR|unix.EPOLLPRI) != 0 {
		e.greedy = true
	}
	if events&unix.EPOLLERR != 0 {
		e.failed = true
	}
	if events&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0 && !e.writes.flushed() {
		l.turn(e.writes)
	}
	if r.over {
		return
	}
	if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR|unix.EPOLLPRI) != 0 {
		e.readable, e.read = true, false
	}
	if e.readable {
		l.turn(e.reads)
	}
	r.acknowledge()
}

// acknowledge lets ACKs go that the first bytes have brought, or that none will bring now.
func (r *Relay) acknowledge() {
	for _, e := range [...]*end{&r.near, &r.far} {
		if e.held && !r.over && (!e.writes.src.readable || e.writes.eof || e.writes.count.Load() > 0) {
			e.held = false
			redirect.Acknowledge(e.fd)
		}
	}
}

// turn lets d carry what it may. Nobody reads what has ended, nor while dst takes
// nothing: an error of src has to be asked for then, or a reset would not get through.
func (l *Loop) turn(d *direction) {
	l.pump(d)
	if d.src.failed && !d.relay.over && (d.eof || !d.flushed()) {
		if err := socketError(d.src.fd); err != nil {
			l.finish(d.relay, err)
		}
	}
}

// later gives d another turn, after the others'.
func (l *Loop) later(d *direction) {
	if !d.queued {
		d.queued = true
		l.ready = append(l.ready, d)
	}
}

// finish ends a relay. It does nothing the second time.
func (l *Loop) finish(r *Relay, err error) {
	if r.over {
		return
	}
	var kept *Tunnel
	l.mu.Lock()
	l.leaves(&r.near)
	if err == nil && r.far.keep {
		kept = l.leave(r)
	} else {
		l.leaves(&r.far)
	}
	l.mu.Unlock()
	l.relays.Add(-1)
	l.spill(&r.up)
	l.spill(&r.down)
	r.close(err, kept, l.spawn)
}

// leaves frees an end's slot; with the lock.
func (l *Loop) leaves(e *end) {
	l.ends[e.slot] = nil
	l.ages[e.slot]++
	l.free = append(l.free, e.slot)
}

// shut cuts what is left, when the loop stops.
func (l *Loop) shut() {
	l.mu.Lock()
	left := append([]*end(nil), l.ends...)
	l.mu.Unlock()
	for _, e := range left {
		switch {
		case e == nil:
		case e.tunnel != nil:
			e.tunnel.Close()
		case e == &e.relay.near:
			l.finish(e.relay, ErrCut)
		}
	}
	for _, p := range l.pipes {
		p.close()
	}
	_ = errors.Join(unix.Close(l.epoll), unix.Close(l.wake))
}
