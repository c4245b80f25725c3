package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// authority is a certificate that signs others, with its key.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newTestKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func mustURI(t testing.TB, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func sign(t testing.TB, tmpl, parent *x509.Certificate, pub any, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	tmpl.SerialNumber = serial
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func caTemplate(t testing.TB, name, uri string) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		URIs:                  []*url.URL{mustURI(t, uri)},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(240 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
}

func newRoot(t testing.TB, td string) *authority {
	t.Helper()
	key := newTestKey(t)
	tmpl := caTemplate(t, "root of "+td, "spiffe://"+td)
	return &authority{t, sign(t, tmpl, tmpl, key.Public(), key), key}
}

// intermediate makes a CA below a; change edits the template.
func (a *authority) intermediate(change func(*x509.Certificate)) *authority {
	a.t.Helper()
	key := newTestKey(a.t)
	tmpl := caTemplate(a.t, "intermediate", a.cert.URIs[0].String())
	if change != nil {
		change(tmpl)
	}
	return &authority{a.t, sign(a.t, tmpl, a.cert, key.Public(), a.key), key}
}

// issueFor signs pub as a workload's SVID; change edits the template.
func (a *authority) issueFor(pub any, id string, claims Attributes, change func(*x509.Certificate)) *x509.Certificate {
	a.t.Helper()
	now := time.Now()
	tmpl := &x509.Certificate{
		URIs:                  []*url.URL{mustURI(a.t, id)},
		NotBefore:             now.Add(-time.Minute),
		NotAfter:              now.Add(time.Hour),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if claims != nil {
		ext, err := MarshalClaims(claims)
		if err != nil {
			a.t.Fatal(err)
		}
		tmpl.ExtraExtensions = append(tmpl.ExtraExtensions, ext)
	}
	if change != nil {
		change(tmpl)
	}
	return sign(a.t, tmpl, a.cert, pub, a.key)
}

func (a *authority) issue(id string, claims Attributes, change func(*x509.Certificate)) *x509.Certificate {
	a.t.Helper()
	return a.issueFor(newTestKey(a.t).Public(), id, claims, change)
}

func (a *authority) bundle() *x509bundle.Bundle {
	id, err := spiffeid.FromURI(a.cert.URIs[0])
	if err != nil {
		a.t.Fatal(err)
	}
	return x509bundle.FromX509Authorities(id.TrustDomain(), []*x509.Certificate{a.cert})
}
