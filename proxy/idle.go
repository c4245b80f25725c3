package proxy

import (
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// Idle bounds how long an open connection may rest. Each starts again with every
// byte; 0: for ever.
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

// sweepIdle cuts the connections that have rested for too long.
func (p *Proxy) sweepIdle(now time.Time) {
	if p.idle == (Idle{}) {
		return
	}
	for _, l := range p.table.snapshot() {
		if l.moved == nil {
			continue
		}
		if bytes, half := l.moved(); l.rest.tooLong(p.idle, bytes, half, now) {
			l.end(symbolonv1.Reason_REASON_TIMED_OUT)
		}
	}
}
