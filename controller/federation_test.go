package controller_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// webFiles is a certificate for 127.0.0.1 and its key, which is its own CA, as files.
func webFiles(t *testing.T) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for file, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: pkcs8}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

func (w *world) trustDomains() *symbolonv1.ListTrustDomainsResponse {
	w.t.Helper()
	res, err := w.admin().ListTrustDomains(w.t.Context(), connect.NewRequest(&symbolonv1.ListTrustDomainsRequest{}))
	if err != nil {
		w.t.Fatal(err)
	}
	return res.Msg
}

func (w *world) refresh(name string) (*symbolonv1.TrustDomainStatus, error) {
	w.t.Helper()
	res, err := w.admin().RefreshTrustDomain(w.t.Context(), connect.NewRequest(&symbolonv1.RefreshTrustDomainRequest{Name: name}))
	if err != nil {
		return nil, err
	}
	return res.Msg.GetTrustDomain(), nil
}

// bundles waits for a generation with so many foreign roots.
func (s *session) bundles(domain string, roots int) *symbolonv1.Generation {
	s.t.Helper()
	for {
		g := s.generation()
		s.ack(g.GetNumber(), "")
		n := 0
		for _, b := range g.GetBundles() {
			if b.GetTrustDomain() == domain {
				n = len(b.GetRoots())
			}
		}
		if n == roots {
			return g
		}
	}
}

// TestTwoControllersFederate: each serves its bundle and has the other's, one by
// https_spiffe, one by https_web; what they have outlives both.
func TestTwoControllersFederate(t *testing.T) {
	cert, key := webFiles(t)
	ours := newWorld(t, func(w *world) {
		w.cfg.Federation.Listen, w.cfg.Federation.WebCAFile = "127.0.0.1:0", cert
	})
	theirs := newWorld(t, func(w *world) {
		w.cfg.TrustDomain = "partner.example"
		f := &w.cfg.Federation
		f.Listen, f.Profile, f.CertFile, f.KeyFile, f.RefreshHint = "127.0.0.1:0", "https_web", cert, key, time.Hour
	})
	host := ours.enrol("/", nil).open(t, &symbolonv1.Hello{})
	host.bundles("partner.example", 0)

	ours.apply("kind: TrustDomain\nnamespace: /\nname: partner.example\nprofile: https_web\nclaims: [app]\nendpoint: " +
		theirs.trustDomains().GetOwn().GetEndpoint())
	d, err := ours.refresh("partner.example")
	if err != nil {
		t.Fatal(err)
	}
	if d.GetRoots() != 1 || d.GetSequence() == 0 || d.GetRefreshHint().AsDuration() != time.Hour || d.GetFetched() == nil || d.GetError() != "" {
		t.Errorf("https_web: %v", d)
	}
	host.bundles("partner.example", 1)

	own := ours.trustDomains().GetOwn()
	theirs.apply(fmt.Sprintf("kind: TrustDomain\nnamespace: /\nname: acme.example\nprofile: https_spiffe\nendpoint: %s\nendpoint_id: %s\nbundle: |\n  %s\n",
		own.GetEndpoint(), own.GetEndpointId(), own.GetBundle()))
	d, err = theirs.refresh("acme.example")
	if err != nil {
		t.Fatal(err)
	}
	if d.GetRoots() != 1 || d.GetSequence() != own.GetSequence() || d.GetBundle() != own.GetBundle() {
		t.Errorf("https_spiffe: %v, want %v", d, own)
	}

	// The partner is away: the error shows, its bundle stays, over a restart as well.
	before := ours.trustDomains().GetTrustDomains()[0]
	theirs.halt()
	if _, err := ours.refresh("partner.example"); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("refresh while it is away: %v", err)
	}
	after := ours.trustDomains().GetTrustDomains()[0]
	if after.GetError() == "" || after.GetFailingSince() == nil || after.GetBundle() != before.GetBundle() || !after.GetFetched().AsTime().Equal(before.GetFetched().AsTime()) {
		t.Errorf("while it is away: %v", after)
	}
	ours.halt()
	ours.start()
	after = ours.trustDomains().GetTrustDomains()[0]
	if after.GetBundle() != before.GetBundle() || !after.GetFetched().AsTime().Equal(before.GetFetched().AsTime()) {
		t.Errorf("after a restart: %v", after)
	}
	if now := ours.trustDomains().GetOwn().GetSequence(); now != own.GetSequence() {
		t.Errorf("the same bundle has sequence number %d, and had %d", now, own.GetSequence())
	}
	host = ours.enrol("/", nil).open(t, &symbolonv1.Hello{})
	host.bundles("partner.example", 1)

	// Its TrustDomain gone, nobody of it is believed; come back, it starts from nothing.
	_, err = ours.admin().Delete(t.Context(), connect.NewRequest(&symbolonv1.DeleteRequest{
		Keys: []*symbolonv1.ResourceKey{{Kind: "TrustDomain", Namespace: "/", Name: "partner.example"}},
	}))
	if err != nil {
		t.Fatal(err)
	}
	host.bundles("partner.example", 0)
	ours.apply("kind: TrustDomain\nnamespace: /\nname: partner.example\nclaims: [app]\n")
	if d := ours.trustDomains().GetTrustDomains()[0]; d.GetRoots() != 0 || d.GetFetched() != nil {
		t.Errorf("a TrustDomain that came back has %v", d)
	}
}

// TestTheEndpointIsOfSPIFFEsForm: go-spiffe's own client reads it.
func TestTheEndpointIsOfSPIFFEsForm(t *testing.T) {
	w := newWorld(t, func(w *world) { w.cfg.Federation.Listen = "127.0.0.1:0" })
	own := w.trustDomains().GetOwn()
	td := spiffeid.RequireTrustDomainFromString("acme.example")
	known, err := spiffebundle.Parse(td, []byte(own.GetBundle()))
	if err != nil {
		t.Fatal(err)
	}
	b, err := federation.FetchBundle(t.Context(), td, own.GetEndpoint(), federation.WithSPIFFEAuth(known, spiffeid.RequireFromString(own.GetEndpointId())))
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	if err != nil || !b.Equal(known) {
		t.Fatalf("%v, %v", b, err)
	}
	if hint, ok := b.RefreshHint(); !ok || hint != 5*time.Minute {
		t.Errorf("refresh hint %v", hint)
	}
}

// endpoint is a partner's, whose answer a test chooses.
type endpoint struct {
	*httptest.Server
	answer atomic.Pointer[string]
}

func newEndpoint(t *testing.T) (*endpoint, string) {
	t.Helper()
	e := &endpoint{}
	e.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, *e.answer.Load())
	}))
	e.Config.ErrorLog = log.New(io.Discard, "", 0)
	e.StartTLS()
	t.Cleanup(e.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: e.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return e, ca
}

// says makes it answer with roots.
func (e *endpoint) says(t *testing.T, roots ...*x509.Certificate) {
	t.Helper()
	data, err := spiffebundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString("partner.example"), roots).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	e.answer.Store(&text)
}

func webRoot(t *testing.T) *x509.Certificate {
	t.Helper()
	file, _ := webFiles(t)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(data)
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestARootThatChangesReachesTheHosts: without a generation of its own, so that a partner
// cannot push our policy's history out; what is no bundle changes nothing.
func TestARootThatChangesReachesTheHosts(t *testing.T) {
	e, ca := newEndpoint(t)
	first, second := webRoot(t), webRoot(t)
	e.says(t, first)
	w := newWorld(t, func(w *world) { w.cfg.Federation.WebCAFile = ca })
	w.apply("kind: TrustDomain\nnamespace: /\nname: partner.example\nprofile: https_web\nendpoint: " + e.URL)
	host := w.enrol("/", nil).open(t, &symbolonv1.Hello{})
	g := host.bundles("partner.example", 1)

	e.says(t, first, second)
	if _, err := w.refresh("partner.example"); err != nil {
		t.Fatal(err)
	}
	if both := host.bundles("partner.example", 2); both.GetNumber() != g.GetNumber() {
		t.Errorf("generation %d has become %d", g.GetNumber(), both.GetNumber())
	}
	e.says(t, second)
	if _, err := w.refresh("partner.example"); err != nil {
		t.Fatal(err)
	}
	last := host.bundles("partner.example", 1)
	if string(last.GetBundles()[0].GetRoots()[0]) != string(second.Raw) {
		t.Error("the root that was withdrawn is still there")
	}
	for _, bad := range []string{"", "{}", `{"keys":[]}`, strings.Repeat(" ", identity.MaxBundleSize+1)} {
		e.answer.Store(&bad)
		if _, err := w.refresh("partner.example"); err == nil {
			t.Errorf("%.10q is a bundle", bad)
		}
	}
	if d := w.trustDomains().GetTrustDomains()[0]; d.GetRoots() != 1 || !strings.Contains(d.GetError(), "malformed") {
		t.Errorf("after answers that are none: %v", d)
	}
	// A bundle that an operator writes counts more than what was fetched.
	e.says(t, first, second)
	data, _ := spiffebundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString("partner.example"), []*x509.Certificate{first, second}).Marshal()
	w.apply("kind: TrustDomain\nnamespace: /\nname: partner.example\nbundle: |\n  " + string(data))
	host.bundles("partner.example", 2)
}

func TestFederationConfig(t *testing.T) {
	for text, want := range map[string]string{
		"federation: {listen: here}":                                "federation.listen",
		"federation: {profile: https}":                              "use https_spiffe or https_web",
		"federation: {profile: https_web}":                          "there is no endpoint to serve by it",
		"federation: {listen: 127.0.0.1:1, profile: https_web}":     "needs a certificate and its key",
		"federation: {listen: 127.0.0.1:1, cert_file: /a}":          "the endpoint has an SVID",
		"federation: {refresh_hint: 1s}":                            "use 10s to 24h",
		"federation: {refresh_hint: 10500ms}":                       "not in whole seconds",
		"federation: {web_ca_file: ca.pem}":                         "not an absolute path",
		"federation: {listne: 127.0.0.1:1}":                         "listne",
		"federation: {listen: 127.0.0.1:1, web_ca_file: /dev/null}": "",
	} {
		_, err := load(t, "trust_domain: acme.example\n"+text+"\n", nil, nil)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v", text, err)
		}
	}
}
