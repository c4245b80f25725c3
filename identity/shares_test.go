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
