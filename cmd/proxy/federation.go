package main

import (
	"crypto/x509"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/proxy"
)

// foreignBundles are the roots of the other trust domains of a generation. One that
// claims to speak of the host's own domain is refused: its roots come from the
// controller's CA alone.
func foreignBundles(g *symbolonv1.Generation, own spiffeid.TrustDomain) (map[spiffeid.TrustDomain][]*x509.Certificate, error) {
	out := make(map[spiffeid.TrustDomain][]*x509.Certificate, len(g.GetBundles()))
	for _, b := range g.GetBundles() {
		td, err := spiffeid.TrustDomainFromString(b.GetTrustDomain())
		if err != nil || td.Name() != b.GetTrustDomain() {
			return nil, fmt.Errorf("bundle of %q: not a trust domain", b.GetTrustDomain())
		}
		if td == own {
			return nil, fmt.Errorf("bundle of %s: it is the host's own trust domain", td)
		}
		roots, err := parseRoots(b.GetRoots())
		if err != nil {
			return nil, fmt.Errorf("%s: %w", td, err)
		}
		if len(roots) == 0 || len(roots) > identity.MaxRoots {
			return nil, fmt.Errorf("bundle of %s: %d roots", td, len(roots))
		}
		out[td] = roots
	}
	return out, nil
}

// federate makes the workloads believe the trust domains of a generation, and no others.
// What SPIRE's workloads believe is their entries' to say (federates_with): a
// TrustDomain does not widen it. Only apply calls it.
func (d *daemonParts) federate(foreign map[spiffeid.TrustDomain][]*x509.Certificate) {
	if d.cfg.Identity.Source != proxy.SourceController {
		return
	}
	for td := range d.foreign {
		if _, ok := foreign[td]; !ok {
			d.source.SetBundle(td, nil)
		}
	}
	for td, roots := range foreign {
		d.source.SetBundle(td, roots)
	}
	d.foreign = foreign
}
