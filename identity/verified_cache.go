package identity

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
)

// VerifiedCache remembers chains that Verify accepted, so that the second
// connection between two workloads costs a hash and not the signatures of a
// chain. Refusals are not remembered: they must not push good peers out.
// Safe for concurrent use.
type VerifiedCache struct {
	seen *lru.Cache[[sha256.Size]byte, verified]
}

type verified struct {
	principal Principal
	validity  validity
}

// NewVerifiedCache holds up to size chains, the recently used ones.
func NewVerifiedCache(size int) *VerifiedCache {
	seen, err := lru.New[[sha256.Size]byte, verified](max(size, 1))
	if err != nil {
		panic(err) // only for a size below one
	}
	return &VerifiedCache{seen}
}

// Verify is the function of that name, with the same answers. What was verified
// holds while every certificate of the path is valid and the trust domain's bundle
// has the same roots; the answer never outlives either.
func (c *VerifiedCache) Verify(chain []*x509.Certificate, bundles x509bundle.Source, now time.Time) (Principal, error) {
	id, err := checkSVID(chain)
	if err != nil {
		return Principal{}, err
	}
	if bundles == nil {
		return Principal{}, fmt.Errorf("%w %s", ErrNoBundle, id.TrustDomain())
	}
	bundle, err := bundles.GetX509BundleForTrustDomain(id.TrustDomain())
	if err != nil {
		return Principal{}, fmt.Errorf("%w %s: %w", ErrNoBundle, id.TrustDomain(), err)
	}
	// Sets and bundles can be changed in place, so their contents are the key, not
	// their addresses. Key and verification must see the same roots.
	bundle = bundle.Clone()
	k := verifiedKey(chain, bundle.X509Authorities())
	if v, ok := c.seen.Get(k); ok && v.validity.contains(now) {
		return v.principal, nil
	}
	p, v, err := verify(chain, bundle, now)
	if err != nil {
		c.seen.Remove(k)
		return Principal{}, err
	}
	c.seen.Add(k, verified{p, v})
	return p, nil
}

// Len is how many chains are remembered.
func (c *VerifiedCache) Len() int { return c.seen.Len() }

func verifiedKey(lists ...[]*x509.Certificate) [sha256.Size]byte {
	h := sha256.New()
	var n [4]byte
	count := func(i int) {
		binary.BigEndian.PutUint32(n[:], uint32(i))
		h.Write(n[:])
	}
	for _, certs := range lists {
		count(len(certs))
		for _, c := range certs {
			count(len(c.Raw))
			h.Write(c.Raw)
		}
	}
	return [sha256.Size]byte(h.Sum(nil))
}
