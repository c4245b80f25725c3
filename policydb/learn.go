package policydb

import (
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// A namespace in learn lets through what it would deny, and says so: as far as it could
// have allowed it by a policy of its own. So a deny of a namespace above holds, by which
// a parent overrules; a default or a fallback of one above does not, since the namespace
// could overrule those. Learn is a word on the namespace's own side only: the other side
// judges by its own namespace, and one that enforces denies as ever. What cannot be
// judged (an unknown namespace, a hole in the chain) has no mode, and is denied.

// learn turns a denial into what a namespace in learn makes of it. Obligations stay.
func (d *Decision) learn() {
	d.Allow, d.Reason = true, symbolonv1.Reason_REASON_LEARN
	d.WouldAllow, d.WouldPolicy = &wouldDeny, d.Policy
	d.Policy = ""
}

// overruled tells whether the policy that decided is a deny of a namespace above that of
// ch, enforced and no fallback.
func (c *Compiled) overruled(ch *chain, decided int32) bool {
	if decided == none || c.policies[decided].verb != symbolonv1.Verb_VERB_DENY {
		return false
	}
	own := ch.levels[len(ch.levels)-1]
	return !own.own || uint32(decided) < own.first*wordBits
}

// Learns tells whether a namespace is known and in learn.
func (c *Compiled) Learns(namespace string) bool {
	ch := c.chains[namespace]
	return ch != nil && ch.learn
}

// DecideUnprotected judges a connection between own and an address of which nothing is
// known: no proxy answers for it, and no External has it. There are no attributes that a
// policy could speak of, so it is let through by a namespace in learn and by no other;
// and not even there if a deny of a namespace above holds for whoever is at the other end.
func (c *Compiled) DecideUnprotected(side Side, own *Endpoint, protocol string, port uint16, now time.Time) Decision {
	ch := c.chains[own.Namespace]
	if ch == nil || own.External != "" {
		return Decision{Reason: symbolonv1.Reason_REASON_NO_POLICY}
	}
	d := Decision{Reason: symbolonv1.Reason_REASON_PEER_UNPROTECTED}
	if !ch.learn {
		return d
	}
	q := &Query{From: *own, To: Endpoint{External: nobody}, Protocol: protocol, Port: port}
	if side == Server {
		q.From, q.To = q.To, q.From
	}
	judged := c.Decide(side, q, now)
	if !judged.Allow {
		return judged
	}
	d.Until = judged.Until
	d.learn()
	return d
}

// nobody stands for an end that has neither identity nor External.
const nobody = "?"

// enforceAll makes c judge as if no namespace were in learn.
func (c *Compiled) enforceAll() {
	for _, ch := range c.chains {
		ch.learn = false
	}
	c.forgetAnswers()
}
