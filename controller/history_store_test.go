package controller

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/policydb"
)

func mustParse(t *testing.T, text string) []policydb.Document {
	t.Helper()
	docs, err := policydb.Parse("a.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return docs
}

func numberedPolicy(name string, port int) string {
	return fmt.Sprintf("kind: Policy\nnamespace: /\nname: %s\nsubject: any\nverb: deny\nobject: any\nports: [tcp/%d]\n", name, port)
}

// TestHistoryIsBounded by generations and by bytes, in the store too; and what is kept
// leads back as far as it says.
func TestHistoryIsBounded(t *testing.T) {
	st := openFaulty(t)
	p, err := openPolicies(t.Context(), st, &hosts{store: st}, nil, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	for n := range maxHistory + 5 {
		if _, _, _, err := p.apply(t.Context(), change{upserts: mustParse(t, numberedPolicy("p", n+1))}); err != nil {
			t.Fatal(err)
		}
	}
	records, now := p.generations()
	if len(records) != maxHistory || now != maxHistory+6 || records[0].Generation != 7 {
		t.Fatalf("%d records from %d, generation %d", len(records), records[0].Generation, now)
	}
	for _, prefix := range []string{historyPrefix, undoPrefix} {
		if kvs, _, err := st.List(t.Context(), prefix); err != nil || len(kvs) != maxHistory {
			t.Errorf("%s: %d keys, %v", prefix, len(kvs), err)
		}
	}
	if _, _, resources, err := p.generation(t.Context(), 7); err != nil || resources[1].GetPolicy().GetPorts()[0].GetFirst() != 6 {
		t.Errorf("%v, %v", resources, err)
	}

	// Bytes: each of these generations undoes to some 10 MiB.
	for round := range 9 {
		var docs []policydb.Document
		for n := range 12 {
			long := strings.Repeat("x", 1000)
			var values []string
			for v := range 850 {
				values = append(values, fmt.Sprintf("%d-%s", v+round, long))
			}
			docs = append(docs, mustParse(t, fmt.Sprintf("kind: Policy\nnamespace: /\nname: big-%d\nsubject: any\nverb: deny\nobject: {os.user: [%s]}\n",
				n, strings.Join(values, ", ")))...)
		}
		if _, _, _, err := p.apply(t.Context(), change{upserts: docs}); err != nil {
			t.Fatal(err)
		}
	}
	records, _ = p.generations()
	size := 0
	for _, r := range records {
		size += r.Bytes
	}
	if size > maxHistoryBytes || size < maxHistoryBytes/2 || len(records) < 2 {
		t.Errorf("%d records of %d bytes", len(records), size)
	}
	kvs, _, err := st.List(t.Context(), undoPrefix)
	stored := 0
	for _, kv := range kvs {
		stored += len(kv.Value)
		if len(kv.Value) > store.MaxValue {
			t.Errorf("a chunk of %d bytes", len(kv.Value))
		}
	}
	if err != nil || stored != size {
		t.Errorf("%d bytes are stored, %d are known of; %v", stored, size, err)
	}
	// Over chunks, what was is read back whole.
	first := records[0].Generation
	if _, _, resources, err := p.generation(t.Context(), first); err != nil || len(resources) != 14 {
		t.Errorf("%d resources, %v", len(resources), err)
	}
}

// TestHistoryBeginsAnewAfterAGap: a controller of before wrote a generation without
// keeping what undoes it.
func TestHistoryBeginsAnewAfterAGap(t *testing.T) {
	st := openFaulty(t)
	p, err := openPolicies(t.Context(), st, &hosts{store: st}, nil, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	for n := range 3 {
		if _, _, _, err := p.apply(t.Context(), change{upserts: mustParse(t, numberedPolicy("p", n+1))}); err != nil {
			t.Fatal(err)
		}
	}
	op, err := putJSON(keyState, state{Generation: 5, ProfilesGeneration: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, ok, err := st.Txn(t.Context(), nil, []store.Op{op}); err != nil || !ok {
		t.Fatal(ok, err)
	}
	for range 2 {
		if p, err = openPolicies(t.Context(), st, &hosts{store: st}, nil, time.Now); err != nil {
			t.Fatal(err)
		}
		if records, _ := p.generations(); len(records) != 1 || records[0].Generation != 5 {
			t.Fatalf("records %v", records)
		}
	}
	if kvs, _, err := st.List(t.Context(), undoPrefix); err != nil || len(kvs) != 0 {
		t.Errorf("left behind: %d, %v", len(kvs), err)
	}
	if _, _, _, err := p.apply(t.Context(), change{rollback: 4}); err == nil || !strings.Contains(err.Error(), "not kept") {
		t.Errorf("err = %v", err)
	}
}

// TestUndoOfGarbageIsRefused rather than half believed.
func TestUndoOfGarbageIsRefused(t *testing.T) {
	c := policydb.Change{Resource: mustParse(t, numberedPolicy("p", 1))[0].Resource}
	c.Previous = mustParse(t, numberedPolicy("p", 2))[0].Resource
	good, err := encodeUndo([]policydb.Change{c})
	if err != nil {
		t.Fatal(err)
	}
	was := make(past)
	if err := decodeUndo(good, was); err != nil || len(was) != 1 {
		t.Fatal(was, err)
	}
	for n := 1; n < len(good); n++ {
		if err := decodeUndo(good[:n], make(past)); err == nil {
			t.Errorf("%d of %d bytes were taken", n, len(good))
		}
	}
	other := append([]byte(nil), good...)
	other[len("\x06Policy\x01/\x01")] = 'q' // the key says q, the resource p
	if err := decodeUndo(other, make(past)); err == nil || !strings.Contains(err.Error(), "stands under") {
		t.Errorf("err = %v", err)
	}
}
