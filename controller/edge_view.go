package controller

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

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
	// The namespaces that judge foreign ends, if hosts of ours do.
	fromJudge, toJudge string
	protocol           string
	port               uint32
	allowed            bool
}

// seenSums are what each side counted.
type seenSums struct{ client, server uint64 }

// local says in which namespace a host judges a workload of its own whose ID another
// trust domain gave: policydb.Compiled.LocalNamespace.
type local func(id spiffeid.ID, host string) string

// seen puts together what the two sides of each edge reported since a moment. With
// byVerdict, what was allowed and what was denied are edges apart, and what failed
// otherwise is none. Of a foreign end only what our own hosts judge is judged: a partner's
// policies are not known. Sorted by who, whom and port.
func (b *edgeBook) seen(since time.Time, byVerdict bool, judge local, wanted func(from, to *policydb.Endpoint) bool) []seenEdge {
	b.mu.Lock()
	defer b.mu.Unlock()
	found := make(map[seenKey]*seenEdge)
	counts := make(map[seenKey]*seenSums)
	for _, r := range b.since(since, func(*edgeRecord) bool { return true }) {
		e := r.edge
		from, to := r.endpoints(judge)
		if from.Namespace == "" && to.Namespace == "" || !wanted(&from, &to) {
			continue
		}
		k := seenKey{from: r.from, to: r.to, protocol: e.GetProtocol(), port: e.GetPort()}
		if r.from.foreign {
			k.fromJudge = from.Namespace
		}
		if r.to.foreign {
			k.toJudge = to.Namespace
		}
		if byVerdict {
			var denied bool
			if k.allowed, denied = verdictOfEdge(e); !k.allowed && !denied {
				continue
			}
		}
		x := found[k]
		if x == nil {
			x = newSeen(r, from, to)
			x.Allowed = k.allowed
			found[k], counts[k] = x, &seenSums{}
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
	joinForeign(found)
	out := make([]seenEdge, 0, len(found))
	for _, x := range found {
		out = append(out, *x)
	}
	slices.SortFunc(out, compareSeen)
	return out
}

// joinForeign makes one edge of what the two ends of one reported of each other, where
// both are foreign and each said only in which namespace it judges itself. Where several
// claim to be an end (a host may say so of any foreign ID), they stay apart.
func joinForeign(found map[seenKey]*seenEdge) {
	clients, servers := make(map[seenKey][]seenKey), make(map[seenKey][]seenKey)
	for k := range found {
		if !k.from.foreign || !k.to.foreign {
			continue
		}
		bare := k
		bare.fromJudge, bare.toJudge = "", ""
		if k.toJudge == "" {
			clients[bare] = append(clients[bare], k)
		} else if k.fromJudge == "" {
			servers[bare] = append(servers[bare], k)
		}
	}
	for bare, cs := range clients {
		ss := servers[bare]
		if len(cs) != 1 || len(ss) != 1 {
			continue
		}
		x, y := found[cs[0]], found[ss[0]]
		x.To, x.Connections = y.To, max(x.Connections, y.Connections)
		x.First, x.Last, x.Allowed = earliest(x.First, y.First), latest(x.Last, y.Last), x.Allowed || y.Allowed
		delete(found, ss[0])
	}
}

// endpoints are the ends as policy goes by them. A foreign one is judged here if it is the
// reporting host's own: by that host's policies, whatever its path says.
func (r *edgeRecord) endpoints(judge local) (from, to policydb.Endpoint) {
	from, to = r.from.endpoint, r.to.endpoint
	reporter := r.edge.GetReporter()
	if r.from.foreign && reporter != symbolonv1.Reporter_REPORTER_SERVER {
		r.from.judgedBy(r.namespace, judge, &from)
	}
	if r.to.foreign && reporter != symbolonv1.Reporter_REPORTER_CLIENT {
		r.to.judgedBy(r.namespace, judge, &to)
	}
	return from, to
}

func (e *edgeEnd) judgedBy(host string, judge local, out *policydb.Endpoint) {
	if id, err := spiffeid.FromString(e.message.GetSpiffeId()); err == nil && out.Foreign {
		*out = policydb.Endpoint{Namespace: judge(id, host), Attributes: out.Attributes}
	}
}

func newSeen(r *edgeRecord, from, to policydb.Endpoint) *seenEdge {
	e := r.edge
	x := &seenEdge{from: r.from, to: r.to, Edge: policydb.Edge{
		From: from, To: to, FromAddress: r.from.address, ToAddress: r.to.address,
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
		cmp.Compare(x.From.Namespace, y.From.Namespace), cmp.Compare(x.To.Namespace, y.To.Namespace),
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
func (b *edgeBook) policyEdges(namespace string, since time.Time, judge local) []policydb.Edge {
	touches := func(e *policydb.Endpoint) bool { return e.Namespace != "" && within(e.Namespace, namespace) }
	seen := b.seen(since, true, judge, func(from, to *policydb.Endpoint) bool { return namespace == "" || touches(from) || touches(to) })
	out := make([]policydb.Edge, len(seen))
	for i := range seen {
		out[i] = seen[i].Edge
	}
	return out
}
