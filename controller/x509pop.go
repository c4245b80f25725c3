package controller

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/enrol"
	"github.com/symbolon/symbolon/identity"
)

// maxHostChain bounds the certificates that a stranger can make us look at.
const maxHostChain = 5

// errCertificate: no CA of the configuration vouches for the certificate.
var errCertificate = errors.New("the certificate is not accepted")

var errOwnSVID = errors.New("an SVID of this trust domain is no way into it")

// popAuthority is one entry of enrolment.x509pop.
type popAuthority struct {
	X509PoPConfig
	roots []*x509.Certificate
	pool  *x509.CertPool
}

// openPoP reads the CA files. Errors: ErrConfig.
func openPoP(entries []X509PoPConfig) ([]popAuthority, error) {
	var out []popAuthority
	for i, e := range entries {
		bad := func(err error) error {
			return fmt.Errorf("%w: enrolment.x509pop[%d].ca_file: %w", ErrConfig, i, err)
		}
		data, err := os.ReadFile(e.CAFile)
		if err != nil {
			return nil, bad(err)
		}
		roots, err := parsePEM(data)
		if err != nil {
			return nil, bad(fmt.Errorf("%s: %w", e.CAFile, err))
		}
		a := popAuthority{X509PoPConfig: e, roots: roots, pool: x509.NewCertPool()}
		for _, r := range roots {
			if !r.IsCA {
				return nil, bad(fmt.Errorf("%s: %s is not a CA", e.CAFile, r.Subject))
			}
			a.pool.AddCert(r)
		}
		out = append(out, a)
	}
	return out, nil
}

// parsePEM reads one certificate or more, and nothing else.
func parsePEM(data []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("it holds a %s; want certificates only", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, errors.New("it holds no certificate in PEM")
	}
	return out, nil
}

// hostIdentity is who a host is by another's word. Enrolments of one identity make one
// host.
type hostIdentity struct {
	// name is the SPIFFE ID, or "key:" and the SHA-256 of the certificate's public key,
	// which stays when the certificate is renewed.
	name     string
	spiffeID string // "": none
	// names is "names:" and the SHA-256 of the certificate's alternative names, where it has
	// some and no SPIFFE ID: a host that was removed is known by them, whatever its key. ""
	// otherwise.
	names string
}

// barring is by what, besides its name, a removed host would be known.
func (h hostIdentity) barring() []string {
	if h.names == "" {
		return nil
	}
	return []string{h.names}
}

// certificateNames are a certificate's alternative names, in one order, hashed; "": it has none.
func certificateNames(c *x509.Certificate) string {
	var all []string
	for _, x := range c.DNSNames {
		all = append(all, "dns:"+strings.ToLower(x))
	}
	for _, x := range c.IPAddresses {
		all = append(all, "ip:"+x.String())
	}
	for _, x := range c.EmailAddresses {
		all = append(all, "email:"+x)
	}
	for _, x := range c.URIs {
		all = append(all, "uri:"+x.String())
	}
	if len(all) == 0 {
		return ""
	}
	slices.Sort(all)
	sum := sha256.Sum256([]byte(strings.Join(slices.Compact(all), "\n")))
	return "names:" + hex.EncodeToString(sum[:])
}

// identify finds the first CA that vouches for a chain, and who it says this is. That
// the leaf's key is there is another question (enrol.CheckProof).
// Errors: errCertificate, with the reason of the last CA that was asked.
func identify(authorities []popAuthority, own spiffeid.TrustDomain, chain []*x509.Certificate, now time.Time) (*popAuthority, hostIdentity, error) {
	err := errors.New("no CA is configured (enrolment.x509pop)")
	for i := range authorities {
		var id hostIdentity
		if id, err = authorities[i].identify(own, chain, now); err == nil {
			return &authorities[i], id, nil
		}
	}
	return nil, hostIdentity{}, fmt.Errorf("%w: %w", errCertificate, err)
}

func (a *popAuthority) identify(own spiffeid.TrustDomain, chain []*x509.Certificate, now time.Time) (hostIdentity, error) {
	leaf := chain[0]
	// A CA vouches for the SPIFFE IDs that its patterns name, and for no others: it
	// could take over the hosts of another CA.
	if len(a.SPIFFEIDs) > 0 {
		return a.svid(own, chain, now)
	}
	switch {
	case slices.ContainsFunc(leaf.URIs, func(u *url.URL) bool { return u.Scheme == "spiffe" && u.Host == own.Name() }):
		return hostIdentity{}, errOwnSVID
	case leaf.IsCA:
		return hostIdentity{}, errors.New("it is a CA's")
	case leaf.KeyUsage != 0 && leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return hostIdentity{}, errors.New("it lacks the key usage digitalSignature")
	}
	intermediates := x509.NewCertPool()
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	_, err := leaf.Verify(x509.VerifyOptions{
		Roots: a.pool, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return hostIdentity{}, popReason(err)
	}
	sum := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
	return hostIdentity{name: "key:" + hex.EncodeToString(sum[:]), names: certificateNames(leaf)}, nil
}

// svid judges by the rules of SPIFFE, which are other than the web's.
func (a *popAuthority) svid(own spiffeid.TrustDomain, chain []*x509.Certificate, now time.Time) (hostIdentity, error) {
	if len(chain[0].URIs) != 1 {
		return hostIdentity{}, errors.New("it is no X509-SVID, which has one URI")
	}
	td, err := spiffeid.TrustDomainFromURI(chain[0].URIs[0])
	if err != nil {
		return hostIdentity{}, errors.New("its SPIFFE ID is malformed")
	}
	if td == own {
		return hostIdentity{}, errOwnSVID
	}
	id, err := identity.VerifySVID(chain, x509bundle.FromX509Authorities(td, a.roots), now)
	if err != nil {
		return hostIdentity{}, err
	}
	if !slices.ContainsFunc(a.SPIFFEIDs, func(p string) bool { return matchID(p, id.String()) }) {
		return hostIdentity{}, fmt.Errorf("%s fits no pattern of enrolment.x509pop", id)
	}
	return hostIdentity{name: id.String(), spiffeID: id.String()}, nil
}

// popReason is in words of ours: those of crypto/x509 quote what a stranger wrote.
func popReason(err error) error {
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &unknown):
		return errors.New("no CA of the configuration has signed it")
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return errors.New("it, or a CA above it, is not valid at this time")
	case errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
		return errors.New("it is not for client authentication")
	}
	return errors.New("it does not verify")
}

// enrolByCertificate makes or renews the host that a certificate stands for, once its key
// has signed for this very connection and CSR.
func (s enrolmentService) enrolByCertificate(ctx context.Context, req *connect.Request[symbolonv1.EnrolRequest], pub crypto.PublicKey, reported identity.Attributes, proof *cloudProof) (*connect.Response[symbolonv1.EnrolResponse], error) {
	m := req.Msg
	refuse := func(code connect.Code, err error) error {
		s.log.Warn("enrolment refused", zap.Error(err), zap.String("address", req.Peer().Addr))
		return connect.NewError(code, err)
	}
	chain, err := parseHostChain(m.GetX509Pop().GetChain())
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	authority, who, err := identify(s.pop, s.cfg.trustDomain(), chain, s.opts.Now())
	if err != nil {
		return nil, refuse(connect.CodeUnauthenticated, err)
	}
	if err := enrol.CheckProof(callOf(ctx).tls, m.GetCsr(), chain[0], m.GetX509Pop().GetSignature()); err != nil {
		return nil, refuse(connect.CodeUnauthenticated, err)
	}
	return s.admit(ctx, req, pub, reported, admission{
		who: who, namespace: authority.Namespace, labels: authority.Labels, instance: proof.instance(),
	})
}

func parseHostChain(ders [][]byte) ([]*x509.Certificate, error) {
	if n := len(ders); n == 0 || n > maxHostChain {
		return nil, fmt.Errorf("%d certificates: want the host's own and at most %d above it", n, maxHostChain-1)
	}
	var out []*x509.Certificate
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, errors.New("the certificate cannot be read")
		}
		// Before anything is verified by it: crypto/x509 does with an RSA key of any size,
		// and one that fills the message costs seconds.
		if err := enrol.CheckKey(c.PublicKey); err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}
