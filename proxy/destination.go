package proxy

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/policydb"
)

// NameSource knows which names have an address; names.Names is the real one.
type NameSource interface {
	// Want replaces the names that Of goes by.
	Want(names []string)
	// Of returns the wanted names that have an address.
	Of(netip.Addr) []string
	// Has tells whether any name has an address; it may have to ask. Workloads have a fair
	// share of what can be asked at once.
	Has(ctx context.Context, workload, name string, a netip.Addr) bool
	// Settled waits, not for ever, until it is known of every wanted name.
	Settled(ctx context.Context)
	// Snapshot is all of that, for encoding/json.
	Snapshot() any
}

// named tells whether a destination's names matter.
func (x *conn) named(c *policydb.Compiled, me *party, dst netip.AddrPort) bool {
	return x.p.names != nil && c.NamesMatter(me.namespace(c)) && !x.p.peers.has(dst.Addr())
}

// names are those that a destination has and that may make it an External or a Service:
// whole names that policy speaks of, and the one that the client asks for, if it is one
// that policy has a wildcard for and if it has the very address that was dialled. What a
// client says of a name is no more than the reason to look it up. The address of a host
// with a proxy has none: no answer of DNS takes a tunnel away.
func (x *conn) names(ctx context.Context, c *policydb.Compiled, me *party, dst netip.AddrPort) []string {
	ns, source := me.namespace(c), x.p.names
	if !x.named(c, me, dst) {
		return nil
	}
	names := source.Of(dst.Addr())
	if len(names) == 0 {
		source.Settled(ctx)
		names = source.Of(dst.Addr())
	}
	own := me.endpoint(c)
	if !c.NameMayOpen(ns, dst.Addr(), tcp, dst.Port(), names...) || !c.MayReach(&own, x.p.now()) {
		return names
	}
	client, err := x.accepted.attach() // there is something to wait for
	if err != nil {
		return names
	}
	start := time.Now()
	asked, err := mtls.PeekServerName(client, start.Add(x.p.timeouts.Quiet), start.Add(x.p.timeouts.Handshake))
	if err != nil || asked == "" || slices.Contains(names, asked) || !c.HasName(ns, asked, dst.Addr(), tcp, dst.Port()) {
		return names
	}
	if source.Has(ctx, me.principal().ID.String(), asked, dst.Addr()) {
		names = append(names, asked)
		slices.Sort(names)
	}
	return names
}
