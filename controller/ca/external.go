package ca

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"slices"
	"time"

	"github.com/symbolon/symbolon/controller/seal"
	"github.com/symbolon/symbolon/controller/store"
)

// External signs our intermediates in the place of a root whose key we have: a SPIRE server.
type External interface {
	// Sign makes a CA certificate for a request's key, valid for about as long as is
	// preferred. chain is that certificate and those above it, below the roots; roots are
	// all of the trust domain's.
	Sign(ctx context.Context, csr []byte, preferred time.Duration) (chain, roots []*x509.Certificate, err error)
	// String names it.
	String() string
}

const (
	// keyExternal is not under ca/, where keys lie.
	keyExternal = "ca-external"
	// externalTTLs is how many times as long as an SVID an intermediate should live: it is
	// replaced at half of that, and signs nothing that outlives it.
	externalTTLs = 4
)

// externalRecord is the trust domain's roots, as who signs for us has said last.
type externalRecord struct {
	TrustDomain string   `json:"trust_domain"`
	Roots       [][]byte `json:"roots"` // DER
	// Version numbers the sets of roots.
	Version uint64 `json:"version"`
}

func (r externalRecord) put() (store.Op, error) {
	v, err := json.Marshal(r)
	if err != nil {
		return store.Op{}, fmt.Errorf("ca: %w", err)
	}
	return store.Put(keyExternal, v), nil
}

func (r externalRecord) same(roots []*x509.Certificate) bool {
	has := func(c *x509.Certificate) bool {
		return slices.ContainsFunc(r.Roots, func(der []byte) bool { return string(der) == string(c.Raw) })
	}
	return len(roots) == len(r.Roots) && !slices.ContainsFunc(roots, func(c *x509.Certificate) bool { return !has(c) })
}

// notExternal refuses to open a store whose intermediate another CA has signed as one with
// a root of its own.
func notExternal(ctx context.Context, st store.Store) error {
	_, err := st.Get(ctx, keyExternal)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil
	case err != nil:
		return fmt.Errorf("ca: %w", err)
	}
	return fmt.Errorf("%w: in this store SPIRE signs; put ca.upstream_spire_workload_api and ca.upstream_spire_server back, or give another data_dir", ErrUpstream)
}

// openExternal loads what was signed last, or has it signed if the store has nothing that
// is valid.
func (c *CA) openExternal(ctx context.Context) (err error) {
	if _, err := c.store.Get(ctx, keyRoot); err == nil {
		return fmt.Errorf("%w: the store has a CA of its own already, whose SVIDs no one below %s believes; give another data_dir, and enrol the hosts anew", ErrUpstream, c.cfg.External)
	} else if !errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("ca: %w", err)
	}
	kv, err := c.store.Get(ctx, keyExternal)
	if errors.Is(err, store.ErrNotFound) {
		if c.seal, err = seal.LoadOrCreate(c.cfg.KeyFile); err != nil {
			return fmt.Errorf("ca: %w", err)
		}
		return c.renewExternal(ctx, "")
	}
	if err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	if err := json.Unmarshal(kv.Value, &c.external); err != nil {
		return fmt.Errorf("ca: %s: %w", keyExternal, err)
	}
	if td := c.external.TrustDomain; td != c.cfg.TrustDomain.IDString() {
		return fmt.Errorf("%w: it is %s, the configuration says %s; set trust_domain back, or give another data_dir", ErrTrustDomain, td, c.cfg.TrustDomain.IDString())
	}
	if c.seal, err = seal.Load(c.cfg.KeyFile); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("ca: the CA's keys are sealed with %s, which is not there; put it back: %w", c.cfg.KeyFile, err)
	} else if err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	if c.intermediate, err = c.load(ctx, keyIntermediate); err != nil {
		return err
	}
	if c.footing, err = c.externalFooting(c.intermediate, c.external); err != nil {
		return err
	}
	if err := c.openReplacement(ctx); err != nil {
		return err
	}
	if !c.cfg.Now().Before(c.intermediate.cert.NotAfter) {
		return c.renewExternal(ctx, "")
	}
	return nil
}

// externalFooting stands on that of the roots which the intermediate leads to. If it leads to none, they
// were replaced under it: nothing that it signs is believed, and it is to be replaced at once.
func (c *CA) externalFooting(intermediate *signer, record externalRecord) (*footing, error) {
	f := &footing{upstream: true, record: rootRecord{Version: record.Version}, signerEnd: intermediate.end()}
	for _, der := range record.Roots {
		root, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("ca: %s: %w", keyExternal, err)
		}
		if f.root == nil && c.try(intermediate, intermediate.above, root) == nil {
			f.root = root
		} else {
			f.others = append(f.others, root)
		}
	}
	if f.root == nil {
		if len(f.others) == 0 {
			return nil, fmt.Errorf("ca: %s: no roots", keyExternal)
		}
		f.root, f.others, f.stranded = f.others[0], f.others[1:], true
	}
	for _, cert := range intermediate.above {
		f.presented = append(f.presented, cert.Raw)
	}
	f.anchors = [][]byte{f.root.Raw}
	return f, nil
}

// renewExternal has another intermediate signed, which is durable before it is in force. It
// holds no lock while it waits: the one before signs on.
func (c *CA) renewExternal(ctx context.Context, by string) error {
	c.renewing.Lock()
	defer c.renewing.Unlock()
	next, roots, err := c.askExternal(ctx)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	record := c.recordOf(roots)
	stands, err := c.externalFooting(next, record)
	if err != nil {
		return err
	}
	if stands.stranded {
		return fmt.Errorf("%w: what %s has signed leads to none of its roots, or may not sign SVIDs of %s", ErrUpstream, c.cfg.External, c.cfg.TrustDomain)
	}
	packed, err := c.pack(keyIntermediate, next)
	if err != nil {
		return err
	}
	op, err := record.put()
	if err != nil {
		return err
	}
	ops := []store.Op{op, store.Put(keyIntermediate, packed)}
	replaced := c.replaced
	if c.intermediate != nil {
		replaced = replacement{Time: c.cfg.Now(), By: by, Until: c.ValidUntil()}
		if end := c.intermediate.cert.NotAfter; end.Before(replaced.Until) {
			replaced.Until = end
		}
		note, err := json.Marshal(replaced)
		if err != nil {
			return fmt.Errorf("ca: %w", err)
		}
		ops = append(ops, store.Put(keyReplaced, note))
	}
	if _, _, err := c.store.Txn(ctx, nil, ops); err != nil {
		return fmt.Errorf("ca: replace the intermediate: %w", err)
	}
	c.intermediate, c.replaced, c.footing, c.external = next, replaced, stands, record
	return nil
}

// askExternal checks the answer as a stranger's.
func (c *CA) askExternal(ctx context.Context) (*signer, []*x509.Certificate, error) {
	key, err := newKey()
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{c.cfg.TrustDomain.ID().URL()}}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("ca: %w", err)
	}
	chain, roots, err := c.cfg.External.Sign(ctx, csr, externalTTLs*c.cfg.TTL)
	if err != nil {
		return nil, nil, fmt.Errorf("ca: %w", err)
	}
	if len(chain) == 0 || len(roots) == 0 || !sameKey(key.Public(), chain[0].PublicKey) {
		return nil, nil, fmt.Errorf("%w: %s has signed for another key", ErrUpstream, c.cfg.External)
	}
	for _, cert := range slices.Concat(chain, roots) {
		if !cert.IsCA || !cert.BasicConstraintsValid || cert.KeyUsage != 0 && cert.KeyUsage&x509.KeyUsageCertSign == 0 {
			return nil, nil, fmt.Errorf("%w: %q, which %s gives, is no CA certificate", ErrUpstream, cert.Subject, c.cfg.External)
		}
	}
	return &signer{cert: chain[0], key: key, above: chain[1:], trustDomain: c.cfg.TrustDomain.IDString()}, roots, nil
}

// recordOf is the record with these roots; its number grows if they are others. The lock is
// held.
func (c *CA) recordOf(roots []*x509.Certificate) externalRecord {
	if c.external.same(roots) {
		return c.external
	}
	next := externalRecord{TrustDomain: c.cfg.TrustDomain.IDString(), Version: max(c.external.Version+1, uint64(max(c.cfg.Now().Unix(), 0)))}
	for _, root := range roots {
		next.Roots = append(next.Roots, root.Raw)
	}
	return next
}

// SetRoots replaces what hosts are to believe by what the trust domain's authority says, and
// tells whether that is something else. What leads to none of them is to be renewed: see
// Renew. It is for a CA with an External.
func (c *CA) SetRoots(ctx context.Context, roots []*x509.Certificate) (changed bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(roots) == 0 || c.external.same(roots) {
		return false, nil
	}
	record := c.recordOf(roots)
	stands, err := c.externalFooting(c.intermediate, record)
	if err != nil {
		return false, err
	}
	op, err := record.put()
	if err != nil {
		return false, err
	}
	if _, _, err := c.store.Txn(ctx, nil, []store.Op{op}); err != nil {
		return false, fmt.Errorf("ca: roots: %w", err)
	}
	c.external, c.footing = record, stands
	return true, nil
}

// externalRenewal is when the intermediate is to be replaced: at half of its life. The lock
// is held.
func (c *CA) externalRenewal() time.Time {
	cert := c.intermediate.cert
	if c.footing.stranded {
		return cert.NotBefore
	}
	return cert.NotBefore.Add(cert.NotAfter.Sub(cert.NotBefore) / 2)
}
