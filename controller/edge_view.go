package controller

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/policydb"
)

// seenEdge is what both sides reported of who reached whom, together, as policy goes
// by it.
type seenEdge struct {
	policydb.Edge
	from, to *edgeEnd
}

// seenKey is what the reports of a seenEdge have in common.
type seenKey struct {
	from, to *edgeEnd
	protocol string
	port     uint32
	allowed  bool
}

// seen puts together what the two sides of each edge reported since a moment. With
// byVerdict, what was allowed and what was denied are edges apart, and what failed
// otherwise is none. Ends of other trust domains are left out: others decide on them.
// Sorted by who, whom and port.
func (b *edgeBook) seen(since time.Time, byVerdict bool, wanted func(*edgeRecord) bool) []seenEdge {
	b.mu.Lock()
	defer b.mu.Unlock()
	type sums struct{ client, server uint64 }
	found := make(map[seenKey]*seenEdge)
	counts := make(map[seenKey]*sums)
	for _, r := range b.since(since, wanted) {
		e := r.edge
		if r.from.foreign || r.to.foreign || !judged(r.from) && !judged(r.to) {
			continue
		}
		k := seenKey{r.from, r.to, e.GetProtocol(), e.GetPort(), false}
		if byVerdict {
			var denied bool
			if k.allowed, denied = verdictOfEdge(e); !k.allowed && !denied {
				continue
			}
		}
		x := found[k]
		if x == nil {
			x = newSeen(r)
			x.Allowed = k.allowed
			found[k], counts[k] = x, &sums{}
		}
		// The records come with the last seen first.
		x.First = earliest(x.First, e.GetFirst().AsTime())
		if !byVerdict {
			x.Allowed = x.Allowed || e.GetOutcome() == symbolonv1.Outcome_OUTCOME_ALLOW
		}
		n := counts[k]
		if e.GetReporter() == symbolonv1.Reporter_REPORTER_SERVER {
			n.server = saturated(n.server, e.GetConnections())
		} else {
			n.client = saturated(n.client, e.GetConnections())
		}
		x.Connections = max(n.client, n.server) // each side counts the same connections
	}
	out := make([]seenEdge, 0, len(found))
	for _, x := range found {
		out = append(out, *x)
	}
	slices.SortFunc(out, compareSeen)
	return out
}

// judged: an end with a proxy whose policy says something.
func judged(e *edgeEnd) bool { return e.endpoint.Namespace != "" }

func newSeen(r *edgeRecord) *seenEdge {
	e := r.edge
	x := &seenEdge{from: r.from, to: r.to, Edge: policydb.Edge{
		From: r.from.endpoint, To: r.to.endpoint, FromAddress: r.from.address, ToAddress: r.to.address,
		Protocol: e.GetProtocol(), Port: uint16(e.GetPort()), Encrypted: e.GetProtection() == symbolonv1.Protection_PROTECTION_ENCRYPTED,
		First: e.GetFirst().AsTime(), Last: e.GetLast().AsTime(), AddressOnly: e.GetAddressOnly(),
	}}
	external, err := netip.ParseAddr(e.GetExternalAddress())
	if err == nil && x.From.External != "" {
		x.FromAddress = external
	}
	if err == nil && x.To.External != "" {
		x.ToAddress = external
	}
	return x
}

func earliest(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// verdictOfEdge is policy's part in an outcome: neither, where something else failed.
func verdictOfEdge(e *symbolonv1.Edge) (allowed, denied bool) {
	if e.GetOutcome() == symbolonv1.Outcome_OUTCOME_ALLOW {
		return true, false
	}
	return false, e.GetOutcome() == symbolonv1.Outcome_OUTCOME_DENY && (policyReason(e.GetReason()) || policyReason(e.GetPeerReason()))
}

func policyReason(r symbolonv1.Reason) bool {
	switch r {
	case symbolonv1.Reason_REASON_POLICY, symbolonv1.Reason_REASON_DEFAULT, symbolonv1.Reason_REASON_FALLBACK,
		symbolonv1.Reason_REASON_NO_POLICY, symbolonv1.Reason_REASON_ENCRYPTION_UNAVAILABLE, symbolonv1.Reason_REASON_POLICY_CHANGED:
		return true
	}
	return false
}

func compareSeen(x, y seenEdge) int {
	allowed := func(b bool) int {
		if b {
			return 0
		}
		return 1
	}
	return cmp.Or(
		compareEnds(x.from, y.from), compareEnds(x.to, y.to),
		cmp.Compare(x.Protocol, y.Protocol), cmp.Compare(x.Port, y.Port), cmp.Compare(allowed(x.Allowed), allowed(y.Allowed)),
	)
}

func compareEnds(x, y *edgeEnd) int {
	return cmp.Or(
		cmp.Compare(x.message.GetSpiffeId(), y.message.GetSpiffeId()),
		cmp.Compare(x.message.GetExternal(), y.message.GetExternal()),
		x.address.Compare(y.address), slices.Compare(x.id[:], y.id[:]),
	)
}

// policyEdges are the edges that touch a namespace or what is below it ("": all), what
// policy allowed and what it denied apart.
func (b *edgeBook) policyEdges(namespace string, since time.Time) []policydb.Edge {
	seen := b.seen(since, true, func(r *edgeRecord) bool { return r.touches(namespace) })
	out := make([]policydb.Edge, len(seen))
	for i := range seen {
		out[i] = seen[i].Edge
	}
	return out
}
