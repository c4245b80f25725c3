package controller

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/policydb"
)

// faulty is a store whose disk can fill up.
type faulty struct {
	store.Store
	full atomic.Bool
}

func (f *faulty) Txn(ctx context.Context, conds []store.Cond, ops []store.Op) (int64, bool, error) {
	if f.full.Load() {
		return 0, false, store.ErrNoSpace
	}
	return f.Store.Txn(ctx, conds, ops)
}

func openFaulty(t *testing.T) *faulty {
	t.Helper()
	st, err := store.Open(filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.Close() })
	return &faulty{Store: st}
}

// TestStoreFailureKeepsGeneration: what is not durable is not in force, and the
// same change goes through once the store works again.
func TestStoreFailureKeepsGeneration(t *testing.T) {
	st := openFaulty(t)
	p, err := openPolicies(t.Context(), st, &hosts{store: st}, nil, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	docs, err := policydb.Parse("a.yaml", []byte("kind: Namespace\nname: /acme\nmode: enforce\n"))
	if err != nil {
		t.Fatal(err)
	}
	st.full.Store(true)
	if _, _, published, err := p.apply(t.Context(), change{upserts: docs}); !errors.Is(err, store.ErrNoSpace) || published != nil {
		t.Fatalf("%v, published %v; want ErrNoSpace", err, published)
	}
	if p.snapshot().Generation() != 1 || p.hasNamespace("/acme") {
		t.Errorf("generation %d is in force after a failed write", p.snapshot().Generation())
	}
	st.full.Store(false)
	_, generation, published, err := p.apply(t.Context(), change{upserts: docs})
	if err != nil || generation != 2 || published.generation() != 2 || !p.hasNamespace("/acme") {
		t.Errorf("generation %d, %v", generation, err)
	}
}

// TestForeignChangeIsAConflict: if somebody else moved the stored set, ours is
// refused rather than mixed into it.
func TestForeignChangeIsAConflict(t *testing.T) {
	st := openFaulty(t)
	p, err := openPolicies(t.Context(), st, &hosts{store: st}, nil, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	op, err := putJSON(keyState, state{Generation: 9})
	if err != nil {
		t.Fatal(err)
	}
	if _, ok, err := st.Txn(t.Context(), nil, []store.Op{op}); err != nil || !ok {
		t.Fatal(ok, err)
	}
	docs, err := policydb.Parse("a.yaml", []byte("kind: Namespace\nname: /acme\nmode: enforce\n"))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := p.apply(t.Context(), change{upserts: docs}); !errors.Is(err, policydb.ErrConflict) || p.hasNamespace("/acme") {
		t.Errorf("err = %v, want ErrConflict", err)
	}
}

// TestInventoryIsWrittenBehind: after a failed write, the next one has all of it.
func TestInventoryIsWrittenBehind(t *testing.T) {
	st := openFaulty(t)
	now := time.Now()
	clock := func() time.Time { return now }
	i, err := openInventory(t.Context(), st, clock)
	if err != nil {
		t.Fatal(err)
	}
	record := func(name, host string) {
		t.Helper()
		i.record(workloadRecord{SPIFFEID: "spiffe://a/n/" + name, Namespace: "/n", Name: name, HostID: host, Issued: now, NotAfter: now.Add(time.Hour)})
	}
	record("a", "h1")
	st.full.Store(true)
	if err := i.flush(t.Context()); !errors.Is(err, store.ErrNoSpace) {
		t.Errorf("err = %v", err)
	}
	st.full.Store(false)
	record("b", "h2")
	i.removeHost("h2")
	if err := i.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	again, err := openInventory(t.Context(), st, clock)
	if err != nil {
		t.Fatal(err)
	}
	if got := again.list(""); len(got) != 1 || got[0].Name != "a" {
		t.Errorf("stored: %v", got)
	}
	now = now.Add(2 * time.Hour)
	again.prune(nil)
	if err := again.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if kvs, _, err := st.List(t.Context(), workloadPrefix); err != nil || len(kvs) != 0 {
		t.Errorf("after they expired: %v, %v", kvs, err)
	}
}

// TestInventoryIsBounded per host: one host cannot make us remember without end, and
// one user of a host cannot push out what Profiles name.
func TestInventoryIsBounded(t *testing.T) {
	st := openFaulty(t)
	i, err := openInventory(t.Context(), st, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	record := func(host, name string) {
		now = now.Add(time.Millisecond)
		i.record(workloadRecord{Namespace: "/n", Name: name, HostID: host, Issued: now, NotAfter: now.Add(time.Hour)})
	}
	names := func(i *inventory, host string) map[string]bool {
		out := make(map[string]bool)
		for _, r := range i.list("") {
			if r.HostID == host {
				out[r.Name] = true
			}
		}
		return out
	}
	record("another", "unprofiled.old")
	record("h", "web")
	for n := range maxWorkloadsPerHost - 1 {
		record("h", fmt.Sprint("unprofiled.", n))
	}
	record("h", "unprofiled.0") // seen again: the youngest now
	for n := range 10 {
		record("h", fmt.Sprint("db-", n))
	}
	for _, i := range []*inventory{i, reopen(t, i)} {
		got := names(i, "h")
		if len(got) != maxWorkloadsPerHost {
			t.Errorf("%d workloads, want %d", len(got), maxWorkloadsPerHost)
		}
		for name, want := range map[string]bool{
			"web": true, "db-0": true, "db-9": true, "unprofiled.0": true,
			"unprofiled.1": false, "unprofiled.10": false, "unprofiled.11": true, "unprofiled.4000": true,
		} {
			if got[name] != want {
				t.Errorf("%s: kept %t, want %t", name, got[name], want)
			}
		}
		if !names(i, "another")["unprofiled.old"] {
			t.Error("another host's was forgotten")
		}
	}
	// With names of Profiles only, the oldest of those goes.
	for n := range maxWorkloadsPerHost {
		record("h", fmt.Sprint("app-", n))
	}
	if got := names(i, "h"); len(got) != maxWorkloadsPerHost || got["web"] || got["db-9"] || !got["app-0"] {
		t.Errorf("%d workloads, web %t, app-0 %t", len(got), got["web"], got["app-0"])
	}
	i.removeHost("h")
	if got := i.hosts(); len(got) != 1 || got[0] != "another" || len(i.records) != 1 {
		t.Errorf("left: hosts %v, %d records", got, len(i.records))
	}
}

// reopen is what a controller that starts anew knows.
func reopen(t *testing.T, i *inventory) *inventory {
	t.Helper()
	if err := i.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	again, err := openInventory(t.Context(), i.store, i.now)
	if err != nil {
		t.Fatal(err)
	}
	return again
}
