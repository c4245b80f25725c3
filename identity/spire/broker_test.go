package spire

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/symbolon/symbolon/identity"
)

// proxyPath is whom the broker's side lets in.
const proxyPath = "/symbolon/proxy"

// testBroker is a testAgent's Broker API: the real protocol over TLS, beside the Workload
// API that gives the proxy its SVID. The agent's answers are those that the test sets.
type testBroker struct {
	*testAgent
	site              *root
	broker, workloads string // sockets

	once sync.Once
	may  chan struct{} // closed when the proxy has an entry
}

// newTestBroker shows the SVID of path as the agent's.
func newTestBroker(t *testing.T, site *root, path string) *testBroker {
	t.Helper()
	dir := t.TempDir()
	b := &testBroker{
		testAgent: newTestAgent(t, site), site: site, may: make(chan struct{}),
		broker: filepath.Join(dir, "broker.sock"), workloads: filepath.Join(dir, "api.sock"),
	}
	x := site.svid(path, "")
	svid, err := x509svid.ParseRaw(x.X509Svid.CertChain[0], x.X509SvidKey)
	if err != nil {
		t.Fatal(err)
	}
	td := spiffeid.RequireTrustDomainFromString(site.td)
	c := tlsconfig.MTLSServerConfig(svid, x509bundle.FromX509Authorities(td, append(x509bundle.New(td).X509Authorities(), site.cert)),
		tlsconfig.AuthorizeID(spiffeid.RequireFromPath(td, proxyPath)))
	tunnel, plain := grpc.NewServer(grpc.Creds(credentials.NewTLS(c))), grpc.NewServer()
	broker.RegisterAPIServer(tunnel, brokerAPI{b: b})
	workload.RegisterSpiffeWorkloadAPIServer(plain, workloadAPI{b: b})
	for path, s := range map[string]*grpc.Server{b.broker: tunnel, b.workloads: plain} {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		go func() { _ = s.Serve(l) }()
		t.Cleanup(s.Stop)
	}
	return b
}

// admit makes the proxy's entry.
func (b *testBroker) admit() { b.once.Do(func() { close(b.may) }) }

func (b *testBroker) source(t *testing.T) *Source {
	t.Helper()
	needRoot(t)
	s, err := New(Options{Controller: controllerTD, BrokerSocket: b.broker, WorkloadAPI: "unix://" + b.workloads})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

type workloadAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	b *testBroker
}

type brokerAPI struct {
	broker.UnimplementedAPIServer
	b *testBroker
}

// FetchX509SVID gives the proxy its own SVID, when it may have one.
func (a workloadAPI) FetchX509SVID(_ *workload.X509SVIDRequest, s workload.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	b := a.b
	select {
	case <-b.may:
	default:
		return status.Error(codes.PermissionDenied, "no identity issued")
	}
	x := b.site.svid(proxyPath, "")
	if err := s.Send(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
		SpiffeId: "spiffe://" + b.site.td + proxyPath, X509Svid: x.X509Svid.CertChain[0], X509SvidKey: x.X509SvidKey, Bundle: b.site.cert.Raw,
	}}}); err != nil {
		return err
	}
	<-s.Context().Done()
	return nil
}

// referred is the process that a request is about.
func referred(ctx context.Context, r *broker.WorkloadReference) (int32, error) {
	if md, _ := metadata.FromIncomingContext(ctx); strings.Join(md.Get("broker.spiffe.io"), " ") != "true" {
		return 0, status.Error(codes.InvalidArgument, "security header missing from request")
	}
	var pid broker.WorkloadPIDReference
	if err := r.GetReference().UnmarshalTo(&pid); err != nil {
		return 0, status.Error(codes.InvalidArgument, err.Error())
	}
	return pid.Pid, nil
}

// translated sends what the Delegated Identity API would as the Broker API's.
type translated[From, To any] struct {
	grpc.ServerStreamingServer[From]
	to    grpc.ServerStreamingServer[To]
	words func(*From) *To
}

func (s translated[From, To]) Context() context.Context { return s.to.Context() }
func (s translated[From, To]) Send(m *From) error       { return s.to.Send(s.words(m)) }

func (a brokerAPI) SubscribeToX509SVID(r *broker.SubscribeToX509SVIDRequest, to grpc.ServerStreamingServer[broker.SubscribeToX509SVIDResponse]) error {
	pid, err := referred(to.Context(), r.GetReference())
	if err != nil {
		return err
	}
	b := a.b
	return b.SubscribeToX509SVIDs(&delegatedidentityv1.SubscribeToX509SVIDsRequest{Pid: pid},
		translated[svids, broker.SubscribeToX509SVIDResponse]{to: to, words: func(m *svids) *broker.SubscribeToX509SVIDResponse {
			b.mu.Lock()
			defer b.mu.Unlock()
			out := &broker.SubscribeToX509SVIDResponse{FederatedBundles: make(map[string][]byte)}
			for _, x := range m.X509Svids {
				td := "spiffe://" + x.X509Svid.Id.TrustDomain
				out.Svids = append(out.Svids, &broker.X509SVID{
					SpiffeId: td + x.X509Svid.Id.Path, X509Svid: x.X509Svid.CertChain[0], X509SvidKey: x.X509SvidKey, Bundle: b.bundles[td], Hint: x.X509Svid.Hint,
				})
			}
			for _, td := range m.FederatesWith {
				out.FederatedBundles[td] = b.bundles[td]
			}
			return out
		}})
}

func (a brokerAPI) SubscribeToX509Bundles(r *broker.SubscribeToX509BundlesRequest, to grpc.ServerStreamingServer[broker.SubscribeToX509BundlesResponse]) error {
	if _, err := referred(to.Context(), r.GetReference()); err != nil {
		return err
	}
	type from = delegatedidentityv1.SubscribeToX509BundlesResponse
	return a.b.SubscribeToX509Bundles(nil, translated[from, broker.SubscribeToX509BundlesResponse]{to: to, words: func(m *from) *broker.SubscribeToX509BundlesResponse {
		return &broker.SubscribeToX509BundlesResponse{Bundles: m.CaCertificates}
	}})
}

// By the Broker API it is as by the other one: a process has its own SVID and what it
// federates with, follows its renewal, and loses it with its entry.
func TestBroker(t *testing.T) {
	site, partner, stranger := newRoot(t, "site.example"), newRoot(t, "partner.example"), newRoot(t, "stranger.example")
	b := newTestBroker(t, site, "/spire/agent/join_token/1")
	b.bundles["spiffe://partner.example"], b.bundles["spiffe://stranger.example"] = partner.cert.Raw, stranger.cert.Raw
	p := sleeper(t)
	b.sends[p.pid()] = &svids{X509Svids: one(site.svid("/prod/web", "")).X509Svids, FederatesWith: []string{"spiffe://partner.example"}}
	s := b.source(t)
	web := watched(t, s, p.w)
	// That the proxy has none itself yet is no reason not to begin.
	until(t, web, "the proxy has no SVID", fails(identity.ErrWithdrawn, "cannot be reached", "no SVID of its own"))
	b.admit()
	first := until(t, web, "web has an SVID", is("spiffe://site.example/prod/web"))
	if got, want := domains(first.Credential), "partner.example site.example"; got != want {
		t.Errorf("believes %s, want %s", got, want)
	}
	await(t, "the status says that it answers", func() bool {
		got := s.Status()
		return got.API == "broker" && got.Error == "" && len(got.TrustDomains) == 3
	})
	b.change(func() { b.sends[p.pid()] = one(site.svid("/prod/web", "")) })
	second := until(t, web, "it is renewed", func(u identity.Update) bool {
		return is("spiffe://site.example/prod/web")(u) && !u.Credential.SVID.Chain[0].Equal(first.Credential.SVID.Chain[0])
	})
	if got, want := domains(second.Credential), "site.example"; got != want {
		t.Errorf("believes %s, want %s", got, want)
	}
	// What signs it must be in the bundle that comes with it.
	next := newRoot(t, "site.example")
	b.change(func() { b.bundles["spiffe://site.example"] = next.cert.Raw })
	until(t, web, "its roots are gone", fails(identity.ErrWithdrawn))
	b.change(func() { b.bundles["spiffe://site.example"] = site.cert.Raw })
	until(t, web, "they are back", is("spiffe://site.example/prod/web"))
	b.change(func() { b.sends[p.pid()] = nil })
	until(t, web, "its entry is gone", fails(identity.ErrWithdrawn, "registration entry"))
	b.change(func() { b.sends[p.pid()] = one(site.svid("/prod/web", "")) })
	until(t, web, "it is back", is("spiffe://site.example/prod/web"))
	asked := b.count(p.pid())
	p.kill()
	until(t, web, "its end is told", fails(identity.ErrEnded))
	until(t, watched(t, s, p.w), "a dead process is refused", fails(identity.ErrEnded))
	if n := b.count(p.pid()); asked != 1 || n != asked {
		t.Errorf("the agent was asked %d times, and %d after the end", asked, n)
	}
}

// An agent that says of a process that there is none, or that it is none of the proxy's
// business, takes back what it said before; one that fails takes nothing back.
func TestBrokerRefuses(t *testing.T) {
	site := newRoot(t, "site.example")
	b := newTestBroker(t, site, "/spire/agent/join_token/1")
	b.admit()
	p := sleeper(t)
	b.sends[p.pid()] = one(site.svid("/web", ""))
	updates := watched(t, b.source(t), p.w)
	until(t, updates, "it has an SVID", is("spiffe://site.example/web"))
	for code, words := range map[codes.Code]string{codes.PermissionDenied: "allowed_reference_types", codes.NotFound: "NotFound"} {
		b.change(func() { b.refuse = code })
		until(t, updates, words, fails(identity.ErrWithdrawn, words))
		b.change(func() { b.refuse = codes.OK })
		until(t, updates, "it answers again", is("spiffe://site.example/web"))
	}
	for code, words := range map[codes.Code]string{codes.Internal: "Internal", codes.Unavailable: "experimental.broker.socket_path", codes.Unimplemented: "SPIRE 1.15.2"} {
		b.change(func() { b.refuse = code })
		until(t, updates, words, func(u identity.Update) bool {
			return u.Credential != nil && u.Err != nil && !errors.Is(u.Err, identity.ErrWithdrawn) && strings.Contains(u.Err.Error(), words)
		})
		b.change(func() { b.refuse = codes.OK })
		until(t, updates, "it answers again", is("spiffe://site.example/web"))
	}
}

// Whoever stands at the agent's socket without being an agent is told nothing: it could
// name every process as it likes.
func TestBrokerIsAnAgent(t *testing.T) {
	for name, path := range map[string]string{"a workload": "/prod/web", "nearly an agent": "/spire/agents/x", "the server": "/spire/server"} {
		t.Run(name, func(t *testing.T) {
			site := newRoot(t, "site.example")
			b := newTestBroker(t, site, path)
			b.admit()
			p := sleeper(t)
			b.sends[p.pid()] = one(site.svid("/prod/web", ""))
			s := b.source(t)
			until(t, watched(t, s, p.w), "it is not believed", fails(identity.ErrWithdrawn, "is no SPIRE agent of site.example"))
			if n := b.count(p.pid()); n != 0 {
				t.Errorf("it was asked %d times", n)
			}
		})
	}
}
