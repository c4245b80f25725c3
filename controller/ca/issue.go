package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/identity"
)

// maxCSR is far above a request for any key that is accepted, bytes.
const maxCSR = 8 << 10

var (
	// ErrCSR: the request does not parse, is not signed by its own key, or its key is
	// of a kind that is not accepted.
	ErrCSR = errors.New("certificate request refused")
	// ErrID: not an ID that this CA signs.
	ErrID = errors.New("SPIFFE ID refused")
	// ErrClaims: the claims do not fit into a certificate.
	ErrClaims = errors.New("claims refused")
)

// HostID and ControllerID are the reserved IDs of a trust domain.
func HostID(td spiffeid.TrustDomain, id string) (spiffeid.ID, error) {
	return spiffeid.FromSegments(td, identity.ReservedPath, "host", id)
}

// ControllerID is the ID that the controller serves by.
func ControllerID(td spiffeid.TrustDomain) spiffeid.ID {
	return spiffeid.RequireFromSegments(td, identity.ReservedPath, "controller")
}

// Issued is a signed certificate. Immutable.
type Issued struct {
	ID spiffeid.ID
	// Chain is leaf, then intermediates; without the root.
	Chain [][]byte
	Leaf  *x509.Certificate
	// RotateAt is when its holder should ask for the next.
	RotateAt time.Time
}

// PublicKey takes the one thing that is used of a DER PKCS#10 request: its public
// key, ECDSA on P-256 or P-384 or Ed25519, proven to be held by its signature.
// Errors: ErrCSR.
func PublicKey(csr []byte) (crypto.PublicKey, error) {
	if len(csr) > maxCSR {
		return nil, fmt.Errorf("%w: %d bytes, the limit is %d", ErrCSR, len(csr), maxCSR)
	}
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCSR, err)
	}
	switch k := req.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
			return nil, fmt.Errorf("%w: curve %s; use P-256 or P-384", ErrCSR, k.Curve.Params().Name)
		}
	case ed25519.PublicKey:
	default:
		return nil, fmt.Errorf("%w: %s key; use ECDSA (P-256, P-384) or Ed25519", ErrCSR, req.PublicKeyAlgorithm)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCSR, err)
	}
	return req.PublicKey, nil
}

// IssueWorkload signs the SVID of a workload on a host, with its claims.
// Errors: ErrID, ErrClaims.
func (c *CA) IssueWorkload(pub crypto.PublicKey, id spiffeid.ID, claims identity.Attributes, hostID string) (*Issued, error) {
	if _, err := identity.NewPrincipal(id, nil); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrID, err)
	}
	t := c.leaf(id)
	// Also where there are none: that is then known, and nobody looks further.
	ext, err := identity.MarshalClaims(claims)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrClaims, err)
	}
	t.ExtraExtensions = []pkix.Extension{ext}
	t.SerialNumber = identity.NewSerial(hostID)
	return c.sign(pub, id, t)
}

// IssueHost signs the SVID by which a host speaks to the controller. Errors: ErrID.
func (c *CA) IssueHost(pub crypto.PublicKey, hostID string) (*Issued, error) {
	id, err := HostID(c.cfg.TrustDomain, hostID)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrID, err)
	}
	t := c.leaf(id)
	t.SerialNumber = identity.NewSerial(hostID)
	return c.sign(pub, id, t)
}

// IssueController signs the controller's own server certificate: its SPIFFE ID,
// and names and addresses for clients that know no SPIFFE.
func (c *CA) IssueController(pub crypto.PublicKey, names []string, addresses []net.IP) (*Issued, error) {
	id := ControllerID(c.cfg.TrustDomain)
	t := c.leaf(id)
	t.DNSNames, t.IPAddresses = names, addresses
	return c.sign(pub, id, t)
}

func (c *CA) leaf(id spiffeid.ID) *x509.Certificate {
	now := c.cfg.Now()
	return &x509.Certificate{
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(c.cfg.TTL),
		URIs:                  []*url.URL{id.URL()},
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
}

func (c *CA) sign(pub crypto.PublicKey, id spiffeid.ID, t *x509.Certificate) (*Issued, error) {
	if !id.MemberOf(c.cfg.TrustDomain) {
		return nil, fmt.Errorf("%w: %s is not of %s", ErrID, id, c.cfg.TrustDomain)
	}
	c.mu.Lock()
	by, on := c.intermediate, c.footing
	c.mu.Unlock()
	if t.NotAfter.After(by.cert.NotAfter) {
		t.NotAfter = by.cert.NotAfter
	}
	leaf, err := create(t, by.cert, pub, by.key)
	if err != nil {
		return nil, err
	}
	return &Issued{
		ID:       id,
		Chain:    append([][]byte{leaf.Raw, by.cert.Raw}, on.presented...),
		Leaf:     leaf,
		RotateAt: c.cfg.Now().Add(c.cfg.RotateEvery),
	}, nil
}

// newRoot makes one of our own. A further one has its key's identifier in its name: not
// every verifier looks beyond names, and the two are believed at the same time.
func (c *CA) newRoot(further bool) (*signer, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	what := "root"
	if further {
		id, err := keyID(key.Public())
		if err != nil {
			return nil, err
		}
		what += " " + hex.EncodeToString(id[:4])
	}
	t := c.authority(what, rootValidity)
	t.URIs = []*url.URL{c.cfg.TrustDomain.ID().URL()}
	cert, err := create(t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &signer{cert: cert, key: key}, nil
}

// newIntermediate has root sign one, and tries out that what it will sign verifies: an
// operator's CA may not be able to, or not any more. Errors: ErrUpstream.
func (c *CA) newIntermediate(root *signer) (*signer, error) {
	t := c.authority("intermediate", intermediateValidity)
	if t.NotAfter.After(root.cert.NotAfter) {
		t.NotAfter = root.cert.NotAfter
	}
	t.MaxPathLen, t.MaxPathLenZero = 0, true
	// It can vouch for nobody outside its trust domain, should its key get away.
	t.PermittedURIDomains = []string{c.cfg.TrustDomain.Name()}
	t.PermittedDNSDomainsCritical = true // of the whole extension, despite its name
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	cert, err := create(t, root.cert, key.Public(), root.key)
	if err != nil {
		return nil, err
	}
	next := &signer{cert: cert, key: key}
	if err := c.tryOut(root, next); err != nil {
		return nil, err
	}
	return next, nil
}

func (c *CA) authority(what string, validity time.Duration) *x509.Certificate {
	now := c.cfg.Now()
	return &x509.Certificate{
		Subject:               pkix.Name{Organization: []string{"Symbolon"}, CommonName: c.cfg.TrustDomain.Name() + " " + what},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(validity),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
}

// create adds what every certificate has: a random serial number, unless it has one,
// and a key identifier.
func create(t, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	if t.SerialNumber == nil {
		t.SerialNumber = identity.NewSerial("")
	}
	var err error
	if t.SubjectKeyId, err = keyID(pub); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, pub, key)
	if err != nil {
		return nil, fmt.Errorf("ca: sign: %w", err)
	}
	return x509.ParseCertificate(der)
}

// keyID is 160 bits of the SHA-256 of a key's SubjectPublicKeyInfo.
func keyID(pub crypto.PublicKey) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	sum := sha256.Sum256(spki)
	return sum[:20], nil
}
