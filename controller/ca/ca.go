// Package ca is the certificate authority of one trust domain: a root and an
// intermediate, ECDSA P-256, and the X.509-SVIDs that the intermediate signs.
//
// What it signs is decided by its callers; its form is decided here, by the SPIFFE
// X.509-SVID document: exactly one URI SAN, key usage digitalSignature, never a CA.
// Of a certificate request only the public key is used.
//
// The private keys lie in the store sealed under the operator's key file (package
// seal), never in plain text. The root's is unsealed only to sign an intermediate.
package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/controller/seal"
	"github.com/symbolon/symbolon/controller/store"
)

const (
	rootValidity         = 10 * 365 * 24 * time.Hour
	intermediateValidity = 365 * 24 * time.Hour
	// renewBefore is what is left of an intermediate when the next one is made; an
	// SVID never outlives its intermediate.
	renewBefore = 90 * 24 * time.Hour
	// backdate is how far clocks of hosts may be behind ours.
	backdate = time.Minute

	keyRoot         = "ca/root"
	keyIntermediate = "ca/intermediate"
)

// ErrTrustDomain: the store holds the CA of another trust domain.
var ErrTrustDomain = errors.New("ca: the store belongs to another trust domain")

// Config is what a CA is made of.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// KeyFile seals the private keys; made if the CA is made.
	KeyFile string
	// UpstreamCert and UpstreamKey, if not empty, name the operator's own CA, PEM, which
	// is taken over if the CA is made.
	UpstreamCert, UpstreamKey string
	// NextCert and NextKey, if not empty, name the operator's CA that is to be the next
	// one; read by StartRoot.
	NextCert, NextKey string
	// External, if not nil, signs our intermediates: there is no root of ours.
	External External
	// TTL is how long an SVID is valid, RotateEvery how soon its holder should ask
	// for the next one.
	TTL, RotateEvery time.Duration
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// CA signs. Safe for concurrent use.
type CA struct {
	cfg   Config
	store store.Store
	seal  *seal.Key

	mu           sync.Mutex
	footing      *footing
	intermediate *signer
	replaced     replacement
	external     externalRecord // zero without an External

	// renewing orders the requests to External; it is taken before mu.
	renewing sync.Mutex

	validity validity
}

// signer is a CA certificate with its key.
type signer struct {
	cert *x509.Certificate
	key  crypto.Signer
	// above are the certificates from the issuer of cert to the root; none: it is one.
	above []*x509.Certificate
	// trustDomain is whose CA it is, where cert does not say.
	trustDomain string
}

// sealedSigner is a signer in the store.
type sealedSigner struct {
	Certificate []byte   `json:"certificate"` // DER
	Above       [][]byte `json:"above,omitempty"`
	TrustDomain string   `json:"trust_domain,omitempty"`
	Key         []byte   `json:"key"` // PKCS#8, sealed under the store's key, bound to all the others
}

// Open loads the trust domain's CA from the store, or makes it if the store has
// none. Errors: ErrTrustDomain; seal.ErrKeyFile, seal.ErrWrongKey.
func Open(ctx context.Context, st store.Store, cfg Config) (*CA, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	c := &CA{cfg: cfg, store: st}
	if cfg.External != nil {
		if err := c.openValidity(ctx); err != nil {
			return nil, err
		}
		return c, c.openExternal(ctx)
	}
	if err := notExternal(ctx, st); err != nil {
		return nil, err
	}
	_, err := st.Get(ctx, keyRoot)
	switch {
	case errors.Is(err, store.ErrNotFound):
		if c.seal, err = seal.LoadOrCreate(cfg.KeyFile); err != nil {
			return nil, fmt.Errorf("ca: %w", err)
		}
		if err := c.create(ctx); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, fmt.Errorf("ca: %w", err)
	default:
		// Never a new one here: it could not open what the old one sealed.
		c.seal, err = seal.Load(cfg.KeyFile)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("ca: the CA's keys are sealed with %s, which is not there; put it back: %w", cfg.KeyFile, err)
		}
		if err != nil {
			return nil, fmt.Errorf("ca: %w", err)
		}
	}
	root, err := c.load(ctx, keyRoot)
	if err != nil {
		return nil, err
	}
	if td := trustDomainOf(root); td != cfg.TrustDomain.IDString() {
		return nil, fmt.Errorf("%w: it is %s, the configuration says %s; set trust_domain back, or give another data_dir", ErrTrustDomain, td, cfg.TrustDomain.IDString())
	}
	record, err := c.loadRootRecord(ctx)
	if err != nil {
		return nil, err
	}
	if c.footing, err = newFooting(root, record); err != nil {
		return nil, err
	}
	if err := c.checkUpstream(root, record); err != nil {
		return nil, err
	}
	if c.intermediate, err = c.load(ctx, keyIntermediate); err != nil {
		return nil, err
	}
	if err := errors.Join(c.openValidity(ctx), c.openReplacement(ctx)); err != nil {
		return nil, err
	}
	if err := c.Renew(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

func trustDomainOf(root *signer) string {
	if root.trustDomain != "" {
		return root.trustDomain
	}
	if len(root.cert.URIs) != 1 {
		return ""
	}
	return root.cert.URIs[0].String()
}

// create stores a new root and intermediate, unless somebody else was first.
func (c *CA) create(ctx context.Context) error {
	makeRoot := func() (*signer, error) { return c.newRoot(false) }
	if c.cfg.UpstreamCert != "" {
		makeRoot = func() (*signer, error) { return c.readUpstream("ca.upstream", c.cfg.UpstreamCert, c.cfg.UpstreamKey) }
	}
	root, err := makeRoot()
	if err != nil {
		return err
	}
	intermediate, err := c.newIntermediate(root)
	if err != nil {
		return err
	}
	ops, err := c.puts(map[string]*signer{keyRoot: root, keyIntermediate: intermediate})
	if err != nil {
		return err
	}
	if _, _, err := c.store.Txn(ctx, []store.Cond{{Key: keyRoot}}, ops); err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	return nil
}

// Renew replaces the intermediate if it is near its end. Call it now and then; with an
// External it may wait for that.
func (c *CA) Renew(ctx context.Context) error {
	if c.cfg.External != nil {
		c.mu.Lock()
		at := c.externalRenewal()
		c.mu.Unlock()
		if c.cfg.Now().Before(at) {
			return nil
		}
		return c.renewExternal(ctx, "")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if at := c.renewal(); at.IsZero() || c.cfg.Now().Before(at) {
		return nil
	}
	_, err := c.replace(ctx, "")
	return err
}

// puts store signers by their names.
func (c *CA) puts(signers map[string]*signer) ([]store.Op, error) {
	var ops []store.Op
	for name, s := range signers {
		packed, err := c.pack(name, s)
		if err != nil {
			return nil, err
		}
		ops = append(ops, store.Put(name, packed))
	}
	return ops, nil
}

func (c *CA) pack(name string, s *signer) ([]byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(s.key)
	if err != nil {
		return nil, fmt.Errorf("ca: %s: %w", name, err)
	}
	defer clear(key)
	sealed, err := c.seal.Seal(name, key, s.bound())
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	packed := sealedSigner{Certificate: s.cert.Raw, TrustDomain: s.trustDomain, Key: sealed}
	for _, cert := range s.above {
		packed.Above = append(packed.Above, cert.Raw)
	}
	return json.Marshal(packed)
}

func (c *CA) load(ctx context.Context, name string) (*signer, error) {
	kv, err := c.store.Get(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	var packed sealedSigner
	if err := json.Unmarshal(kv.Value, &packed); err != nil {
		return nil, fmt.Errorf("ca: %s: %w", name, err)
	}
	cert, err := x509.ParseCertificate(packed.Certificate)
	if err != nil {
		return nil, fmt.Errorf("ca: %s: %w", name, err)
	}
	s := &signer{cert: cert, trustDomain: packed.TrustDomain}
	for _, der := range packed.Above {
		above, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("ca: %s: %w", name, err)
		}
		s.above = append(s.above, above)
	}
	der, err := c.seal.Open(name, packed.Key, s.bound())
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("ca: %s: %w", name, err)
	}
	var ok bool
	if s.key, ok = key.(crypto.Signer); !ok || !sameKey(s.key.Public(), cert.PublicKey) {
		return nil, fmt.Errorf("ca: %s: the key is not the certificate's", name)
	}
	return s, nil
}

// Roots are the trust domain's, which every host trusts; the one that signs first.
func (c *CA) Roots() []*x509.Certificate {
	roots, _ := c.Trust()
	return roots
}

// Bundle is the same in go-spiffe's form.
func (c *CA) Bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(c.cfg.TrustDomain, c.Roots())
}

// Pin is the SHA-256 of the SubjectPublicKeyInfo of the root that signs, 64 hex digits:
// what a join token carries (RFC 7469, section 2.4, in hex).
func (c *CA) Pin() string { return Pin(c.stands().root) }

// Pin is the pin of any certificate's key.
func Pin(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// NotAfter is when the root ends that signs.
func (c *CA) NotAfter() time.Time { return c.stands().root.NotAfter }

func newKey() (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	return key, nil
}
