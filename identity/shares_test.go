package identity

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestSharesAreFair: a user who has all of his share waits for himself, and keeps
// nobody else waiting.
func TestSharesAreFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShares(4, 2)
		take := func(uid uint32) (func(), error) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			return s.acquire(ctx, uid)
		}
		must := func(uid uint32) func() {
			t.Helper()
			release, err := take(uid)
			if err != nil {
				t.Fatalf("user %d: %v", uid, err)
			}
			return release
		}
		began := time.Now()
		greedy := []func(){must(1000), must(1000)}
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if _, err := take(1000); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("beyond the share: %v", err)
				}
			})
		}
		synctest.Wait()
		other := []func(){must(0), must(0)}
		if d := time.Since(began); d != 0 {
			t.Errorf("another user waited %s", d)
		}
		if _, err := take(33); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("beyond the total: %v", err)
		}
		other[0]()
		must(33)()
		wg.Wait()
		for _, release := range append(greedy, other[1]) {
			release()
		}
		if len(s.users) != 0 {
			t.Errorf("%d users remembered", len(s.users))
		}
		must(1000)()
	})
}

// TestSharesByWeight: what takes several slots waits for all of them, and gives them back.
func TestSharesByWeight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewShares(30, 10)
		take := func(uid uint32, n int64) (func(), error) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			return s.AcquireN(ctx, uid, n)
		}
		eight, err := take(1000, 8)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := take(1000, 3); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("beyond the share: %v", err)
		}
		other, err := take(33, 10)
		if err != nil {
			t.Errorf("another user: %v", err)
		}
		eight()
		all, err := take(1000, 10)
		if err != nil {
			t.Fatalf("what was given back: %v", err)
		}
		all()
		other()
		if len(s.s.users) != 0 {
			t.Errorf("%d users remembered", len(s.s.users))
		}
	})
}
