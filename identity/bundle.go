package identity

import (
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ErrMalformedBundle: what should be a trust domain's SPIFFE bundle is none, or is
// another domain's.
var ErrMalformedBundle = errors.New("malformed SPIFFE bundle")

const (
	// MaxBundleSize bounds a SPIFFE bundle, bytes of JSON: ten times what a domain has
	// that is in the midst of a rotation.
	MaxBundleSize = 64 << 10
	// MaxRoots is how many roots a trust domain may have: every handshake may have to
	// look at each.
	MaxRoots = 32
)

// ParseBundle reads a SPIFFE bundle (SPIFFE Trust Domain and Bundle, section 4), a
// JWK set that somebody outside wrote. It must hold roots, each a CA's, and none that
// names another trust domain than td: JSON alone does not say whose bundle it is.
// Errors: ErrMalformedBundle.
func ParseBundle(td spiffeid.TrustDomain, data []byte) (*spiffebundle.Bundle, error) {
	if len(data) > MaxBundleSize {
		return nil, fmt.Errorf("%w: it is larger than %d KiB", ErrMalformedBundle, MaxBundleSize>>10)
	}
	b, err := spiffebundle.Parse(td, data)
	if err != nil {
		// The library's words quote what it read, which is a stranger's.
		return nil, fmt.Errorf("%w: it is not a JWK set of X.509 and JWT authorities", ErrMalformedBundle)
	}
	return b, checkRoots(td, b.X509Authorities())
}

func checkRoots(td spiffeid.TrustDomain, roots []*x509.Certificate) error {
	switch n := len(roots); {
	case n == 0:
		return fmt.Errorf("%w: it has no X.509 authority (a key with use x509-svid)", ErrMalformedBundle)
	case n > MaxRoots:
		return fmt.Errorf("%w: it has %d X.509 authorities, at most %d", ErrMalformedBundle, n, MaxRoots)
	}
	for _, root := range roots {
		if !root.IsCA {
			return fmt.Errorf("%w: an X.509 authority is not a CA", ErrMalformedBundle)
		}
		// Every handshake that names the root would be verified by it.
		if n := rsaBits(root); n > maxRSA {
			return fmt.Errorf("%w: the RSA key of an X.509 authority has %d bits, at most %d", ErrMalformedBundle, n, maxRSA)
		}
		for _, uri := range root.URIs {
			if id, err := spiffeid.FromURI(uri); err == nil && id.TrustDomain() != td {
				return fmt.Errorf("%w: an X.509 authority is of %s, not of %s", ErrMalformedBundle, id.TrustDomain(), td)
			}
		}
	}
	return nil
}
