package spire

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"sync"
	"testing"
	"time"

	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// root is the CA of a trust domain.
type root struct {
	t    *testing.T
	td   string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newRoot(t *testing.T, td string) *root {
	t.Helper()
	key := newKey(t)
	tmpl := &x509.Certificate{
		Subject: pkix.Name{CommonName: td}, URIs: []*url.URL{{Scheme: "spiffe", Host: td}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	return &root{t, td, create(t, tmpl, tmpl, key, key), key}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func create(t *testing.T, tmpl, parent *x509.Certificate, of, by *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	tmpl.SerialNumber = serial
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, of.Public(), by)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// svid is an SVID for path as the agent sends it.
func (r *root) svid(path, hint string) *delegatedidentityv1.X509SVIDWithKey {
	r.t.Helper()
	key := newKey(r.t)
	leaf := create(r.t, &x509.Certificate{
		URIs:      []*url.URL{{Scheme: "spiffe", Host: r.td, Path: path}},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, r.cert, key, r.key)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		r.t.Fatal(err)
	}
	return &delegatedidentityv1.X509SVIDWithKey{
		X509Svid: &types.X509SVID{
			CertChain: [][]byte{leaf.Raw}, Id: &types.SPIFFEID{TrustDomain: r.td, Path: path}, ExpiresAt: leaf.NotAfter.Unix(), Hint: hint,
		},
		X509SvidKey: private,
	}
}

type svids = delegatedidentityv1.SubscribeToX509SVIDsResponse

// one is an answer with one SVID.
func one(s ...*delegatedidentityv1.X509SVIDWithKey) *svids { return &svids{X509Svids: s} }

// testAgent is an agent's Delegated Identity API on a Unix socket: the real protocol, with
// answers by the test.
type testAgent struct {
	delegatedidentityv1.UnimplementedDelegatedIdentityServer
	t      *testing.T
	socket string

	mu      sync.Mutex
	server  *grpc.Server
	changed chan struct{}
	// attest is asked once for each subscription, in the moment of attestation.
	attest func(pid int) *svids
	// sends replaces what a subscription is told, by PID.
	sends   map[int]*svids
	bundles map[string][]byte
	refuse  codes.Code
	asked   map[int]int
}

func newTestAgent(t *testing.T, roots ...*root) *testAgent {
	t.Helper()
	a := &testAgent{
		t: t, socket: filepath.Join(t.TempDir(), "admin.sock"), changed: make(chan struct{}),
		sends: make(map[int]*svids), bundles: make(map[string][]byte), asked: make(map[int]int),
	}
	for _, r := range roots {
		a.bundles["spiffe://"+r.td] = r.cert.Raw
	}
	a.start()
	t.Cleanup(a.stop)
	return a
}

func (a *testAgent) start() {
	l, err := net.Listen("unix", a.socket)
	if err != nil {
		a.t.Fatal(err)
	}
	s := grpc.NewServer()
	delegatedidentityv1.RegisterDelegatedIdentityServer(s, a)
	a.mu.Lock()
	a.server = s
	a.mu.Unlock()
	go func() { _ = s.Serve(l) }()
}

func (a *testAgent) stop() {
	a.mu.Lock()
	s := a.server
	a.mu.Unlock()
	s.Stop()
}

// change changes what is told, and tells it.
func (a *testAgent) change(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *testAgent) count(pid int) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.asked[pid]
}

func (a *testAgent) now() (chan struct{}, codes.Code) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.changed, a.refuse
}

func (a *testAgent) SubscribeToX509SVIDs(r *delegatedidentityv1.SubscribeToX509SVIDsRequest, s grpc.ServerStreamingServer[svids]) error {
	pid := int(r.GetPid())
	a.mu.Lock()
	a.asked[pid]++
	attest := a.attest
	a.mu.Unlock()
	var told *svids
	if attest != nil {
		told = attest(pid)
	}
	for first := true; ; first = false {
		changed, refuse := a.now()
		if refuse != codes.OK {
			return status.Error(refuse, "no identity issued")
		}
		next := told
		if attest == nil {
			a.mu.Lock()
			next = a.sends[pid]
			a.mu.Unlock()
		}
		if next == nil {
			next = &svids{}
		}
		if first || attest == nil {
			if err := s.Send(next); err != nil {
				return err
			}
		}
		if err := wait(s.Context(), changed); err != nil {
			return err
		}
	}
}

func (a *testAgent) SubscribeToX509Bundles(_ *delegatedidentityv1.SubscribeToX509BundlesRequest, s grpc.ServerStreamingServer[delegatedidentityv1.SubscribeToX509BundlesResponse]) error {
	for {
		changed, refuse := a.now()
		if refuse != codes.OK {
			return status.Error(refuse, "no identity issued")
		}
		a.mu.Lock()
		m := &delegatedidentityv1.SubscribeToX509BundlesResponse{CaCertificates: make(map[string][]byte)}
		for k, v := range a.bundles {
			m.CaCertificates[k] = v
		}
		a.mu.Unlock()
		if err := s.Send(m); err != nil {
			return err
		}
		if err := wait(s.Context(), changed); err != nil {
			return err
		}
	}
}

func wait(ctx context.Context, changed <-chan struct{}) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-changed:
		return nil
	}
}
