package policydb

import (
	"math/bits"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// Side says whose policies judge.
type Side uint8

const (
	// Client judges by the chain of Query.From's namespace.
	Client Side = iota
	// Server judges by the chain of Query.To's namespace.
	Server
)

func (s Side) String() string {
	if s == Server {
		return "server"
	}
	return "client"
}

// Endpoint is one end of a connection: a workload, or an External.
type Endpoint struct {
	Namespace  string
	Attributes identity.Attributes // an External's labels
	// External is "namespace/name" if it is one; then it has no namespace of its own.
	External string
	// Foreign: a workload that others judge, by policies which are not known here: of
	// another trust domain, say. Then it has no namespace either.
	Foreign bool
}

// Query is one connection to judge. Protocol is "tcp" or "udp"; Port is the
// destination's.
type Query struct {
	From, To Endpoint
	Protocol string
	Port     uint16
}

// Decision is one side's word on a connection.
type Decision struct {
	Allow bool
	// Reason is one of POLICY, FALLBACK, DEFAULT, NO_POLICY, ENCRYPTION_UNAVAILABLE;
	// LEARN if it was denied by one of those, and let through: see WouldAllow.
	Reason symbolonv1.Reason
	// Policy decided: "namespace/name"; empty where a default did.
	Policy string
	// Protection is the least that this side asks for, were the connection let
	// through; unspecified if the other side is an External.
	Protection symbolonv1.Protection
	// Log: a policy asks for a record.
	Log bool
	// WouldAllow is what the verdict would be if policies in observe mode were
	// enforced; nil if it would be the same. Read only. WouldPolicy would decide it.
	// Of a namespace in learn it is what enforce would have denied by the policies
	// that are not in observe mode.
	WouldAllow  *bool
	WouldPolicy string
	// Until is the first moment at which the decision may change by itself, because
	// a window opens or closes or a policy expires; zero: never.
	Until time.Time
}

// Judges are the sides of q that have policies here: an External has none, and those of a
// foreign workload are elsewhere.
func (q *Query) Judges() []Side {
	var out []Side
	for _, side := range []Side{Client, Server} {
		if own, _ := q.side(side); own.External == "" && !own.Foreign {
			out = append(out, side)
		}
	}
	return out
}

// side splits q into the endpoint whose chain judges and the other one.
func (q *Query) side(s Side) (own, other *Endpoint) {
	if s == Server {
		return &q.To, &q.From
	}
	return &q.From, &q.To
}

// Decide judges q by one side's policies (docs/policy.md has the rules). It
// allocates nothing for a question that it was asked before. Safe for concurrent use.
func (c *Compiled) Decide(side Side, q *Query, now time.Time) (d Decision) {
	own, other := q.side(side)
	from, to := c.entry(q.From.Attributes), c.entry(q.To.Attributes)
	ours := from
	if side == Server {
		ours = to
	}
	ch := c.chainAt(ours, own.Namespace)
	if ch == nil || own.External != "" {
		return Decision{Reason: symbolonv1.Reason_REASON_NO_POLICY, Protection: symbolonv1.Protection_PROTECTION_ENCRYPTED}
	}
	external := other.External != ""
	asked := question{from.known, to.known, ch, q.what(side, external)}
	if a := c.known.answers.Load().find(&asked, now); a != nil {
		return a.decision
	}
	c.decide(&d, &asked, q, external, now)
	c.keep(&asked, &d, now)
	return d
}

// decide is Decide without what was decided before. external: the other end is one.
func (c *Compiled) decide(d *Decision, asked *question, q *Query, external bool, now time.Time) {
	ch := asked.chain
	var (
		until           time.Time
		observed        bool
		enforced, would verdict
	)
	enforced.begin()
	if c.observing {
		would.begin()
	}
	if len(ch.levels) > 0 {
		protocol := transportOf(q.Protocol)
		subjects, objects := c.subjectsOf(asked.from), c.objectsOf(asked.to)
		for i := range ch.levels {
			l := &ch.levels[i]
			// This is both (bits.go), written out: a call per word is a third of the time.
			for s := l.first / wordBits; s*wordBits < l.end; s++ {
				for m := subjects.summary[s] & objects.summary[s] & l.mask(s); m != 0; m &= m - 1 {
					i := s*wordBits + uint32(bits.TrailingZeros64(m))
					w := subjects.word(i) & objects.word(i)
					if !l.own {
						w &= c.propagating[i]
					}
					for ; w != 0; w &= w - 1 {
						bit := int32(i)*wordBits + int32(bits.TrailingZeros64(w))
						r := &c.rules[bit]
						if !r.open(protocol, q.Port) || r.flags&further != 0 && !c.inForce(&c.policies[bit], q, protocol, now, &until) {
							continue
						}
						if r.flags&observes != 0 {
							observed = true
						} else {
							enforced.add(r, bit)
						}
						if c.observing {
							would.add(r, bit)
						}
					}
				}
			}
			enforced.endLevel()
			if c.observing {
				would.endLevel()
			}
		}
	}
	c.conclude(d, &enforced, ch, external)
	d.Until = until
	if ch.learn && !d.Allow && !c.overruled(ch, enforced.decided) {
		d.learn()
		return
	}
	if observed {
		var w Decision
		if c.conclude(&w, &would, ch, external); w.Allow != d.Allow {
			d.WouldAllow, d.WouldPolicy = verdictOf(w.Allow), w.Policy
		}
	}
}

var wouldAllow, wouldDeny = true, false

func verdictOf(allow bool) *bool {
	if allow {
		return &wouldAllow
	}
	return &wouldDeny
}

// inForce checks what selectors do not: ports, where, then time. A policy that
// fails by the time alone still bounds how long the decision holds.
func (c *Compiled) inForce(p *policy, q *Query, protocol transport, now time.Time, until *time.Time) bool {
	if !p.ports.contains(protocol, q.Port) {
		return false
	}
	for _, key := range p.same {
		if !shares(q.From.Attributes.Of(key), q.To.Attributes.Of(key)) {
			return false
		}
	}
	for _, key := range p.different {
		from, to := q.From.Attributes.Of(key), q.To.Attributes.Of(key)
		if len(from) == 0 || len(to) == 0 || shares(from, to) {
			return false
		}
	}
	if !p.expires.IsZero() {
		if !now.Before(p.expires) {
			return false
		}
		sooner(until, p.expires)
	}
	if p.window == nil || c.timeless {
		return true
	}
	sooner(until, p.window.next(now))
	return p.window.active(now)
}

func sooner(until *time.Time, t time.Time) {
	if until.IsZero() || t.Before(*until) {
		*until = t
	}
}

// shares tells whether two attributes have a value in common. Both are sorted.
func shares(a, b identity.Attributes) bool {
	for i, j := 0, 0; i < len(a) && j < len(b); {
		switch {
		case a[i].Value == b[j].Value:
			return true
		case a[i].Value < b[j].Value:
			i++
		default:
			j++
		}
	}
	return false
}

// conclude turns what was gathered into a decision, which is large to be copied.
func (c *Compiled) conclude(d *Decision, v *verdict, ch *chain, external bool) {
	d.Allow, d.Reason, d.Protection, d.Log = ch.allow, symbolonv1.Reason_REASON_DEFAULT, ch.protection, v.flags&logs != 0
	switch {
	case v.decided != none:
		d.Reason = symbolonv1.Reason_REASON_POLICY
	case v.fallback != none:
		d.Reason = symbolonv1.Reason_REASON_FALLBACK
	}
	if bit := either(v.decided, v.fallback); bit != none {
		p := &c.policies[bit]
		d.Allow, d.Policy = p.verb == symbolonv1.Verb_VERB_ALLOW, p.ref
	}
	if v.encrypt != none {
		d.Protection = symbolonv1.Protection_PROTECTION_ENCRYPTED
	}
	if external {
		d.Protection = symbolonv1.Protection_PROTECTION_UNSPECIFIED
		if d.Allow && v.encrypt != none {
			d.Allow, d.Reason, d.Policy = false, symbolonv1.Reason_REASON_ENCRYPTION_UNAVAILABLE, c.policies[v.encrypt].ref
		}
	}
}
