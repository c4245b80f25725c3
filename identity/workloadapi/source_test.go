package workloadapi

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
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
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/symbolon/symbolon/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 60 * time.Second

// root is the CA of a trust domain.
type root struct {
	td   string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func certificate(t *testing.T, tmpl, parent *x509.Certificate, pub any, by *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	tmpl.SerialNumber, tmpl.NotBefore, tmpl.NotAfter, tmpl.BasicConstraintsValid = serial, time.Now().Add(-time.Minute), time.Now().Add(time.Hour), true
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, by)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newRoot(t *testing.T, td string) *root {
	t.Helper()
	key := newKey(t)
	tmpl := &x509.Certificate{URIs: []*url.URL{{Scheme: "spiffe", Host: td}}, IsCA: true, KeyUsage: x509.KeyUsageCertSign}
	return &root{td, certificate(t, tmpl, tmpl, key.Public(), key), key}
}

func (r *root) svid(t *testing.T, path, hint string) *workload.X509SVID {
	t.Helper()
	key := newKey(t)
	leaf := certificate(t, &x509.Certificate{
		URIs: []*url.URL{{Scheme: "spiffe", Host: r.td, Path: path}}, KeyUsage: x509.KeyUsageDigitalSignature,
	}, r.cert, key.Public(), r.key)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return &workload.X509SVID{SpiffeId: "spiffe://" + r.td + path, X509Svid: leaf.Raw, X509SvidKey: private, Bundle: r.cert.Raw, Hint: hint}
}

// fakeAPI is a Workload API on a Unix socket.
type fakeAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	address string

	mu      sync.Mutex
	says    *workload.X509SVIDResponse
	refuse  codes.Code
	changed chan struct{}
}

func newAPI(t *testing.T) *fakeAPI {
	t.Helper()
	path := filepath.Join(t.TempDir(), "api.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	a := &fakeAPI{address: "unix://" + path, changed: make(chan struct{}), refuse: codes.PermissionDenied}
	s := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(s, a)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	return a
}

// say changes the answer; nil: it refuses.
func (a *fakeAPI) say(m *workload.X509SVIDResponse) {
	if m == nil {
		a.fail(codes.PermissionDenied)
		return
	}
	a.answer(m, codes.OK)
}

// fail answers with an error from now on.
func (a *fakeAPI) fail(code codes.Code) { a.answer(nil, code) }

func (a *fakeAPI) answer(m *workload.X509SVIDResponse, code codes.Code) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.says, a.refuse = m, code
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *fakeAPI) FetchX509SVID(_ *workload.X509SVIDRequest, s grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	for {
		a.mu.Lock()
		m, refuse, changed := a.says, a.refuse, a.changed
		a.mu.Unlock()
		if refuse != codes.OK {
			return status.Error(refuse, "no identity issued")
		}
		if err := s.Send(m); err != nil {
			return err
		}
		select {
		case <-s.Context().Done():
			return s.Context().Err()
		case <-changed:
		}
	}
}

func sourceOf(t *testing.T, a *fakeAPI, rule Rule) *Source {
	t.Helper()
	s, err := New(Options{Controller: spiffeid.RequireTrustDomainFromString("controller.example"), Address: a.address, Rule: rule})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func watched(t *testing.T, s *Source, uid uint32) <-chan identity.Update {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	out := s.Watch(ctx, &identity.Workload{Key: identity.Key{UID: uid}})
	t.Cleanup(func() {
		cancel()
		for range out { // until it is closed
		}
	})
	return out
}

func until(t *testing.T, updates <-chan identity.Update, what string, want func(identity.Update) bool) identity.Update {
	t.Helper()
	deadline := time.After(patience)
	var last identity.Update
	for {
		select {
		case u := <-updates:
			if want(u) {
				return u
			}
			last = u
		case <-deadline:
			t.Fatalf("never %s; last %v, %v", what, last.Credential, last.Err)
		}
	}
}

func is(id string) func(identity.Update) bool {
	return func(u identity.Update) bool {
		return u.Err == nil && u.Credential != nil && u.Credential.SVID.ID.String() == id
	}
}

func refused(words ...string) func(identity.Update) bool {
	return func(u identity.Update) bool {
		if u.Credential != nil || !errors.Is(u.Err, identity.ErrWithdrawn) {
			return false
		}
		for _, w := range words {
			if !strings.Contains(u.Err.Error(), w) {
				return false
			}
		}
		return true
	}
}

// An agent that has no entry for the proxy keeps nobody waiting; when it has one, all
// workloads have that identity; when it has none again, nobody has. One that does not
// answer takes nothing away.
func TestOneIdentityForAll(t *testing.T) {
	site, partner, ours := newRoot(t, "site.example"), newRoot(t, "partner.example"), newRoot(t, "controller.example")
	a := newAPI(t)
	s := sourceOf(t, a, Rule{})
	s.SetBundle(spiffeid.RequireTrustDomainFromString("controller.example"), []*x509.Certificate{ours.cert})
	one, two := watched(t, s, 1), watched(t, s, 2)
	until(t, one, "it says why there is none", refused("PermissionDenied", "registration entry"))
	a.say(&workload.X509SVIDResponse{
		Svids: []*workload.X509SVID{site.svid(t, "/host", "")}, FederatedBundles: map[string][]byte{"spiffe://partner.example": partner.cert.Raw},
	})
	u := until(t, one, "an SVID", is("spiffe://site.example/host"))
	if v := until(t, two, "the same", is("spiffe://site.example/host")); v.Credential.SVID != u.Credential.SVID {
		t.Error("another SVID")
	}
	if n := u.Credential.Bundles.Len(); n != 3 {
		t.Errorf("%d bundles, want the agent's, its federation's and the controller's", n)
	}
	a.say(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{site.svid(t, "/host", "")}})
	if v := until(t, one, "a renewal", is("spiffe://site.example/host")); v.Credential == u.Credential || v.Credential.Bundles.Len() != 2 {
		t.Error("what was renewed is as before")
	}
	// What it says now holds when it cannot be reached any more: it has taken nothing back.
	a.say(nil)
	until(t, one, "it has none again", refused("PermissionDenied", "registration entry"))
	a.fail(codes.Unavailable)
	until(t, watched(t, s, 3), "nobody has one", refused("PermissionDenied"))
	if st := s.Status(); st.SPIFFEID != "" || st.Error == "" {
		t.Errorf("%+v", st)
	}
	a.say(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{site.svid(t, "/host", "")}})
	until(t, one, "it has one again", is("spiffe://site.example/host"))
	answers := s.Status().Since
	a.fail(codes.Unavailable)
	v := until(t, one, "why there is no newer", func(u identity.Update) bool { return u.Err != nil })
	if v.Credential == nil || errors.Is(v.Err, identity.ErrWithdrawn) {
		t.Errorf("what there was is taken away: %v", v.Err)
	}
	if st := s.Status(); st.SPIFFEID != "spiffe://site.example/host" || st.Error == "" || answers.IsZero() || !st.Since.After(answers) {
		t.Errorf("%+v", st)
	}
}

func TestSeveral(t *testing.T) {
	site := newRoot(t, "site.example")
	a := newAPI(t)
	a.say(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{site.svid(t, "/a", "x"), site.svid(t, "/b", "y")}})
	until(t, watched(t, sourceOf(t, a, Rule{}), 1), "it cannot choose", refused("spiffe://site.example/a", "spiffe://site.example/b", "identity.spire.hint"))
	until(t, watched(t, sourceOf(t, a, Rule{Hint: "y"}), 1), "it chooses", is("spiffe://site.example/b"))
}

// The controller's CA must not name workloads of the agent's trust domain.
func TestControllersDomain(t *testing.T) {
	site, ours := newRoot(t, "controller.example"), newRoot(t, "controller.example")
	a := newAPI(t)
	a.say(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{site.svid(t, "/host", "")}})
	s := sourceOf(t, a, Rule{})
	s.SetBundle(spiffeid.RequireTrustDomainFromString("controller.example"), []*x509.Certificate{ours.cert})
	until(t, watched(t, s, 1), "it is refused", refused("another trust_domain"))
}

// What an earlier run left bridges the time until the agent answers, and no longer: not
// even when an agent that has said that there is none cannot be reached any more. Foreign
// bundles of then are not believed.
func TestRestored(t *testing.T) {
	site, partner := newRoot(t, "site.example"), newRoot(t, "partner.example")
	a := newAPI(t)
	a.say(&workload.X509SVIDResponse{
		Svids: []*workload.X509SVID{site.svid(t, "/host", "")}, FederatedBundles: map[string][]byte{"spiffe://partner.example": partner.cert.Raw},
	})
	m := identity.NewManager(sourceOf(t, a, Rule{}))
	if _, err := m.Get(t.Context(), &identity.Workload{Key: identity.Key{UID: 1}}); err != nil {
		t.Fatal(err)
	}
	kept := m.Keep()
	m.Close()
	a.fail(codes.Unavailable)
	s := sourceOf(t, a, Rule{})
	s.Restore(kept)
	one := watched(t, s, 1)
	u := until(t, one, "its own of before", func(u identity.Update) bool {
		return u.Credential != nil && u.Credential.SVID.ID == kept[0].SVID.ID
	})
	if n := u.Credential.Bundles.Len(); n != 1 {
		t.Errorf("%d bundles of before are believed, want its own", n)
	}
	until(t, watched(t, s, 2), "another has none", refused())
	a.say(nil)
	until(t, one, "the agent has none", refused("PermissionDenied"))
	a.fail(codes.Unavailable)
	// What ends the wait: a change that has it judged anew.
	s.SetBundle(spiffeid.RequireTrustDomainFromString("controller.example"), []*x509.Certificate{newRoot(t, "controller.example").cert})
	if u := until(t, one, "it is judged again", func(identity.Update) bool { return true }); u.Credential != nil {
		t.Error("what the agent has withdrawn is back")
	}
}
