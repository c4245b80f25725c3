package upstream

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority is a trust domain's.
type authority struct {
	*testing.T
	td   string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newAuthority(t *testing.T, td string) *authority {
	t.Helper()
	a := &authority{T: t, td: td, key: newKey(t)}
	a.cert = a.sign(&x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageCertSign}, a.key.Public(), "")
	return a
}

func (a *authority) sign(tmpl *x509.Certificate, pub crypto.PublicKey, path string) *x509.Certificate {
	a.Helper()
	var err error
	if tmpl.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
		a.Fatal(err)
	}
	tmpl.NotBefore, tmpl.NotAfter, tmpl.BasicConstraintsValid = time.Now().Add(-time.Minute), time.Now().Add(time.Hour), true
	tmpl.URIs = []*url.URL{{Scheme: "spiffe", Host: a.td, Path: path}}
	parent := a.cert
	if parent == nil {
		parent = tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, a.key)
	if err != nil {
		a.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.Fatal(err)
	}
	return cert
}

func (a *authority) leaf(path string) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.Helper()
	key := newKey(a.T)
	return a.sign(&x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature}, key.Public(), path), key
}

func (a *authority) svid(path string) *workload.X509SVID {
	a.Helper()
	leaf, key := a.leaf(path)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.Fatal(err)
	}
	return &workload.X509SVID{SpiffeId: "spiffe://" + a.td + path, X509Svid: leaf.Raw, X509SvidKey: private, Bundle: a.cert.Raw}
}

// site is an agent and a server, which say what a test wants.
type site struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	svidv1.UnimplementedSVIDServer
	*authority
	options Options

	mu      sync.Mutex
	gives   []*workload.X509SVID // none: no identity
	answer  func(csr *x509.CertificateRequest) (*svidv1.NewDownstreamX509CAResponse, error)
	changed chan struct{}
	callers []string
}

// newSite has a server that proves to be serverPath of by.
func newSite(t *testing.T, by *authority, serverPath string) *site {
	t.Helper()
	a := newAuthority(t, "prod.example")
	if by == nil {
		by = a
	}
	s := &site{authority: a, changed: make(chan struct{})}
	s.answer = func(csr *x509.CertificateRequest) (*svidv1.NewDownstreamX509CAResponse, error) {
		ca := a.sign(&x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageCertSign}, csr.PublicKey, "")
		return &svidv1.NewDownstreamX509CAResponse{CaCertChain: [][]byte{ca.Raw}, X509Authorities: [][]byte{a.cert.Raw}}, nil
	}
	serve := func(l net.Listener, err error, o ...grpc.ServerOption) {
		if err != nil {
			t.Fatal(err)
		}
		g := grpc.NewServer(o...)
		workload.RegisterSpiffeWorkloadAPIServer(g, s)
		svidv1.RegisterSVIDServer(g, s)
		go func() { _ = g.Serve(l) }()
		t.Cleanup(g.Stop)
	}
	path := filepath.Join(t.TempDir(), "api.sock")
	agent, err := net.Listen("unix", path)
	serve(agent, err)
	leaf, key := by.leaf(serverPath)
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	server, err := net.Listen("tcp", "127.0.0.1:0")
	serve(server, err, grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{leaf.Raw}, PrivateKey: key}},
		ClientAuth:   tls.RequireAnyClientCert, MinVersion: tls.VersionTLS13,
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
			s.mu.Lock()
			defer s.mu.Unlock()
			s.callers = append(s.callers, cs.PeerCertificates[0].URIs[0].String())
			return err
		},
	})))
	s.options = Options{TrustDomain: spiffeid.RequireTrustDomainFromString("prod.example"), WorkloadAPI: "unix://" + path, Server: server.Addr().String()}
	return s
}

// give changes what the agent gives.
func (s *site) give(all ...*workload.X509SVID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gives = all
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *site) FetchX509SVID(_ *workload.X509SVIDRequest, stream workload.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	for {
		s.mu.Lock()
		gives, changed := s.gives, s.changed
		s.mu.Unlock()
		if len(gives) == 0 {
			return status.Error(codes.PermissionDenied, "no identity issued")
		}
		if err := stream.Send(&workload.X509SVIDResponse{Svids: gives}); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return nil
		}
	}
}

func (s *site) NewDownstreamX509CA(_ context.Context, m *svidv1.NewDownstreamX509CARequest) (*svidv1.NewDownstreamX509CAResponse, error) {
	csr, err := x509.ParseCertificateRequest(m.GetCsr())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return s.answer(csr)
}

func (s *site) open() *SPIRE {
	s.Helper()
	x, err := New(s.options)
	if err != nil {
		s.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { x.Run(ctx) })
	s.Cleanup(func() { cancel(); running.Wait(); x.Close() })
	return x
}

func (s *site) ask(x *SPIRE, patience time.Duration) (chain, roots []*x509.Certificate, err error) {
	s.Helper()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, newKey(s.T))
	if err != nil {
		s.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(s.Context(), patience)
	defer cancel()
	return x.Sign(ctx, csr, 24*time.Hour)
}

const patience = 30 * time.Second

func TestSign(t *testing.T) {
	s := newSite(t, nil, "/spire/server")
	x := s.open()
	if _, err := x.Agent(); !errors.Is(err, errSilent) && !strings.Contains(err.Error(), "no identity") {
		t.Errorf("at first: %v", err)
	}
	if _, _, err := s.ask(x, 2*time.Second); err == nil || !strings.Contains(err.Error(), "-downstream") {
		t.Errorf("without an entry: %v", err)
	}
	s.give(s.svid("/ca/symbolon"))
	chain, roots, err := s.ask(x, patience)
	if err != nil || len(chain) != 1 || len(roots) != 1 || !roots[0].Equal(s.cert) {
		t.Fatalf("%d certificates, %d roots, %v", len(chain), len(roots), err)
	}
	if len(s.callers) != 1 || s.callers[0] != "spiffe://prod.example/ca/symbolon" {
		t.Errorf("the server was asked by %v", s.callers)
	}
	if _, err := x.Agent(); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	// Another root comes with the SVID; what there was stays when there is no identity.
	next := newAuthority(t, "prod.example")
	both := s.svid("/ca/symbolon")
	both.Bundle = append(both.Bundle, next.cert.Raw...)
	_, changed := x.Roots()
	s.give(both)
	<-changed
	roots, changed = x.Roots()
	if len(roots) != 2 {
		t.Errorf("%d roots", len(roots))
	}
	s.give()
	<-changed
	if _, err := x.Agent(); err == nil || !strings.Contains(err.Error(), "-downstream") {
		t.Errorf("without an identity: %v", err)
	}
	if roots, _ := x.Roots(); len(roots) != 2 {
		t.Error("the roots are gone with the identity")
	}
}

// Whoever answers in the server's place, and whatever answers are no CA's, are refused.
func TestRefusals(t *testing.T) {
	stranger := newAuthority(t, "prod.example")
	for name, tc := range map[string]struct {
		by    *authority
		path  string
		gives func(s *site) []*workload.X509SVID
		spoil func(*svidv1.NewDownstreamX509CAResponse)
		err   error
		words string
	}{
		"a workload in the server's place": {path: "/acme/web", words: "unexpected ID"},
		"another authority's server":       {by: stranger, path: "/spire/server", words: "Unavailable"},
		"an agent of another trust domain": {
			gives: func(*site) []*workload.X509SVID {
				return []*workload.X509SVID{newAuthority(t, "other.example").svid("/ca/symbolon")}
			},
			words: "must be the same (trust_domain)",
		},
		"several SVIDs": {
			gives: func(s *site) []*workload.X509SVID {
				return []*workload.X509SVID{s.svid("/ca/symbolon"), s.svid("/other")}
			},
			words: "leave one registration entry",
		},
		"not downstream":      {err: status.Error(codes.PermissionDenied, "caller is not a downstream workload"), words: "spiffe://prod.example/ca/symbolon, must be made with -downstream"},
		"no certificate":      {spoil: func(r *svidv1.NewDownstreamX509CAResponse) { r.CaCertChain = nil }, words: "0 certificates"},
		"too many":            {spoil: func(r *svidv1.NewDownstreamX509CAResponse) { r.CaCertChain = make([][]byte, maxChain+1) }, words: "certificates, want 1 to"},
		"too many roots":      {spoil: func(r *svidv1.NewDownstreamX509CAResponse) { r.X509Authorities = make([][]byte, 1000) }, words: "1000 certificates"},
		"garbage":             {spoil: func(r *svidv1.NewDownstreamX509CAResponse) { r.CaCertChain[0] = []byte("x") }, words: "cannot be used"},
		"a large certificate": {spoil: func(r *svidv1.NewDownstreamX509CAResponse) { r.CaCertChain[0] = make([]byte, maxCertificate+1) }, words: "bytes, at most"},
		"a large answer":      {spoil: func(r *svidv1.NewDownstreamX509CAResponse) { r.CaCertChain[0] = make([]byte, 2*maxAnswer) }, words: "ResourceExhausted"},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.path == "" {
				tc.path = "/spire/server"
			}
			s := newSite(t, tc.by, tc.path)
			good := s.answer
			s.answer = func(csr *x509.CertificateRequest) (*svidv1.NewDownstreamX509CAResponse, error) {
				r, err := good(csr)
				if tc.spoil != nil {
					tc.spoil(r)
				}
				if tc.err != nil {
					return nil, tc.err
				}
				return r, err
			}
			gives := []*workload.X509SVID{s.svid("/ca/symbolon")}
			wait := patience
			if tc.gives != nil {
				gives, wait = tc.gives(s), 2*time.Second
			}
			s.give(gives...)
			chain, _, err := s.ask(s.open(), wait)
			if err == nil || !strings.Contains(err.Error(), tc.words) {
				t.Errorf("%d certificates, error %v; want %q in it", len(chain), err, tc.words)
			}
		})
	}
}
