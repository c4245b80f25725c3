package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/symbolon/symbolon/controller/store"
)

// keyReplaced is not under ca/, where keys lie.
const keyReplaced = "ca-replaced"

// replacement is what is known of the last change of intermediates; zero: none yet.
type replacement struct {
	Time time.Time `json:"time"`
	// By is who asked for it; empty: it was near its end.
	By string `json:"by,omitempty"`
	// Until is when nothing is valid any more that an earlier one has signed.
	Until time.Time `json:"until"`
}

// replacedBy is that the intermediate is replaced now, and what stores it.
func (c *CA) replacedBy(by string) (replacement, store.Op, error) {
	r := replacement{Time: c.cfg.Now(), By: by, Until: c.ValidUntil()}
	note, err := json.Marshal(r)
	if err != nil {
		return r, store.Op{}, fmt.Errorf("ca: %w", err)
	}
	return r, store.Put(keyReplaced, note), nil
}

// Status is what signs.
type Status struct {
	// Root is what hosts trust; Upstream: it is the operator's, or above the operator's CA.
	Root     *x509.Certificate
	Upstream bool
	// Intermediate signs SVIDs. It is replaced at Renewal; zero: it ends with what has
	// signed it.
	Intermediate *x509.Certificate
	Renewal      time.Time
	// Replaced is when the intermediate was replaced last, By who asked for it; zero: never.
	Replaced time.Time
	By       string
	// EarlierUntil is when the last SVID of an earlier intermediate ends; zero if all have.
	EarlierUntil time.Time
	// Stranded: below an External, the intermediate leads to no root that is believed.
	Stranded bool
	// RootRotation is that of the root.
	RootRotation RootRotation
}

// Issuer names the intermediate that has signed: its key identifier, hexadecimal.
func (i *Issued) Issuer() string { return hex.EncodeToString(i.Leaf.AuthorityKeyId) }

// InForce tells whether the intermediate that has signed would do so now.
func (c *CA) InForce(i *Issued) bool { return c.inForce(i.Chain) }

func (c *CA) inForce(chain [][]byte) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return bytes.Equal(chain[1], c.intermediate.cert.Raw)
}

// Status says what signs now.
func (c *CA) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := Status{
		Root: c.footing.root, Upstream: c.footing.upstream, RootRotation: c.footing.status(), Stranded: c.footing.stranded, Intermediate: c.intermediate.cert, Renewal: c.renewal(),
		Replaced: c.replaced.Time, By: c.replaced.By,
	}
	if c.cfg.Now().Before(c.replaced.Until) {
		s.EarlierUntil = c.replaced.Until
	}
	return s
}

// renewal is when the intermediate is to be replaced; zero: there is no more to be had.
// The lock is held.
func (c *CA) renewal() time.Time {
	if c.cfg.External != nil {
		return c.externalRenewal()
	}
	end := c.intermediate.cert.NotAfter
	if last := c.footing.signerEnd; !last.After(end) || !c.cfg.Now().Before(last) {
		return time.Time{}
	}
	return end.Add(-renewBefore)
}

// RotateIntermediate makes another intermediate under the same root, at once; by is who
// wants that. What the old one has signed stays valid, and its key is gone.
// Errors: ErrUpstream: what the new one signs would not verify; the old one stays.
func (c *CA) RotateIntermediate(ctx context.Context, by string) (previous, next *x509.Certificate, err error) {
	if c.cfg.External != nil {
		previous = c.Status().Intermediate
		if err := c.renewExternal(ctx, by); err != nil {
			return nil, nil, err
		}
		return previous, c.Status().Intermediate, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	previous = c.intermediate.cert
	if next, err = c.replace(ctx, by); err != nil {
		return nil, nil, err
	}
	return previous, next, nil
}

// replace is durable before it is in force. The lock is held.
func (c *CA) replace(ctx context.Context, by string) (*x509.Certificate, error) {
	root, err := c.load(ctx, keyRoot)
	if err != nil {
		return nil, err
	}
	next, err := c.newIntermediate(root)
	if err != nil {
		return nil, err
	}
	ops, err := c.puts(map[string]*signer{keyIntermediate: next})
	if err != nil {
		return nil, err
	}
	replaced, note, err := c.replacedBy(by)
	if err != nil {
		return nil, err
	}
	ops = append(ops, note)
	stands := c.footing
	if record := stands.record; record.Phase == PhaseSign {
		record.Issuers = append(slices.Clone(record.Issuers), hex.EncodeToString(next.cert.SubjectKeyId))
		op, err := record.put()
		if err != nil {
			return nil, err
		}
		ops = append(ops, op)
		if stands, err = newFooting(root, record); err != nil {
			return nil, err
		}
	}
	if _, _, err := c.store.Txn(ctx, nil, ops); err != nil {
		return nil, fmt.Errorf("ca: replace the intermediate: %w", err)
	}
	c.intermediate, c.replaced, c.footing = next, replaced, stands
	return next.cert, nil
}

func (c *CA) openReplacement(ctx context.Context) error {
	kv, err := c.store.Get(ctx, keyReplaced)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	if err := json.Unmarshal(kv.Value, &c.replaced); err != nil {
		return fmt.Errorf("ca: %s: %w", keyReplaced, err)
	}
	return nil
}
