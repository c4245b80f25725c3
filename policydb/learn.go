package policydb

import symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"

// A namespace in learn lets through what it would deny, and says so. That is a word on
// its own side only: the other side judges by its own namespace, and one that enforces
// denies as ever. What cannot be judged (an unknown namespace, a hole in the chain) has
// no mode, and is denied.

// learn turns a denial into what a namespace in learn makes of it. Obligations stay.
func (d *Decision) learn() {
	d.Allow, d.Reason = true, symbolonv1.Reason_REASON_LEARN
	d.WouldAllow, d.WouldPolicy = &wouldDeny, d.Policy
	d.Policy = ""
}

// Learns tells whether a namespace is known and in learn.
func (c *Compiled) Learns(namespace string) bool {
	ch := c.chains[namespace]
	return ch != nil && ch.learn
}

// DecideUnprotected judges a connection between own and an address of which nothing is
// known: no proxy answers for it, and no External has it. There are no attributes that a
// policy could speak of, so it is let through by a namespace in learn and by no other.
func (c *Compiled) DecideUnprotected(own *Endpoint) Decision {
	ch := c.chains[own.Namespace]
	if ch == nil || own.External != "" {
		return Decision{Reason: symbolonv1.Reason_REASON_NO_POLICY}
	}
	d := Decision{Reason: symbolonv1.Reason_REASON_PEER_UNPROTECTED}
	if ch.learn {
		d.learn()
	}
	return d
}

// enforceAll makes c judge as if no namespace were in learn.
func (c *Compiled) enforceAll() {
	for _, ch := range c.chains {
		ch.learn = false
	}
}
