package policydb

import (
	"sync/atomic"
	"time"
	"unsafe"
)

// maxAnswers bounds the decisions that are kept: a power of two. One is about 200 bytes.
const (
	maxAnswers = 1 << answerBits
	answerBits = 12
)

// question is what a decision depends on beside the clock. Ends are what policies can
// tell of them: the replicas of an application ask one question.
type question struct {
	from, to *known
	chain    *chain // of the side that judges
	// what packs the port, the protocol, the side, and whether the other end is an External.
	what uint32
}

func (q *Query) what(side Side, external bool) uint32 {
	w := uint32(q.Port) | uint32(transportOf(q.Protocol))<<16 | uint32(side)<<24
	if external {
		w |= 1 << 25
	}
	return w
}

// answer is a decision that was made, and from when until when it holds.
type answer struct {
	question
	decision Decision
	// By the clock on the wall, which windows go by, and not by the monotonic one: when
	// it is set, what was decided is asked anew. Zero until: for as long as policy holds.
	from, until time.Time
}

// holds tells whether a is what would be decided now. A clock that was set back may
// show a time before a policy expired of which the answer says nothing any more.
func (a *answer) holds(q *question, now time.Time) bool {
	return a != nil && a.question == *q && !now.Before(a.from) && (a.until.IsZero() || now.Before(a.until))
}

// answers keeps decisions; each has two places.
type answers struct {
	slots [maxAnswers]atomic.Pointer[answer]
}

// place is the first of the places of q; the second is its neighbour. What q points to
// cannot go away, nor its address be used again, while an answer remembers it.
func (q *question) place() uint64 {
	const odd, golden = 0xff51afd7ed558ccd, 0x9e3779b97f4a7c15
	h := uint64(uintptr(unsafe.Pointer(q.from)))
	h = h*odd + uint64(uintptr(unsafe.Pointer(q.to)))
	h = h*odd + uint64(uintptr(unsafe.Pointer(q.chain)))
	h = (h ^ h>>32) * odd
	return (h + uint64(q.what)) * golden >> (64 - answerBits)
}

// forgetAnswers is for who changes what decisions go by, before others see c.
func (c *Compiled) forgetAnswers() { c.known.answers.Store(nil) }

// openWindows makes c take every window as open: PolicyTests must not depend on the hour.
func (c *Compiled) openWindows() {
	c.timeless = true
	c.forgetAnswers()
}

// find is the answer to q, or nil.
func (as *answers) find(q *question, now time.Time) *answer {
	if as == nil {
		return nil
	}
	i := q.place()
	if a := as.slots[i].Load(); a.holds(q, now) {
		return a
	}
	if a := as.slots[i^1].Load(); a.holds(q, now) {
		return a
	}
	return nil
}

// keep remembers what was decided. What was there moves over, as in newEntry; an answer to
// the same question, of another time, goes.
func (c *Compiled) keep(q *question, d *Decision, now time.Time) {
	as := c.known.answers.Load()
	if as == nil {
		as = new(answers)
		if !c.known.answers.CompareAndSwap(nil, as) {
			return // kept the next time
		}
	}
	i := q.place()
	old := as.slots[i].Swap(&answer{question: *q, decision: *d, from: now.Round(0), until: d.Until.Round(0)})
	if old != nil && old.question != *q {
		as.slots[i^1].Store(old)
	}
}
