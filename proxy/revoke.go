package proxy

import (
	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/policydb"
)

// SetRevocations makes r what is refused: for new connections at once, and for live
// ones before it returns, which are cut.
func (p *Proxy) SetRevocations(r *identity.Revocations) {
	n := p.table.setRevocations(r)
	p.pool.drop(func(t *mtls.Conn) bool { return r.Check(t.Peer().Serial(), &t.Peer().Principal) != nil })
	if n > 0 {
		p.log.Info("connections of the revoked are cut", zap.Int("connections", n), zap.Uint64("revocations", r.Number()))
	}
}

// Revocations is what is refused; nil: nothing.
func (p *Proxy) Revocations() *identity.Revocations { return p.table.revoked.Load() }

// refuseRevoked judges a certificate and its holder, as policy knows him. Errors carry
// REVOKED.
func (p *Proxy) refuseRevoked(leaf interface{ Serial() identity.Serial }, who *identity.Principal) error {
	r := p.Revocations()
	if r.Empty() { // mostly: no number is to be looked up
		return nil
	}
	if err := r.Check(leaf.Serial(), who); err != nil {
		return deny(symbolonv1.Reason_REASON_REVOKED, err)
	}
	return nil
}

// refuseRevokedPeer is for handshakes, in which the peer is not known by more than its
// certificate and what policy says of its ID.
func (p *Proxy) refuseRevokedPeer(local *identity.Credential, peer *mtls.Peer) error {
	who := &peer.Principal
	if c := p.policy.Load(); c != nil && !peer.Host {
		// By the namespace that decisions go by: labels that Profiles there give count, and
		// those of a namespace that only the ID's path names do not.
		namespace := local.SVID.Namespace
		if host := p.parties.host.Load(); host != nil {
			namespace = c.LocalNamespace(local.SVID.ID, *host)
		}
		who = c.About(who, namespace, local.SVID.ID.TrustDomain())
	}
	return p.refuseRevoked(peer, who)
}

// isRevoked: the peer is, or a workload of this host that takes part.
func (l *live) isRevoked(r *identity.Revocations, c *policydb.Compiled) bool {
	if r.Empty() {
		return false
	}
	return l.peer != nil && r.Check(identity.SerialOf(l.leaf), l.question.near.sees(c, l.peer)) != nil || l.groupRevoked(r, c)
}

// groupRevoked: all who ask what l asks are revoked: for who the peer is, and not for its
// certificate, or for a workload of this host.
func (l *live) groupRevoked(r *identity.Revocations, c *policydb.Compiled) bool {
	if r.Empty() {
		return false
	}
	q := &l.question
	if l.peer != nil && r.Check("", q.near.sees(c, l.peer)) != nil {
		return true
	}
	if q.endpoint != nil && svidRevoked(r, q.endpoint) {
		return true
	}
	for _, w := range q.parties() {
		e := w.current.Load()
		if e == nil {
			continue
		}
		// Without a tunnel no certificate was shown: what counts is the one that there is.
		if q.endpoint == nil && svidRevoked(r, e) || r.Check("", w.known(c)) != nil {
			return true
		}
	}
	return false
}

func svidRevoked(r *identity.Revocations, e *mtls.Endpoint) bool {
	svid := e.Credential().SVID
	return r.Check(svid.Serial(), &svid.Principal) != nil
}

// setRevocations puts r in force and cuts the live connections that it names. Who
// registers meanwhile either stands among those, or sees r (see add).
func (t *table) setRevocations(r *identity.Revocations) (cut int) {
	t.mu.Lock()
	t.revoked.Store(r)
	all, c := t.snapshotLocked(), t.policy
	t.mu.Unlock()
	for _, l := range all {
		if l.isRevoked(r, c) && l.end(symbolonv1.Reason_REASON_REVOKED) {
			cut++
		}
	}
	return cut
}

// drop closes the tunnels that wait and that gone names.
func (p *pool) drop(gone func(*mtls.Conn) bool) {
	var out []kept
	p.mu.Lock()
	for r, list := range p.idle {
		stay := make([]waiting, 0, len(list))
		for _, w := range list {
			if gone(w.tunnel.Conn) {
				out = append(out, w.tunnel)
			} else {
				stay = append(stay, w)
			}
		}
		p.total -= len(list) - len(stay)
		if len(stay) == 0 {
			delete(p.idle, r)
		} else if len(stay) < len(list) {
			p.idle[r] = stay
		}
	}
	p.mu.Unlock()
	for _, t := range out {
		_ = t.Close()
	}
}
