package mtls

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

	"github.com/symbolon/symbolon/identity"
)

// authority is a CA of one trust domain, with an intermediate.
type authority struct {
	t                 testing.TB
	td                spiffeid.TrustDomain
	root, issuer      *x509.Certificate
	rootKey, issueKey *ecdsa.PrivateKey
}

func newAuthority(t testing.TB, domain string) *authority {
	t.Helper()
	a := &authority{t: t, td: spiffeid.RequireTrustDomainFromString(domain)}
	a.rootKey, a.issueKey = newKey(t), newKey(t)
	ca := func(name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: serial(t), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
			KeyUsage:  x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		}
	}
	root := ca("root")
	a.root = sign(t, root, root, a.rootKey, a.rootKey)
	a.issuer = sign(t, ca("intermediate"), a.root, a.issueKey, a.rootKey)
	return a
}

// leaf is a workload's template; change it before credential.
func (a *authority) leaf(path string, claims identity.Attributes) *x509.Certificate {
	a.t.Helper()
	c := &x509.Certificate{
		SerialNumber: serial(a.t), URIs: []*url.URL{spiffeid.RequireFromPath(a.td, path).URL()},
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		NotBefore:             time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
	}
	if claims != nil {
		e, err := identity.MarshalClaims(claims)
		if err != nil {
			a.t.Fatal(err)
		}
		c.ExtraExtensions = []pkix.Extension{e}
	}
	return c
}

// credential signs template and trusts the given authorities besides a itself.
// Only here is a malformed SVID let into a credential: an attacker's.
func (a *authority) credential(template *x509.Certificate, trusts ...*authority) *identity.Credential {
	a.t.Helper()
	key := newKey(a.t)
	leaf := sign(a.t, template, a.issuer, key, a.issueKey)
	bundles := x509bundle.NewSet()
	for _, x := range append(trusts, a) {
		bundles.Add(x509bundle.FromX509Authorities(x.td, []*x509.Certificate{x.root}))
	}
	good := sign(a.t, a.leaf("/attacker/x", nil), a.issuer, key, a.issueKey)
	svid, err := identity.NewSVID([]*x509.Certificate{good, a.issuer}, key)
	if err != nil {
		a.t.Fatal(err)
	}
	if parsed, err := identity.NewSVID([]*x509.Certificate{leaf, a.issuer}, key); err == nil {
		svid = parsed
	} else {
		svid.TLS.Certificate[0], svid.TLS.Leaf = leaf.Raw, leaf
	}
	return &identity.Credential{SVID: svid, Bundles: bundles}
}

func (a *authority) workload(path string, labels map[string][]string, trusts ...*authority) *identity.Credential {
	return a.credential(a.leaf(path, identity.NewAttributes(labels)), trusts...)
}

func (a *authority) host(id string) *identity.Credential {
	a.t.Helper()
	key := newKey(a.t)
	leaf := sign(a.t, a.leaf("/symbolon/host/"+id, nil), a.issuer, key, a.issueKey)
	svid, err := identity.NewHostSVID([]*x509.Certificate{leaf, a.issuer}, key)
	if err != nil {
		a.t.Fatal(err)
	}
	return &identity.Credential{SVID: svid, Bundles: x509bundle.NewSet(x509bundle.FromX509Authorities(a.td, []*x509.Certificate{a.root}))}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func serial(t testing.TB) *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func sign(t testing.TB, template, parent *x509.Certificate, key, signer *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
