package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/identity/token"
)

const (
	keyTokens = "ca/tokens"
	// tokenKeyLife is how long a key signs tokens before the next one does.
	tokenKeyLife = 30 * 24 * time.Hour
	// tokenKeyNotice is how long a key is announced before it signs: a host that has not
	// heard of it would refuse its tokens. No session lasts longer than a host's SVID.
	tokenKeyNotice = 24 * time.Hour
	// tokenKeyTail is how long a key stays announced after it has signed for the last time.
	tokenKeyTail = token.MaxLife + time.Hour
)

// TokenKeys sign what the controller says of workloads whose SVIDs are of other CAs
// (identity/token). They lie in the store sealed, as the CA's own. Safe for concurrent use.
type TokenKeys struct {
	ca *CA

	mu   sync.Mutex
	keys []tokenKey // by when they sign; never empty
	rev  int64
}

type tokenKey struct {
	key    *ecdsa.PrivateKey
	public *symbolonv1.TokenKey
	from   time.Time // it signs from here on, until the next one does
}

// sealedTokenKey is one in the store.
type sealedTokenKey struct {
	Public []byte    `json:"public"` // DER SubjectPublicKeyInfo
	Key    []byte    `json:"key"`    // PKCS#8, sealed, bound to Public
	From   time.Time `json:"from"`
}

// OpenTokenKeys loads the keys, or makes a first one.
func (c *CA) OpenTokenKeys(ctx context.Context) (*TokenKeys, error) {
	t := &TokenKeys{ca: c}
	err := t.load(ctx)
	if errors.Is(err, store.ErrNotFound) {
		var first tokenKey
		if first, err = newTokenKey(c.cfg.Now()); err != nil {
			return nil, err
		}
		// Whoever was first, its keys count.
		if err = t.save(ctx, []tokenKey{first}); err == nil {
			err = t.load(ctx)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("ca: token keys: %w", err)
	}
	_, err = t.Renew(ctx)
	return t, err
}

func newTokenKey(from time.Time) (tokenKey, error) {
	key, err := newKey()
	if err != nil {
		return tokenKey{}, err
	}
	public, err := announce(key)
	return tokenKey{key, public, from}, err
}

func announce(key *ecdsa.PrivateKey) (*symbolonv1.TokenKey, error) {
	id, err := token.Thumbprint(key.Public())
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	return &symbolonv1.TokenKey{Id: id, PublicKey: der}, nil
}

func (t *TokenKeys) load(ctx context.Context) error {
	kv, err := t.ca.store.Get(ctx, keyTokens)
	if err != nil {
		return err
	}
	var packed []sealedTokenKey
	if err := json.Unmarshal(kv.Value, &packed); err != nil {
		return err
	}
	var keys []tokenKey
	for _, p := range packed {
		der, err := t.ca.seal.Open(keyTokens, p.Key, p.Public)
		if err != nil {
			return err
		}
		key, err := x509.ParsePKCS8PrivateKey(der)
		clear(der)
		if err != nil {
			return err
		}
		ec, ok := key.(*ecdsa.PrivateKey)
		if !ok {
			return fmt.Errorf("%w: a %T", store.ErrCorrupt, key)
		}
		public, err := announce(ec)
		if err != nil {
			return err
		}
		keys = append(keys, tokenKey{ec, public, p.From})
	}
	if len(keys) == 0 {
		return fmt.Errorf("%w: no key", store.ErrCorrupt)
	}
	t.keys, t.rev = keys, kv.ModRevision
	return nil
}

// save stores keys, unless what is there is another than load has seen; then nothing
// happens.
func (t *TokenKeys) save(ctx context.Context, keys []tokenKey) error {
	var packed []sealedTokenKey
	for _, k := range keys {
		der, err := x509.MarshalPKCS8PrivateKey(k.key)
		if err != nil {
			return err
		}
		sealed, err := t.ca.seal.Seal(keyTokens, der, k.public.GetPublicKey())
		clear(der)
		if err != nil {
			return err
		}
		packed = append(packed, sealedTokenKey{Public: k.public.GetPublicKey(), Key: sealed, From: k.from})
	}
	b, err := json.Marshal(packed)
	if err != nil {
		return err
	}
	_, _, err = t.ca.store.Txn(ctx, []store.Cond{{Key: keyTokens, ModRevision: t.rev}}, []store.Op{store.Put(keyTokens, b)})
	return err
}

// Renew announces the next key in time, and drops those whose last token has ended.
// changed: hosts should hear of Public anew. Call it now and then.
func (t *TokenKeys) Renew(ctx context.Context) (changed bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.ca.cfg.Now()
	keys := slices.Clone(t.keys)
	if last := keys[len(keys)-1]; !now.Before(last.from.Add(tokenKeyLife - tokenKeyNotice)) {
		next, err := newTokenKey(now.Add(tokenKeyNotice))
		if err != nil {
			return false, err
		}
		keys = append(keys, next)
	}
	for len(keys) > 1 && !now.Before(keys[1].from.Add(tokenKeyTail)) {
		keys = keys[1:]
	}
	if len(keys) == len(t.keys) && keys[0].key == t.keys[0].key {
		return false, nil
	}
	if err = t.save(ctx, keys); err == nil {
		err = t.load(ctx)
	}
	if err != nil {
		return false, fmt.Errorf("ca: token keys: %w", err)
	}
	return true, nil
}

// Public is all keys that may have signed a valid token, or are about to.
func (t *TokenKeys) Public() []*symbolonv1.TokenKey {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []*symbolonv1.TokenKey
	for _, k := range t.keys {
		out = append(out, k.public)
	}
	return out
}

// Sign makes a token by the key whose turn it is. Errors: token.ErrInvalid.
func (t *TokenKeys) Sign(s *token.Statement) (string, error) {
	t.mu.Lock()
	now := t.ca.cfg.Now()
	by := t.keys[0]
	for _, k := range t.keys[1:] {
		if !k.from.After(now) {
			by = k
		}
	}
	t.mu.Unlock()
	return token.Sign(by.key, s)
}
