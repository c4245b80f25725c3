package names

import (
	"context"
	"net/netip"
	"time"
)

// Names that clients ask for. A client chooses what is looked up, and how slowly whoever
// answers for it does so: what one workload does must not keep another's names from
// being looked up.
const (
	// maxAsked bounds the names that are known because a client asked for them.
	maxAsked = 1024
	// asksAtOnce bounds their lookups under way, asksEach those of one workload.
	asksAtOnce = 64
	asksEach   = 8
	// askWait is how long a client waits for its name, askEvery how often one is looked up
	// for clients: they may ask as often as they like.
	askWait  = 5 * time.Second
	askEvery = time.Second
)

// asker is a workload that asks. Guarded by Names' lock.
type asker struct {
	slots chan struct{}
	users int
}

// Has tells whether a name, one that a client of a workload asks for, has an address. It is
// looked up if that is not known, which may take a while.
func (n *Names) Has(ctx context.Context, workload, name string, a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	ctx, cancel := context.WithTimeout(ctx, askWait)
	defer cancel()
	has, ask := n.has(ctx, workload, name, a)
	if !ask {
		return has
	}
	// A turn first, then the name: one that is being looked up is waited for by all who
	// ask for it, and must not wait for its first asker's turn.
	leave := n.turn(ctx, workload)
	if leave == nil {
		return false
	}
	defer leave()
	if has, ask = n.has(ctx, workload, name, a); !ask {
		return has
	}
	n.mu.Lock()
	e := n.known[name]
	if e == nil || e.done != nil {
		n.mu.Unlock()
		has, _ = n.has(ctx, workload, name, a)
		return has
	}
	n.beginLocked(e, n.now())
	n.mu.Unlock()
	// Others wait for this as well, so that it does not end when this client's time does.
	lookup, done := context.WithTimeout(context.WithoutCancel(ctx), askWait)
	defer done()
	n.finish(e, n.lookup(lookup, name))
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.now().Before(e.until[a])
}

// has tells whether a name has an address, or whether to look it up first. It waits for a
// lookup that is under way.
func (n *Names) has(ctx context.Context, workload, name string, a netip.Addr) (has, ask bool) {
	for {
		now := n.now()
		n.mu.Lock()
		e := n.known[name]
		if e == nil {
			if e = n.roomLocked(workload, name); e == nil {
				n.mu.Unlock()
				return false, false
			}
		}
		e.used = now
		wait, known, fresh := e.done, now.Before(e.until[a]), e.settled && now.Sub(e.began) < askEvery
		n.mu.Unlock()
		switch {
		case known:
			return true, false
		case wait == nil:
			return false, !fresh
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return false, false
		}
	}
}

// turn waits until the workload may look a name up; nil: its time was over before.
func (n *Names) turn(ctx context.Context, workload string) (leave func()) {
	n.mu.Lock()
	w := n.askers[workload]
	if w == nil {
		w = &asker{slots: make(chan struct{}, asksEach)}
		n.askers[workload] = w
	}
	w.users++
	n.mu.Unlock()
	gone := func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		if w.users--; w.users == 0 {
			delete(n.askers, workload)
		}
	}
	for i, slots := range []chan struct{}{w.slots, n.asks} {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			if i > 0 {
				<-w.slots
			}
			gone()
			return nil
		}
	}
	return func() {
		<-n.asks
		<-w.slots
		gone()
	}
}

// roomLocked makes an entry for a name that a client asks for. Where there is no room, the
// workload with the most names loses the one that nobody has asked for the longest; nil:
// all of its are being looked up.
func (n *Names) roomLocked(workload, name string) *entry {
	if n.asked >= maxAsked {
		count := make(map[string]int)
		most := workload
		for _, e := range n.known {
			if !e.wanted {
				count[e.by]++
			}
		}
		for by, c := range count {
			if c > count[most] {
				most = by
			}
		}
		var oldest *entry
		for _, e := range n.known {
			if !e.wanted && e.by == most && e.done == nil && (oldest == nil || e.used.Before(oldest.used)) {
				oldest = e
			}
		}
		if oldest == nil {
			return nil
		}
		n.forgetLocked(oldest)
	}
	n.asked++
	e := n.newEntryLocked(name)
	e.by = workload
	return e
}
