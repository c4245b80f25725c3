package enrol

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
	"github.com/symbolon/symbolon/identity"
)

// HostCredential is what makes this machine a host of the trust domain. Immutable;
// Renew makes the next one.
type HostCredential struct {
	HostID      string
	Namespace   string
	TrustDomain spiffeid.TrustDomain
	// Chain is leaf, then intermediates.
	Chain []*x509.Certificate
	// Roots are the trust domain's, BundleVersion the controller's number for that set; 0:
	// it has none.
	Roots         []*x509.Certificate
	BundleVersion uint64
	// RotateAt is when to call Renew.
	RotateAt time.Time

	key *ecdsa.PrivateKey
}

// NotAfter is when the SVID ends. A host that was away for longer needs a new
// join token.
func (c *HostCredential) NotAfter() time.Time { return c.Chain[0].NotAfter }

// install checks that what the controller issued is for this key and this host, and
// verifies by the roots that came with it.
func (c *HostCredential) install(svid *symbolonv1.IssuedSVID, bundle [][]byte, key *ecdsa.PrivateKey) (err error) {
	if c.Chain, err = parseAll(svid.GetChain()); err != nil {
		return fmt.Errorf("%w: chain: %w", ErrResponse, err)
	}
	if c.Roots, err = parseAll(bundle); err != nil {
		return fmt.Errorf("%w: bundle: %w", ErrResponse, err)
	}
	if len(c.Chain) == 0 || len(c.Roots) == 0 {
		return fmt.Errorf("%w: %d certificates and %d roots", ErrResponse, len(c.Chain), len(c.Roots))
	}
	if !key.PublicKey.Equal(c.Chain[0].PublicKey) {
		return fmt.Errorf("%w: the certificate is for another key", ErrResponse)
	}
	id, err := identity.VerifySVID(c.Chain, x509bundle.FromX509Authorities(c.TrustDomain, c.Roots), time.Now())
	if err != nil {
		return fmt.Errorf("%w: %w", ErrResponse, err)
	}
	want, err := spiffeid.FromSegments(c.TrustDomain, identity.ReservedPath, "host", c.HostID)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrResponse, err)
	}
	if id != want {
		return fmt.Errorf("%w: the certificate is of %s, want %s", ErrResponse, id, want)
	}
	c.RotateAt, c.key = svid.GetRotateAt().AsTime(), key
	return nil
}

func parseAll(ders [][]byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for _, der := range ders {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	return certs, nil
}

// WithRoots is the credential with other roots, which the controller has said. They need
// not vouch for its own SVID any more: who is withdrawn shall not believe what was, either.
func (c *HostCredential) WithRoots(roots []*x509.Certificate, version uint64) *HostCredential {
	next := *c
	next.Roots, next.BundleVersion = roots, version
	return &next
}

// TLS is the configuration to speak to the controller with, at whatever address it
// has: the host's SVID on our side, and on the other nothing but the controller's
// own. Errors of a handshake: ErrController.
func (c *HostCredential) TLS() *tls.Config {
	own := tls.Certificate{PrivateKey: c.key, Leaf: c.Chain[0]}
	for _, cert := range c.Chain {
		own.Certificate = append(own.Certificate, cert.Raw)
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{own},
		// The SPIFFE ID replaces the name; VerifyConnection checks it, also when a
		// session is resumed.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			if err := verifyController(state.PeerCertificates, c.Roots); err != nil {
				return err
			}
			if td := state.PeerCertificates[0].URIs[0].Host; td != c.TrustDomain.Name() {
				return fmt.Errorf("%w: it is of %s", ErrController, td)
			}
			return nil
		},
	}
}

// Transport speaks HTTP/2 to the controller as this host. The caller closes its
// idle connections when it is replaced. A nil dialer is the plain one.
func (c *HostCredential) Transport(dialer Dialer) *http.Transport {
	return newTransport(c.TLS(), dialer)
}

// Renew asks for the next SVID, with a new key.
// Errors: ErrResponse, *connect.Error (permission_denied: the host was removed).
func (c *HostCredential) Renew(ctx context.Context, client symbolonv1connect.ProxyServiceClient) (*HostCredential, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("renew: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("renew: %w", err)
	}
	res, err := client.RenewHost(ctx, connect.NewRequest(&symbolonv1.RenewHostRequest{Csr: csr}))
	if err != nil {
		return nil, fmt.Errorf("renew: %w", err)
	}
	next := &HostCredential{HostID: c.HostID, Namespace: c.Namespace, TrustDomain: c.TrustDomain, BundleVersion: res.Msg.GetBundleVersion()}
	if err := next.install(res.Msg.GetSvid(), res.Msg.GetBundle(), key); err != nil {
		return nil, fmt.Errorf("renew: %w", err)
	}
	return next, nil
}
