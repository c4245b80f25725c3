package ca_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/symbolon/symbolon/controller/ca"
	"github.com/symbolon/symbolon/controller/seal"
	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/identity"
)

// world is a store and a key file, with a clock that the test moves.
type world struct {
	t   *testing.T
	dir string
	now time.Time
	td  spiffeid.TrustDomain
}

func newWorld(t *testing.T, td string) *world {
	return &world{t: t, dir: t.TempDir(), now: time.Now().Truncate(time.Second), td: spiffeid.RequireTrustDomainFromString(td)}
}

func (w *world) config() ca.Config {
	return ca.Config{
		TrustDomain: w.td, KeyFile: filepath.Join(w.dir, "seal.key"),
		TTL: 24 * time.Hour, RotateEvery: 30 * time.Minute,
		Now: func() time.Time { return w.now },
	}
}

func (w *world) try(cfg ca.Config) (*ca.CA, error) {
	w.t.Helper()
	st, err := store.Open(filepath.Join(w.dir, "db"))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = st.Close() })
	c, err := ca.Open(w.t.Context(), st, cfg)
	if err != nil {
		_ = st.Close()
	}
	return c, err
}

func (w *world) open() *ca.CA {
	w.t.Helper()
	c, err := w.try(w.config())
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

func csr(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func ecKey(t *testing.T, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func parse(t *testing.T, chain [][]byte) []*x509.Certificate {
	t.Helper()
	var out []*x509.Certificate
	for _, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, cert)
	}
	return out
}

func TestWorkloadSVIDForm(t *testing.T) {
	w := newWorld(t, "acme.example")
	c := w.open()
	claims := identity.NewAttributes(map[string][]string{"app": {"web"}, "os.user": {"www-data"}})
	id := spiffeid.RequireFromPath(w.td, "/acme/prod/web")
	key := ecKey(t, elliptic.P256())
	issued, err := c.IssueWorkload(key.Public(), id, claims, "h1")
	if err != nil {
		t.Fatal(err)
	}
	chain := parse(t, issued.Chain)
	if len(chain) != 2 {
		t.Fatalf("%d certificates, want leaf and intermediate", len(chain))
	}
	leaf, intermediate := chain[0], chain[1]

	p, err := identity.Verify(chain, c.Bundle(), w.now)
	if err != nil {
		t.Fatal(err)
	}
	want := claims.Union(identity.NewAttributes(map[string][]string{
		"spiffe.id": {id.String()}, "spiffe.trust_domain": {"acme.example"},
	}))
	if diff := cmp.Diff(want, p.Attributes); diff != "" || p.ID != id || p.Namespace != "/acme/prod" || p.Name != "web" {
		t.Errorf("principal %+v\n%s", p, diff)
	}

	if len(leaf.URIs) != 1 || len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 {
		t.Errorf("SANs: %v %v %v", leaf.URIs, leaf.DNSNames, leaf.IPAddresses)
	}
	if leaf.KeyUsage != x509.KeyUsageDigitalSignature || leaf.IsCA || !leaf.BasicConstraintsValid {
		t.Errorf("key usage %b, CA %v", leaf.KeyUsage, leaf.IsCA)
	}
	for _, ext := range leaf.Extensions {
		if ext.Id.String() == "2.5.29.15" && !ext.Critical {
			t.Error("key usage is not critical")
		}
	}
	if diff := cmp.Diff([]x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, leaf.ExtKeyUsage); diff != "" {
		t.Error(diff)
	}
	if !leaf.NotBefore.Equal(w.now.Add(-time.Minute)) || !leaf.NotAfter.Equal(w.now.Add(24*time.Hour)) {
		t.Errorf("valid %v to %v at %v", leaf.NotBefore, leaf.NotAfter, w.now)
	}
	if !issued.RotateAt.Equal(w.now.Add(30 * time.Minute)) {
		t.Errorf("rotate at %v", issued.RotateAt)
	}
	if n := leaf.SerialNumber.BitLen(); n < 72 || n > 159 || leaf.SerialNumber.Sign() <= 0 {
		t.Errorf("serial number of %d bits", n)
	}
	if len(leaf.SubjectKeyId) == 0 || !bytes.Equal(leaf.AuthorityKeyId, intermediate.SubjectKeyId) {
		t.Errorf("SKI %x, AKI %x, the intermediate's SKI %x", leaf.SubjectKeyId, leaf.AuthorityKeyId, intermediate.SubjectKeyId)
	}
	if !intermediate.IsCA || intermediate.MaxPathLen != 0 || !intermediate.MaxPathLenZero || len(intermediate.URIs) != 0 {
		t.Errorf("intermediate: CA %v, path length %d, URIs %v", intermediate.IsCA, intermediate.MaxPathLen, intermediate.URIs)
	}
}

// TestIntermediateIsConstrained: with the intermediate's key alone, nobody makes an
// SVID of another trust domain that our root vouches for.
func TestIntermediateIsConstrained(t *testing.T) {
	w := newWorld(t, "acme.example")
	c := w.open()
	issued, err := c.IssueWorkload(ecKey(t, elliptic.P256()).Public(), spiffeid.RequireFromPath(w.td, "/a/b"), nil, "h1")
	if err != nil {
		t.Fatal(err)
	}
	intermediate := parse(t, issued.Chain)[1]
	// The same constraints, under a key that the test has.
	root := ecKey(t, elliptic.P256())
	rootCert := selfSigned(t, root, &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	key := ecKey(t, elliptic.P256())
	stolen := signed(t, &x509.Certificate{
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, MaxPathLenZero: true,
		PermittedURIDomains:         intermediate.PermittedURIDomains,
		PermittedDNSDomainsCritical: intermediate.PermittedDNSDomainsCritical,
	}, rootCert, key.Public(), root)
	if len(stolen.PermittedURIDomains) != 1 || !stolen.PermittedDNSDomainsCritical {
		t.Fatalf("constraints of the intermediate: %v", intermediate.PermittedURIDomains)
	}
	for name, ok := range map[string]bool{"acme.example": true, "other.example": false} {
		td := spiffeid.RequireTrustDomainFromString(name)
		leaf := signed(t, &x509.Certificate{
			URIs: []*url.URL{spiffeid.RequireFromPath(td, "/a/b").URL()}, KeyUsage: x509.KeyUsageDigitalSignature,
		}, stolen, ecKey(t, elliptic.P256()).Public(), key)
		bundle := x509bundle.FromX509Authorities(td, []*x509.Certificate{rootCert})
		_, _, err := x509svid.Verify([]*x509.Certificate{leaf, stolen}, bundle)
		if (err == nil) != ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func selfSigned(t *testing.T, key crypto.Signer, tmpl *x509.Certificate) *x509.Certificate {
	return signed(t, tmpl, tmpl, key.Public(), key)
}

func signed(t *testing.T, tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	return parse(t, [][]byte{der})[0]
}

// TestTrustDomainsThatVerify: every form of name that the configuration lets
// through must survive our own name constraint.
func TestTrustDomainsThatVerify(t *testing.T) {
	for _, name := range []string{"acme.example", "acme", "a.b.c.d.example", "with-dash.example", "with_underscore.example", "9lives.example"} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, name)
			c := w.open()
			issued, err := c.IssueWorkload(ecKey(t, elliptic.P256()).Public(), spiffeid.RequireFromPath(w.td, "/a/b"), nil, "h1")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := identity.Verify(parse(t, issued.Chain), c.Bundle(), w.now); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestIssueRefuses(t *testing.T) {
	w := newWorld(t, "acme.example")
	c := w.open()
	pub := ecKey(t, elliptic.P256()).Public()
	many := make(map[string][]string)
	for i := range 65 {
		many[fmt.Sprintf("k%d", i)] = []string{"v"}
	}
	for name, test := range map[string]struct {
		id     string
		claims map[string][]string
		want   error
	}{
		"another trust domain": {id: "spiffe://other.example/a/b", want: ca.ErrID},
		"a host's ID":          {id: "spiffe://acme.example/symbolon/host/x", want: ca.ErrID},
		"the controller's ID":  {id: "spiffe://acme.example/symbolon/controller", want: ca.ErrID},
		"no path":              {id: "spiffe://acme.example", want: ca.ErrID},
		"65 claims":            {id: "spiffe://acme.example/a/b", claims: many, want: ca.ErrClaims},
		"5 KiB of claims":      {id: "spiffe://acme.example/a/b", claims: map[string][]string{"k": {strings.Repeat("x", 5<<10)}}, want: ca.ErrClaims},
	} {
		issued, err := c.IssueWorkload(pub, spiffeid.RequireFromString(test.id), identity.NewAttributes(test.claims), "h1")
		if !errors.Is(err, test.want) || issued != nil {
			t.Errorf("%s: %v, %v; want %v", name, issued, err, test.want)
		}
	}
	for _, id := range []string{"", "a/b", "..", "a b", "é"} {
		if _, err := c.IssueHost(pub, id); !errors.Is(err, ca.ErrID) {
			t.Errorf("host ID %q: %v", id, err)
		}
	}
}

func TestPublicKey(t *testing.T) {
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{
		"P-256": ecKey(t, elliptic.P256()), "P-384": ecKey(t, elliptic.P384()), "Ed25519": ed,
	} {
		pub, err := ca.PublicKey(csr(t, key))
		if err != nil || !pub.(interface{ Equal(crypto.PublicKey) bool }).Equal(key.Public()) {
			t.Errorf("%s: %v", name, err)
		}
	}
	good := csr(t, ecKey(t, elliptic.P256()))
	forged := bytes.Clone(good)
	forged[len(forged)-1] ^= 1
	for name, der := range map[string][]byte{
		"empty": nil, "RSA": csr(t, rsaKey), "P-521": csr(t, ecKey(t, elliptic.P521())), "P-224": csr(t, ecKey(t, elliptic.P224())),
		"signature altered": forged, "cut": good[:len(good)-4], "trailing bytes": append(bytes.Clone(good), 0),
		"huge": make([]byte, 1<<20),
	} {
		if _, err := ca.PublicKey(der); !errors.Is(err, ca.ErrCSR) {
			t.Errorf("%s: %v, want ErrCSR", name, err)
		}
	}
}

// TestCSRNamesAreIgnored: what a request asks for beyond its key has no effect.
func TestCSRNamesAreIgnored(t *testing.T) {
	w := newWorld(t, "acme.example")
	c := w.open()
	key := ecKey(t, elliptic.P256())
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		URIs:     []*url.URL{spiffeid.RequireFromPath(w.td, "/symbolon/controller").URL()},
		DNSNames: []string{"controller.example"},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := ca.PublicKey(der)
	if err != nil {
		t.Fatal(err)
	}
	issued, err := c.IssueHost(pub, "h1")
	if err != nil {
		t.Fatal(err)
	}
	if len(issued.Leaf.DNSNames) != 0 || len(issued.Leaf.URIs) != 1 || issued.Leaf.URIs[0].Path != "/symbolon/host/h1" {
		t.Errorf("%v %v", issued.Leaf.DNSNames, issued.Leaf.URIs)
	}
}

func TestKeysAreSealedAtRest(t *testing.T) {
	w := newWorld(t, "acme.example")
	st, err := store.Open(filepath.Join(w.dir, "db"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Open(t.Context(), st, w.config()); err != nil {
		t.Fatal(err)
	}
	kvs, _, err := st.List(t.Context(), "ca/")
	if err != nil || len(kvs) != 2 {
		t.Fatalf("%d keys, %v", len(kvs), err)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(w.dir, "db"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := seal.Load(w.config().KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range kvs {
		der := unseal(t, key, kv)
		private, err := x509.ParsePKCS8PrivateKey(der)
		if err != nil {
			t.Fatal(err)
		}
		scalar, err := private.(*ecdsa.PrivateKey).Bytes()
		if err != nil {
			t.Fatal(err)
		}
		for form, secret := range secretForms(scalar, der) {
			if bytes.Contains(raw, secret) {
				t.Errorf("%s: the private key stands in the file as %s", kv.Key, form)
			}
		}
	}
}

func TestRestartKeepsTheCA(t *testing.T) {
	w := newWorld(t, "acme.example")
	st, err := store.Open(filepath.Join(w.dir, "db"))
	if err != nil {
		t.Fatal(err)
	}
	first, err := ca.Open(t.Context(), st, w.config())
	if err != nil {
		t.Fatal(err)
	}
	pin := first.Pin()
	_ = st.Close()
	if again := w.open(); again.Pin() != pin || len(pin) != 64 {
		t.Errorf("pin %q, then %q", pin, again.Pin())
	}
}

func TestOpenRefuses(t *testing.T) {
	w := newWorld(t, "acme.example")
	st, err := store.Open(filepath.Join(w.dir, "db"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Open(t.Context(), st, w.config()); err != nil {
		t.Fatal(err)
	}
	_ = st.Close()

	other := w.config()
	other.TrustDomain = spiffeid.RequireTrustDomainFromString("other.example")
	if _, err := w.try(other); !errors.Is(err, ca.ErrTrustDomain) || !strings.Contains(err.Error(), "acme.example") {
		t.Errorf("another trust domain: %v", err)
	}
	wrong := w.config()
	wrong.KeyFile = filepath.Join(w.dir, "wrong.key")
	if err := os.WriteFile(wrong.KeyFile, bytes.Repeat([]byte{1}, seal.KeySize), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := w.try(wrong); !errors.Is(err, seal.ErrWrongKey) || !strings.Contains(err.Error(), wrong.KeyFile) {
		t.Errorf("wrong key file: %v", err)
	}
	missing := w.config()
	missing.KeyFile = filepath.Join(w.dir, "gone.key")
	if _, err := w.try(missing); !errors.Is(err, seal.ErrKeyFile) || !strings.Contains(err.Error(), "put it back") {
		t.Errorf("missing key file: %v", err)
	}
	if _, err := os.Stat(missing.KeyFile); err == nil {
		t.Error("a new key file was made for a CA that it cannot open")
	}
}

func TestIntermediateRenews(t *testing.T) {
	w := newWorld(t, "acme.example")
	c := w.open()
	id := spiffeid.RequireFromPath(w.td, "/a/b")
	pub := ecKey(t, elliptic.P256()).Public()
	before, err := c.IssueWorkload(pub, id, nil, "h1")
	if err != nil {
		t.Fatal(err)
	}
	w.now = w.now.Add(300 * 24 * time.Hour)
	if err := c.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	after, err := c.IssueWorkload(pub, id, nil, "h1")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(before.Chain[1], after.Chain[1]) {
		t.Error("65 days before its end, the intermediate is still the same")
	}
	if _, err := identity.Verify(parse(t, after.Chain), c.Bundle(), w.now); err != nil {
		t.Error(err)
	}
}

// TestSVIDNeverOutlivesItsIssuer, even if nobody renewed the intermediate.
func TestSVIDNeverOutlivesItsIssuer(t *testing.T) {
	w := newWorld(t, "acme.example")
	c := w.open()
	w.now = w.now.Add(365*24*time.Hour - time.Hour)
	issued, err := c.IssueHost(ecKey(t, elliptic.P256()).Public(), "h")
	if err != nil {
		t.Fatal(err)
	}
	if end := parse(t, issued.Chain)[1].NotAfter; issued.Leaf.NotAfter.After(end) {
		t.Errorf("leaf ends %v, intermediate %v", issued.Leaf.NotAfter, end)
	}
}

func TestServerCertificate(t *testing.T) {
	w := newWorld(t, "acme.example")
	c := w.open()
	s := c.ServerCertificate([]string{"controller.example"}, []net.IP{net.IPv4(192, 0, 2, 1), net.ParseIP("2001:db8::1")})
	first, err := s.Get(nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(first.Certificate) != 3 || !bytes.Equal(first.Certificate[2], c.Roots()[0].Raw) {
		t.Errorf("chain of %d, want leaf, intermediate and root", len(first.Certificate))
	}
	pool := x509.NewCertPool()
	pool.AddCert(c.Roots()[0])
	between := x509.NewCertPool()
	between.AddCert(parse(t, first.Certificate)[1])
	for _, name := range []string{"controller.example", "192.0.2.1", "2001:db8::1"} {
		if _, err := first.Leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: pool, Intermediates: between, CurrentTime: w.now}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if len(first.Leaf.URIs) != 1 || first.Leaf.URIs[0].String() != "spiffe://acme.example/symbolon/controller" {
		t.Errorf("URIs %v", first.Leaf.URIs)
	}
	if again, _ := s.Get(nil); again != first {
		t.Error("a new certificate for every handshake")
	}
	w.now = w.now.Add(13 * time.Hour)
	second, err := s.Get(nil)
	if err != nil {
		t.Fatal(err)
	}
	if second == first || first.PrivateKey.(*ecdsa.PrivateKey).Equal(second.PrivateKey) {
		t.Error("past half of its life, the certificate or its key is still the same")
	}
}
