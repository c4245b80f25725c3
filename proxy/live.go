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
	// expires is the first moment at which a certificate of the connection's is no
	// longer valid; zero: never.
	expires time.Time
	// cut ends both directions at once.
	cut func()

	record func() *symbolonv1.FlowRecord // for debugging: what is known so far
	until  time.Time                     // guarded by the table's lock
	reason atomic.Int32                  // why it was cut
}

// cutReason is why the connection was cut; UNSPECIFIED: it was not.
func (l *live) cutReason() symbolonv1.Reason { return symbolonv1.Reason(l.reason.Load()) }

func (l *live) end(why symbolonv1.Reason) {
	if l.reason.CompareAndSwap(0, int32(why)) {
		l.cut()
	}
}

// table is the set of live connections. Safe for concurrent use.
type table struct {
	mu     sync.Mutex
	conns  map[*live]struct{}
	policy *policydb.Compiled
}

// add registers l, which was allowed by the policy decided. Registering comes
// before the last check: whoever changes the policy afterwards finds l here, and
// what changed before is judged now. So no connection slips between.
func (t *table) add(l *live, decided *policydb.Compiled, now time.Time) {
	t.mu.Lock()
	if t.conns == nil {
		t.conns = make(map[*live]struct{})
	}
	t.conns[l] = struct{}{}
	current := t.policy
	t.mu.Unlock()
	if current != nil && current != decided {
		t.check(l, current, now)
	}
}

func (t *table) remove(l *live) {
	t.mu.Lock()
	delete(t.conns, l)
	t.mu.Unlock()
}

// setPolicy judges every connection by c, and cuts what it denies.
func (t *table) setPolicy(c *policydb.Compiled, now time.Time) (cut int) {
	t.mu.Lock()
	t.policy = c
	all := t.snapshotLocked()
	t.mu.Unlock()
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
		if past(l.expires, now) || past(l.until, now) {
			due = append(due, l)
		}
	}
	t.mu.Unlock()
	for _, l := range due {
		if past(l.expires, now) {
			l.end(symbolonv1.Reason_REASON_SVID_EXPIRED)
		} else if c != nil {
			t.check(l, c, now)
		}
	}
}

func (t *table) check(l *live, c *policydb.Compiled, now time.Time) bool {
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

// endAll cuts every connection.
func (t *table) endAll(why symbolonv1.Reason) {
	t.mu.Lock()
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
