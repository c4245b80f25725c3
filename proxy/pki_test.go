package proxy

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	encodingpem "encoding/pem"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/identity"
)

// authority is the CA of a trust domain. Tests hold its key, so they can sign what
// no controller would.
type authority struct {
	testing.TB
	domain          spiffeid.TrustDomain
	root, issuer    *x509.Certificate
	rootKey, issues *ecdsa.PrivateKey
}

func newAuthority(t testing.TB, domain string) *authority {
	t.Helper()
	a := &authority{TB: t, domain: spiffeid.RequireTrustDomainFromString(domain), rootKey: newKey(t), issues: newKey(t)}
	root := caTemplate(t, "root")
	a.root = sign(t, root, root, &a.rootKey.PublicKey, a.rootKey)
	a.issuer = sign(t, caTemplate(t, "issuer"), a.root, &a.issues.PublicKey, a.rootKey)
	return a
}

func caTemplate(t testing.TB, name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: serial(t), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage:  x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		NotBefore: time.Now().Add(-3 * time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
	}
}

// leaf is the template of an SVID, for tests to spoil.
func (a *authority) leaf(path string, labels map[string][]string) *x509.Certificate {
	a.Helper()
	c := &x509.Certificate{
		SerialNumber: serial(a), URIs: []*url.URL{spiffeid.RequireFromPath(a.domain, path).URL()},
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		NotBefore:   time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	if labels != nil {
		c.ExtraExtensions = []pkix.Extension{a.claims(labels)}
	}
	return c
}

func (a *authority) claims(labels map[string][]string) pkix.Extension {
	a.Helper()
	e, err := identity.MarshalClaims(identity.NewAttributes(labels))
	if err != nil {
		a.Fatal(err)
	}
	return e
}

// issue signs any template, in the form of crypto/tls.
func (a *authority) issue(template *x509.Certificate) tls.Certificate {
	a.Helper()
	key := newKey(a)
	leaf := sign(a, template, a.issuer, &key.PublicKey, a.issues)
	return tls.Certificate{Certificate: [][]byte{leaf.Raw, a.issuer.Raw}, PrivateKey: key, Leaf: leaf}
}

// workload is a credential as identity.Manager would give it.
func (a *authority) workload(path string, labels map[string][]string) *identity.Credential {
	a.Helper()
	return a.credential(a.leaf(path, labels), identity.NewSVID)
}

func (a *authority) host(id string) *identity.Credential {
	a.Helper()
	return a.credential(a.leaf("/symbolon/host/"+id, nil), identity.NewHostSVID)
}

func (a *authority) credential(template *x509.Certificate, newSVID func([]*x509.Certificate, crypto.Signer) (*identity.SVID, error)) *identity.Credential {
	a.Helper()
	c := a.issue(template)
	svid, err := newSVID([]*x509.Certificate{c.Leaf, a.issuer}, c.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		a.Fatal(err)
	}
	return &identity.Credential{SVID: svid, Bundles: x509bundle.NewSet(a.bundle())}
}

func (a *authority) bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(a.domain, []*x509.Certificate{a.root})
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func serial(t testing.TB) *big.Int {
	t.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func sign(t testing.TB, template, parent *x509.Certificate, key *ecdsa.PublicKey, signer *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, signer)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// pem is a credential as openssl reads it: leaf and issuer, and the key.
func pem(t testing.TB, c *identity.Credential) (chain [][]byte, key []byte) {
	t.Helper()
	for _, x := range c.SVID.Chain {
		chain = append(chain, encodingpem.EncodeToMemory(&encodingpem.Block{Type: "CERTIFICATE", Bytes: x.Raw}))
	}
	der, err := x509.MarshalPKCS8PrivateKey(c.SVID.Key)
	if err != nil {
		t.Fatal(err)
	}
	return chain, encodingpem.EncodeToMemory(&encodingpem.Block{Type: "PRIVATE KEY", Bytes: der})
}
