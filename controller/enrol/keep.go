package enrol

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// ErrExpired: the kept SVID has ended; the host must enrol again.
var ErrExpired = errors.New("the kept host SVID has expired; enrol again with a new join token")

// kept is a credential as bytes.
type kept struct {
	HostID      string    `json:"host_id"`
	Namespace   string    `json:"namespace"`
	TrustDomain string    `json:"trust_domain"`
	Chain       [][]byte  `json:"chain"`
	Roots       [][]byte  `json:"roots"`
	Bundle      uint64    `json:"bundle_version,omitempty"`
	Key         []byte    `json:"key"` // PKCS#8
	RotateAt    time.Time `json:"rotate_at"`
}

// Marshal is the credential with its private key, for a place that is memory and
// nothing else: a host's key never touches a disk.
func (c *HostCredential) Marshal() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(c.key)
	if err != nil {
		return nil, fmt.Errorf("keep host credential: %w", err)
	}
	b, err := json.Marshal(kept{
		HostID: c.HostID, Namespace: c.Namespace, TrustDomain: c.TrustDomain.Name(),
		Chain: raw(c.Chain), Roots: raw(c.Roots), Bundle: c.BundleVersion, Key: der, RotateAt: c.RotateAt,
	})
	if err != nil {
		return nil, fmt.Errorf("keep host credential: %w", err)
	}
	return b, nil
}

func raw(certs []*x509.Certificate) [][]byte {
	var ders [][]byte
	for _, c := range certs {
		ders = append(ders, c.Raw)
	}
	return ders
}

// Unmarshal reads what Marshal wrote, and checks it as if it had just come from
// the controller. Errors: ErrExpired, ErrResponse, and others for what is no
// credential at all.
func Unmarshal(b []byte) (*HostCredential, error) {
	var k kept
	if err := json.Unmarshal(b, &k); err != nil {
		return nil, fmt.Errorf("kept host credential: %w", err)
	}
	private, err := x509.ParsePKCS8PrivateKey(k.Key)
	if err != nil {
		return nil, fmt.Errorf("kept host credential: %w", err)
	}
	ec, ok := private.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("kept host credential: a %T, want an ECDSA key", private)
	}
	td, err := spiffeid.TrustDomainFromString(k.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("kept host credential: %w", err)
	}
	c := &HostCredential{HostID: k.HostID, Namespace: k.Namespace, TrustDomain: td, BundleVersion: k.Bundle}
	if chain, err := parseAll(k.Chain); err == nil && len(chain) > 0 && time.Now().After(chain[0].NotAfter) {
		return nil, fmt.Errorf("%w (%s)", ErrExpired, chain[0].NotAfter.Format(time.RFC3339))
	}
	svid := &symbolonv1.IssuedSVID{Chain: k.Chain, RotateAt: timestamppb.New(k.RotateAt)}
	if err := c.install(svid, k.Roots, ec); err != nil {
		return nil, fmt.Errorf("kept host credential: %w", err)
	}
	return c, nil
}

// SVID is the host's own, as tunnels show it where a port has no workload.
func (c *HostCredential) SVID() (*identity.SVID, error) {
	return identity.NewHostSVID(c.Chain, c.key)
}
