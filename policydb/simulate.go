package policydb

import (
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// EdgeVerdict is what policy says of an edge, both sides together.
type EdgeVerdict struct {
	Allow bool
	// Reason is the denying side's, or else the client's, or of the side that has a
	// proxy; PEER_UNPROTECTED where one end is an address without an External.
	Reason symbolonv1.Reason
	// Protection is the stricter of the two sides'; unspecified if denied.
	Protection symbolonv1.Protection
	// The policies that decided; empty: a default, or a side that does not judge.
	ClientPolicy, ServerPolicy string
}

func (v *EdgeVerdict) encrypted() bool {
	return v.Allow && v.Protection == symbolonv1.Protection_PROTECTION_ENCRYPTED
}

// Difference is what a draft makes of an edge: at most one, the weightiest.
type Difference uint8

const (
	// Unchanged says nothing of the policies that decide: they may be others.
	Unchanged Difference = iota
	// NewlyDenied was allowed by the policy in force.
	NewlyDenied
	// NewlyAllowed was denied by it.
	NewlyAllowed
	// NewlyEncrypted is allowed by both, and has to be encrypted by the draft only.
	NewlyEncrypted
	// NoLongerEncrypted is the reverse.
	NoLongerEncrypted
)

// Simulated is one edge under the policy in force and under a draft.
type Simulated struct {
	Difference    Difference
	Before, After EdgeVerdict
}

// Simulate decides each edge twice, by both sides, at one moment: by the policy in
// force and by a draft. It returns one answer for each edge, in order. What was
// recorded of an edge's verdict does not count, only who, whom and on which port.
// Workloads keep the attributes that they had; which External an address is, each
// set says.
func Simulate(current, draft *Compiled, edges []Edge, now time.Time) []Simulated {
	out := make([]Simulated, len(edges))
	for i := range edges {
		names := current.namesOf(&edges[i])
		out[i].Before, out[i].After = current.judge(&edges[i], now, names), draft.judge(&edges[i], now, names)
		out[i].Difference = difference(&out[i].Before, &out[i].After)
	}
	return out
}

func difference(before, after *EdgeVerdict) Difference {
	switch {
	case before.Allow && !after.Allow:
		return NewlyDenied
	case !before.Allow && after.Allow:
		return NewlyAllowed
	case !before.encrypted() && after.encrypted():
		return NewlyEncrypted
	case before.encrypted() && !after.encrypted():
		return NoLongerEncrypted
	}
	return Unchanged
}

var unprotected = EdgeVerdict{Reason: symbolonv1.Reason_REASON_PEER_UNPROTECTED}

// judgeUnprotected is of an end beside an address that is nobody's.
func (c *Compiled) judgeUnprotected(side Side, own *Endpoint, e *Edge, now time.Time) EdgeVerdict {
	d := c.DecideUnprotected(side, own, e.Protocol, e.Port, now)
	v := EdgeVerdict{Allow: d.Allow, Reason: d.Reason}
	if side == Client {
		v.ClientPolicy = d.Policy
	} else {
		v.ServerPolicy = d.Policy
	}
	return v
}

// judge decides an edge by both sides. names are those that its destination has.
func (c *Compiled) judge(e *Edge, now time.Time, names []string) EdgeVerdict {
	q := Query{From: e.From, To: e.To, Protocol: e.Protocol, Port: e.Port}
	if e.FromAddress.IsValid() {
		m, ok := c.Source(q.To.Namespace, e.FromAddress)
		if !ok {
			return c.judgeUnprotected(Server, &q.To, e, now)
		}
		q.From = Endpoint{External: m.Ref, Attributes: m.Labels}
	}
	if e.ToAddress.IsValid() {
		m, service := c.Destination(q.From.Namespace, e.ToAddress, q.Protocol, q.Port, names...)
		if m == nil && service != "" {
			return unprotected
		}
		if m == nil {
			return c.judgeUnprotected(Client, &q.From, e, now)
		}
		if q.To = m.Endpoint(); m.beneath != nil {
			d := c.DecideExternal(&q.From, m, q.Protocol, q.Port, now)
			return EdgeVerdict{Allow: d.Allow, Reason: d.Reason, ClientPolicy: d.Policy}
		}
	}
	v := EdgeVerdict{Allow: true}
	for _, side := range q.Judges() {
		d := c.Decide(side, &q, now)
		if side == Client {
			v.ClientPolicy = d.Policy
		} else {
			v.ServerPolicy = d.Policy
		}
		if v.Reason == symbolonv1.Reason_REASON_UNSPECIFIED || v.Allow && !d.Allow {
			v.Reason = d.Reason
		}
		v.Allow = v.Allow && d.Allow
		v.Protection = max(v.Protection, d.Protection)
	}
	if !v.Allow {
		v.Protection = symbolonv1.Protection_PROTECTION_UNSPECIFIED
	}
	return v
}
