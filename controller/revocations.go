package controller

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/identity"
)

const (
	// maxRevocations and maxRevocationBytes bound what every proxy must hold and look
	// through.
	maxRevocations     = 100_000
	maxRevocationBytes = 16 << 20
	// keptRevocationChanges is how far back a session may be and still be told the
	// difference instead of the whole.
	keptRevocationChanges = 1000
	// maxReason bounds what somebody gives as the reason, bytes.
	maxReason = 512
)

var (
	errRevocationsFull = fmt.Errorf("no more than %d revocations, of %d MiB in all, can be kept; 'symbolon ca revocations' shows them, 'symbolon ca unrevoke' drops one, and a label selector may stand for many",
		maxRevocations, maxRevocationBytes>>20)
	errNotRevoked = errors.New("there is no such revocation")
)

// revocationRecord is one revocation: of a SPIFFE ID, a serial number, a host or labels.
type revocationRecord struct {
	ID          string            `json:"id"`
	SPIFFEID    string            `json:"spiffe_id,omitempty"`
	TrustDomain string            `json:"trust_domain,omitempty"` // of serial and host
	Serial      string            `json:"serial,omitempty"`       // hexadecimal
	Host        string            `json:"host,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Reason      string            `json:"reason,omitempty"`
	Actor       string            `json:"actor"`
	Time        time.Time         `json:"time"`
	// Expires is when nothing that is valid can match any more; zero: until unrevoked.
	Expires time.Time `json:"expires,omitzero"`
}

// subject tells whether two revocations are of the same.
func (r *revocationRecord) subject() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%q %q %q %q", r.SPIFFEID, r.TrustDomain, r.Serial, r.Host)
	for _, k := range slices.Sorted(maps.Keys(r.Labels)) {
		fmt.Fprintf(&b, " %q %q", k, r.Labels[k])
	}
	return b.String()
}

func (r *revocationRecord) key() string { return revocationPrefix + r.ID }

// size is about what it takes on its way to a proxy.
func (r *revocationRecord) size() int { return 64 + len(r.subject()) }

// revocation is what proxies get of it.
func (r *revocationRecord) revocation() *symbolonv1.Revocation {
	out := &symbolonv1.Revocation{Id: r.ID}
	switch {
	case r.SPIFFEID != "":
		out.Subject = &symbolonv1.Revocation_SpiffeId{SpiffeId: r.SPIFFEID}
	case r.Serial != "":
		serial, _ := identity.ParseSerial(r.Serial) // as it was written
		out.Subject = &symbolonv1.Revocation_Serial{Serial: &symbolonv1.RevokedSerial{TrustDomain: r.TrustDomain, Serial: []byte(serial)}}
	case r.Host != "":
		out.Subject = &symbolonv1.Revocation_Host{Host: &symbolonv1.RevokedHost{TrustDomain: r.TrustDomain, HostId: r.Host}}
	default:
		out.Subject = &symbolonv1.Revocation_Labels{Labels: &symbolonv1.RevokedLabels{Labels: r.Labels}}
	}
	return out
}

func (r *revocationRecord) proto() *symbolonv1.RevocationRecord {
	out := &symbolonv1.RevocationRecord{
		Revocation: r.revocation(), Reason: r.Reason, Actor: r.Actor, Time: timestamppb.New(r.Time),
	}
	if !r.Expires.IsZero() {
		out.Expires = timestamppb.New(r.Expires)
	}
	return out
}

// revocationState counts the changes.
type revocationState struct {
	Number uint64 `json:"number"`
}

// revocationChange is one step from the set before it.
type revocationChange struct {
	number  uint64
	added   *revocationRecord
	removed string
}

// revocations is the set, in the store first: what is not durable is not in force.
// Safe for concurrent use.
type revocations struct {
	store store.Store
	now   func() time.Time

	mu        sync.Mutex // orders changes
	number    uint64
	records   map[string]*revocationRecord // by id; not changed in place
	bySubject map[string]string
	bytes     int
	changes   []revocationChange // the last ones, without a gap
	set       *identity.Revocations
	changed   chan struct{} // closed and replaced with every change
}

func openRevocations(ctx context.Context, st store.Store, now func() time.Time) (*revocations, error) {
	r := &revocations{
		store: st, now: now, changed: make(chan struct{}), number: 1, // 0 is what nobody has
		records: make(map[string]*revocationRecord), bySubject: make(map[string]string),
	}
	kv, err := st.Get(ctx, keyRevocations)
	switch {
	case errors.Is(err, store.ErrNotFound):
	case err != nil:
		return nil, fmt.Errorf("revocations: %w", err)
	default:
		var s revocationState
		if err := getJSON(kv, &s); err != nil {
			return nil, fmt.Errorf("revocations: %w", err)
		}
		r.number = s.Number
	}
	stored, _, err := listJSON[revocationRecord](ctx, st, revocationPrefix)
	if err != nil {
		return nil, fmt.Errorf("revocations: %w", err)
	}
	for _, rec := range stored {
		r.put(rec)
	}
	return r, nil
}

func (r *revocations) put(rec *revocationRecord) {
	r.records[rec.ID], r.bySubject[rec.subject()] = rec, rec.ID
	r.bytes += rec.size()
}

// add revokes. If that is revoked already, the answer is that revocation, which for
// a host lasts as long as either. Errors: errRevocationsFull, the store's.
func (r *revocations) add(ctx context.Context, rec revocationRecord) (out *revocationRecord, already bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if was := r.records[r.bySubject[rec.subject()]]; was != nil {
		// A certificate has one end; a host may be revoked for good, and be removed then.
		if rec.Serial != "" || was.Expires.IsZero() || !rec.Expires.IsZero() && !rec.Expires.After(was.Expires) {
			return was, true, nil
		}
		longer := *was
		longer.Expires = rec.Expires
		rec = longer
		already = true
	} else {
		if len(r.records) >= maxRevocations || r.bytes+rec.size() > maxRevocationBytes {
			return nil, false, errRevocationsFull
		}
		id := make([]byte, 6)
		_, _ = rand.Read(id) // never fails: crypto/rand
		rec.ID, rec.Time = hex.EncodeToString(id), r.now()
	}
	op, err := putJSON(rec.key(), rec)
	if err == nil {
		err = r.commit(ctx, revocationChange{added: &rec}, op)
	}
	if err != nil {
		return nil, false, err
	}
	if already {
		r.bytes -= rec.size() // it is of one size
	}
	r.put(&rec)
	return &rec, already, nil
}

// remove unrevokes by id, or by the SPIFFE ID that is revoked. Errors: errNotRevoked, the
// store's.
func (r *revocations) remove(ctx context.Context, id string) (*revocationRecord, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec := r.records[id]
	if rec == nil {
		rec = r.records[r.bySubject[(&revocationRecord{SPIFFEID: id}).subject()]]
	}
	if rec == nil {
		return nil, errNotRevoked
	}
	return rec, r.removeLocked(ctx, rec)
}

func (r *revocations) removeLocked(ctx context.Context, rec *revocationRecord) error {
	if err := r.commit(ctx, revocationChange{removed: rec.ID}, store.Delete(rec.key())); err != nil {
		return err
	}
	delete(r.records, rec.ID)
	delete(r.bySubject, rec.subject())
	r.bytes -= rec.size()
	return nil
}

// commit makes one step durable, and wakes up who must hear of it: after the caller
// has changed the records and let go of the lock.
func (r *revocations) commit(ctx context.Context, c revocationChange, op store.Op) error {
	c.number = r.number + 1
	state, err := putJSON(keyRevocations, revocationState{Number: c.number})
	if err != nil {
		return err
	}
	if _, _, err := r.store.Txn(ctx, nil, []store.Op{op, state}); err != nil {
		return fmt.Errorf("revocations: %w", err)
	}
	r.number, r.set = c.number, nil
	if r.changes = append(r.changes, c); len(r.changes) > keptRevocationChanges {
		r.changes = append([]revocationChange(nil), r.changes[len(r.changes)-keptRevocationChanges/2:]...)
	}
	close(r.changed)
	r.changed = make(chan struct{})
	return nil
}

// prune drops what nothing that is valid can match any more.
func (r *revocations) prune(ctx context.Context) (dropped int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.now()
	for _, rec := range r.records {
		if rec.Expires.IsZero() || !now.After(rec.Expires) {
			continue
		}
		if err := r.removeLocked(ctx, rec); err != nil {
			return dropped, err
		}
		dropped++
	}
	return dropped, nil
}

// current is the set to judge by.
func (r *revocations) current() *identity.Revocations {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.set == nil {
		// There is nothing in it that we do not know.
		r.set, _ = (*identity.Revocations)(nil).Update(r.wholeLocked())
	}
	return r.set
}

func (r *revocations) wholeLocked() *symbolonv1.Revocations {
	m := &symbolonv1.Revocations{Number: r.number}
	for _, rec := range r.records {
		m.Added = append(m.Added, rec.revocation())
	}
	return m
}

// since is what has changed since a number; 0, or one that is too long ago: the whole
// set. The channel closes with the next change. Nothing has changed: nil.
func (r *revocations) since(number uint64) (*symbolonv1.Revocations, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.number - number
	switch {
	case number != 0 && n == 0:
		return nil, r.changed
	case number == 0 || n > uint64(len(r.changes)):
		return r.wholeLocked(), r.changed
	}
	m := &symbolonv1.Revocations{Number: r.number, Base: number}
	added := make(map[string]*revocationRecord)
	for _, c := range r.changes[uint64(len(r.changes))-n:] {
		if c.added != nil {
			added[c.added.ID] = c.added
			continue
		}
		if added[c.removed] != nil {
			delete(added, c.removed)
		}
		m.Removed = append(m.Removed, c.removed) // it may have been there before, too
	}
	for _, rec := range added {
		m.Added = append(m.Added, rec.revocation())
	}
	return m, r.changed
}

// list is all of it, the oldest first, and the number.
func (r *revocations) list() ([]*revocationRecord, uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := slices.Collect(maps.Values(r.records))
	slices.SortFunc(all, func(a, b *revocationRecord) int {
		if c := a.Time.Compare(b.Time); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return all, r.number
}
