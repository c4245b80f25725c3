package proxy

import (
	"crypto/x509"
	"sync"
	"sync/atomic"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/policydb"
)

// sweepEvery is how late a connection may be cut after a certificate has expired or
// a policy's time window has ended.
const sweepEvery = time.Second

// live is an open connection, as far as it can be judged again.
type live struct {
	question question
	// judge decides by the given policy; until is when to ask again, zero: only
	// when something changes. Connections with one question have one answer, so one
	// of them is asked for all.
	judge func(c *policydb.Compiled, now time.Time) (allow bool, until time.Time)
	// expires is when the certificates of the local parties end: one answer for one
	// question, too; nil: the connection stands on none.
	expires func() time.Time
	// notAfter is when the peer's certificate ends; zero: there is none.
	notAfter time.Time
	// leaf is that certificate, peer whose it is; nil: there is none.
	leaf *x509.Certificate
	// above are the certificates that came with it.
	above []*x509.Certificate
	peer  *identity.Principal
	// cut ends both directions at once.
	cut func()

	// moved is how many bytes it has carried, and whether one end has closed; nil: it
	// may rest for as long as it likes.
	moved func() (bytes uint64, half bool)
	rest  rest // guarded by the table's lock until it is registered, then the sweep's

	// renewal renews what it stands on; nil: nothing that could be renewed.
	renewal *renewal
	// first is the connection as it was registered first, which has cut, reason and rest;
	// nil: this is it.
	first *live

	record func() *symbolonv1.FlowRecord // for debugging: what is known so far
	reason atomic.Int32                  // why it was cut

	// Guarded by the table's lock.
	group       *group // nil: not registered
	seat, place int    // among the group's members, in the table's queue
	number      uint64 // of its registration
	round       turn   // when its rest is looked at
}

func (l *live) when() time.Time { return l.notAfter }
func (l *live) spot() *int      { return &l.place }

// cutReason is why the connection was cut; UNSPECIFIED: it was not.
func (l *live) cutReason() symbolonv1.Reason { return symbolonv1.Reason(l.origin().reason.Load()) }

// origin is l as it was registered first.
func (l *live) origin() *live {
	if l.first != nil {
		return l.first
	}
	return l
}

// end cuts l; false: it was cut before.
func (l *live) end(why symbolonv1.Reason) bool {
	l = l.origin()
	if !l.reason.CompareAndSwap(0, int32(why)) {
		return false
	}
	l.cut()
	return true
}

// table is the set of live connections, and the policy that they are judged by. A
// change asks each question that it could touch once, however many connections wait
// for the answer. Safe for concurrent use.
type table struct {
	mu        sync.Mutex
	n         int
	number    uint64 // of the newest registration
	groups    map[question]*group
	byParty   map[*party]map[*group]struct{}
	expiring  queue[*live]  // by the peer's certificate
	uncertain queue[*group] // by when to judge again
	asking    queue[*renewal]
	round     round // whose rest is to be looked at first
	policy    *policydb.Compiled
	revoked   atomic.Pointer[identity.Revocations]
	closed    symbolonv1.Reason // why no connection lives any more; 0: they may
	judged    atomic.Uint64     // decisions made on live connections
}

// check is a group to judge, as it was when the reason for it came up.
type check struct {
	group *group
	asked *live  // for all
	epoch uint64 // of the group
}

// add registers l, and judges it once more. Registering comes first: whoever changes
// policy or claims afterwards finds l here, and what changed before is seen now. So
// no connection slips between a decision and a change.
func (t *table) add(l *live, now time.Time) {
	t.mu.Lock()
	k := t.registerLocked(l, now)
	c, closed := t.policy, t.closed
	t.mu.Unlock()
	if closed != 0 {
		l.end(closed)
		return
	}
	if past(l.notAfter, now) {
		l.end(symbolonv1.Reason_REASON_SVID_EXPIRED)
		return
	}
	if l.isRevoked(t.revoked.Load(), c) {
		l.end(symbolonv1.Reason_REASON_REVOKED)
		return
	}
	if why := l.disbelieved(now); why != 0 {
		l.end(why)
		return
	}
	// The others of the group are left to whoever made the change.
	if why, due := t.ask(l, c, now); why != 0 {
		l.end(why)
	} else {
		t.answered(k, c, due)
	}
}

func (t *table) registerLocked(l *live, now time.Time) check {
	g := t.groups[l.question]
	if g == nil {
		if t.groups == nil {
			t.groups, t.byParty = make(map[question]*group), make(map[*party]map[*group]struct{})
		}
		g = &group{question: l.question}
		t.groups[l.question] = g
		for _, w := range l.question.parties() {
			if t.byParty[w] == nil {
				t.byParty[w] = make(map[*group]struct{})
			}
			t.byParty[w][g] = struct{}{}
		}
	}
	t.n++
	t.number++
	l.number = t.number
	g.join(l)
	t.expiring.put(l)
	if l.moved != nil {
		if l.first == nil {
			l.rest.since = now
		}
		t.round.join(l, now)
	}
	return g.checkLocked(l)
}

func (g *group) checkLocked(asked *live) check {
	g.epoch++
	return check{g, asked, g.epoch}
}

// remove forgets l; nothing happens if it was never added.
func (t *table) remove(l *live) {
	t.mu.Lock()
	defer t.mu.Unlock()
	g := l.group
	if g == nil {
		return
	}
	t.n--
	t.expiring.drop(l)
	t.round.leave(l)
	g.leave(l)
	if len(g.members) > 0 {
		return
	}
	t.uncertain.drop(g)
	delete(t.groups, g.question)
	for _, w := range g.question.parties() {
		delete(t.byParty[w], g)
		if len(t.byParty[w]) == 0 {
			delete(t.byParty, w)
		}
	}
}

// setPolicy makes c the policy, tells publish under the same lock, so that nobody
// decides by an older one afterwards, and cuts the live connections that c denies.
func (t *table) setPolicy(c *policydb.Compiled, publish func(), now time.Time) (cut int) {
	t.mu.Lock()
	t.policy = c
	publish()
	checks := make([]check, 0, len(t.groups))
	for _, g := range t.groups {
		checks = append(checks, g.checkLocked(g.members[0]))
	}
	last := t.number
	t.mu.Unlock()
	return t.check(checks, c, last, now)
}

// changed judges again what w, whose credential is another now, takes part in.
func (t *table) changed(w *party, now time.Time) (cut int) {
	t.mu.Lock()
	c, last := t.policy, t.number
	checks := make([]check, 0, len(t.byParty[w]))
	var doubtful []*live
	for g := range t.byParty[w] {
		checks = append(checks, g.checkLocked(g.members[0]))
		if g.question.doubtful() {
			doubtful = append(doubtful, g.members...)
		}
	}
	t.mu.Unlock()
	for _, l := range doubtful {
		if why := l.disbelieved(now); why != 0 && l.end(why) {
			cut++
		}
	}
	return cut + t.check(checks, c, last, now)
}

// sweep cuts what has expired, and judges again what was allowed until now only.
func (t *table) sweep(now time.Time) {
	t.mu.Lock()
	c, last := t.policy, t.number
	var expired []*live
	var checks []check
	for l, ok := t.expiring.due(now); ok; l, ok = t.expiring.due(now) {
		expired = append(expired, l)
	}
	for g, ok := t.uncertain.due(now); ok; g, ok = t.uncertain.due(now) {
		g.due = time.Time{}
		checks = append(checks, g.checkLocked(g.members[0]))
	}
	t.mu.Unlock()
	for _, l := range expired {
		l.end(symbolonv1.Reason_REASON_SVID_EXPIRED)
	}
	t.check(checks, c, last, now)
}

// check judges groups by c, and cuts the members of those that it denies. Who has
// registered later than last has been judged by what holds since.
func (t *table) check(checks []check, c *policydb.Compiled, last uint64, now time.Time) (cut int) {
	for _, k := range checks {
		why, due := t.ask(k.asked, c, now)
		if why == 0 {
			t.answered(k, c, due)
			continue
		}
		for _, l := range t.members(k.group, last) {
			if l.end(why) {
				cut++
			}
		}
	}
	return cut
}

// ask judges l: why it must end, 0 if it need not, or else when to ask again.
func (t *table) ask(l *live, c *policydb.Compiled, now time.Time) (why symbolonv1.Reason, due time.Time) {
	if l.expires != nil {
		if due = l.expires(); past(due, now) {
			return symbolonv1.Reason_REASON_SVID_EXPIRED, due
		}
	}
	if l.question.withdrawn() {
		return symbolonv1.Reason_REASON_NO_IDENTITY, due
	}
	if l.groupRevoked(t.revoked.Load(), c) {
		return symbolonv1.Reason_REASON_REVOKED, due
	}
	if c == nil {
		return 0, due
	}
	t.judged.Add(1)
	allow, until := l.judge(c, now)
	if !allow {
		return symbolonv1.Reason_REASON_POLICY_CHANGED, due
	}
	return 0, earlier(due, until)
}

// answered notes when the group is to be asked again. If it has been asked by another
// policy or for another reason meanwhile, both answers count: too early does no harm.
func (t *table) answered(k check, c *policydb.Compiled, due time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	g := k.group
	if len(g.members) == 0 {
		return // gone
	}
	if t.policy != c || g.epoch != k.epoch {
		due = earlier(g.due, due)
	}
	g.due = due
	t.uncertain.put(g)
}

// members are those of g that had registered by last.
func (t *table) members(g *group, last uint64) []*live {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]*live, 0, len(g.members))
	for _, l := range g.members {
		if l.number <= last {
			out = append(out, l)
		}
	}
	return out
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
	return t.n
}

func (t *table) snapshot() []*live {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.snapshotLocked()
}

func (t *table) snapshotLocked() []*live {
	all := make([]*live, 0, t.n)
	for _, g := range t.groups {
		all = append(all, g.members...)
	}
	return all
}

func past(t, now time.Time) bool { return !t.IsZero() && !now.Before(t) }
