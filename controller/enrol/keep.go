package enrol

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/seal"
)

// sealName is the purpose that a kept credential is sealed for.
const sealName = "host credential"

// ErrExpired: the kept SVID has ended; the host must enrol again.
var ErrExpired = errors.New("the kept host SVID has expired; enrol again with a new join token")

// kept is the plain text inside the sealed file.
type kept struct {
	HostID      string    `json:"host_id"`
	Namespace   string    `json:"namespace"`
	TrustDomain string    `json:"trust_domain"`
	Chain       [][]byte  `json:"chain"`
	Roots       [][]byte  `json:"roots"`
	Key         []byte    `json:"key"` // PKCS#8
	RotateAt    time.Time `json:"rotate_at"`
}

// Save keeps the credential in a file, sealed, so that a proxy that restarts needs
// no new join token. It replaces the file as a whole, or not at all.
func (c *HostCredential) Save(path string, key *seal.Key) error {
	der, err := x509.MarshalPKCS8PrivateKey(c.key)
	if err != nil {
		return fmt.Errorf("keep host credential: %w", err)
	}
	plain, err := json.Marshal(kept{
		HostID: c.HostID, Namespace: c.Namespace, TrustDomain: c.TrustDomain.Name(),
		Chain: raw(c.Chain), Roots: raw(c.Roots), Key: der, RotateAt: c.RotateAt,
	})
	if err != nil {
		return fmt.Errorf("keep host credential: %w", err)
	}
	sealed, err := key.Seal(sealName, plain, nil)
	if err != nil {
		return fmt.Errorf("keep host credential: %w", err)
	}
	next := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".next")
	_ = os.Remove(next) // of a run that was killed between the two steps
	if err := seal.WriteFile(next, sealed); err != nil {
		return fmt.Errorf("keep host credential: %w", err)
	}
	if err := os.Rename(next, path); err != nil {
		return fmt.Errorf("keep host credential: %w", err)
	}
	return nil
}

func raw(certs []*x509.Certificate) [][]byte {
	var ders [][]byte
	for _, c := range certs {
		ders = append(ders, c.Raw)
	}
	return ders
}

// Load reads what Save kept, and checks it as if it had just come from the
// controller. Errors: fs.ErrNotExist, seal.ErrWrongKey, ErrExpired, ErrResponse.
func Load(path string, key *seal.Key) (*HostCredential, error) {
	sealed, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("kept host credential: %w", err)
	}
	plain, err := key.Open(sealName, sealed, nil)
	if err != nil {
		return nil, fmt.Errorf("kept host credential %s: %w", path, err)
	}
	var k kept
	if err := json.Unmarshal(plain, &k); err != nil {
		return nil, fmt.Errorf("kept host credential %s: %w", path, err)
	}
	private, err := x509.ParsePKCS8PrivateKey(k.Key)
	if err != nil {
		return nil, fmt.Errorf("kept host credential %s: %w", path, err)
	}
	ec, ok := private.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("kept host credential %s: a %T, want an ECDSA key", path, private)
	}
	td, err := spiffeid.TrustDomainFromString(k.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("kept host credential %s: %w", path, err)
	}
	c := &HostCredential{HostID: k.HostID, Namespace: k.Namespace, TrustDomain: td}
	if chain, err := parseAll(k.Chain); err == nil && len(chain) > 0 && time.Now().After(chain[0].NotAfter) {
		return nil, fmt.Errorf("%w (%s)", ErrExpired, chain[0].NotAfter.Format(time.RFC3339))
	}
	svid := &symbolonv1.IssuedSVID{Chain: k.Chain, RotateAt: timestamppb.New(k.RotateAt)}
	if err := c.install(svid, k.Roots, ec); err != nil {
		return nil, fmt.Errorf("kept host credential %s: %w", path, err)
	}
	return c, nil
}
