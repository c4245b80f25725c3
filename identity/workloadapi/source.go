package workloadapi

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	api "github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/internal/agent"
)

// Rule chooses one of several SVIDs.
type Rule = agent.Rule

// Options are what a Source is made of.
type Options struct {
	// Controller is the trust domain of the controller's CA. The agent's must be another,
	// or that CA must stand below the agent's root.
	Controller spiffeid.TrustDomain
	// Address is the Workload API's, in the form of SPIFFE_ENDPOINT_SOCKET:
	// "unix:///run/spire/sockets/agent.sock".
	Address string
	// Rule chooses where the proxy has several SVIDs.
	Rule Rule
	// Report hears when the API does not answer any more (its reason), and when it does
	// again (nil); nil: nobody does.
	Report func(error)
}

// Source is an identity.Source. Safe for concurrent use; Close it.
type Source struct {
	client  *api.Client
	address string
	rule    Rule
	report  func(error)
	roots   *agent.Roots

	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex
	latest given
	told   error // what was reported last

	identity.Estate
}

// given is what the API said last. A new one replaces it.
type given struct {
	svid    *identity.SVID
	bundles *x509bundle.Set
	err     error         // why there is nothing newer
	known   bool          // it has said something, or failed
	since   time.Time     // when err became nil, or was nil last
	changed chan struct{} // closed when this is not the last any more
}

// New connects in the background, and keeps trying: the API does not answer a program
// that has no registration entry yet, and that must not keep the proxy from starting.
func New(o Options) (*Source, error) {
	if err := api.ValidateAddress(o.Address); err != nil {
		return nil, fmt.Errorf("the Workload API's address %q: %w", o.Address, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	client, err := api.New(ctx, api.WithAddr(o.Address))
	if err != nil {
		cancel()
		return nil, fmt.Errorf("the Workload API at %s: %w", o.Address, err)
	}
	s := &Source{
		client: client, address: o.Address, rule: o.Rule, report: o.Report, roots: agent.NewRoots(o.Controller), cancel: cancel,
		latest: given{since: time.Now(), changed: make(chan struct{})},
	}
	s.wg.Go(func() { s.run(ctx) })
	return s, nil
}

// run keeps a stream open until ctx ends. The client itself tries again after most
// failures, and tells the watcher; what it gives up at is tried again here.
func (s *Source) run(ctx context.Context) {
	for failures := 1; ctx.Err() == nil; failures++ {
		if err := s.client.WatchX509Context(ctx, watcher{s}); ctx.Err() == nil {
			s.failed(err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(agent.Pause(failures)):
		}
	}
}

// Close ends the source's own work. Watches end with their contexts, before.
func (s *Source) Close() {
	s.cancel()
	s.wg.Wait()
	_ = s.client.Close()
}

// SetBundle gives all workloads the roots of one more trust domain, the controller's;
// none takes them away again.
func (s *Source) SetBundle(td spiffeid.TrustDomain, roots []*x509.Certificate) {
	s.roots.SetExtra(td, roots)
}

// Reissue does nothing: the agent renews the SVID when it is time, and there is nothing
// that could be asked for anew.
func (s *Source) Reissue() {}

// Status is the source's state, for people.
type Status struct {
	Address string `json:"address"`
	// SPIFFEID is the host's one identity, "" if there is none.
	SPIFFEID string `json:"spiffe_id,omitempty"`
	// Error is why there is no newer SVID, "" if there is.
	Error string `json:"error,omitempty"`
	// Since is when it began to answer, or not to.
	Since time.Time `json:"since"`
}

// Status tells how it is with the API.
func (s *Source) Status() Status {
	g := s.current()
	out := Status{Address: s.address, Since: g.since.UTC()}
	if g.svid != nil {
		out.SPIFFEID = g.svid.ID.String()
	}
	switch {
	case g.err != nil:
		out.Error = g.err.Error()
	case !g.known:
		out.Error = "the Workload API has not answered yet"
	}
	return out
}

// watcher is the Source as the client's watcher.
type watcher struct{ s *Source }

func (w watcher) OnX509ContextUpdate(c *api.X509Context) {
	g := given{known: true, bundles: x509bundle.NewSet(c.Bundles.Bundles()...)}
	g.svid, g.err = w.s.choose(c)
	w.s.replace(g)
}

func (w watcher) OnX509ContextWatchError(err error) {
	if status.Code(err) != codes.Canceled {
		w.s.failed(err)
	}
}

// choose returns the host's SVID. Errors: identity.ErrWithdrawn.
func (s *Source) choose(c *api.X509Context) (*identity.SVID, error) {
	var offers []agent.Offer
	for _, x := range c.SVIDs {
		offers = append(offers, agent.Offer{ID: x.ID, Hint: x.Hint})
	}
	i, err := s.rule.Choose(offers)
	if err != nil {
		return nil, err
	}
	svid, err := identity.NewSVID(c.SVIDs[i].Certificates, c.SVIDs[i].PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", identity.ErrWithdrawn, err)
	}
	return svid, nil
}

// failed keeps what there is, but for an agent that answers that there is none, any more
// or yet. That stands until it says something else: not to be reached afterwards, it has
// taken nothing back.
func (s *Source) failed(err error) {
	g := s.current()
	st := status.Convert(err)
	why := fmt.Errorf("the SPIFFE Workload API at %s: %s: %.300s", s.address, st.Code(), st.Message())
	switch {
	case st.Code() == codes.PermissionDenied:
		g.svid, g.bundles = nil, nil
		why = fmt.Errorf("%w: %w: the agent has no identity for the proxy; give it a registration entry", identity.ErrWithdrawn, why)
	case errors.Is(g.err, identity.ErrWithdrawn):
		why = g.err
	}
	g.err, g.known = why, true
	s.replace(g)
}

func (s *Source) current() given {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.latest
}

func (s *Source) replace(g given) {
	g.changed = make(chan struct{})
	s.mu.Lock()
	was := s.latest
	if g.since = was.since; (was.known && was.err == nil) != (g.err == nil) {
		g.since = time.Now()
	}
	s.latest = g
	told := s.told
	s.told = g.err
	s.mu.Unlock()
	close(was.changed)
	if s.report != nil && ((told == nil) != (g.err == nil) || told != nil && told.Error() != g.err.Error()) {
		s.report(g.err)
	}
}

// Watch implements identity.Source.
func (s *Source) Watch(ctx context.Context, w *identity.Workload) <-chan identity.Update {
	out := make(chan identity.Update, 1)
	go func() {
		defer close(out)
		s.follow(ctx, w, out)
	}()
	return out
}

func (s *Source) follow(ctx context.Context, w *identity.Workload, out chan identity.Update) {
	var last *identity.Credential
	kept, restored := s.Claim(w)
	restored = restored && kept.Bundles != nil
	for {
		g, state := s.current(), s.roots.Current()
		if restored && (!g.known || g.svid == nil && !errors.Is(g.err, identity.ErrWithdrawn)) {
			// Until the agent has its say, what it said to an earlier run. Whom it and the
			// controller federated with then may be gone by now.
			if own, ok := kept.Bundles.Get(kept.SVID.ID.TrustDomain()); ok {
				g.svid, g.bundles, g.known = kept.SVID, x509bundle.NewSet(own), true
			}
		}
		if g.known {
			u := credential(g, state, last)
			last = u.Credential
			select {
			case <-out:
			default:
			}
			out <- u
		}
		select {
		case <-ctx.Done():
			return
		case <-g.changed:
		case <-state.Changed():
		}
	}
}

// credential makes the update of what the API says and the bundles of now. It is last
// again, if that says the same.
func credential(g given, state agent.State, last *identity.Credential) identity.Update {
	if g.svid == nil {
		err := g.err
		if !errors.Is(err, identity.ErrWithdrawn) {
			err = fmt.Errorf("%w: %w", identity.ErrWithdrawn, err)
		}
		return identity.Update{Err: err}
	}
	// All bundles that the API gives are for this SVID.
	var all []spiffeid.TrustDomain
	for _, b := range g.bundles.Bundles() {
		all = append(all, b.TrustDomain())
	}
	state.Agent = g.bundles
	set, err := state.For(g.svid.ID.TrustDomain(), all)
	if err == nil {
		_, err = identity.Verify(g.svid.Chain, set, time.Now())
	}
	if err != nil {
		return identity.Update{Err: fmt.Errorf("%w: %w", identity.ErrWithdrawn, err)}
	}
	if last == nil || !agent.Same(last.Bundles, set) || !slices.EqualFunc(last.SVID.Chain, g.svid.Chain, (*x509.Certificate).Equal) {
		last = &identity.Credential{SVID: g.svid, Bundles: set}
	}
	return identity.Update{Credential: last, Err: g.err}
}
