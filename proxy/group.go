package proxy

import (
	"crypto/sha256"
	"net/netip"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
)

// question is all that a connection's decision depends on beside the policy and what
// its parties are now. Open connections that ask the same are judged once for all.
type question struct {
	kind questionKind
	// near is the workload of this host that is judged for; far the other one, if it
	// is of this host as well.
	near, far *party
	// Of a tunnel: whose SVID it presented, what its peer is, and its protection.
	endpoint   *mtls.Endpoint
	namespace  string
	attributes [sha256.Size]byte
	issuer     identity.Issuer
	protection symbolonv1.Protection
	// address is the other end's, where that is all that is known of it.
	address netip.Addr
	port    uint16
	// names are those by which the address was an External when the connection was made.
	names string
}

type questionKind uint8

const (
	noQuestion questionKind = iota // the proxy's own page
	toTunnel
	fromTunnel
	bothLocal
	toAddress
	fromAddress
)

// tunnelQuestion is that of a connection through t, which presented e's SVID.
// peer is by its certificate or token; what policy knows of it beyond is part of the
// answer.
func tunnelQuestion(kind questionKind, me *party, e *mtls.Endpoint, t *mtls.Conn, peer *identity.Principal, port uint16) question {
	return question{
		kind: kind, near: me, endpoint: e, namespace: peer.Namespace,
		attributes: peer.Attributes.Hash(), issuer: peer.Issuer,
		protection: t.Protection(), port: port,
	}
}

// group is the live connections with one question. Guarded by the table's lock.
type group struct {
	question question
	members  []*live
	// epoch counts the reasons to judge the group again, so that an answer which came
	// late does not replace a newer one.
	epoch uint64
	due   time.Time // when to judge again; zero: only when something changes
	place int
}

func (g *group) when() time.Time { return g.due }
func (g *group) spot() *int      { return &g.place }

func (g *group) join(l *live) {
	l.group, l.seat = g, len(g.members)
	g.members = append(g.members, l)
}

func (g *group) leave(l *live) {
	last := len(g.members) - 1
	g.members[l.seat] = g.members[last]
	g.members[l.seat].seat = l.seat
	g.members[last] = nil
	g.members = g.members[:last]
	l.group = nil
}

// parties are the local ones.
func (q *question) parties() []*party {
	switch {
	case q.near == nil:
		return nil
	case q.far == nil || q.far == q.near:
		return []*party{q.near}
	}
	return []*party{q.near, q.far}
}

// withdrawn tells whether one of them has no identity any more.
func (q *question) withdrawn() bool {
	return q.near != nil && q.near.withdrawn.Load() || q.far != nil && q.far.withdrawn.Load()
}
