package controller

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/symbolon/symbolon/controller/store"
)

const (
	// maxWorkloadsPerHost bounds what one host can make us remember.
	maxWorkloadsPerHost = 4096
	// inventoryDelay gathers changes, so that a thousand SVIDs do not cost a thousand
	// writes to disk. A crash forgets at most that much of the inventory, nothing else.
	inventoryDelay = time.Second
	// inventoryBatch bounds one transaction.
	inventoryBatch = 1000
)

// inventory is the last SVID of each workload on each host, until it expires: in
// memory, and behind it in the store.
type inventory struct {
	store store.Store
	now   func() time.Time

	mu      sync.Mutex
	records map[string]workloadRecord // by key
	perHost map[string]int
	dirty   map[string]bool // keys to write or delete
	wake    chan struct{}
}

func openInventory(ctx context.Context, st store.Store, now func() time.Time) (*inventory, error) {
	i := &inventory{
		store: st, now: now, wake: make(chan struct{}, 1),
		records: make(map[string]workloadRecord), perHost: make(map[string]int), dirty: make(map[string]bool),
	}
	kvs, _, err := st.List(ctx, workloadPrefix)
	if err != nil {
		return nil, fmt.Errorf("inventory: %w", err)
	}
	for _, kv := range kvs {
		var r workloadRecord
		if err := getJSON(kv, &r); err != nil {
			return nil, fmt.Errorf("inventory: %w", err)
		}
		i.records[kv.Key] = r
		i.perHost[r.HostID]++
	}
	i.prune(nil)
	return i, nil
}

// record remembers an issued SVID. It fails only if the host has too many.
func (i *inventory) record(r workloadRecord) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	key := r.key()
	if _, known := i.records[key]; !known {
		if i.perHost[r.HostID] >= maxWorkloadsPerHost {
			return fmt.Errorf("host %s has %d workloads, which is the limit", r.HostID, maxWorkloadsPerHost)
		}
		i.perHost[r.HostID]++
	}
	i.records[key] = r
	i.touch(key)
	return nil
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
	for key, r := range i.records {
		if now.After(r.NotAfter) || gone != nil && gone(&r) {
			delete(i.records, key)
			if i.perHost[r.HostID]--; i.perHost[r.HostID] == 0 {
				delete(i.perHost, r.HostID)
			}
			i.touch(key)
		}
	}
}

// removeHost forgets a host's workloads.
func (i *inventory) removeHost(id string) {
	i.prune(func(r *workloadRecord) bool { return r.HostID == id })
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
		if r := i.records[key]; !now.After(r.NotAfter) && within(r.Namespace, namespace) {
			out = append(out, r)
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
		r, live := i.records[key]
		if !live {
			ops = append(ops, store.Delete(key))
			continue
		}
		op, err := putJSON(key, r)
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
