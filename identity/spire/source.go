package spire

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/internal/agent"
)

const (
	// maxMessage bounds one answer of the agent, bytes: all federated bundles.
	maxMessage = 16 << 20
	// firstAnswer bounds how long the agent may take to attest.
	firstAnswer = 15 * time.Second
	// maxAttesting is how many processes are attested at a time, and
	// maxAttestingPerUser how many of one user.
	maxAttesting, maxAttestingPerUser = 16, 4
	// maxWatched is how many threads are watched at a time, for which each takes a
	// descriptor, and maxWatchedPerUser how many of one user's processes; newThreads is the
	// room for those that a process makes meanwhile.
	maxWatched, maxWatchedPerUser = 3 * maxWatchedPerUser, identity.MaxThreads + newThreads
	newThreads                    = 64
	// reconnect bounds how long the socket of an agent that came back is not noticed.
	reconnect = 2 * time.Second
	// checkEvery is how soon a change of a process is noticed.
	checkEvery = 2 * time.Second
)

// Options are what a Source is made of.
type Options struct {
	// Controller is the trust domain of the controller's CA. The agent's must be another,
	// or that CA must stand below the agent's root.
	Controller spiffeid.TrustDomain
	// AdminSocket is the path of the agent's admin_socket_path, for the Delegated Identity
	// API. It is not used where BrokerSocket is set.
	AdminSocket string
	// BrokerSocket is the path of the agent's experimental.broker.socket_path: its Broker API
	// is used. WorkloadAPI is then where the proxy gets the SVID that it shows there, in the
	// form of SPIFFE_ENDPOINT_SOCKET.
	BrokerSocket, WorkloadAPI string
	// Rule chooses where a workload has several SVIDs.
	Rule Rule
	// Report hears when the agent can be talked to no more (its reason), and when it
	// can again (nil); nil: nobody does.
	Report func(error)
}

// Rule chooses one of several SVIDs: by the hint of its entry, or the beginning of its
// path; by both if both are given.
type Rule = agent.Rule

// Source is an identity.Source for workloads with a Key.Process. Safe for concurrent
// use; Close it.
type Source struct {
	api   api
	rule  Rule
	roots *agent.Roots
	slots identity.Shares
	// watched are the descriptors that attesting takes.
	watched identity.Shares
	report  func(error)

	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex
	status error // of the bundle subscription
	since  time.Time

	identity.Estate
}

// errConnecting: the agent has not answered since the start.
var errConnecting = errors.New("the SPIRE agent has not answered yet")

// New connects in the background, and keeps trying.
func New(o Options) (*Source, error) {
	api, err := o.open()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &Source{
		api: api, rule: o.Rule,
		roots: agent.NewRoots(o.Controller), slots: identity.NewShares(maxAttesting, maxAttestingPerUser),
		watched: identity.NewShares(maxWatched, maxWatchedPerUser),
		report:  o.Report, cancel: cancel, status: errConnecting, since: time.Now(),
	}
	s.wg.Go(func() { s.watchBundles(ctx) })
	return s, nil
}

// open opens the API that the options name.
func (o Options) open() (api, error) {
	if o.BrokerSocket == "" {
		return openDelegated(o.AdminSocket)
	}
	return openBroker(o.BrokerSocket, o.WorkloadAPI)
}

// dial connects in the background to a socket of the agent's, and keeps trying.
func dial(socket string, creds credentials.TransportCredentials) (*grpc.ClientConn, error) {
	if !filepath.IsAbs(socket) {
		return nil, fmt.Errorf("the SPIRE agent's socket %q is no absolute path", socket)
	}
	conn, err := grpc.NewClient("unix://"+socket,
		grpc.WithTransportCredentials(creds),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: reconnect / 10, Multiplier: 1.6, Jitter: 0.5, MaxDelay: reconnect},
			MinConnectTimeout: reconnect,
		}),
		grpc.WithIdleTimeout(0), grpc.WithDisableServiceConfig())
	if err != nil {
		return nil, fmt.Errorf("the SPIRE agent's socket %s: %w", socket, err)
	}
	return conn, nil
}

// Close ends the source's own work. Watches end with their contexts, before.
func (s *Source) Close() {
	s.cancel()
	s.wg.Wait()
	s.api.close()
}

// SetBundle gives all workloads the roots of one more trust domain, the controller's;
// none takes them away again.
func (s *Source) SetBundle(td spiffeid.TrustDomain, roots []*x509.Certificate) {
	s.roots.SetExtra(td, roots)
}

// Reissue has every workload attested anew, at once. Meanwhile the SVIDs that there are
// stay.
func (s *Source) Reissue() { s.roots.Reissue() }

// Status is the source's state, for people.
type Status struct {
	// API is the agent's that is used: delegated or broker. Socket is where.
	API    string `json:"api"`
	Socket string `json:"socket"`
	// Error is why the agent does not answer, "" if it does.
	Error string `json:"error,omitempty"`
	// Since is when it began to answer, or not to.
	Since time.Time `json:"since"`
	// TrustDomains are those that the agent serves bundles of.
	TrustDomains []string `json:"trust_domains"`
}

// Status tells how it is with the agent.
func (s *Source) Status() Status {
	out := Status{TrustDomains: []string{}}
	out.API, out.Socket = s.api.name()
	s.mu.Lock()
	if s.status != nil {
		out.Error = s.status.Error()
	}
	out.Since = s.since.UTC()
	s.mu.Unlock()
	if set := s.roots.Current().Agent; set != nil {
		for _, b := range set.Bundles() {
			out.TrustDomains = append(out.TrustDomains, b.TrustDomain().Name())
		}
		slices.Sort(out.TrustDomains)
	}
	return out
}

// Watch implements identity.Source.
func (s *Source) Watch(ctx context.Context, w *identity.Workload) <-chan identity.Update {
	out := make(chan identity.Update, 1)
	go func() {
		defer close(out)
		x := &watch{source: s, workload: w, out: out}
		x.run(ctx)
		<-ctx.Done()
	}()
	return out
}
