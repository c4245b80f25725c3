package proxy

import (
	"sync"
	"sync/atomic"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/policydb"
)

// sweepEvery is how late a connection may be cut after a certificate has expired or
// a policy's time window has ended.
const sweepEvery = time.Second

// live is an open connection, as far as it can be judged again.
type live struct {
	// judge decides by the given policy; until is when to ask again, zero: only
	// when the policy changes.
	judge func(c *policydb.Compiled, now time.Time) (allow bool, until time.Time)
	// expires is the first moment at which a certificate that the connection stands
	// on is no longer valid; nil: it stands on none.
	expires func() time.Time
	// cut ends both directions at once.
	cut func()

	// moved is how many bytes it has carried, and whether one end has closed; nil: it
	// may rest for as long as it likes.
	moved func() (bytes uint64, half bool)
	rest  rest

	record func() *symbolonv1.FlowRecord // for debugging: what is known so far
	until  time.Time                     // guarded by the table's lock
	reason atomic.Int32                  // why it was cut
}

// cutReason is why the connection was cut; UNSPECIFIED: it was not.
func (l *live) cutReason() symbolonv1.Reason { return symbolonv1.Reason(l.reason.Load()) }

func (l *live) expired(now time.Time) bool { return l.expires != nil && past(l.expires(), now) }

func (l *live) end(why symbolonv1.Reason) {
	if l.reason.CompareAndSwap(0, int32(why)) {
		l.cut()
	}
}

// table is the set of live connections, and the policy that they are judged by.
// Safe for concurrent use.
type table struct {
	mu     sync.Mutex
	conns  map[*live]struct{}
	policy *policydb.Compiled
	closed symbolonv1.Reason // why no connection lives any more; 0: they may
}

// add registers l, and judges it once more. Registering comes first: whoever changes
// policy or claims afterwards finds l here, and what changed before is seen now. So
// no connection slips between a decision and a change.
func (t *table) add(l *live, now time.Time) {
	t.mu.Lock()
	if t.conns == nil {
		t.conns = make(map[*live]struct{})
	}
	t.conns[l] = struct{}{}
	c, closed := t.policy, t.closed
	t.mu.Unlock()
	if closed != 0 {
		l.end(closed)
		return
	}
	if c != nil {
		t.check(l, c, now)
	}
}

func (t *table) remove(l *live) {
	t.mu.Lock()
	delete(t.conns, l)
	t.mu.Unlock()
}

// setPolicy makes c the policy, tells publish under the same lock, so that nobody
// decides by an older one afterwards, and cuts the live connections that c denies.
func (t *table) setPolicy(c *policydb.Compiled, publish func(), now time.Time) (cut int) {
	t.mu.Lock()
	t.policy = c
	publish()
	t.mu.Unlock()
	return t.rejudge(now)
}

// rejudge judges every connection by the policy in force.
func (t *table) rejudge(now time.Time) (cut int) {
	t.mu.Lock()
	c := t.policy
	all := t.snapshotLocked()
	t.mu.Unlock()
	if c == nil {
		return 0
	}
	for _, l := range all {
		if !t.check(l, c, now) {
			cut++
		}
	}
	return cut
}

// sweep cuts what has expired, and judges again what was allowed until now only.
func (t *table) sweep(now time.Time) {
	t.mu.Lock()
	c := t.policy
	var due []*live
	for l := range t.conns {
		if l.expired(now) || past(l.until, now) {
			due = append(due, l)
		}
	}
	t.mu.Unlock()
	for _, l := range due {
		if l.expired(now) {
			l.end(symbolonv1.Reason_REASON_SVID_EXPIRED)
		} else if c != nil {
			t.check(l, c, now)
		}
	}
}

func (t *table) check(l *live, c *policydb.Compiled, now time.Time) bool {
	if l.expired(now) {
		l.end(symbolonv1.Reason_REASON_SVID_EXPIRED)
		return false
	}
	allow, until := l.judge(c, now)
	if !allow {
		l.end(symbolonv1.Reason_REASON_POLICY_CHANGED)
		return false
	}
	t.mu.Lock()
	l.until = until
	t.mu.Unlock()
	return true
}

// endAll cuts every connection, also those that are added later.
func (t *table) endAll(why symbolonv1.Reason) {
	t.mu.Lock()
	t.closed = why
	all := t.snapshotLocked()
	t.mu.Unlock()
	for _, l := range all {
		l.end(why)
	}
}

func (t *table) size() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.conns)
}

func (t *table) snapshot() []*live {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.snapshotLocked()
}

func (t *table) snapshotLocked() []*live {
	all := make([]*live, 0, len(t.conns))
	for l := range t.conns {
		all = append(all, l)
	}
	return all
}

func past(t, now time.Time) bool { return !t.IsZero() && !now.Before(t) }
