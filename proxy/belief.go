package proxy

// disbelieved tells whether the connection's peer is of a trust domain that its local
// workload has no bundle of any more: nobody here vouches for it, however good its
// certificate was in the handshake.
func (q *question) disbelieved() bool {
	if q.kind != toTunnel && q.kind != fromTunnel {
		return false
	}
	bundles := q.near.current.Load().Credential().Bundles
	return bundles != nil && !bundles.Has(q.domain)
}
