package proxy

import (
	"container/list"
	"context"
	"errors"
	"io"
	"sync"
	"time"
)

// lot is the server's side of tunnels that wait for their next connection on an event
// loop, in the order in which they came: each may wait for as long as the others. Safe
// for concurrent use.
type lot struct {
	mu     sync.Mutex
	parked list.List // of *incoming
	closed bool
}

// park lets a tunnel that its loop has wait for its next connection. It needs no
// goroutine meanwhile.
func (in *incoming) park() {
	p := in.p
	if !p.lot.add(in, p.now()) {
		p.conns.Add(1) // beside the connection that has just ended
		in.leave()
		return
	}
	in.tunnel.on.Await(func(m []byte, err error) {
		if !p.lot.leave(in, p.conns.Add) {
			return // who has taken it out ends it
		}
		in.arrived(m, err)
	})
}

// gone ends the tunnel, and gives its place back.
func (in *incoming) gone() {
	_ = in.tunnel.Close()
	in.slot.leave()
}

// leave is gone for a tunnel on which the client may be asking just now. One of p.conns is
// given back when all is closed: the process is not to end before.
func (in *incoming) leave() {
	in.tunnel.leave(func() {
		in.slot.leave()
		in.p.conns.Done()
	})
}

// arrived serves the connection that m, by loop.Tunnel, announces. err is why none came.
// It does not wait. One of p.conns is given back at the end.
func (in *incoming) arrived(m []byte, err error) {
	p := in.p
	open, err := in.tunnel.TakeOpen(m, err)
	if err != nil {
		p.crew.run(func() {
			defer p.conns.Done()
			in.missed(err)
		})
		return
	}
	next := in.again()
	next.quick = true
	err = next.serveNext(context.Background(), open)
	if errors.Is(err, errRelaying) {
		p.conns.Done()
		return
	}
	p.crew.run(func() {
		defer p.conns.Done()
		if errors.Is(err, errLater) {
			ctx, cancel := next.setup()
			defer cancel()
			rest := next.rest
			next.rest = nil
			err = rest(ctx)
		}
		next.ended(err)
	})
}

// missed ends a tunnel on which no Open came that can be served.
func (in *incoming) missed(err error) {
	if !errors.Is(err, io.EOF) {
		if in.tunnel.attach() == nil {
			err = in.tunnel.RefuseOpen(err)
		}
		in.again().report(err)
	}
	in.gone()
}

// add is false where nothing is waited for any more.
func (l *lot) add(in *incoming, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	in.since = now
	in.spot = l.parked.PushBack(in)
	return true
}

// leave takes in out, if it is there, and calls begin with 1: it is under way.
func (l *lot) leave(in *incoming, begin func(int)) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if in.spot == nil {
		return false
	}
	l.parked.Remove(in.spot)
	in.spot = nil
	begin(1)
	return true
}

// sweep ends what has waited for too long.
func (l *lot) sweep(now time.Time) {
	l.end(func(in *incoming) bool { return now.Sub(in.since) > keepIdleServer })
}

// close ends all, and takes none any more.
func (l *lot) close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.end(func(*incoming) bool { return true })
}

// end ends the first ones, as long as they are to end.
func (l *lot) end(ends func(*incoming) bool) {
	for {
		l.mu.Lock()
		first := l.parked.Front()
		if first == nil || !ends(first.Value.(*incoming)) {
			l.mu.Unlock()
			return
		}
		in := l.parked.Remove(first).(*incoming)
		in.spot = nil
		in.p.conns.Add(1) // before close has returned
		l.mu.Unlock()
		in.leave()
	}
}
