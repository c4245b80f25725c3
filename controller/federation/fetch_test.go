package federation_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/controller/federation"
	"github.com/symbolon/symbolon/identity"
)

var partner = spiffeid.RequireTrustDomainFromString("partner.example")

// authority is a root with its key.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, td spiffeid.TrustDomain) *authority {
	t.Helper()
	a := &authority{t: t}
	a.cert, a.key = a.sign(&x509.Certificate{
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{td.ID().URL()},
	})
	return a
}

func (a *authority) sign(c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	c.SerialNumber, c.NotBefore, c.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

// svid is a server certificate for an ID.
func (a *authority) svid(id string) tls.Certificate {
	cert, key := a.sign(&x509.Certificate{
		KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{spiffeid.RequireFromString(id).URL()},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

func (a *authority) bundle(td spiffeid.TrustDomain) *spiffebundle.Bundle {
	return spiffebundle.FromX509Authorities(td, []*x509.Certificate{a.cert})
}

func (a *authority) json() []byte {
	data, err := a.bundle(partner).Marshal()
	if err != nil {
		a.t.Fatal(err)
	}
	return data
}

func serve(t *testing.T, certificate *tls.Certificate, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	if certificate != nil {
		s.TLS = &tls.Config{Certificates: []tls.Certificate{*certificate}}
	}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func webRoots(s *httptest.Server) *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(s.Certificate())
	return pool
}

const server = "spiffe://partner.example/spire/server"

func TestFetchByEitherProfile(t *testing.T) {
	ca := newAuthority(t, partner)
	answer := func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(ca.json()) }

	web := serve(t, nil, answer)
	b, err := federation.Fetch(t.Context(), federation.Endpoint{TrustDomain: partner, URL: web.URL}, nil, webRoots(web))
	if err != nil || !b.HasX509Authority(ca.cert) {
		t.Errorf("https_web: %v, %v", b, err)
	}
	svid := ca.svid(server)
	spiffe := serve(t, &svid, answer)
	e := federation.Endpoint{TrustDomain: partner, URL: spiffe.URL, ID: spiffeid.RequireFromString(server)}
	b, err = federation.Fetch(t.Context(), e, ca.bundle(partner), nil)
	if err != nil || !b.HasX509Authority(ca.cert) {
		t.Errorf("https_spiffe: %v, %v", b, err)
	}
}

// TestAStrangersEndpoint: whoever answers in the endpoint's place is not believed.
func TestAStrangersEndpoint(t *testing.T) {
	ca, forger := newAuthority(t, partner), newAuthority(t, partner)
	other := newAuthority(t, spiffeid.RequireTrustDomainFromString("other.example"))
	var asked atomic.Int32
	answer := func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		_, _ = w.Write(ca.json())
	}
	for name, svid := range map[string]tls.Certificate{
		"signed by somebody else":         forger.svid(server),
		"another workload of the domain":  ca.svid("spiffe://partner.example/web"),
		"of another domain, by its own":   other.svid("spiffe://other.example/spire/server"),
		"the right name by another's CA":  other.svid(server),
		"another's name by the right CA":  ca.svid("spiffe://other.example/spire/server"),
		"the name with something behind":  ca.svid(server + "/x"),
		"the domain in other's namespace": ca.svid("spiffe://partner.example.other.example/spire/server"),
	} {
		s := serve(t, &svid, answer)
		e := federation.Endpoint{TrustDomain: partner, URL: s.URL, ID: spiffeid.RequireFromString(server)}
		if _, err := federation.Fetch(t.Context(), e, ca.bundle(partner), nil); !errors.Is(err, federation.ErrEndpoint) {
			t.Errorf("https_spiffe, %s: %v", name, err)
		}
		// The web's roots do not speak for an endpoint with an ID.
		if _, err := federation.Fetch(t.Context(), e, nil, webRoots(s)); !errors.Is(err, federation.ErrEndpoint) {
			t.Errorf("https_spiffe without a bundle, %s: %v", name, err)
		}
	}
	web := serve(t, nil, answer)
	e := federation.Endpoint{TrustDomain: partner, URL: web.URL}
	if _, err := federation.Fetch(t.Context(), e, ca.bundle(partner), x509.NewCertPool()); !errors.Is(err, federation.ErrEndpoint) {
		t.Errorf("https_web by an unknown CA: %v", err)
	}
	// Nor does the domain's bundle speak for one of the web.
	svid := ca.svid(server)
	s := serve(t, &svid, answer)
	if _, err := federation.Fetch(t.Context(), federation.Endpoint{TrustDomain: partner, URL: s.URL}, ca.bundle(partner), x509.NewCertPool()); !errors.Is(err, federation.ErrEndpoint) {
		t.Errorf("https_web by an SVID: %v", err)
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("%d strangers were asked for something", n)
	}
}

// TestAnAnswerIsBounded: what the right endpoint answers is a stranger's all the same.
func TestAnAnswerIsBounded(t *testing.T) {
	ca := newAuthority(t, partner)
	var inner atomic.Int32
	internal := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { inner.Add(1) }))
	defer internal.Close()
	const secret = "s3cret-of-somebody"
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		want   string
		is     error
	}{
		"a redirect to the inside": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, internal.URL+"/latest/meta-data/"+secret, http.StatusFound)
		}, "redirects (status 302)", federation.ErrEndpoint},
		"a redirect with a bundle": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", internal.URL)
			w.WriteHeader(http.StatusMovedPermanently)
			_, _ = w.Write(ca.json())
		}, "redirects (status 301)", federation.ErrEndpoint},
		"an error with a bundle": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
			_, _ = w.Write(ca.json())
		}, "status 500", federation.ErrEndpoint},
		"without an end": {func(w http.ResponseWriter, _ *http.Request) {
			for range 1000 {
				if _, err := w.Write(bytes.Repeat([]byte(" "), 64<<10)); err != nil {
					return
				}
			}
		}, "larger than 64 KiB", identity.ErrMalformedBundle},
		"headers without an end": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Long", strings.Repeat("x", 1<<20))
			_, _ = w.Write(ca.json())
		}, "bundle endpoint", federation.ErrEndpoint},
		"something else": {func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>"+secret) },
			"not a JWK set", identity.ErrMalformedBundle},
		"another domain's": {func(w http.ResponseWriter, _ *http.Request) {
			data, _ := newAuthority(t, spiffeid.RequireTrustDomainFromString("other.example")).bundle(partner).Marshal()
			_, _ = w.Write(data)
		}, "of other.example", identity.ErrMalformedBundle},
	} {
		s := serve(t, nil, c.answer)
		_, err := federation.Fetch(t.Context(), federation.Endpoint{TrustDomain: partner, URL: s.URL}, nil, webRoots(s))
		if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && (strings.Contains(err.Error(), secret) || len(err.Error()) > 500) {
			t.Errorf("%s: the error repeats the answer: %v", name, err)
		}
	}
	if n := inner.Load(); n != 0 {
		t.Errorf("a redirect was followed %d times", n)
	}
}

func TestAFetchEndsWithItsContext(t *testing.T) {
	arrived := make(chan struct{})
	s := serve(t, nil, func(_ http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-r.Context().Done()
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-arrived
		cancel()
	}()
	if _, err := federation.Fetch(ctx, federation.Endpoint{TrustDomain: partner, URL: s.URL}, nil, webRoots(s)); !errors.Is(err, federation.ErrEndpoint) {
		t.Error(err)
	}
}

func TestPace(t *testing.T) {
	b := spiffebundle.New(partner)
	for hint, want := range map[time.Duration]time.Duration{
		0: federation.DefaultRefresh, -time.Hour: federation.DefaultRefresh, time.Nanosecond: 30 * time.Second,
		time.Hour: time.Hour, 1 << 62: 24 * time.Hour,
	} {
		b.SetRefreshHint(hint)
		if got := federation.RefreshAfter(b); got != want {
			t.Errorf("a hint of %v: %v, want %v", hint, got, want)
		}
	}
	b.ClearRefreshHint()
	if got := federation.RefreshAfter(b); got != federation.DefaultRefresh {
		t.Errorf("no hint: %v", got)
	}
	for _, n := range []int{1, 2, 10, 1000} {
		if got := federation.RetryAfter(n); got < time.Second || got > 5*time.Minute {
			t.Errorf("after %d failures: %v", n, got)
		}
	}
}
