package loop

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
)

// credentials are two workloads' of one trust domain: a client's and a server's.
var credentials = sync.OnceValue(func() (c [2]*identity.Credential) {
	domain := spiffeid.RequireTrustDomainFromString("acme.example")
	ca := newKey()
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	root = sign(root, root, &ca.PublicKey, ca)
	for i, path := range []string{"/prod/web", "/prod/db"} {
		key := newKey()
		leaf := sign(&x509.Certificate{
			SerialNumber: big.NewInt(int64(2 + i)), URIs: []*url.URL{spiffeid.RequireFromPath(domain, path).URL()},
			KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			NotBefore:   time.Now().Add(-time.Hour), NotAfter: time.Now().Add(12 * time.Hour),
		}, root, &key.PublicKey, ca)
		svid, err := identity.NewSVID([]*x509.Certificate{leaf}, key)
		must(err)
		c[i] = &identity.Credential{SVID: svid, Bundles: x509bundle.NewSet(x509bundle.FromX509Authorities(domain, []*x509.Certificate{root}))}
	}
	return c
})

// endpoints are theirs; stock: crypto/tls does their data phase.
var (
	client      = sync.OnceValue(func() *mtls.Endpoint { return mtls.NewEndpoint(credentials()[0], mtls.Options{}) })
	server      = sync.OnceValue(func() *mtls.Endpoint { return mtls.NewEndpoint(credentials()[1], mtls.Options{}) })
	stockClient = sync.OnceValue(func() *mtls.Endpoint {
		return mtls.NewEndpoint(credentials()[0], mtls.Options{StockTLS: true})
	})
)

func newKey() *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	return k
}

func sign(template, parent *x509.Certificate, key *ecdsa.PublicKey, signer *ecdsa.PrivateKey) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, signer)
	must(err)
	c, err := x509.ParseCertificate(der)
	must(err)
	return c
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}
