package names

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
)

const (
	// linger is how long an address counts beyond the TTL of the last answer with it.
	linger = time.Minute
	// staleFailure is how long beyond its TTL the last good answer is kept when no other
	// comes, staleNegative when the answer is that there are no addresses.
	staleFailure  = time.Hour
	staleNegative = 5 * time.Minute

	// A name is asked for again after a part of its TTL, at random.
	refreshFrom, refreshTo = 0.7, 0.9
	retryFirst             = time.Second
	retryMax               = time.Minute
	retryNone              = 30 * time.Second

	// maxWanted bounds the names that are kept fresh; policydb refuses more.
	maxWanted = 4096
	// atOnce bounds the lookups under way of names that are kept fresh.
	atOnce = 16
	// settleWait is how long the first answers are waited for.
	settleWait = 3 * time.Second
)

// Options are what Names are made of.
type Options struct {
	// Dial connects to DNS servers, past the proxy's own redirection.
	Dial Dial
	// Conf is a file as in resolv.conf(5); empty: /etc/resolv.conf.
	Conf string
	Log  *zap.Logger
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// Names are the addresses of names. Safe for concurrent use.
type Names struct {
	lookup func(ctx context.Context, name string) [2]answer
	log    *zap.Logger
	now    func() time.Time
	wake   chan struct{}
	slots  chan struct{} // of those kept fresh
	asks   chan struct{} // of those asked for, see asked.go

	mu     sync.RWMutex
	known  map[string]*entry
	asked  int
	askers map[string]*asker
	// unsettled counts the wanted names of which no lookup has ended.
	unsettled int
	// byAddr are the wanted names that have had an address.
	byAddr map[netip.Addr]map[*entry]struct{}
}

// entry is one name. Guarded by Names' lock.
type entry struct {
	name   string
	wanted bool // kept fresh
	used   time.Time
	by     string // who asked for it first, if it is not wanted

	families [2]family
	until    map[netip.Addr]time.Time
	due      time.Time     // of the next lookup
	began    time.Time     // of the last one
	done     chan struct{} // closed when the one under way ends; nil: there is none
	settled  bool          // one has ended
	failures int
	err      error // of the last lookup
}

// family is the last good answer of one type of record.
type family struct {
	addrs []netip.Addr
	until time.Time // its TTL's end
}

// New makes a Names that knows nothing yet.
func New(o Options) *Names {
	if o.Conf == "" {
		o.Conf = "/etc/resolv.conf"
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	c := &client{dial: o.Dial, conf: (&conf{path: o.Conf}).now}
	return newNames(c.lookup, o)
}

func newNames(lookup func(context.Context, string) [2]answer, o Options) *Names {
	return &Names{
		lookup: lookup, log: o.Log, now: o.Now,
		wake: make(chan struct{}, 1), slots: make(chan struct{}, atOnce), asks: make(chan struct{}, asksAtOnce),
		known: make(map[string]*entry), byAddr: make(map[netip.Addr]map[*entry]struct{}), askers: make(map[string]*asker),
	}
}

// Want replaces the names that are kept fresh.
func (n *Names) Want(names []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(names) > maxWanted {
		n.log.Error("too many names to resolve; the rest is nobody's", zap.Int("names", len(names)), zap.Int("limit", maxWanted))
		names = names[:maxWanted]
	}
	wanted := make(map[string]bool, len(names))
	for _, name := range names {
		wanted[name] = true
		e := n.known[name]
		if e == nil {
			e = n.newEntryLocked(name)
		} else if !e.wanted {
			n.asked--
		}
		if !e.wanted && !e.settled {
			n.unsettled++
		}
		e.wanted = true
		for a := range e.until {
			n.indexLocked(e, a)
		}
	}
	for name, e := range n.known {
		if e.wanted && !wanted[name] {
			n.forgetLocked(e)
		}
	}
	n.nudge()
}

func (n *Names) newEntryLocked(name string) *entry {
	e := &entry{name: name, until: make(map[netip.Addr]time.Time)}
	n.known[name] = e
	return e
}

func (n *Names) forgetLocked(e *entry) {
	delete(n.known, e.name)
	if !e.wanted {
		n.asked--
	} else if !e.settled {
		n.unsettled--
	}
	for a := range e.until {
		n.unindexLocked(e, a)
	}
}

func (n *Names) indexLocked(e *entry, a netip.Addr) {
	if n.byAddr[a] == nil {
		n.byAddr[a] = make(map[*entry]struct{})
	}
	n.byAddr[a][e] = struct{}{}
}

func (n *Names) unindexLocked(e *entry, a netip.Addr) {
	delete(n.byAddr[a], e)
	if len(n.byAddr[a]) == 0 {
		delete(n.byAddr, a)
	}
}

func (n *Names) nudge() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// Of returns the wanted names that have an address, sorted.
func (n *Names) Of(a netip.Addr) []string {
	a = a.Unmap().WithZone("")
	now := n.now()
	n.mu.RLock()
	defer n.mu.RUnlock()
	var out []string
	for e := range n.byAddr[a] {
		if now.Before(e.until[a]) {
			out = append(out, e.name)
		}
	}
	slices.Sort(out)
	return out
}

// Settled waits until every wanted name has been looked up once, for a while.
func (n *Names) Settled(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, settleWait)
	defer cancel()
	for {
		n.mu.RLock()
		settled := n.unsettled == 0
		n.mu.RUnlock()
		if settled {
			return
		}
		pause := time.NewTimer(10 * time.Millisecond)
		select {
		case <-pause.C:
		case <-ctx.Done():
		}
		pause.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// Run keeps the wanted names fresh until ctx ends.
func (n *Names) Run(ctx context.Context) {
	var lookups sync.WaitGroup
	defer lookups.Wait()
	for {
		now := n.now()
		next := now.Add(retryMax)
		n.mu.Lock()
		for _, e := range n.known {
			switch {
			case !e.wanted || e.done != nil:
			case e.due.After(now):
				next = earlier(next, e.due)
			default:
				n.beginLocked(e, now)
				lookups.Go(func() { n.refresh(ctx, e) })
			}
		}
		n.pruneLocked(now)
		n.mu.Unlock()
		timer := time.NewTimer(next.Sub(now))
		select {
		case <-ctx.Done():
		case <-n.wake:
		case <-timer.C:
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func (n *Names) refresh(ctx context.Context, e *entry) {
	var got [2]answer
	select {
	case n.slots <- struct{}{}:
		got = n.lookup(ctx, e.name)
		<-n.slots
	case <-ctx.Done():
		got = failed(ctx.Err())
	}
	n.finish(e, got)
	n.nudge()
}

func failed(err error) [2]answer { return [2]answer{{err: err}, {err: err}} }

// pruneLocked forgets addresses that do not count any more, and with them the names that
// clients asked for.
func (n *Names) pruneLocked(now time.Time) {
	for _, e := range n.known {
		for a, until := range e.until {
			if !now.Before(until) {
				delete(e.until, a)
				n.unindexLocked(e, a)
			}
		}
		if !e.wanted && e.done == nil && len(e.until) == 0 && now.Sub(e.began) > askEvery {
			n.forgetLocked(e)
		}
	}
}

func (n *Names) beginLocked(e *entry, now time.Time) { e.done, e.began = make(chan struct{}), now }

// finish takes the answers.
func (n *Names) finish(e *entry, got [2]answer) {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := n.now()
	close(e.done)
	if e.wanted && !e.settled && n.known[e.name] == e {
		n.unsettled--
	}
	e.done, e.settled, e.err = nil, true, nil
	ttl, none := ttlMax, true
	for i, a := range got {
		f := &e.families[i]
		keep := f.until
		switch {
		case a.err == nil:
			none, ttl = false, min(ttl, a.ttl)
			f.addrs, f.until = a.addrs, now.Add(a.ttl)
			keep = f.until.Add(linger)
		case errors.Is(a.err, errNone):
			keep = keep.Add(staleNegative)
		default:
			none, e.err = false, a.err
			keep = keep.Add(staleFailure)
		}
		for _, addr := range f.addrs {
			n.keepLocked(e, addr, keep)
		}
		if errors.Is(a.err, errNone) {
			f.addrs = nil // and no failure makes them count for longer
		}
	}
	if none {
		e.err = errNone
	}
	n.scheduleLocked(e, now, ttl)
}

// keepLocked makes an address count until then at least. Those of earlier answers stay
// for as long as they were to, and give way when there are too many.
func (n *Names) keepLocked(e *entry, a netip.Addr, until time.Time) {
	if was, ok := e.until[a]; !ok && len(e.until) >= 2*maxAddresses {
		var first netip.Addr
		for x, t := range e.until {
			if !first.IsValid() || t.Before(e.until[first]) {
				first = x
			}
		}
		delete(e.until, first)
		n.unindexLocked(e, first)
	} else if ok && was.After(until) {
		return
	}
	e.until[a] = until
	if e.wanted && n.known[e.name] == e {
		n.indexLocked(e, a)
	}
}

// scheduleLocked says when the name is looked up again, and tells when that goes wrong.
func (n *Names) scheduleLocked(e *entry, now time.Time, ttl time.Duration) {
	wait := time.Duration(float64(ttl) * (refreshFrom + rand.Float64()*(refreshTo-refreshFrom)))
	if e.err == nil {
		if e.failures > 0 && e.wanted {
			n.log.Info("name resolved again", zap.String("name", e.name))
		}
		e.failures = 0
	} else {
		if e.failures++; e.failures == 1 && e.wanted && !errors.Is(e.err, context.Canceled) {
			n.log.Warn("name not resolved; its last addresses stay for a while", zap.String("name", e.name), zap.Int("addresses", len(e.until)), zap.Error(e.err))
		}
		wait = retryNone
		if !errors.Is(e.err, errNone) {
			wait = min(retryFirst<<min(e.failures-1, 10), retryMax)
		}
		wait = wait/2 + rand.N(wait/2)
	}
	e.due = now.Add(wait)
}

// Status is what is known of one name, for people.
type Status struct {
	Name      string    `json:"name"`
	Addresses []Address `json:"addresses"`
	// Asked: a client asked for it, under a wildcard; it is not kept fresh.
	Asked bool `json:"asked,omitempty"`
	// Error is that of the last lookup.
	Error string    `json:"error,omitempty"`
	Next  time.Time `json:"next_lookup,omitzero"`
}

// Address is one of a name's, and until when it counts if no answer has it any more.
type Address struct {
	Address netip.Addr `json:"address"`
	Until   time.Time  `json:"until"`
}

// Snapshot lists what is known, by name: a []Status.
func (n *Names) Snapshot() any { return n.statuses() }

func (n *Names) statuses() []Status {
	now := n.now()
	n.mu.RLock()
	defer n.mu.RUnlock()
	out := make([]Status, 0, len(n.known))
	for _, e := range n.known {
		s := Status{Name: e.name, Asked: !e.wanted, Addresses: []Address{}}
		if e.wanted {
			s.Next = e.due
		}
		if e.err != nil {
			s.Error = e.err.Error()
		}
		for a, until := range e.until {
			if now.Before(until) {
				s.Addresses = append(s.Addresses, Address{a, until})
			}
		}
		slices.SortFunc(s.Addresses, func(x, y Address) int { return x.Address.Compare(y.Address) })
		out = append(out, s)
	}
	slices.SortFunc(out, func(x, y Status) int { return strings.Compare(x.Name, y.Name) })
	return out
}
