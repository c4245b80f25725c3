package controller

import (
	"container/list"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/policydb"
)

const (
	// maxWorkloadsPerHost bounds what one host can make us remember: beyond it, its
	// oldest are forgotten.
	maxWorkloadsPerHost = 4096
	// maxSubjects bounds the executables and images of one workload that are remembered.
	// What is beyond hears of a scan when its SVID is rotated.
	maxSubjects = 32
	// inventoryDelay gathers changes, so that a thousand SVIDs do not cost a thousand
	// writes to disk. A crash forgets at most that much of the inventory, nothing else.
	inventoryDelay = time.Second
	// inventoryBatch bounds one transaction.
	inventoryBatch = 1000
)

// inventory is the last SVID of each workload on each host, until it expires: in
// memory, and behind it in the store. It is for people to look at. Nothing is refused
// because of what is or is not in it.
type inventory struct {
	store store.Store
	now   func() time.Time

	mu      sync.Mutex
	records map[string]*list.Element // by key; the values are *workloadRecord
	perHost map[string]*hostInventory
	dirty   map[string]bool // keys to write or delete
	wake    chan struct{}
}

// hostInventory is one host's, those whose last SVID is the oldest first. Any local
// user can make workloads of any number under names that no Profile gives, so those
// are kept apart, and go first.
type hostInventory struct{ profiled, unprofiled *list.List }

func (h *hostInventory) of(r *workloadRecord) *list.List {
	if strings.HasPrefix(r.Name, policydb.UnprofiledPrefix) {
		return h.unprofiled
	}
	return h.profiled
}

func (h *hostInventory) len() int { return h.profiled.Len() + h.unprofiled.Len() }

func (h *hostInventory) oldest() *workloadRecord {
	if e := h.unprofiled.Front(); e != nil {
		return e.Value.(*workloadRecord)
	}
	return h.profiled.Front().Value.(*workloadRecord)
}

func openInventory(ctx context.Context, st store.Store, now func() time.Time) (*inventory, error) {
	i := &inventory{
		store: st, now: now, wake: make(chan struct{}, 1),
		records: make(map[string]*list.Element), perHost: make(map[string]*hostInventory), dirty: make(map[string]bool),
	}
	stored, _, err := listJSON[workloadRecord](ctx, st, workloadPrefix)
	if err != nil {
		return nil, fmt.Errorf("inventory: %w", err)
	}
	slices.SortFunc(stored, func(a, b *workloadRecord) int { return a.Issued.Compare(b.Issued) })
	for _, r := range stored {
		i.put(*r)
	}
	i.prune(nil)
	return i, nil
}

// record remembers an issued SVID, and forgets an older one if the host has too many.
func (i *inventory) record(r workloadRecord) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if e := i.records[r.key()]; e != nil {
		r.Subjects = joinSubjects(e.Value.(*workloadRecord), &r)
	}
	i.put(r)
	i.touch(r.key())
}

func (i *inventory) put(r workloadRecord) {
	key := r.key()
	h := i.perHost[r.HostID]
	if h == nil {
		h = &hostInventory{list.New(), list.New()}
		i.perHost[r.HostID] = h
	}
	if e := i.records[key]; e != nil {
		e.Value = &r
		h.of(&r).MoveToBack(e)
		return
	}
	if h.len() >= maxWorkloadsPerHost {
		i.forget(h.oldest().key()) // it leaves others: the limit is above one
	}
	i.records[key] = h.of(&r).PushBack(&r)
}

// forget removes a record that there is.
func (i *inventory) forget(key string) {
	e := i.records[key]
	r := e.Value.(*workloadRecord)
	h := i.perHost[r.HostID]
	h.of(r).Remove(e)
	if h.len() == 0 {
		delete(i.perHost, r.HostID)
	}
	delete(i.records, key)
	i.touch(key)
}

func (i *inventory) touch(key string) {
	i.dirty[key] = true
	select {
	case i.wake <- struct{}{}:
	default:
	}
}

// prune forgets what has expired, and what gone names besides (nil: nothing).
func (i *inventory) prune(gone func(*workloadRecord) bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	now := i.now()
	for key, e := range i.records {
		r := e.Value.(*workloadRecord)
		if now.After(r.NotAfter) || gone != nil && gone(r) {
			i.forget(key)
		}
	}
}

// removeHost forgets a host's workloads.
func (i *inventory) removeHost(id string) {
	i.prune(func(r *workloadRecord) bool { return r.HostID == id })
}

// joinSubjects are the subjects of a workload's SVIDs, old and new, the newest of them if
// there are too many.
func joinSubjects(was, now *workloadRecord) map[string]time.Time {
	all := maps.Clone(now.Subjects)
	for s, issued := range was.Subjects {
		// Its SVID is gone, as far as is known of how long it lived.
		if now.Issued.After(issued.Add(now.NotAfter.Sub(now.Issued))) {
			continue
		}
		if _, again := now.Subjects[s]; !again {
			if all == nil {
				all = make(map[string]time.Time)
			}
			all[s] = issued
		}
	}
	for len(all) > maxSubjects {
		oldest := ""
		for s, issued := range all {
			if oldest == "" || issued.Before(all[oldest]) {
				oldest = s
			}
		}
		delete(all, oldest)
	}
	return all
}

// hostsWith are the hosts that have a workload of one of the subjects.
func (i *inventory) hostsWith(subjects []string) []string {
	wanted := make(map[string]bool)
	for _, s := range subjects {
		wanted[s] = true
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	found := make(map[string]bool)
	for _, e := range i.records {
		r := e.Value.(*workloadRecord)
		for s := range r.Subjects {
			if wanted[s] {
				found[r.HostID] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// subjectsOf are those of a host's workloads, and since when the oldest SVID is that a
// workload of theirs has.
func (i *inventory) subjectsOf(hostID string) map[string]time.Time {
	i.mu.Lock()
	defer i.mu.Unlock()
	out := make(map[string]time.Time)
	for _, e := range i.records {
		r := e.Value.(*workloadRecord)
		if r.HostID != hostID {
			continue
		}
		for s, issued := range r.Subjects {
			if was, ok := out[s]; !ok || issued.Before(was) {
				out[s] = issued
			}
		}
	}
	return out
}

// hosts are the IDs of the hosts that have workloads.
func (i *inventory) hosts() []string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return slices.Collect(maps.Keys(i.perHost))
}

// list returns the live ones in a namespace and below it (empty: all), by ID and host.
func (i *inventory) list(namespace string) []workloadRecord {
	i.mu.Lock()
	defer i.mu.Unlock()
	now := i.now()
	var out []workloadRecord
	for _, key := range slices.Sorted(maps.Keys(i.records)) {
		if r := i.records[key].Value.(*workloadRecord); !now.After(r.NotAfter) && within(r.Namespace, namespace) {
			out = append(out, *r)
		}
	}
	return out
}

// find returns the newest record of a SPIFFE ID.
func (i *inventory) find(spiffeID string) (workloadRecord, bool) {
	var newest workloadRecord
	found := false
	for _, r := range i.list("") {
		if r.SPIFFEID == spiffeID && (!found || r.Issued.After(newest.Issued)) {
			newest, found = r, true
		}
	}
	return newest, found
}

// bySerial returns the record whose last SVID has a serial number.
func (i *inventory) bySerial(serial string) (workloadRecord, bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, e := range i.records {
		if r := e.Value.(*workloadRecord); r.Serial == serial {
			return *r, true
		}
	}
	return workloadRecord{}, false
}

// within tells whether a namespace is another or below it; "" is above all.
func within(namespace, ancestor string) bool {
	ancestor = strings.TrimSuffix(ancestor, "/")
	return ancestor == "" || namespace == ancestor || strings.HasPrefix(namespace, ancestor+"/")
}

// run writes changes behind, until ctx ends; then it writes the rest.
func (i *inventory) run(ctx context.Context, failed func(error)) {
	for {
		select {
		case <-ctx.Done():
			if err := i.flush(context.WithoutCancel(ctx)); err != nil {
				failed(err)
			}
			return
		case <-i.wake:
		}
		select {
		case <-ctx.Done():
		case <-time.After(inventoryDelay):
		}
		if err := i.flush(context.WithoutCancel(ctx)); err != nil {
			failed(err)
		}
	}
}

// flush writes what changed. What could not be written stays to be written with
// the next change.
func (i *inventory) flush(ctx context.Context) error {
	i.mu.Lock()
	dirty := i.dirty
	i.dirty = make(map[string]bool)
	ops := make([]store.Op, 0, len(dirty))
	var failure error
	for key := range dirty {
		e := i.records[key]
		if e == nil {
			ops = append(ops, store.Delete(key))
			continue
		}
		op, err := putJSON(key, e.Value)
		if err != nil {
			failure = err
			continue
		}
		ops = append(ops, op)
	}
	i.mu.Unlock()
	for batch := range slices.Chunk(ops, inventoryBatch) {
		if _, _, err := i.store.Txn(ctx, nil, batch); err != nil {
			failure = err
			i.mu.Lock()
			for _, op := range batch {
				i.dirty[op.Key] = true
			}
			i.mu.Unlock()
		}
	}
	if failure != nil {
		return fmt.Errorf("inventory: %w", failure)
	}
	return nil
}
