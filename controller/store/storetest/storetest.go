// Package storetest holds implementations of store.Store to its contract.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/symbolon/symbolon/controller/store"
)

// Run runs the whole suite. open makes an empty store; the suite closes it.
func Run(t *testing.T, open func(t *testing.T) store.Store) {
	for name, test := range map[string]func(*testing.T, store.Store){
		"GetOfNothing":              getOfNothing,
		"RevisionsCountChanges":     revisionsCountChanges,
		"ListIsOrderedAndPrefixed":  listIsOrderedAndPrefixed,
		"TxnIsAllOrNothing":         txnIsAllOrNothing,
		"TxnRefusesWrongCalls":      txnRefusesWrongCalls,
		"ConditionsAdmitOneWinner":  conditionsAdmitOneWinner,
		"ValuesAreCopies":           valuesAreCopies,
		"WatchReplaysThenFollows":   watchReplaysThenFollows,
		"WatchSeesEveryChangeOnce":  watchSeesEveryChangeOnce,
		"WatchEndsWithContext":      watchEndsWithContext,
		"SnapshotWrites":            snapshotWrites,
		"ClosedStoreSaysSo":         closedStoreSaysSo,
		"EmptyValueIsNotAbsence":    emptyValueIsNotAbsence,
		"LargeValuesAndTransaction": largeValuesAndTransaction,
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			t.Cleanup(func() {
				if err := s.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			})
			test(t, s)
		})
	}
}

func ctx(t *testing.T) context.Context {
	c, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return c
}

// txn applies ops without conditions and returns the revision.
func txn(t *testing.T, s store.Store, ops ...store.Op) int64 {
	t.Helper()
	rev, ok, err := s.Txn(ctx(t), nil, ops)
	if err != nil || !ok {
		t.Fatalf("txn: ok=%v err=%v", ok, err)
	}
	return rev
}

func getOfNothing(t *testing.T, s store.Store) {
	if _, err := s.Get(ctx(t), "absent"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("err = %v, want ErrNotFound", err)
	}
	kvs, _, err := s.List(ctx(t), "")
	if err != nil || len(kvs) != 0 {
		t.Errorf("list of an empty store: %v, %v", kvs, err)
	}
}

func revisionsCountChanges(t *testing.T, s store.Store) {
	first := txn(t, s, store.Put("a", []byte("1")), store.Put("b", []byte("1")))
	second := txn(t, s, store.Put("a", []byte("2")))
	if second != first+1 {
		t.Errorf("revisions %d then %d, want consecutive", first, second)
	}
	a, err := s.Get(ctx(t), "a")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(store.KV{Key: "a", Value: []byte("2"), ModRevision: second}, a); diff != "" {
		t.Error(diff)
	}
	b, err := s.Get(ctx(t), "b")
	if err != nil || b.ModRevision != first {
		t.Errorf("b: %+v, %v; want the revision %d of its own change", b, err, first)
	}
	if rev := txn(t, s, store.Delete("absent")); rev != second {
		t.Errorf("deleting nothing moved the revision to %d", rev)
	}
}

func listIsOrderedAndPrefixed(t *testing.T, s store.Store) {
	rev := txn(t, s, store.Put("x/b", nil), store.Put("y", nil), store.Put("x/a", nil), store.Put("x", nil), store.Put("x0", nil))
	kvs, at, err := s.List(ctx(t), "x/")
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, kv := range kvs {
		keys = append(keys, kv.Key)
	}
	if diff := cmp.Diff([]string{"x/a", "x/b"}, keys); diff != "" {
		t.Error(diff)
	}
	if at != rev {
		t.Errorf("list is of revision %d, want %d", at, rev)
	}
}

func txnIsAllOrNothing(t *testing.T, s store.Store) {
	rev := txn(t, s, store.Put("a", []byte("1")))
	_, ok, err := s.Txn(ctx(t),
		[]store.Cond{{Key: "a", ModRevision: rev}, {Key: "b", ModRevision: rev}},
		[]store.Op{store.Put("a", []byte("2")), store.Put("b", []byte("2"))})
	if err != nil || ok {
		t.Fatalf("ok=%v err=%v, want refused: b does not exist", ok, err)
	}
	a, _ := s.Get(ctx(t), "a")
	if string(a.Value) != "1" {
		t.Errorf("a = %q after a refused transaction", a.Value)
	}
	_, ok, err = s.Txn(ctx(t),
		[]store.Cond{{Key: "a", ModRevision: rev}, {Key: "b"}},
		[]store.Op{store.Delete("a"), store.Put("b", []byte("2"))})
	if err != nil || !ok {
		t.Fatalf("ok=%v err=%v, want applied", ok, err)
	}
	if _, err := s.Get(ctx(t), "a"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("a: %v, want deleted", err)
	}
}

func txnRefusesWrongCalls(t *testing.T, s store.Store) {
	for name, ops := range map[string][]store.Op{
		"empty key":  {store.Put("", nil)},
		"key twice":  {store.Put("a", nil), store.Delete("a")},
		"huge value": {store.Put("a", make([]byte, store.MaxValue+1))},
	} {
		if _, _, err := s.Txn(ctx(t), nil, ops); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("%s: err = %v, want ErrInvalid", name, err)
		}
	}
}

func conditionsAdmitOneWinner(t *testing.T, s store.Store) {
	rev := txn(t, s, store.Put("token", []byte("unused")))
	var wg sync.WaitGroup
	won := make(chan int, 32)
	for i := range cap(won) {
		wg.Go(func() {
			_, ok, err := s.Txn(ctx(t), []store.Cond{{Key: "token", ModRevision: rev}},
				[]store.Op{store.Put("token", []byte("used")), store.Put("host/"+strconv.Itoa(i), nil)})
			if err != nil {
				t.Error(err)
			}
			if ok {
				won <- i
			}
		})
	}
	wg.Wait()
	if len(won) != 1 {
		t.Errorf("%d transactions won, want exactly one", len(won))
	}
	if hosts, _, _ := s.List(ctx(t), "host/"); len(hosts) != 1 {
		t.Errorf("%d hosts, want one", len(hosts))
	}
}

func valuesAreCopies(t *testing.T, s store.Store) {
	v := []byte("mine")
	txn(t, s, store.Put("k", v))
	v[0] = 'X'
	got, _ := s.Get(ctx(t), "k")
	if string(got.Value) != "mine" {
		t.Fatalf("stored value follows the caller's slice: %q", got.Value)
	}
	got.Value[0] = 'Y'
	again, _ := s.Get(ctx(t), "k")
	if string(again.Value) != "mine" {
		t.Errorf("returned value is the store's own: %q", again.Value)
	}
}

// collect takes n events from a watch.
func collect(t *testing.T, s store.Store, prefix string, after int64, n int) []store.Event {
	t.Helper()
	var events []store.Event
	for e, err := range s.Watch(ctx(t), prefix, after) {
		if err != nil {
			t.Fatalf("watch: %v after %d of %d events", err, len(events), n)
		}
		if events = append(events, e); len(events) == n {
			break
		}
	}
	return events
}

func watchReplaysThenFollows(t *testing.T, s store.Store) {
	start := txn(t, s, store.Put("w/a", []byte("0")))
	r1 := txn(t, s, store.Put("w/a", []byte("1")), store.Put("other", nil))
	r2 := txn(t, s, store.Delete("w/a"))
	wrote := make(chan int64, 1)
	go func() {
		rev, _, err := s.Txn(context.WithoutCancel(t.Context()), nil, []store.Op{store.Put("w/b", []byte("2"))})
		if err != nil {
			t.Error(err)
		}
		wrote <- rev
	}()
	got := collect(t, s, "w/", start, 3)
	want := []store.Event{
		{KV: store.KV{Key: "w/a", Value: []byte("1"), ModRevision: r1}},
		{KV: store.KV{Key: "w/a", Value: []byte{}, ModRevision: r2}, Deleted: true},
		{KV: store.KV{Key: "w/b", Value: []byte("2"), ModRevision: <-wrote}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func watchSeesEveryChangeOnce(t *testing.T, s store.Store) {
	start := txn(t, s, store.Put("start", nil))
	const writers, each = 8, 25
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				if _, _, err := s.Txn(ctx(t), nil, []store.Op{store.Put(fmt.Sprintf("n/%d/%d", w, i), nil)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	events := collect(t, s, "n/", start, writers*each)
	wg.Wait()
	seen := make(map[string]bool)
	for i, e := range events {
		if seen[e.Key] {
			t.Errorf("%s seen twice", e.Key)
		}
		seen[e.Key] = true
		if i > 0 && e.ModRevision <= events[i-1].ModRevision {
			t.Errorf("revision %d after %d", e.ModRevision, events[i-1].ModRevision)
		}
	}
}

func watchEndsWithContext(t *testing.T, s store.Store) {
	rev := txn(t, s, store.Put("a", nil))
	c, cancel := context.WithCancel(t.Context())
	cancel()
	var last error
	for _, err := range s.Watch(c, "", rev) {
		last = err
	}
	if !errors.Is(last, context.Canceled) {
		t.Errorf("last error %v, want context.Canceled", last)
	}
}

func snapshotWrites(t *testing.T, s store.Store) {
	txn(t, s, store.Put("a", []byte("in the snapshot")))
	var b bytes.Buffer
	if err := s.Snapshot(ctx(t), &b); err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(b.Bytes(), []byte("in the snapshot")) {
		t.Errorf("%d bytes of snapshot without the value", b.Len())
	}
}

func closedStoreSaysSo(t *testing.T, s store.Store) {
	rev := txn(t, s, store.Put("a", nil))
	watched := make(chan error, 1)
	go func() {
		var last error
		for _, err := range s.Watch(context.WithoutCancel(t.Context()), "", rev) {
			last = err
		}
		watched <- last
	}()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-watched; !errors.Is(err, store.ErrClosed) {
		t.Errorf("watch ended with %v, want ErrClosed", err)
	}
	if _, err := s.Get(ctx(t), "a"); !errors.Is(err, store.ErrClosed) {
		t.Errorf("get: %v, want ErrClosed", err)
	}
	if _, _, err := s.Txn(ctx(t), nil, []store.Op{store.Put("a", nil)}); !errors.Is(err, store.ErrClosed) {
		t.Errorf("txn: %v, want ErrClosed", err)
	}
	if err := s.Snapshot(ctx(t), io.Discard); !errors.Is(err, store.ErrClosed) {
		t.Errorf("snapshot: %v, want ErrClosed", err)
	}
}

func emptyValueIsNotAbsence(t *testing.T, s store.Store) {
	txn(t, s, store.Put("a", nil))
	kv, err := s.Get(ctx(t), "a")
	if err != nil || len(kv.Value) != 0 {
		t.Errorf("%+v, %v", kv, err)
	}
	if _, ok, _ := s.Txn(ctx(t), []store.Cond{{Key: "a"}}, nil); ok {
		t.Error("a key with an empty value counts as absent")
	}
}

func largeValuesAndTransaction(t *testing.T, s store.Store) {
	big := bytes.Repeat([]byte{7}, store.MaxValue)
	txn(t, s, store.Put("big", big))
	kv, err := s.Get(ctx(t), "big")
	if err != nil || !bytes.Equal(kv.Value, big) {
		t.Errorf("value of %d bytes came back as %d, %v", len(big), len(kv.Value), err)
	}
	var ops []store.Op
	for i := range 100 {
		ops = append(ops, store.Put(fmt.Sprintf("many/%03d", i), []byte{byte(i)}))
	}
	rev := txn(t, s, ops...)
	kvs, _, err := s.List(ctx(t), "many/")
	if err != nil || len(kvs) != len(ops) {
		t.Fatalf("%d of %d keys, %v", len(kvs), len(ops), err)
	}
	for _, kv := range kvs {
		if kv.ModRevision != rev {
			t.Errorf("%s has revision %d, want %d", kv.Key, kv.ModRevision, rev)
		}
	}
}
