package token

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

const (
	// maxKeys bounds what a controller announces: the key in use, the last and the next.
	maxKeys = 16
	// maxOpened is how many tokens are remembered whose signature was checked.
	maxOpened = 1024
)

// Verifier believes one controller's tokens. Without keys it believes none. Safe for
// concurrent use.
type Verifier struct {
	mu       sync.Mutex
	audience spiffeid.TrustDomain
	keys     map[string]*ecdsa.PublicKey // never changed in place
	opened   *lru.Cache[[sha256.Size]byte, *opened]
}

// opened is a token whose signature is good, and its subject's attributes: one set for
// all connections that show it.
type opened struct {
	*Statement
	attributes identity.Attributes
}

// NewVerifier has no keys yet.
func NewVerifier() *Verifier { return &Verifier{} }

// Set replaces the controller's trust domain and keys. Tokens by a key that is not
// among them are no longer believed. Errors: ErrInvalid, and nothing has changed.
func (v *Verifier) Set(audience spiffeid.TrustDomain, keys []*symbolonv1.TokenKey) error {
	if len(keys) > maxKeys {
		return fmt.Errorf("%w: %d token keys, at most %d", ErrInvalid, len(keys), maxKeys)
	}
	next := make(map[string]*ecdsa.PublicKey, len(keys))
	for _, k := range keys {
		pub, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		if err != nil {
			return fmt.Errorf("%w: token key: %w", ErrInvalid, err)
		}
		ec, ok := pub.(*ecdsa.PublicKey)
		if !ok || ec.Curve != elliptic.P256() {
			return fmt.Errorf("%w: a token key that is not ECDSA P-256", ErrInvalid)
		}
		if id, err := Thumbprint(ec); err != nil || id != k.GetId() {
			return fmt.Errorf("%w: a token key under another's name", ErrInvalid)
		}
		next[k.GetId()] = ec
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.audience, v.keys, v.opened = audience, next, newOpened()
	return nil
}

func newOpened() *lru.Cache[[sha256.Size]byte, *opened] {
	c, err := lru.New[[sha256.Size]byte, *opened](maxOpened)
	if err != nil {
		panic(err) // only for a size below one
	}
	return c
}

// Verify is p with the claims of a token that it has shown; p is by its verified leaf.
// Errors: ErrInvalid, ErrWrongSubject, ErrWrongKey, ErrExpired.
func (v *Verifier) Verify(compact string, p *identity.Principal, leaf *x509.Certificate, now time.Time) (*identity.Principal, error) {
	t, audience, err := v.open(compact)
	if err != nil {
		return nil, err
	}
	if err := t.check(p.ID, leaf, audience, now); err != nil {
		return nil, err
	}
	out := *p
	out.Attributes, out.Issuer = t.attributes, identity.FromToken
	return &out, nil
}

// Take is a token that the controller has issued for svid, checked as a stranger's.
func (v *Verifier) Take(compact string, svid *identity.SVID, now time.Time) (*identity.Token, error) {
	p, err := v.Verify(compact, &svid.Principal, svid.Chain[0], now)
	if err != nil {
		return nil, err
	}
	t, _, err := v.open(compact)
	if err != nil {
		return nil, err
	}
	return &identity.Token{Compact: compact, NotAfter: t.Expiry, Principal: p}, nil
}

func (v *Verifier) open(compact string) (*opened, spiffeid.TrustDomain, error) {
	v.mu.Lock()
	audience, keys, seen := v.audience, v.keys, v.opened
	v.mu.Unlock()
	if len(keys) == 0 {
		return nil, audience, fmt.Errorf("%w: the controller has announced no key for tokens", ErrInvalid)
	}
	name := sha256.Sum256([]byte(compact))
	if t, ok := seen.Get(name); ok {
		return t, audience, nil
	}
	s, err := open(compact, keys)
	if err != nil {
		return nil, audience, err
	}
	t := &opened{s, (&identity.Principal{ID: s.Subject}).With(s.Claims, identity.FromToken).Attributes}
	seen.Add(name, t) // of the keys that it was opened by
	return t, audience, nil
}

// Signed tells whether one of the keys has signed a token, whatever it says of whom.
func (v *Verifier) Signed(compact string) bool {
	_, _, err := v.open(compact)
	return err == nil
}
