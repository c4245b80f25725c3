package identity

import (
	"context"
	"sync"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/semaphore"
)

// shares are slots for work that local users cause, so many for all of them and
// fewer for each: one user who takes all of his makes himself wait, nobody else.
// Safe for concurrent use.
type shares struct {
	all *semaphore.Weighted
	per int64

	mu    sync.Mutex
	users map[uint32]*share
}

// Shares are the same for sources in other packages.
type Shares struct{ s *shares }

// NewShares makes total slots, of which a user gets up to per.
func NewShares(total, per int64) Shares { return Shares{newShares(total, per)} }

// Acquire waits for a slot of a user's, no longer than ctx. Call release once, if err
// is nil.
func (s Shares) Acquire(ctx context.Context, uid uint32) (release func(), err error) {
	return s.s.acquire(ctx, uid)
}

// AcquireN is Acquire for n slots at once, no more than a user gets.
func (s Shares) AcquireN(ctx context.Context, uid uint32, n int64) (release func(), err error) {
	return s.s.acquireN(ctx, uid, n)
}

// share is a user's, for as long as he has or waits for a slot.
type share struct {
	slots *semaphore.Weighted
	held  int
}

// newShares: per should be well below total, or one user has it all again.
func newShares(total, per int64) *shares {
	return &shares{all: semaphore.NewWeighted(total), per: per, users: make(map[uint32]*share)}
}

// acquire waits for a slot, no longer than ctx. Call release once, if err is nil.
func (s *shares) acquire(ctx context.Context, uid uint32) (release func(), err error) {
	return s.acquireN(ctx, uid, 1)
}

func (s *shares) acquireN(ctx context.Context, uid uint32, n int64) (release func(), err error) {
	s.mu.Lock()
	u := s.users[uid]
	if u == nil {
		u = &share{slots: semaphore.NewWeighted(s.per)}
		s.users[uid] = u
	}
	u.held++
	s.mu.Unlock()
	// The user's own first: who waits for it must not keep others waiting.
	if err := u.slots.Acquire(ctx, n); err != nil {
		s.leave(uid, u)
		return nil, err
	}
	if err := s.all.Acquire(ctx, n); err != nil {
		u.slots.Release(n)
		s.leave(uid, u)
		return nil, err
	}
	return func() {
		s.all.Release(n)
		u.slots.Release(n)
		s.leave(uid, u)
	}, nil
}

func (s *shares) leave(uid uint32, u *share) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if u.held--; u.held == 0 {
		delete(s.users, uid)
	}
}

func newLRU[K comparable, V any](size int) *lru.Cache[K, V] {
	c, err := lru.New[K, V](size)
	if err != nil {
		panic(err) // only for a size below one
	}
	return c
}

// newClosingLRU closes what it lets go of.
func newClosingLRU[K comparable, V interface{ close() }](size int) *lru.Cache[K, V] {
	c, err := lru.NewWithEvict(size, func(_ K, v V) { v.close() })
	if err != nil {
		panic(err) // only for a size below one
	}
	return c
}
