package proxy

import (
	"net/netip"
	"sync"
)

// What may wait for its authorization at once. Beyond, connections are reset: a
// flood must not take descriptors and memory from those that were let in.
const (
	pendingTotal = 8192
	// pendingPerSource is for an IPv4 address or an IPv6 /64; a balancer or a NAT is
	// one source.
	pendingPerSource = 2048
	pendingPerUser   = 4096
)

// gate counts who is inside, in all and by key. Safe for concurrent use.
type gate[K comparable] struct {
	each, all int // the most that may be inside

	mu     sync.Mutex
	inside map[K]int
	total  int
}

// enter lets one in; leave, to be called once or more, lets it out. Not ok: it is
// full.
func (g *gate[K]) enter(k K) (leave func(), ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.total >= g.all || g.inside[k] >= g.each {
		return nil, false
	}
	if g.inside == nil {
		g.inside = make(map[K]int)
	}
	g.inside[k]++
	g.total++
	return sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.total--; g.inside[k] > 1 {
			g.inside[k]--
		} else {
			delete(g.inside, k)
		}
	}), true
}

// sourceOf is whom a client counts as.
func sourceOf(a netip.Addr) netip.Prefix {
	a = a.Unmap().WithZone("")
	bits := 64
	if a.Is4() {
		bits = 32
	}
	p, _ := a.Prefix(bits) // within the address's length
	return p
}
