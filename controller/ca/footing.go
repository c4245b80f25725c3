package ca

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/symbolon/symbolon/controller/store"
)

// Phase is how far a rotation of the root is.
type Phase string

const (
	// PhaseNone: none is under way.
	PhaseNone Phase = ""
	// PhasePublish: the next root is believed, and signs nothing yet.
	PhasePublish Phase = "publish"
	// PhaseSign: the new root signs, and the old one is believed still.
	PhaseSign Phase = "sign"
)

// keyRootRecord is not under ca/, where keys lie.
const keyRootRecord = "ca-roots"

// rootRecord is what is known of the root's rotation, of the last one when none is under
// way; zero: there was none. The roots' keys lie elsewhere.
type rootRecord struct {
	// Version numbers the sets of roots that were ever believed.
	Version uint64 `json:"version"`
	Phase   Phase  `json:"phase,omitempty"`
	// When each phase began, and who wanted it.
	Started    time.Time `json:"started,omitzero"`
	StartedBy  string    `json:"started_by,omitempty"`
	Signed     time.Time `json:"signed,omitzero"`
	SignedBy   string    `json:"signed_by,omitempty"`
	Finished   time.Time `json:"finished,omitzero"`
	FinishedBy string    `json:"finished_by,omitempty"`
	// Other is the root besides the one that signs, DER: the next one, then the old one.
	Other []byte `json:"other,omitempty"`
	// Cross is, while the new root signs, that root as signed by the old one, and what is
	// above that one, if they verify.
	Cross [][]byte `json:"cross,omitempty"`
	// Issuers are the intermediates that the new root has signed (Issued.Issuer).
	Issuers []string `json:"issuers,omitempty"`
	// Retired are the SHA-256 of CA certificates that an operator gave, and that are not
	// in force any more.
	Retired [][]byte `json:"retired,omitempty"`
}

func (r rootRecord) put() (store.Op, error) {
	v, err := json.Marshal(r)
	if err != nil {
		return store.Op{}, fmt.Errorf("ca: %w", err)
	}
	return store.Put(keyRootRecord, v), nil
}

func (c *CA) loadRootRecord(ctx context.Context) (r rootRecord, err error) {
	kv, err := c.store.Get(ctx, keyRootRecord)
	if errors.Is(err, store.ErrNotFound) {
		return r, nil
	}
	if err != nil {
		return r, fmt.Errorf("ca: %w", err)
	}
	if err := json.Unmarshal(kv.Value, &r); err != nil {
		return r, fmt.Errorf("ca: %s: %w", keyRootRecord, err)
	}
	return r, nil
}

// footing is what our intermediate stands on, and what hosts are to believe. Immutable.
type footing struct {
	// root is the end of what signs.
	root *x509.Certificate
	// signerEnd is when what signs intermediates ends, or the first above it; upstream: it
	// is the operator's.
	signerEnd time.Time
	upstream  bool
	// presented is what SVIDs carry beyond our intermediate; none below our own root,
	// unless it is cross-signed.
	presented [][]byte
	// anchors are the roots that presented leads to, DER.
	anchors [][]byte
	// other is the root that is believed besides; nil: none.
	other  *x509.Certificate
	record rootRecord
	// others are believed besides where an External signs. stranded: what it has signed
	// leads to none of its roots.
	others   []*x509.Certificate
	stranded bool
}

func newFooting(root *signer, record rootRecord) (*footing, error) {
	f := &footing{
		root: root.root(), signerEnd: root.end(), upstream: root.trustDomain != "",
		record: record, anchors: [][]byte{root.root().Raw},
	}
	for _, cert := range root.presented() {
		f.presented = append(f.presented, cert.Raw)
	}
	f.presented = append(f.presented, record.Cross...)
	if len(record.Cross) > 0 {
		f.anchors = append(f.anchors, record.Other)
	}
	if record.Phase != PhaseNone {
		var err error
		if f.other, err = x509.ParseCertificate(record.Other); err != nil {
			return nil, fmt.Errorf("ca: %s: %w", keyRootRecord, err)
		}
	}
	return f, nil
}

func (c *CA) stands() *footing {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.footing
}

// Trust is what hosts are to believe, the root that signs first, and that set's number,
// which grows with every change; 0: there was none yet.
func (c *CA) Trust() (roots []*x509.Certificate, version uint64) {
	f := c.stands()
	roots = []*x509.Certificate{f.root}
	if f.other != nil {
		roots = append(roots, f.other)
	}
	roots = append(roots, f.others...)
	return roots, f.record.Version
}

// RootRotation is the state of the root's rotation; of the last one in PhaseNone.
type RootRotation struct {
	Phase Phase
	// Version is that of Trust.
	Version uint64
	// Other is the next root in PhasePublish, the old one in PhaseSign.
	Other *x509.Certificate
	// Crossed: in PhaseSign whoever believes only the old root can verify what the new one
	// signs.
	Crossed bool
	// When each phase began, and who wanted it; zero: it did not.
	Started, Signed, Finished       time.Time
	StartedBy, SignedBy, FinishedBy string
}

func (f *footing) status() RootRotation {
	r := f.record
	return RootRotation{
		Phase: r.Phase, Version: r.Version, Other: f.other, Crossed: len(r.Cross) > 0,
		Started: r.Started, Signed: r.Signed, Finished: r.Finished,
		StartedBy: r.StartedBy, SignedBy: r.SignedBy, FinishedBy: r.FinishedBy,
	}
}

// OfOldRoot tells whether an intermediate (Issued.Issuer) is one that the old root has
// signed, while the new one signs.
func (c *CA) OfOldRoot(issuer string) bool {
	r := c.stands().record
	return r.Phase == PhaseSign && !slices.Contains(r.Issuers, issuer)
}

func fingerprint(cert *x509.Certificate) []byte {
	sum := sha256.Sum256(cert.Raw)
	return sum[:]
}
