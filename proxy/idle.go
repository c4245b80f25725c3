package proxy

import (
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// Idle bounds how long an open connection may rest, give or take a lookShare. Each
// starts again with every byte; 0: for ever.
type Idle struct {
	// Open is for connections open both ways, HalfClosed for those that one end has
	// closed.
	Open, HalfClosed time.Duration
}

// DefaultIdle lets a connection rest for as long as its ends want, but not half of
// one: who forgets to close the other half does so every time.
var DefaultIdle = Idle{HalfClosed: time.Hour}

// rest is since when a connection has not moved a byte. Only the sweep uses it.
type rest struct {
	bytes uint64
	half  bool
	since time.Time
}

// tooLong notes what has happened since the last look, and tells whether nothing has
// for longer than allowed.
func (r *rest) tooLong(limit Idle, bytes uint64, half bool, now time.Time) bool {
	if r.since.IsZero() || bytes != r.bytes || half != r.half {
		*r = rest{bytes, half, now}
		return false
	}
	most := limit.Open
	if half {
		most = limit.HalfClosed
	}
	return most > 0 && now.Sub(r.since) >= most
}

// lookShare is how exact a bound is kept: a connection is cut a lookShare of the smallest
// one too late at most, or sweepEvery.
const lookShare = 32

// every is how often a connection has to be looked at.
func (i Idle) every() time.Duration {
	least := i.Open
	if least == 0 || i.HalfClosed > 0 && i.HalfClosed < least {
		least = i.HalfClosed
	}
	return max(least/lookShare, sweepEvery)
}

// sweepIdle cuts the connections that have rested for too long.
func (p *Proxy) sweepIdle(now time.Time) {
	if p.idle == (Idle{}) {
		return
	}
	for _, l := range p.table.look(now, p.idle.every()) {
		if bytes, half := l.moved(); l.origin().rest.tooLong(p.idle, bytes, half, now) {
			l.end(symbolonv1.Reason_REASON_TIMED_OUT)
		}
	}
}

// round is the live connections, those first that were looked at longest ago: a sweep
// meets those whose turn it is, and no others. Guarded by the table's lock.
type round struct{ first, last *live }

// turn is a connection's place in the round.
type turn struct {
	before, after *live
	looked        time.Time // zero: it is not there
}

// join puts l at the end.
func (r *round) join(l *live, now time.Time) {
	l.round = turn{before: r.last, looked: now}
	if r.last != nil {
		r.last.round.after = l
	} else {
		r.first = l
	}
	r.last = l
}

// leave takes l out, if it is there.
func (r *round) leave(l *live) {
	t := l.round
	if t.looked.IsZero() {
		return
	}
	if t.before != nil {
		t.before.round.after = t.after
	} else {
		r.first = t.after
	}
	if t.after != nil {
		t.after.round.before = t.before
	} else {
		r.last = t.before
	}
	l.round = turn{}
}

// look gives those that nobody has looked at for so long, and counts them as looked at.
func (t *table) look(now time.Time, every time.Duration) (due []*live) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for l := t.round.first; l != nil && now.Sub(l.round.looked) >= every; l = t.round.first {
		t.round.leave(l)
		t.round.join(l, now)
		due = append(due, l)
	}
	return due
}
