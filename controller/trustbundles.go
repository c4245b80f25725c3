package controller

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/policydb"
)

// trustBundleRecord is the last good bundle that another trust domain's endpoint has
// served. It outlives restarts: a partner that is away stays believed as it was.
type trustBundleRecord struct {
	Bundle json.RawMessage `json:"bundle"` // SPIFFE bundle
	// Fetched is when the endpoint said so last, Changed when it said so first.
	Fetched time.Time `json:"fetched"`
	Changed time.Time `json:"changed"`
}

func trustBundleKey(domain string) string { return trustBundlePrefix + domain }

// trustBundle is what another trust domain's SVIDs are verified by now.
type trustBundle struct {
	*spiffebundle.Bundle
	// record is zero for a bundle that an operator has written, and no endpoint has
	// served yet.
	record trustBundleRecord
}

// loadTrustBundles reads what endpoints have served. One that cannot be read is an
// error: the bundle that it has followed may hold a root that was withdrawn.
func loadTrustBundles(ctx context.Context, st store.Store) (map[string]*trustBundle, error) {
	kvs, _, err := st.List(ctx, trustBundlePrefix)
	if err != nil {
		return nil, err
	}
	out := make(map[string]*trustBundle)
	for _, kv := range kvs {
		name := kv.Key[len(trustBundlePrefix):]
		var record trustBundleRecord
		if err := getJSON(kv, &record); err != nil {
			return nil, err
		}
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, fmt.Errorf("%w: %s", store.ErrCorrupt, kv.Key)
		}
		b, err := identity.ParseBundle(td, record.Bundle)
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %w", store.ErrCorrupt, kv.Key, err)
		}
		out[name] = &trustBundle{b, record}
	}
	return out, nil
}

// trustBundle is what holds of a trust domain: what its endpoint has served last, or
// else what the operator has written; nil: nothing is known of it.
func (p *policies) trustBundle(domain string) *trustBundle {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.trustBundleLocked(p.db.Snapshot().Get(policydb.KindTrustDomain, "/", domain))
}

func (p *policies) trustBundleLocked(r *symbolonv1.Resource) *trustBundle {
	if r == nil {
		return nil
	}
	if b := p.served[r.GetName()]; b != nil {
		return b
	}
	if r.GetTrustDomain().GetBundle() == "" {
		return nil
	}
	td, err := spiffeid.TrustDomainFromString(r.GetName())
	if err != nil {
		return nil
	}
	b, err := identity.ParseBundle(td, []byte(r.GetTrustDomain().GetBundle()))
	if err != nil {
		return nil // an apply has checked it; what cannot be read is not believed
	}
	return &trustBundle{Bundle: b}
}

// trustBundlesLocked is what is distributed: all trust domains of which a bundle is
// known, by name.
func (p *policies) trustBundlesLocked(s *policydb.Snapshot) []*symbolonv1.TrustBundle {
	var out []*symbolonv1.TrustBundle
	for _, r := range s.List(policydb.KindTrustDomain, "/") {
		b := p.trustBundleLocked(r)
		if b == nil {
			continue
		}
		m := &symbolonv1.TrustBundle{TrustDomain: r.GetName()}
		for _, root := range b.X509Authorities() {
			m.Roots = append(m.Roots, root.Raw)
		}
		out = append(out, m)
	}
	return out
}

// forgetServed is what a change of policy makes of bundles that endpoints have served:
// they go with their TrustDomain, and where the operator has written another bundle,
// that one counts.
func forgetServed(changes []policydb.Change) (ops []store.Op, domains []string) {
	for _, c := range changes {
		if c.Key().Kind != policydb.KindTrustDomain || c.Type == symbolonv1.ChangeType_CHANGE_TYPE_UNCHANGED {
			continue
		}
		if c.Resource != nil && c.Previous != nil &&
			c.Resource.GetTrustDomain().GetBundle() == c.Previous.GetTrustDomain().GetBundle() {
			continue
		}
		ops = append(ops, store.Delete(trustBundleKey(c.Key().Name)))
		domains = append(domains, c.Key().Name)
	}
	return ops, domains
}

// keepServed keeps what the endpoint of a TrustDomain has served; nothing happens if
// that says something else by now. published is nil if the roots are as they were.
// Errors: the store's.
func (p *policies) keepServed(ctx context.Context, of *symbolonv1.Resource, b *spiffebundle.Bundle) (published *distribution, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	name := of.GetName()
	r := p.db.Snapshot().Get(policydb.KindTrustDomain, "/", name)
	if r == nil || !sameEndpoint(r, of) {
		return nil, nil
	}
	data, err := b.Marshal()
	if err != nil {
		return nil, fmt.Errorf("bundle of %s: %w", name, err)
	}
	now := p.db.Now()
	next := &trustBundle{b, trustBundleRecord{Bundle: data, Fetched: now, Changed: now}}
	if was := p.served[name]; was != nil && was.Equal(b) {
		next.record.Changed = was.record.Changed
	}
	op, err := putJSON(trustBundleKey(name), next.record)
	if err != nil {
		return nil, err
	}
	if _, _, err := p.store.Txn(ctx, nil, []store.Op{op}); err != nil {
		return nil, err
	}
	was := p.trustBundleLocked(r)
	p.served[name] = next
	if was != nil && sameRoots(was.X509Authorities(), b.X509Authorities()) {
		return nil, nil
	}
	return p.distributionLocked(), nil
}

// sameEndpoint tells whether two forms of a TrustDomain ask the same endpoint, and
// verify it by the same.
func sameEndpoint(a, b *symbolonv1.Resource) bool {
	x, y := a.GetTrustDomain(), b.GetTrustDomain()
	return x.GetEndpoint() == y.GetEndpoint() && x.GetProfile() == y.GetProfile() &&
		x.GetEndpointId() == y.GetEndpointId() && x.GetBundle() == y.GetBundle()
}

// sameRoots compares without regard to order.
func sameRoots(a, b []*x509.Certificate) bool {
	subset := func(a, b []*x509.Certificate) bool {
		return !slices.ContainsFunc(a, func(x *x509.Certificate) bool { return !slices.ContainsFunc(b, x.Equal) })
	}
	return subset(a, b) && subset(b, a)
}
