package agent

import (
	"crypto/x509"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/identity"
)

// State is what all workloads of a source depend on. A new one replaces it; its
// contents never change.
type State struct {
	// Agent are the bundles that the agent serves; nil: none have come yet.
	Agent *x509bundle.Set
	// Extra are those that the proxy was given: the controller's own, and those of
	// trust domains that policy federates with.
	Extra *x509bundle.Set
	// Reissues counts the requests to ask for everything anew.
	Reissues uint64

	controller spiffeid.TrustDomain
	changed    chan struct{}
}

// Changed is closed when there is a newer state.
func (s State) Changed() <-chan struct{} { return s.changed }

// Roots keeps the State. Safe for concurrent use.
type Roots struct {
	mu    sync.Mutex
	state State
}

// NewRoots has no bundles. controller is the trust domain of the controller's CA.
func NewRoots(controller spiffeid.TrustDomain) *Roots {
	return &Roots{state: State{Extra: x509bundle.NewSet(), controller: controller, changed: make(chan struct{})}}
}

// Current is the state as it is now.
func (r *Roots) Current() State {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state
}

// SetAgent replaces all of the agent's bundles, if they are others.
func (r *Roots) SetAgent(set *x509bundle.Set) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.state.Agent != nil && Same(r.state.Agent, set) {
		return
	}
	next := r.state
	next.Agent = set
	r.replace(next)
}

// SetExtra replaces the roots of one trust domain that the proxy was given; none
// removes it.
func (r *Roots) SetExtra(td spiffeid.TrustDomain, roots []*x509.Certificate) {
	r.mu.Lock()
	defer r.mu.Unlock()
	set := x509bundle.NewSet(r.state.Extra.Bundles()...)
	if len(roots) == 0 {
		set.Remove(td)
	} else {
		set.Add(x509bundle.FromX509Authorities(td, slices.Clone(roots)))
	}
	if Same(set, r.state.Extra) {
		return
	}
	next := r.state
	next.Extra = set
	r.replace(next)
}

// Reissue makes a state in which everything is to be asked for anew.
func (r *Roots) Reissue() {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := r.state
	next.Reissues++
	r.replace(next)
}

func (r *Roots) replace(next State) {
	was := r.state.changed
	next.changed = make(chan struct{})
	r.state = next
	close(was)
}

// Same tells whether two sets have the same roots for the same trust domains.
func Same(a, b *x509bundle.Set) bool {
	if a == b {
		return true
	}
	if a == nil || b == nil || a.Len() != b.Len() {
		return false
	}
	for _, x := range a.Bundles() {
		if y, ok := b.Get(x.TrustDomain()); !ok || !x.Equal(y) {
			return false
		}
	}
	return true
}

// For is the bundles by which a workload of the domain td judges others: its own and
// those it federates with, from the agent; and what the proxy was given, which comes
// before what the agent has of the same foreign domain. Of td itself the agent knows
// best.
//
// It is an error if td's own bundle is not known yet, and ErrWithdrawn if td is the
// controller's as well, with roots that are not the agent's: two authorities would name
// workloads of one trust domain, and each could forge the other's.
func (s State) For(td spiffeid.TrustDomain, federates []spiffeid.TrustDomain) (*x509bundle.Set, error) {
	if s.Agent == nil {
		return nil, fmt.Errorf("the agent has not sent the bundle of %s yet", td)
	}
	own, ok := s.Agent.Get(td)
	if !ok {
		return nil, fmt.Errorf("the agent has no bundle of its trust domain %s", td)
	}
	set := x509bundle.NewSet(own)
	for _, other := range federates {
		if b, ok := s.Agent.Get(other); ok && other != td {
			set.Add(b)
		}
	}
	for _, b := range s.Extra.Bundles() {
		if b.TrustDomain() != td {
			set.Add(b)
			continue
		}
		if td == s.controller && !below(b.X509Authorities(), own.X509Authorities()) {
			return nil, fmt.Errorf("%w: %s is the trust domain of the agent and of the controller, with roots of their own each; give the controller another trust_domain, or a CA below the agent's root", identity.ErrWithdrawn, td)
		}
	}
	return set, nil
}

// below tells whether one of cas is among roots, or signed by one of them: then it is one
// authority. Others may be roots that the agent has not heard of yet, or not any more; they
// are believed by nobody here.
func below(cas, roots []*x509.Certificate) bool {
	pool := x509.NewCertPool()
	for _, c := range roots {
		pool.AddCert(c)
	}
	return slices.ContainsFunc(cas, func(c *x509.Certificate) bool {
		if slices.ContainsFunc(roots, c.Equal) {
			return true
		}
		if !c.IsCA {
			return false
		}
		_, err := c.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: time.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		return err == nil
	})
}
