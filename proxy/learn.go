package proxy

import (
	"net/netip"
	"sync/atomic"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/policydb"
)

// peers are the addresses of hosts that have a proxy, as the controller knows them.
// Only a namespace in learn asks: it must neither break what has no proxy nor send it
// probes. One that enforces wants a tunnel of every destination that is no External,
// whatever is or is not in this list. Safe for concurrent use.
type peers struct {
	known atomic.Pointer[map[netip.Addr]struct{}]
}

func (s *peers) has(a netip.Addr) bool {
	known := s.known.Load()
	if known == nil {
		return false
	}
	_, ok := (*known)[a.Unmap().WithZone("")]
	return ok
}

// SetPeers replaces the addresses of hosts that have a proxy, 4 or 16 bytes each. What
// is no address is left out: it cannot be one that anybody connects to.
func (p *Proxy) SetPeers(addresses [][]byte) {
	known := make(map[netip.Addr]struct{}, len(addresses))
	for _, b := range addresses {
		if a, ok := netip.AddrFromSlice(b); ok {
			known[a.Unmap()] = struct{}{}
		}
	}
	p.peers.known.Store(&known)
}

// untouched: the workload's namespace is in learn, and nobody is known to answer for
// the destination. What has a proxy gets a tunnel in learn, too, and no second try
// without one: whoever can break a tunnel must not be able to take it away.
func (x *conn) untouched(c *policydb.Compiled, me *party, dst netip.Addr) bool {
	return c.Learns(me.namespace(c)) && !x.p.peers.has(dst)
}

// outside writes who is at an end without a proxy: an External, or nobody known.
func outside(e *symbolonv1.FlowEndpoint, end **flow.End, ext *policydb.ExternalMatch) {
	if ext != nil {
		e.External, e.Attributes, *end = ext.Ref, ext.Labels.Proto(), externalEnd(ext)
	}
}
