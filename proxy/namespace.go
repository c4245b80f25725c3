package proxy

import (
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/policydb"
)

// placed is the namespace of a party, and what it follows from.
type placed struct {
	policy    *policydb.Compiled
	host      *string
	id        spiffeid.ID
	namespace string
}

// SetHostNamespace tells where this host is enrolled. It is for hosts whose workloads
// another CA than the controller's names: their IDs' paths need not be namespaces, see
// policydb.Compiled.LocalNamespace. Call it before SetPolicy, which judges by it.
func (p *Proxy) SetHostNamespace(namespace string) { p.parties.host.Store(&namespace) }

// namespace is by whose policies the workload is judged: its ID's, but see
// SetHostNamespace.
func (w *party) namespace(c *policydb.Compiled) string {
	p := w.principal()
	if w.host == nil || c == nil {
		return p.Namespace
	}
	host := w.host.Load()
	if host == nil {
		return p.Namespace
	}
	if at := w.place.Load(); at != nil && at.policy == c && at.host == host && at.id == p.ID {
		return at.namespace
	}
	at := &placed{c, host, p.ID, c.LocalNamespace(p.ID, *host)}
	w.place.Store(at)
	return at.namespace
}
