package proxy

// disbelieved tells whether the connection's peer is of a trust domain that its local
// workload has no bundle of any more: nobody here vouches for it, however good its
// certificate was in the handshake.
func (q *question) disbelieved() bool {
	if q.kind != toTunnel && q.kind != fromTunnel {
		return false
	}
	e := q.near.current.Load()
	if e == nil || e.Credential().Bundles == nil {
		return false // it verifies nobody
	}
	return !e.Credential().Bundles.Has(q.domain)
}
