package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/identity"
)

const (
	// maxScans bounds what is kept of all scanners: findings, of one scanner and one
	// subject each.
	maxScans = 50_000
	// maxScanAttributes bounds what one of them may say. An SVID has room for 64 claims.
	maxScanAttributes = 64
	// scanExpiryEvery is how late the end of a finding counts.
	scanExpiryEvery = time.Second
)

// errScansFull: there is no room for more findings.
var errScansFull = fmt.Errorf("%d findings are kept, the limit", maxScans)

// scanRecord is what one scanner says of one subject.
type scanRecord struct {
	Subject    string              `json:"subject"`
	Scanner    string              `json:"scanner"`
	Actor      string              `json:"actor"`
	Attributes identity.Attributes `json:"attributes,omitempty"`
	Pushed     time.Time           `json:"pushed"`
	Until      time.Time           `json:"until"`
	// Changed is since when it says what it says.
	Changed time.Time `json:"changed"`
	// Removed: it says nothing more, and is kept as long as there may be SVIDs of before.
	Removed bool `json:"removed,omitempty"`
}

func (r *scanRecord) key() string { return scanPrefix + r.Subject + "|" + r.Scanner }

// holds are the attributes that are in force at a time.
func (r *scanRecord) holds(now time.Time) identity.Attributes {
	if r == nil || r.Removed || !now.Before(r.Until) {
		return nil
	}
	return r.Attributes
}

// changedSince tells whether what it says is other at a time than it was before it.
func (r *scanRecord) changedSince(then, now time.Time) bool {
	return r.Changed.After(then) || len(r.Attributes) > 0 && !now.Before(r.Until) && r.Until.After(then)
}

// Subjects are what scanners speak of: the executables and images of workloads.
const (
	exeSubject   = "exe:"
	imageSubject = "image:"
)

// scanSubjects are those of a workload, by what its host says of it.
func scanSubjects(reported identity.Attributes) []string {
	var out []string
	add := func(exe, image string) {
		if s, err := scanSubject(exe, image); err == nil && len(out) < maxSubjects {
			out = append(out, s)
		}
	}
	for _, a := range reported.Of("proc.exe_sha256") {
		add(a.Value, "")
	}
	for _, a := range reported.Of("image.digest") {
		add("", a.Value)
	}
	return out
}

// scanBook is what scanners said: in memory, and before that in the store. Safe for
// concurrent use.
type scanBook struct {
	store store.Store
	now   func() time.Time
	keep  time.Duration // how long an SVID may live

	// mu is held while the store is waited for: who reads has seen all that was said
	// before.
	mu        sync.RWMutex
	bySubject map[string]map[string]*scanRecord // then by scanner; records do not change
	count     int
	expired   time.Time // up to here, ends have been told
}

func openScans(ctx context.Context, st store.Store, keep time.Duration, now func() time.Time) (*scanBook, error) {
	b := &scanBook{store: st, now: now, keep: keep, bySubject: make(map[string]map[string]*scanRecord), expired: now()}
	stored, _, err := listJSON[scanRecord](ctx, st, scanPrefix)
	if err != nil {
		return nil, fmt.Errorf("scans: %w", err)
	}
	for _, r := range stored {
		b.put(r)
	}
	return b, nil
}

func (b *scanBook) put(r *scanRecord) {
	of := b.bySubject[r.Subject]
	if of == nil {
		of = make(map[string]*scanRecord)
		b.bySubject[r.Subject] = of
	}
	if of[r.Scanner] == nil {
		b.count++
	}
	of[r.Scanner] = r
}

func (b *scanBook) drop(r *scanRecord) {
	of := b.bySubject[r.Subject]
	if of[r.Scanner] == nil {
		return
	}
	b.count--
	if delete(of, r.Scanner); len(of) == 0 {
		delete(b.bySubject, r.Subject)
	}
}

// of is all that is said of some subjects now.
func (b *scanBook) of(subjects ...string) identity.Attributes {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.ofLocked(subjects...)
}

func (b *scanBook) ofLocked(subjects ...string) identity.Attributes {
	now := b.now()
	var out identity.Attributes
	for _, s := range subjects {
		for _, r := range b.bySubject[s] {
			out = out.Union(r.holds(now))
		}
	}
	return out
}

// changedSince tells whether something else is said of a subject now than at a time.
func (b *scanBook) changedSince(subject string, then time.Time) bool {
	b.mu.RLock()
	defer b.mu.RUnlock()
	now := b.now()
	for _, r := range b.bySubject[subject] {
		if r.changedSince(then, now) {
			return true
		}
	}
	return false
}

// list is what is in force, by subject and scanner.
func (b *scanBook) list() []*scanRecord {
	b.mu.RLock()
	defer b.mu.RUnlock()
	now := b.now()
	var out []*scanRecord
	for _, of := range b.bySubject {
		for _, r := range of {
			if !r.Removed && now.Before(r.Until) {
				out = append(out, r)
			}
		}
	}
	slices.SortFunc(out, func(x, y *scanRecord) int {
		return cmp.Or(cmp.Compare(x.Subject, y.Subject), cmp.Compare(x.Scanner, y.Scanner))
	})
	return out
}

// push takes records, each in the place of the same scanner's of the same subject, all
// or none, and returns the subjects of which something else is said since.
// Errors: errScansFull, the store's.
func (b *scanBook) push(ctx context.Context, records []*scanRecord) (changed []string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	room := maxScans - b.count
	for _, r := range records {
		was := b.bySubject[r.Subject][r.Scanner]
		if was == nil {
			room--
		}
		r.Changed = now
		if was != nil && slices.Equal(was.holds(now), r.holds(now)) && now.Before(was.Until) {
			r.Changed = was.Changed
		}
	}
	if room < 0 {
		return nil, errScansFull
	}
	return b.write(ctx, records)
}

// remove makes records say nothing more. Those that there are not, are not.
func (b *scanBook) remove(ctx context.Context, records []*scanRecord) (changed []string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	var gone []*scanRecord
	for _, r := range records {
		x := *r
		x.Attributes, x.Removed, x.Changed, x.Until = nil, true, now, now.Add(b.keep)
		gone = append(gone, &x)
	}
	return b.write(ctx, gone)
}

// write puts records into the store, then in force. The caller holds the mutex.
func (b *scanBook) write(ctx context.Context, records []*scanRecord) (changed []string, err error) {
	ops := make([]store.Op, len(records))
	for i, r := range records {
		if ops[i], err = putJSON(r.key(), r); err != nil {
			return nil, err
		}
	}
	was := make(map[string]identity.Attributes)
	for _, r := range records {
		was[r.Subject] = b.ofLocked(r.Subject)
	}
	if _, _, err := b.store.Txn(ctx, nil, ops); err != nil {
		return nil, fmt.Errorf("scans: %w", err)
	}
	for _, r := range records {
		b.put(r)
	}
	for _, s := range slices.Sorted(maps.Keys(was)) {
		if !slices.Equal(was[s], b.ofLocked(s)) {
			changed = append(changed, s)
		}
	}
	return changed, nil
}

// justExpired are the subjects of findings that ended since it was called last.
func (b *scanBook) justExpired() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	var out []string
	for subject, of := range b.bySubject {
		for _, r := range of {
			if len(r.Attributes) > 0 && r.Until.After(b.expired) && !now.Before(r.Until) {
				out = append(out, subject)
				break
			}
		}
	}
	b.expired = now
	return out
}

// sweep forgets what no SVID can stem from any more.
func (b *scanBook) sweep(ctx context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	var old []*scanRecord
	for _, of := range b.bySubject {
		for _, r := range of {
			if now.After(r.Until.Add(b.keep)) {
				old = append(old, r)
			}
		}
	}
	for batch := range slices.Chunk(old, inventoryBatch) {
		ops := make([]store.Op, len(batch))
		for i, r := range batch {
			ops[i] = store.Delete(r.key())
		}
		if _, _, err := b.store.Txn(ctx, nil, ops); err != nil {
			return fmt.Errorf("sweep scans: %w", err)
		}
		for _, r := range batch {
			b.drop(r)
		}
	}
	return nil
}

// followScans tells hosts of findings that end, until ctx does.
func (s *Server) followScans(ctx context.Context) {
	tick := time.NewTicker(scanExpiryEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			s.reissueFor(s.scans.justExpired())
		}
	}
}

// reissueFor has those hosts ask for SVIDs anew that have workloads of the subjects,
// and returns how many they are. One that is away is told when it comes back.
func (s *Server) reissueFor(subjects []string) int {
	if len(subjects) == 0 {
		return 0
	}
	hosts := s.inventory.hostsWith(subjects)
	s.hub.reissue(hosts)
	return len(hosts)
}

// owesReissue tells whether scanners say something else of a host's workloads than when
// their SVIDs were issued.
func (s *Server) owesReissue(hostID string) bool {
	for subject, issued := range s.inventory.subjectsOf(hostID) {
		if s.scans.changedSince(subject, issued) {
			return true
		}
	}
	return false
}

// overlay is what a host says of a workload, and scanners of what it runs. Of a key that
// a scanner speaks of, its word counts.
func overlay(reported, scanned identity.Attributes) identity.Attributes {
	return reported.Filter(func(k string) bool { return !scanned.Has(k) }).Union(scanned)
}

// hostKeys are those of image.* that say which image it is. They are the host's, which
// sees it run.
var hostKeys = []string{"image.digest", "image.id", "image.name"}

// checkScan refuses attributes that a scanner may not set. Errors are for the caller.
func checkScan(attrs identity.Attributes) error {
	if len(attrs) > maxScanAttributes {
		return fmt.Errorf("%d attributes, the limit is %d", len(attrs), maxScanAttributes)
	}
	for _, a := range attrs {
		source, name, _ := strings.Cut(a.Key, ".")
		switch {
		case len(a.Key) > maxAttributeKey || !printable(a.Key) || strings.ContainsAny(a.Key, " ="):
			return fmt.Errorf("attribute key %.*q is malformed or longer than %d bytes", maxAttributeKey, a.Key, maxAttributeKey)
		case source != "vuln" && source != "image" || name == "":
			return fmt.Errorf("attribute %s: a scanner may set vuln.* and image.* only", a.Key)
		case slices.Contains(hostKeys, a.Key):
			return fmt.Errorf("attribute %s is the host's to set: it sees which image runs", a.Key)
		case len(a.Value) > maxLabelValue || !printable(a.Value):
			return fmt.Errorf("attribute %s: a value is empty, malformed or longer than %d bytes", a.Key, maxLabelValue)
		}
	}
	return nil
}

// scanSubject is what a finding is about.
func scanSubject(exe, image string) (string, error) {
	hex := func(s string) bool { return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == "" }
	switch {
	case exe != "" && image != "":
		return "", errors.New("exe_sha256 and image_digest: a finding is about one of them")
	case exe != "":
		if !hex(exe) {
			return "", fmt.Errorf("exe_sha256 %.80q: want 64 lower-case hexadecimal digits, as sha256sum prints", exe)
		}
		return exeSubject + exe, nil
	case image != "":
		if digits, ok := strings.CutPrefix(image, "sha256:"); !ok || !hex(digits) {
			return "", fmt.Errorf("image_digest %.80q: want sha256: and 64 lower-case hexadecimal digits", image)
		}
		return imageSubject + image, nil
	}
	return "", errors.New("exe_sha256 or image_digest is needed")
}
