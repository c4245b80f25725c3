package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/symbolon/symbolon/identity"
)

const (
	// callTimeout bounds one question to the server.
	callTimeout = 20 * time.Second
	// maxAnswer bounds what the server may say, bytes.
	maxAnswer = 1 << 20
	// maxChain bounds the CA certificates from ours to a root, which every SVID carries;
	// maxCertificate each of them, bytes.
	maxChain, maxCertificate = 4, 16 << 10
	// maxReason bounds what is repeated of others' words, bytes.
	maxReason = 300
	// Pauses after failures of the agent's.
	pauseFirst, pauseMax = time.Second, 30 * time.Second
)

// ErrUnusable: what SPIRE has answered is no CA for the controller.
var ErrUnusable = errors.New("upstream: SPIRE's answer cannot be used")

// Options say where SPIRE is.
type Options struct {
	TrustDomain spiffeid.TrustDomain
	// WorkloadAPI is the agent's: "unix:///run/spire/agent/api.sock".
	WorkloadAPI string
	// Server is the SPIRE server's "address:port".
	Server string
	// Report hears when it becomes otherwise why the agent gives nothing newer, nil if it
	// does. May be nil.
	Report func(error)
}

// SPIRE is an agent and its server. Safe for concurrent use.
type SPIRE struct {
	o      Options
	client *workloadapi.Client

	mu     sync.Mutex
	latest given
}

// given is what the agent has said last.
type given struct {
	svid  *x509svid.SVID
	roots []*x509.Certificate
	// err is why there is nothing newer, since is when that began or ended.
	err     error
	since   time.Time
	changed chan struct{} // closed when this is not the last any more
}

// errSilent: the agent has said nothing since the start.
var errSilent = errors.New("the SPIRE agent has not answered yet")

// ValidateWorkloadAPI says what is wrong with an address.
func ValidateWorkloadAPI(address string) error { return workloadapi.ValidateAddress(address) }

// New asks nothing yet: Run does.
func New(o Options) (*SPIRE, error) {
	client, err := workloadapi.New(context.Background(), workloadapi.WithAddr(o.WorkloadAPI))
	if err != nil {
		return nil, fmt.Errorf("upstream: the Workload API at %s: %w", o.WorkloadAPI, err)
	}
	return &SPIRE{o: o, client: client, latest: given{err: errSilent, since: time.Now(), changed: make(chan struct{})}}, nil
}

// Run follows the agent until ctx ends.
func (s *SPIRE) Run(ctx context.Context) {
	for pause := pauseFirst; ctx.Err() == nil; pause = min(2*pause, pauseMax) {
		if err := s.client.WatchX509Context(ctx, watcher{s}); ctx.Err() == nil {
			s.failed(err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// Close is for after Run.
func (s *SPIRE) Close() { _ = s.client.Close() }

// watcher is a SPIRE as the client's.
type watcher struct{ s *SPIRE }

func (w watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	svid, roots, err := w.s.choose(c)
	if err != nil {
		w.s.failed(err)
		return
	}
	w.s.replace(given{svid: svid, roots: roots})
}

func (w watcher) OnX509ContextWatchError(err error) {
	if status.Code(err) != codes.Canceled {
		w.s.failed(err)
	}
}

// choose takes what is for the controller: its one SVID, and the bundle of its trust domain.
func (s *SPIRE) choose(c *workloadapi.X509Context) (*x509svid.SVID, []*x509.Certificate, error) {
	if n := len(c.SVIDs); n != 1 {
		var ids []string
		for _, x := range c.SVIDs {
			ids = append(ids, x.ID.String())
		}
		return nil, nil, fmt.Errorf("the SPIRE agent gives the controller %d SVIDs (%.*s): leave one registration entry for this program, made with -downstream",
			n, maxReason, strings.Join(ids, ", "))
	}
	svid := c.SVIDs[0]
	if td := svid.ID.TrustDomain(); td != s.o.TrustDomain {
		return nil, nil, fmt.Errorf("the SPIRE agent is of the trust domain %s, the controller of %s: below SPIRE's CA they must be the same (trust_domain)", td, s.o.TrustDomain)
	}
	b, ok := c.Bundles.Get(s.o.TrustDomain)
	if !ok || len(b.X509Authorities()) == 0 {
		return nil, nil, fmt.Errorf("the SPIRE agent gives no bundle of %s", s.o.TrustDomain)
	}
	if err := checkRoots(b.X509Authorities()); err != nil {
		return nil, nil, err
	}
	return svid, b.X509Authorities(), nil
}

func checkRoots(roots []*x509.Certificate) error {
	if n := len(roots); n == 0 || n > identity.MaxRoots {
		return fmt.Errorf("%w: %d roots, want 1 to %d", ErrUnusable, n, identity.MaxRoots)
	}
	return nil
}

// failed keeps what there is.
func (s *SPIRE) failed(err error) {
	g := s.current()
	if st := status.Convert(err); st.Code() == codes.PermissionDenied {
		err = fmt.Errorf("the SPIRE agent at %s has no identity for the controller (%.*s): make a registration entry for this program, with -downstream", s.o.WorkloadAPI, maxReason, st.Message())
	} else if st.Code() != codes.Unknown {
		err = fmt.Errorf("the SPIRE agent at %s: %s: %.*s", s.o.WorkloadAPI, st.Code(), maxReason, st.Message())
	}
	g.err = err
	s.replace(g)
}

func (s *SPIRE) current() given {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.latest
}

func (s *SPIRE) replace(g given) {
	g.changed = make(chan struct{})
	s.mu.Lock()
	was := s.latest
	if g.since = was.since; (was.err == nil) != (g.err == nil) {
		g.since = time.Now()
	}
	s.latest = g
	s.mu.Unlock()
	close(was.changed)
	if s.o.Report != nil && ((was.err == nil) != (g.err == nil) || g.err != nil && g.err.Error() != was.err.Error()) {
		s.o.Report(g.err)
	}
}

// Roots are the trust domain's, as the agent has said last; none before it has said
// anything. The channel closes when that may be otherwise.
func (s *SPIRE) Roots() ([]*x509.Certificate, <-chan struct{}) {
	g := s.current()
	return slices.Clone(g.roots), g.changed
}

// Agent tells since when the agent gives what is wanted, or why it does not.
func (s *SPIRE) Agent() (since time.Time, err error) {
	g := s.current()
	return g.since, g.err
}

// String names the server.
func (s *SPIRE) String() string { return "the SPIRE server at " + s.o.Server }

// Sign has the server make a CA certificate for a request's key, valid for about as long
// as is preferred if what signs it is; it waits for the agent's SVID. chain is that
// certificate and those above it below the roots. Errors: ErrUnusable; the server's.
func (s *SPIRE) Sign(ctx context.Context, csr []byte, preferred time.Duration) (chain, roots []*x509.Certificate, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	g := s.current()
	for g.svid == nil || !time.Now().Before(g.svid.Certificates[0].NotAfter) {
		select {
		case <-g.changed:
		case <-ctx.Done():
			if g.err != nil {
				return nil, nil, fmt.Errorf("upstream: %w", g.err)
			}
			return nil, nil, errors.New("upstream: the SVID that the SPIRE agent has given has expired")
		}
		g = s.current()
	}
	answer, err := s.ask(ctx, g, &svidv1.NewDownstreamX509CARequest{Csr: csr, PreferredTtl: int32(preferred / time.Second)})
	if err != nil {
		return nil, nil, err
	}
	if chain, err = parse(answer.GetCaCertChain(), maxChain); err != nil {
		return nil, nil, err
	}
	if roots, err = parse(answer.GetX509Authorities(), identity.MaxRoots); err != nil {
		return nil, nil, err
	}
	return chain, roots, checkRoots(roots)
}

// ask opens a connection for one question: there is one in a day.
func (s *SPIRE) ask(ctx context.Context, g given, m *svidv1.NewDownstreamX509CARequest) (*svidv1.NewDownstreamX509CAResponse, error) {
	server := spiffeid.RequireFromSegments(s.o.TrustDomain, "spire", "server")
	bundle := x509bundle.FromX509Authorities(s.o.TrustDomain, g.roots)
	config := tlsconfig.MTLSClientConfig(g.svid, bundle, tlsconfig.AuthorizeID(server))
	config.MinVersion = tls.VersionTLS13
	conn, err := grpc.NewClient("passthrough:///"+s.o.Server,
		grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithNoProxy(), grpc.WithDisableServiceConfig(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", address)
		}))
	if err != nil {
		return nil, fmt.Errorf("upstream: %w", err)
	}
	defer conn.Close()
	answer, err := svidv1.NewSVIDClient(conn).NewDownstreamX509CA(ctx, m)
	switch st := status.Convert(err); st.Code() {
	case codes.OK:
		return answer, nil
	case codes.PermissionDenied:
		return nil, fmt.Errorf("upstream: %s refuses the controller a CA (%.*s): its entry, %s, must be made with -downstream", s, maxReason, st.Message(), g.svid.ID)
	default:
		return nil, fmt.Errorf("upstream: %s: %s: %.*s", s, st.Code(), maxReason, st.Message())
	}
}

// parse reads certificates that somebody else has sent.
func parse(ders [][]byte, most int) ([]*x509.Certificate, error) {
	if n := len(ders); n == 0 || n > most {
		return nil, fmt.Errorf("%w: %d certificates, want 1 to %d", ErrUnusable, n, most)
	}
	var out []*x509.Certificate
	for _, der := range ders {
		if len(der) > maxCertificate {
			return nil, fmt.Errorf("%w: a certificate of %d bytes, at most %d", ErrUnusable, len(der), maxCertificate)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrUnusable, err)
		}
		out = append(out, c)
	}
	return out, nil
}
