package identity

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

var (
	// ErrNoBundle: nobody here vouches for the certificate's trust domain.
	ErrNoBundle = errors.New("no bundle for the trust domain")
	// ErrExpired: the chain is good, but not at this time (also: not yet).
	ErrExpired = errors.New("certificate not valid at this time")
	// ErrUntrusted: no chain of signatures to the bundle of the ID's trust domain.
	ErrUntrusted = errors.New("certificate does not verify")
	// ErrNameConstrained: a CA of the chain may not sign for this name. An ErrUntrusted.
	ErrNameConstrained = fmt.Errorf("%w: a CA of the chain may not sign for this name", ErrUntrusted)
	// ErrNotCA: signed by a certificate that may not sign others, such as an SVID. An
	// ErrUntrusted.
	ErrNotCA = fmt.Errorf("%w: signed by a certificate that may not sign others", ErrUntrusted)
)

// maxChain bounds what a peer can make us look at: the leaf and its
// intermediates. SPIRE with an upstream authority sends three.
const maxChain = 8

// Verify judges a peer's certificates, leaf first as they came in the handshake,
// and returns who it is. It is the only place where that happens, on a first
// handshake and on a resumed one alike.
//
// The chain must lead to the bundle of the leaf's own trust domain: a root of one
// domain says nothing of another. Intermediates carry no meaning, whatever names
// or claims are in them.
//
// Errors: ErrMalformedSVID, ErrNoBundle, ErrExpired, ErrUntrusted (of which
// ErrNameConstrained and ErrNotCA), ErrNotWorkload, ErrMalformedClaims.
func Verify(chain []*x509.Certificate, bundles x509bundle.Source, now time.Time) (Principal, error) {
	p, _, err := verify(chain, bundles, now)
	return p, err
}

// VerifySVID is Verify for any X.509-SVID: a workload's, a host's or a
// controller's. Errors: ErrMalformedSVID, ErrNoBundle, ErrExpired, ErrUntrusted,
// and ErrMalformedClaims for claims marked critical.
func VerifySVID(chain []*x509.Certificate, bundles x509bundle.Source, now time.Time) (spiffeid.ID, error) {
	id, _, err := verifySVID(chain, bundles, now)
	return id, err
}

func verify(chain []*x509.Certificate, bundles x509bundle.Source, now time.Time) (Principal, validity, error) {
	_, v, err := verifySVID(chain, bundles, now)
	if err != nil {
		return Principal{}, validity{}, err
	}
	p, err := PrincipalOf(chain[0])
	if err != nil {
		return Principal{}, validity{}, err
	}
	return p, v, nil
}

func verifySVID(chain []*x509.Certificate, bundles x509bundle.Source, now time.Time) (spiffeid.ID, validity, error) {
	id, err := checkSVID(chain)
	if err != nil {
		return spiffeid.ID{}, validity{}, err
	}
	if bundles == nil {
		return spiffeid.ID{}, validity{}, fmt.Errorf("%w %s", ErrNoBundle, id.TrustDomain())
	}
	// Ask once: a source may change between two questions.
	bundle, err := bundles.GetX509BundleForTrustDomain(id.TrustDomain())
	if err != nil {
		return spiffeid.ID{}, validity{}, fmt.Errorf("%w %s: %w", ErrNoBundle, id.TrustDomain(), err)
	}
	_, paths, err := x509svid.Verify(chain, bundle, x509svid.WithTime(now))
	if err != nil {
		return spiffeid.ID{}, validity{}, refusal(chain, bundle, now, err)
	}
	v := validityOf(paths[0])
	for _, path := range paths[1:] {
		if w := validityOf(path); w.notAfter.After(v.notAfter) {
			v = w
		}
	}
	return id, v, nil
}

// maxRSA is the largest RSA key that anything is verified by, bits, as in crypto/tls:
// one that fills a message costs seconds each time.
const maxRSA = 8192

// rsaBits is the size of a certificate's key, 0 where it is not RSA's.
func rsaBits(c *x509.Certificate) int {
	if key, ok := c.PublicKey.(*rsa.PublicKey); ok {
		return key.N.BitLen()
	}
	return 0
}

// checkSVID applies the rules of the X.509-SVID specification (sections 2 to 4) to
// the leaf alone.
func checkSVID(chain []*x509.Certificate) (spiffeid.ID, error) {
	if len(chain) == 0 {
		return spiffeid.ID{}, fmt.Errorf("%w: no certificate", ErrMalformedSVID)
	}
	if len(chain) > maxChain {
		return spiffeid.ID{}, fmt.Errorf("%w: %d certificates, at most %d", ErrMalformedSVID, len(chain), maxChain)
	}
	for _, c := range chain {
		// TLS refuses such keys itself, but chains come in messages, too.
		if n := rsaBits(c); n > maxRSA {
			return spiffeid.ID{}, fmt.Errorf("%w: an RSA key of %d bits, at most %d", ErrMalformedSVID, n, maxRSA)
		}
	}
	leaf := chain[0]
	id, err := idOf(leaf)
	if err != nil {
		return spiffeid.ID{}, err
	}
	switch ku := leaf.KeyUsage; {
	case leaf.IsCA:
		err = fmt.Errorf("%w: %s is a CA", ErrMalformedSVID, id)
	case ku&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		err = fmt.Errorf("%w: %s may sign certificates", ErrMalformedSVID, id)
	case ku&x509.KeyUsageDigitalSignature == 0:
		err = fmt.Errorf("%w: %s lacks the key usage digitalSignature", ErrMalformedSVID, id)
	case len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) > 0 &&
		!(slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth) &&
			slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth)):
		err = fmt.Errorf("%w: %s lacks the extended key usages serverAuth and clientAuth", ErrMalformedSVID, id)
	}
	return id, err
}

// refusal finds the reason in a failed verification. crypto/x509 looks at dates
// before signatures, and hides an intermediate's date altogether, so that "expired"
// could be said of a forgery; here it is said only of a chain that did verify while
// all of it was valid.
func refusal(chain []*x509.Certificate, bundle *x509bundle.Bundle, now time.Time, cause error) error {
	if errors.As(cause, new(x509.UnhandledCriticalExtension)) {
		if _, err := ClaimsOf(chain[0]); err != nil {
			return err
		}
	}
	v := validityOf(chain)
	if !v.contains(now) && !v.notBefore.After(v.notAfter) {
		for _, then := range [...]time.Time{v.notAfter, v.notBefore} {
			if _, _, err := x509svid.Verify(chain, bundle, x509svid.WithTime(then)); err == nil {
				return fmt.Errorf("%w: from %s to %s", ErrExpired,
					v.notBefore.UTC().Format(time.RFC3339), v.notAfter.UTC().Format(time.RFC3339))
			}
		}
	}
	var invalid x509.CertificateInvalidError
	if errors.As(cause, &invalid) {
		switch invalid.Reason {
		case x509.CANotAuthorizedForThisName, x509.NameConstraintsWithoutSANs, x509.UnconstrainedName:
			return ErrNameConstrained
		case x509.NotAuthorizedToSign:
			return ErrNotCA
		}
	}
	if signedByNoCA(chain, bundle, now) {
		return ErrNotCA
	}
	return fmt.Errorf("%w: %s", ErrUntrusted, describe(cause))
}

// signedByNoCA tells whether a certificate of the chain was signed with the key of
// another that is good by itself, but no CA. crypto/x509 only says that there is no
// path. It costs a signature for each such certificate, and a path for one that signed.
func signedByNoCA(chain []*x509.Certificate, bundle *x509bundle.Bundle, now time.Time) bool {
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, root := range bundle.X509Authorities() {
		roots.AddCert(root)
	}
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	for i, signer := range chain[1:] {
		child := chain[i]
		if maySign(signer) || !bytes.Equal(child.RawIssuer, signer.RawSubject) ||
			signer.CheckSignature(child.SignatureAlgorithm, child.RawTBSCertificate, child.Signature) != nil {
			continue
		}
		_, err := signer.Verify(x509.VerifyOptions{
			Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
		})
		return err == nil
	}
	return false
}

func maySign(c *x509.Certificate) bool {
	return c.BasicConstraintsValid && c.IsCA && (c.KeyUsage == 0 || c.KeyUsage&x509.KeyUsageCertSign != 0)
}

// describe says why a chain does not verify, in words of ours. Those of crypto/x509
// quote what stands in the certificates, a stranger's choice of up to hundreds of
// kilobytes, which would go on into logs, records and verdicts.
func describe(cause error) string {
	var (
		unknown  x509.UnknownAuthorityError
		invalid  x509.CertificateInvalidError
		critical x509.UnhandledCriticalExtension
	)
	switch {
	case errors.As(cause, &unknown):
		return "no path to a root of the trust domain"
	case errors.As(cause, &critical):
		return "unknown critical extension"
	case errors.As(cause, &invalid):
		return describeInvalid(invalid.Reason)
	}
	return "no valid path to a root of the trust domain"
}

func describeInvalid(r x509.InvalidReason) string {
	switch r {
	case x509.Expired:
		return "a certificate of the chain is not valid at this time"
	case x509.TooManyIntermediates:
		return "more intermediates than a certificate of the chain allows"
	case x509.TooManyConstraints:
		return "too many name constraints"
	case x509.IncompatibleUsage, x509.CANotAuthorizedForExtKeyUsage:
		return "a certificate of the chain is not for this use"
	case x509.NameMismatch:
		return "issuer and subject do not match"
	}
	return "no valid path to a root of the trust domain"
}

// validity is when all certificates of a path are valid; both ends included, as in
// RFC 5280.
type validity struct {
	notBefore, notAfter time.Time
}

func (v validity) contains(t time.Time) bool {
	return !t.Before(v.notBefore) && !t.After(v.notAfter)
}

func validityOf(path []*x509.Certificate) validity {
	v := validity{path[0].NotBefore, path[0].NotAfter}
	for _, c := range path[1:] {
		if c.NotBefore.After(v.notBefore) {
			v.notBefore = c.NotBefore
		}
		if c.NotAfter.Before(v.notAfter) {
			v.notAfter = c.NotAfter
		}
	}
	return v
}
