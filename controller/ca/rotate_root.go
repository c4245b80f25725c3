package ca

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/identity"
)

// keyNextRoot is where the next root lies until it signs.
const keyNextRoot = "ca/next-root"

// ErrPhase: the rotation of the root is not where that step can follow.
var ErrPhase = errors.New("ca: not now")

// The steps of a root's rotation, in their order; each is durable before it is in force,
// and taken again changes nothing (false). Who has to have heard of the one before is for
// the caller to see: this package knows no hosts. by is who wants it.

// StartRoot makes the next root, or takes the operator's from the files in the
// configuration: it is believed from then on, and signs nothing.
// Errors: ErrPhase (the new root signs already), ErrUpstream.
func (c *CA) StartRoot(ctx context.Context, by string) (changed bool, err error) {
	if c.cfg.External != nil {
		return false, fmt.Errorf("%w: the roots are those of %s, and are rotated there; this controller follows", ErrUpstream, c.cfg.External)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch c.footing.record.Phase {
	case PhasePublish:
		return false, nil
	case PhaseSign:
		return false, fmt.Errorf("%w: the new root signs already; finish this rotation before the next one", ErrPhase)
	}
	next, err := c.nextRoot()
	if err != nil {
		return false, err
	}
	// It signs nothing yet; that it could is found out here.
	if _, err := c.newIntermediate(next); err != nil {
		return false, err
	}
	ops, err := c.puts(map[string]*signer{keyNextRoot: next})
	if err != nil {
		return false, err
	}
	record := rootRecord{
		Version: c.nextVersion(), Phase: PhasePublish, Started: c.cfg.Now(), StartedBy: by,
		Other: next.root().Raw, Retired: c.footing.record.Retired,
	}
	return true, c.step(ctx, nil, record, c.intermediate, ops...)
}

// nextRoot is the operator's if the configuration names one.
func (c *CA) nextRoot() (*signer, error) {
	if c.cfg.NextCert == "" {
		if c.footing.upstream {
			return nil, fmt.Errorf("%w: the root in force, %q, is yours, and so must be the next: name it in ca.next_cert_file and ca.next_key_file, and restart the controller",
				ErrUpstream, c.footing.root.Subject)
		}
		return c.newRoot(true)
	}
	next, err := c.readUpstream("ca.next", c.cfg.NextCert, c.cfg.NextKey)
	if err != nil {
		return nil, err
	}
	if bytes.Equal(next.root().RawSubjectPublicKeyInfo, c.footing.root.RawSubjectPublicKeyInfo) {
		return nil, fmt.Errorf("%w: %s leads to the root that is in force already, %q", ErrUpstream, c.cfg.NextCert, c.footing.root.Subject)
	}
	return next, nil
}

// nextVersion grows also over a store that was restored from a backup: it is no less
// than the time. The lock is held.
func (c *CA) nextVersion() uint64 {
	return max(c.footing.record.Version+1, uint64(max(c.cfg.Now().Unix(), 0)))
}

// SignRoot has the next root sign from now on, by a new intermediate. The old root's key
// is gone then; with its last signature it vouches for the new one.
// Errors: ErrPhase (nothing was started), ErrUpstream.
func (c *CA) SignRoot(ctx context.Context, by string) (changed bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch c.footing.record.Phase {
	case PhaseNone:
		return false, fmt.Errorf("%w: there is no next root; start a rotation first", ErrPhase)
	case PhaseSign:
		return false, nil
	}
	old, err := c.load(ctx, keyRoot)
	if err != nil {
		return false, err
	}
	next, err := c.load(ctx, keyNextRoot)
	if err != nil {
		return false, err
	}
	intermediate, err := c.newIntermediate(next)
	if err != nil {
		return false, err
	}
	record := c.footing.record
	record.Phase, record.Signed, record.SignedBy = PhaseSign, c.cfg.Now(), by
	record.Other = old.root().Raw
	record.Issuers = []string{hex.EncodeToString(intermediate.cert.SubjectKeyId)}
	if record.Cross, err = c.crossSign(old, next, intermediate); err != nil {
		return false, err
	}
	if old.trustDomain != "" {
		record.Retired = append(slices.Clone(record.Retired), fingerprint(old.cert))
	}
	ops, err := c.puts(map[string]*signer{keyRoot: next, keyIntermediate: intermediate})
	if err != nil {
		return false, err
	}
	replaced, note, err := c.replacedBy(by)
	if err != nil {
		return false, err
	}
	if err := c.step(ctx, next, record, intermediate, append(ops, note, store.Delete(keyNextRoot))...); err != nil {
		return false, err
	}
	c.replaced = replaced
	return true, nil
}

// FinishRoot ends the belief in the old root, and in all that it ever signed.
// Errors: ErrPhase (the new root does not sign yet).
func (c *CA) FinishRoot(ctx context.Context, by string) (changed bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	record := c.footing.record
	switch record.Phase {
	case PhaseNone:
		return false, nil
	case PhasePublish:
		return false, fmt.Errorf("%w: the next root does not sign yet", ErrPhase)
	}
	record.Version, record.Phase = c.nextVersion(), PhaseNone
	record.Finished, record.FinishedBy = c.cfg.Now(), by
	record.Other, record.Cross, record.Issuers = nil, nil, nil
	return true, c.step(ctx, nil, record, c.intermediate)
}

// AbortRoot gives the next root up, and its key. Errors: ErrPhase (it signs already).
func (c *CA) AbortRoot(ctx context.Context) (changed bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch c.footing.record.Phase {
	case PhaseNone:
		return false, nil
	case PhaseSign:
		return false, fmt.Errorf("%w: the new root signs already, and the old one's key is gone; finish this rotation, then rotate again", ErrPhase)
	}
	record := rootRecord{Version: c.nextVersion(), Retired: c.footing.record.Retired}
	return true, c.step(ctx, nil, record, c.intermediate, store.Delete(keyNextRoot))
}

// step puts a record and what goes with it into the store, then into force: on this root,
// or nil for the one that there is. The lock is held.
func (c *CA) step(ctx context.Context, root *signer, record rootRecord, intermediate *signer, ops ...store.Op) (err error) {
	if root == nil {
		if root, err = c.load(ctx, keyRoot); err != nil {
			return err
		}
	}
	stands, err := newFooting(root, record)
	if err != nil {
		return err
	}
	note, err := record.put()
	if err != nil {
		return err
	}
	if _, _, err := c.store.Txn(ctx, nil, append(ops, note)); err != nil {
		return fmt.Errorf("ca: rotate the root: %w", err)
	}
	c.footing, c.intermediate = stands, intermediate
	return nil
}

// crossSign is next's root as signed by old, with what is above old: whoever believes the
// old root alone can verify by it what next signs. None, if an operator's old CA may not
// sign that or the chain gets too long.
func (c *CA) crossSign(old, next, intermediate *signer) ([][]byte, error) {
	root := next.root()
	t := c.authority("", 0)
	t.RawSubject, t.SubjectKeyId, t.SerialNumber = root.RawSubject, root.SubjectKeyId, identity.NewSerial("")
	// The names may be the same: without this, it would look as if it signed itself.
	t.AuthorityKeyId = old.cert.SubjectKeyId
	if t.NotAfter = root.NotAfter; old.end().Before(t.NotAfter) {
		t.NotAfter = old.end()
	}
	t.PermittedURIDomains, t.PermittedDNSDomainsCritical = []string{c.cfg.TrustDomain.Name()}, true
	der, err := x509.CreateCertificate(rand.Reader, t, old.cert, root.PublicKey, old.key)
	if err != nil {
		return nil, fmt.Errorf("ca: sign: %w", err)
	}
	cross, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("ca: sign: %w", err)
	}
	above := append([]*x509.Certificate{cross}, old.presented()...)
	// As the controller presents it: the longest chain that there is.
	all := slices.Concat(next.presented(), above, []*x509.Certificate{root, old.root()})
	if c.try(intermediate, all, old.root()) != nil {
		return nil, nil
	}
	var out [][]byte
	for _, cert := range above {
		out = append(out, cert.Raw)
	}
	return out, nil
}
