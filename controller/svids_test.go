package controller_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/enrol"
	"github.com/symbolon/symbolon/identity"
)

// principal verifies an issued SVID as a peer would.
func principal(t *testing.T, h *enrol.HostCredential, svid *symbolonv1.IssuedSVID) identity.Principal {
	t.Helper()
	var chain []*x509.Certificate
	for _, der := range svid.GetChain() {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, cert)
	}
	p, err := identity.Verify(chain, x509bundle.FromX509Authorities(h.TrustDomain, h.Roots), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestIssueSVIDGivesClaimsByProfile(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	h := w.enrol("/acme/prod", map[string]string{"role": "db"})
	for name, test := range map[string]struct {
		reported []string
		path     string
		claims   map[string][]string
		profiles []string
	}{
		"by executable and host": {
			reported: []string{"proc.exe", "/usr/bin/postgres", "os.user", "postgres"},
			path:     "/acme/prod/payments-db",
			claims:   map[string][]string{"app": {"db"}, "env": {"prod"}, "host.id": {h.HostID}, "host.role": {"db"}, "os.user": {"postgres"}},
			profiles: []string{"/acme/prod/db"},
		},
		"claims by the profile": {
			reported: []string{"proc.exe", "/usr/sbin/nginx", "os.user", "www-data"},
			path:     "/acme/prod/web",
			claims:   map[string][]string{"app": {"web"}, "env": {"prod"}, "proc.exe": {"/usr/sbin/nginx"}},
			profiles: []string{"/acme/prod/web"},
		},
		"no profile": {
			reported: []string{"proc.exe", "/opt/x", "proc.unit", "thing.service"},
			path:     "/acme/prod/unprofiled.thing.service",
			claims:   map[string][]string{"host.id": {h.HostID}, "host.role": {"db"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			key, der := csr(t)
			res, err := h.IssueSVID(t.Context(), connect.NewRequest(&symbolonv1.IssueSVIDRequest{Csr: der, Attributes: attributes(test.reported...)}))
			if err != nil {
				t.Fatal(err)
			}
			p := principal(t, h.HostCredential, res.Msg.GetSvid())
			claims := p.Attributes.Filter(func(k string) bool { return !strings.HasPrefix(k, "spiffe.") })
			if diff := cmp.Diff(identity.NewAttributes(test.claims), claims); diff != "" {
				t.Error(diff)
			}
			if p.ID.Path() != test.path || p.ID.Path() != res.Msg.GetNamespace()+"/"+res.Msg.GetWorkload() {
				t.Errorf("path %s, namespace %s, workload %s; want %s", p.ID.Path(), res.Msg.GetNamespace(), res.Msg.GetWorkload(), test.path)
			}
			if !slices.Equal(res.Msg.GetProfiles(), test.profiles) {
				t.Errorf("profiles %v, want %v", res.Msg.GetProfiles(), test.profiles)
			}
			leaf, _ := x509.ParseCertificate(res.Msg.GetSvid().GetChain()[0])
			if !key.PublicKey.Equal(leaf.PublicKey) {
				t.Error("the certificate is for another key")
			}
			if rotate := res.Msg.GetSvid().GetRotateAt().AsTime(); rotate.Before(time.Now().Add(20*time.Minute)) || rotate.After(leaf.NotAfter) {
				t.Errorf("rotate at %v, valid until %v", rotate, leaf.NotAfter)
			}
		})
	}
}

// TestHostCannotAssert: what a host may not say is refused, by the name of the key.
func TestHostCannotAssert(t *testing.T) {
	w := newWorld(t)
	h := w.enrol("/", map[string]string{"role": "web"})
	for _, key := range []string{"host.role", "host.id", "app", "env", "cloud.zone", "spiffe.id", "os", "os.", "vuln.critical", "Os.user", "procexe"} {
		_, err := h.issue(t.Context(), t, key, "x")
		wantCode(t, err, connect.CodePermissionDenied, key)
	}
	for name, pairs := range map[string][]string{
		"long key":      {"os." + strings.Repeat("k", 200), "v"},
		"long value":    {"os.user", strings.Repeat("v", 2000)},
		"empty value":   {"os.user", ""},
		"escape":        {"os.user", "\x1b[31mroot"},
		"key with =":    {"os.a=b", "v"},
		"newline":       {"proc.exe", "/bin/a\n/bin/b"},
		"spaces in key": {"os.a b", "v"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := h.issue(t.Context(), t, pairs...)
			wantCode(t, err, connect.CodeInvalidArgument)
		})
	}
	var many []string
	for i := range 300 {
		many = append(many, fmt.Sprintf("container.label.%d", i), "v")
	}
	_, err := h.issue(t.Context(), t, many...)
	wantCode(t, err, connect.CodeInvalidArgument, "300")
	_, err = h.IssueSVID(t.Context(), connect.NewRequest(&symbolonv1.IssueSVIDRequest{Csr: []byte("no")}))
	wantCode(t, err, connect.CodeInvalidArgument, "certificate request")
}

func TestTooManyClaimsAreExplained(t *testing.T) {
	w := newWorld(t)
	w.apply(`
kind: Profile
namespace: /
name: greedy
match: {os.user: greedy}
workload: greedy
claims: ["container.*"]
`)
	h := w.enrol("/", nil)
	pairs := []string{"os.user", "greedy"}
	for i := range 65 {
		pairs = append(pairs, fmt.Sprintf("container.label.%02d", i), "v")
	}
	_, err := h.issue(t.Context(), t, pairs...)
	wantCode(t, err, connect.CodeFailedPrecondition, "64", "/greedy")
}

// TestProxyServiceNeedsAHost: nobody else gets a certificate.
func TestProxyServiceNeedsAHost(t *testing.T) {
	w := newWorld(t)
	h := w.enrol("/", nil)
	key, der := csr(t)
	issued, err := h.IssueSVID(t.Context(), connect.NewRequest(&symbolonv1.IssueSVIDRequest{Csr: der, Attributes: attributes("os.user", "x")}))
	if err != nil {
		t.Fatal(err)
	}
	call := func(config *tls.Config) error {
		_, err := w.proxy(config).IssueSVID(t.Context(), connect.NewRequest(&symbolonv1.IssueSVIDRequest{Csr: der}))
		return err
	}
	wantCode(t, call(w.tls()), connect.CodeUnauthenticated, "host SVID")

	workload := w.tls()
	workload.Certificates = []tls.Certificate{{Certificate: issued.Msg.GetSvid().GetChain(), PrivateKey: key}}
	wantCode(t, call(workload), connect.CodePermissionDenied, "is not a host")

	// A certificate that only claims to be the host's does not pass the handshake,
	// where a client does send it, against the server's hint.
	certificate := forge(t, h.Chain[0].URIs[0])
	forged := w.tls()
	forged.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &certificate, nil }
	conn, err := tls.Dial("tcp", w.address(), forged)
	if err != nil {
		t.Fatal(err) // in TLS 1.3 a client is done before it hears of it
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "bad certificate") {
		t.Errorf("with a forged certificate: %v, want it refused", err)
	}
}

func forge(t *testing.T, id *url.URL) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{id},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// TestIssuingIsBoundedPerHost: a host that asks without end is told so, and keeps
// neither itself from renewing nor another host from anything.
func TestIssuingIsBoundedPerHost(t *testing.T) {
	w := newWorld(t)
	greedy, other := w.enrol("/", nil), w.enrol("/", nil)
	_, der := csr(t)
	var mu sync.Mutex
	var refused error
	granted := 0
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 200 {
				// Refused for its request, which costs less than an SVID, and counts.
				_, err := greedy.IssueSVID(t.Context(), connect.NewRequest(&symbolonv1.IssueSVIDRequest{}))
				enough := connect.CodeOf(err) == connect.CodeResourceExhausted
				mu.Lock()
				if enough {
					refused = err
				} else {
					granted++
				}
				mu.Unlock()
				if enough {
					return
				}
			}
		})
	}
	wg.Wait()
	wantCode(t, refused, connect.CodeResourceExhausted, greedy.HostID, "50 SVIDs per second")
	if granted < 500 {
		t.Errorf("%d granted, want a burst of 500", granted)
	}
	if _, err := other.issue(t.Context(), t, "proc.unit", "x.service"); err != nil {
		t.Errorf("another host: %v", err)
	}
	renew := func() error {
		_, err := greedy.RenewHost(t.Context(), connect.NewRequest(&symbolonv1.RenewHostRequest{Csr: der}))
		return err
	}
	if err := renew(); err != nil {
		t.Errorf("its own renewal: %v", err)
	}
	refused = nil
	for n := 0; refused == nil && n < 100; n++ {
		refused = renew()
	}
	wantCode(t, refused, connect.CodeResourceExhausted, "host SVIDs")
}

func TestRemovedHostIsRefused(t *testing.T) {
	w := newWorld(t)
	h := w.enrol("/", nil)
	if _, err := h.issue(t.Context(), t, "os.user", "x"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.admin().RemoveHost(t.Context(), connect.NewRequest(&symbolonv1.RemoveHostRequest{Id: h.HostID})); err != nil {
		t.Fatal(err)
	}
	_, err := h.issue(t.Context(), t, "os.user", "x")
	wantCode(t, err, connect.CodePermissionDenied, "removed")
	_, der := csr(t)
	_, err = h.RenewHost(t.Context(), connect.NewRequest(&symbolonv1.RenewHostRequest{Csr: der}))
	wantCode(t, err, connect.CodePermissionDenied, "removed")
	stream := h.Session(t.Context())
	_ = stream.Send(nil)
	_, err = stream.Receive()
	wantCode(t, err, connect.CodePermissionDenied, "removed")
	_ = stream.CloseRequest()
	_ = stream.CloseResponse()
	_, err = w.admin().RemoveHost(t.Context(), connect.NewRequest(&symbolonv1.RemoveHostRequest{Id: h.HostID}))
	wantCode(t, err, connect.CodeNotFound, h.HostID)
}

func TestIssueConcurrently(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	h := w.enrol("/acme/prod", map[string]string{"role": "db"})
	_, der := csr(t)
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			res, err := h.IssueSVID(t.Context(), connect.NewRequest(&symbolonv1.IssueSVIDRequest{
				Csr: der, Attributes: attributes("proc.unit", fmt.Sprintf("u%d.service", i%50)),
			}))
			if err != nil {
				t.Error(err)
				return
			}
			if want := fmt.Sprintf("unprofiled.u%d.service", i%50); res.Msg.GetWorkload() != want {
				t.Errorf("workload %s, want %s", res.Msg.GetWorkload(), want)
			}
		})
	}
	wg.Wait()
	res, err := w.admin().ListWorkloads(t.Context(), connect.NewRequest(&symbolonv1.ListWorkloadsRequest{Namespace: "/acme"}))
	if err != nil || len(res.Msg.GetWorkloads()) != 50 {
		t.Errorf("%d workloads, %v; want 50", len(res.Msg.GetWorkloads()), err)
	}
}
