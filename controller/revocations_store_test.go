package controller

import (
	"errors"
	"fmt"
	"math/rand"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/identity"
)

func openBook(t *testing.T) *revocations {
	t.Helper()
	st, err := store.Open(filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.Close() })
	r, err := openRevocations(t.Context(), st, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Whoever takes every change, some of them, or the whole, in whatever steps, has the same
// in the end; and so has the store.
func TestRevocationChangesAddUp(t *testing.T) {
	r := openBook(t)
	rng := rand.New(rand.NewSource(1))
	sets := make([]*identity.Revocations, 4)
	catchUp := func(i int) {
		m, _ := r.since(sets[i].Number())
		if m == nil {
			return
		}
		next, err := sets[i].Update(m)
		if err != nil {
			t.Fatal(err)
		}
		sets[i] = next
	}
	var ids []string
	for step := range 1500 {
		if len(ids) > 0 && rng.Intn(3) == 0 {
			n := rng.Intn(len(ids))
			if _, err := r.remove(t.Context(), ids[n]); err != nil {
				t.Fatal(err)
			}
			ids = slices.Delete(ids, n, n+1)
		} else {
			rec, _, err := r.add(t.Context(), revocationRecord{SPIFFEID: fmt.Sprintf("spiffe://a.example/%d", step)})
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, rec.ID)
		}
		for i := range sets {
			if rng.Intn(1+i*i*i*20) == 0 && i < 3 {
				catchUp(i)
			}
		}
	}
	again, err := openRevocations(t.Context(), r.store, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	if again.bytes != r.bytes || again.number != r.number {
		t.Errorf("the store has %d bytes, number %d; want %d, %d", again.bytes, again.number, r.bytes, r.number)
	}
	slices.Sort(ids)
	for i := range sets {
		catchUp(i)
		var has []string
		for _, e := range sets[i].Proto().GetAdded() {
			has = append(has, e.GetId())
		}
		if diff := cmp.Diff(ids, has); diff != "" || sets[i].Number() != r.number {
			t.Errorf("follower %d, at %d of %d (-want +got):\n%s", i, sets[i].Number(), r.number, diff)
		}
		if m, _ := r.since(sets[i].Number()); m != nil {
			t.Errorf("follower %d is told what it has", i)
		}
	}
}

func TestRevocationsAreBounded(t *testing.T) {
	r := openBook(t)
	big := revocationRecord{Labels: map[string]string{"app": strings.Repeat("x", maxAttributeValue)}}
	for i := range maxRevocations {
		r.records[fmt.Sprint(i)] = &big
	}
	if _, _, err := r.add(t.Context(), revocationRecord{SPIFFEID: "spiffe://a.example/b"}); !errors.Is(err, errRevocationsFull) {
		t.Errorf("one too many: %v", err)
	}
	r.records = map[string]*revocationRecord{}
	r.bytes = maxRevocationBytes - 10
	if _, _, err := r.add(t.Context(), revocationRecord{SPIFFEID: "spiffe://a.example/b"}); !errors.Is(err, errRevocationsFull) {
		t.Errorf("a few bytes too many: %v", err)
	}
	r.bytes = 0
	if _, _, err := r.add(t.Context(), revocationRecord{SPIFFEID: "spiffe://a.example/b"}); err != nil {
		t.Error(err)
	}
}

// A host that is removed is not forgotten sooner for having been revoked before, and one
// that was revoked until further notice stays so.
func TestTheLongerRevocationCounts(t *testing.T) {
	r := openBook(t)
	soon, later := time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
	for _, step := range []struct{ expires, want time.Time }{{soon, soon}, {later, later}, {soon, later}, {time.Time{}, time.Time{}}, {later, time.Time{}}} {
		rec, _, err := r.add(t.Context(), revocationRecord{Host: "h", TrustDomain: "a.example", Expires: step.expires})
		if err != nil {
			t.Fatal(err)
		}
		if !rec.Expires.Equal(step.want) || len(r.records) != 1 {
			t.Errorf("until %v, want %v; %d records", rec.Expires, step.want, len(r.records))
		}
	}
	if r.bytes != (&revocationRecord{Host: "h", TrustDomain: "a.example"}).size() {
		t.Errorf("%d bytes", r.bytes)
	}
}

// What nothing can match any more is dropped, and followers hear of it; what was revoked
// until further notice is not.
func TestRevocationsArePruned(t *testing.T) {
	r := openBook(t)
	now := time.Now()
	r.now = func() time.Time { return now }
	for i, expires := range []time.Time{now.Add(time.Hour), now.Add(3 * time.Hour), {}} {
		if _, _, err := r.add(t.Context(), revocationRecord{Serial: fmt.Sprintf("0%d", i+1), TrustDomain: "a.example", Expires: expires}); err != nil {
			t.Fatal(err)
		}
	}
	m, _ := r.since(0)
	set, err := (*identity.Revocations)(nil).Update(m)
	if err != nil {
		t.Fatal(err)
	}
	for hours, want := range []int{3, 3, 2, 2, 1, 1} {
		if _, err := r.prune(t.Context()); err != nil {
			t.Fatal(err)
		}
		if m, _ := r.since(set.Number()); m != nil {
			if set, err = set.Update(m); err != nil {
				t.Fatal(err)
			}
		}
		if r.current().Len() != want || set.Len() != want {
			t.Errorf("hour %d: %d are left, followers have %d; want %d", hours, r.current().Len(), set.Len(), want)
		}
		now = now.Add(time.Hour)
	}
}
