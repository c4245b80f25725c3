package proxy

import "sync/atomic"

// resting is how many goroutines a crew keeps that have nothing to do.
const resting = 8

// crew runs functions on goroutines that it keeps for the next ones. A new goroutine
// begins with a small stack, which is copied again and again as a handshake or a
// record needs more of it.
type crew struct {
	next  chan func()
	spare atomic.Int32
}

func newCrew() *crew { return &crew{next: make(chan func())} }

// run runs f, at once.
func (c *crew) run(f func()) {
	select {
	case c.next <- f:
	default:
		go c.work(f)
	}
}

func (c *crew) work(f func()) {
	for f != nil {
		f()
		if c.spare.Add(1) > resting {
			c.spare.Add(-1)
			return
		}
		f = <-c.next // nil: closed
		c.spare.Add(-1)
	}
}

// close lets the goroutines go that rest. Nothing may be run afterwards.
func (c *crew) close() { close(c.next) }
