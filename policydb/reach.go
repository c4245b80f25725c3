package policydb

import (
	"math/bits"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// MayReach tells whether there is anybody at all whom a workload may connect to, on
// whatever port, as far as its own side goes: before a destination is dialled, which
// tells that something. Who may reach somebody gets to know whom it was denied: the
// record of a denial is worth little without. Decide follows, and can only be
// stricter; a Decide that allows the client's side implies MayReach.
func (c *Compiled) MayReach(own *Endpoint, now time.Time) bool {
	ch := c.chains[own.Namespace]
	if ch == nil || own.External != "" {
		return false
	}
	if ch.allow || ch.learn {
		return true
	}
	if len(ch.levels) == 0 {
		return false
	}
	may := false
	subjects := c.subjectBits(own.Attributes)
	for i := range ch.levels {
		l := &ch.levels[i]
		both(subjects, subjects, l.span, func(i uint32, w uint64) {
			if !l.own {
				w &= c.propagating[i]
			}
			for ; w != 0 && !may; w &= w - 1 {
				p := &c.policies[int32(i)*wordBits+int32(bits.TrailingZeros64(w))]
				may = p.verb == symbolonv1.Verb_VERB_ALLOW && !p.observe && c.inTime(p, now)
			}
		})
	}
	return may
}

// inTime is the part of inForce that has to do with the clock.
func (c *Compiled) inTime(p *policy, now time.Time) bool {
	if !p.expires.IsZero() && !now.Before(p.expires) {
		return false
	}
	return p.window == nil || c.timeless || p.window.active(now)
}
