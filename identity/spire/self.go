package spire

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// self is the proxy as the agent's Broker API sees it: its own SVID, from the Workload API.
// The agent is verified by the bundle of the same trust domain.
type self struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex
	source *workloadapi.X509Source // nil: there is no SVID yet
	err    error                   // why
}

// errNoSelf: the Workload API has given the proxy no SVID.
var errNoSelf = errors.New("the proxy has no SVID of its own from the Workload API yet; it needs a registration entry")

// agentPath is where the SPIFFE IDs of SPIRE's agents are: no entry can be made there.
const agentPath = "/spire/agent/"

// newSelf waits for the SVID in the background: that there is none yet must not keep the
// proxy from starting.
func newSelf(address string) (*self, error) {
	if err := workloadapi.ValidateAddress(address); err != nil {
		return nil, fmt.Errorf("the Workload API's address %q: %w", address, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &self{cancel: cancel, err: errNoSelf}
	s.wg.Go(func() {
		source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(address)))
		s.mu.Lock()
		defer s.mu.Unlock()
		s.source = source
		if err != nil {
			s.err = fmt.Errorf("%w: %w", errNoSelf, err)
		}
	})
	return s, nil
}

func (s *self) close() {
	s.cancel()
	s.wg.Wait()
	if s.source != nil {
		_ = s.source.Close()
	}
}

func (s *self) now() (*workloadapi.X509Source, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.source == nil {
		return nil, s.err
	}
	return s.source, nil
}

// GetX509SVID implements x509svid.Source.
func (s *self) GetX509SVID() (*x509svid.SVID, error) {
	source, err := s.now()
	if err != nil {
		return nil, err
	}
	return source.GetX509SVID()
}

// GetX509BundleForTrustDomain implements x509bundle.Source.
func (s *self) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	source, err := s.now()
	if err != nil {
		return nil, err
	}
	return source.GetX509BundleForTrustDomain(td)
}

// agent lets an agent of the proxy's own trust domain be the other end, and nobody else: a
// workload that got hold of the socket's path could name every process.
func (s *self) agent(id spiffeid.ID, _ [][]*x509.Certificate) error {
	own, err := s.GetX509SVID()
	if err != nil {
		return err
	}
	if !id.MemberOf(own.ID.TrustDomain()) || !strings.HasPrefix(id.Path(), agentPath) {
		return fmt.Errorf("%s is no SPIRE agent of %s", id, own.ID.TrustDomain())
	}
	return nil
}
