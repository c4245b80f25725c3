package spire

import (
	"context"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/identity/internal/agent"
)

// watchBundles keeps the agent's bundles, until ctx ends: one subscription for all
// workloads.
func (s *Source) watchBundles(ctx context.Context) {
	for failures := 0; ctx.Err() == nil; {
		err := s.subscribeBundles(ctx, func() { failures = 0 })
		if ctx.Err() != nil {
			return
		}
		failures++
		s.setStatus(s.api.explain(err))
		select {
		case <-ctx.Done():
		case <-time.After(agent.Pause(failures)):
		}
	}
}

func (s *Source) subscribeBundles(ctx context.Context, answered func()) error {
	next, err := s.api.bundles(ctx)
	if err != nil {
		return err
	}
	for {
		m, err := next()
		if err != nil {
			return err
		}
		set, err := bundleSet(m)
		s.roots.SetAgent(set)
		s.setStatus(err)
		answered()
	}
}

// bundleSet reads what it can of bundles in DER by trust domain: of a domain whose bundle
// is malformed there is none.
func bundleSet(m map[string][]byte) (*x509bundle.Set, error) {
	set := x509bundle.NewSet()
	var bad error
	for name, der := range m {
		td, err := spiffeid.TrustDomainFromString(name)
		var roots []*x509.Certificate
		if err == nil {
			roots, err = x509.ParseCertificates(der)
		}
		if err != nil {
			bad = fmt.Errorf("the agent's bundle of %.80q cannot be read: %w", name, err)
			continue
		}
		set.Add(x509bundle.FromX509Authorities(td, roots))
	}
	return set, bad
}

// setStatus reports when it changes.
func (s *Source) setStatus(err error) {
	s.mu.Lock()
	was := s.status
	s.status = err
	if (was == nil) != (err == nil) {
		s.since = time.Now()
	}
	s.mu.Unlock()
	if s.report == nil {
		return
	}
	if (was == nil) != (err == nil) || was != nil && was.Error() != err.Error() {
		s.report(err)
	}
}
