package proxy

import (
	"fmt"
	"net/netip"
	"sync"
)

// gate counts who is inside, in all and by key. Safe for concurrent use.
type gate[K comparable] struct {
	name      string // of the limit for each key
	each, all int    // the most that may be inside

	mu     sync.Mutex
	inside map[K]int
	total  int
}

// enter lets one in; leave, to be called once or more, lets it out. It is full if
// full is not nil, which says why.
func (g *gate[K]) enter(k K) (leave func(), full *overload) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.inside[k] >= g.each {
		return nil, &overload{g.name, fmt.Sprintf("%v has %d that wait for their authorization", k, g.each)}
	}
	if g.total >= g.all {
		return nil, &overload{limitHandshakes, fmt.Sprintf("%d wait for their authorization", g.all)}
	}
	if g.inside == nil {
		g.inside = make(map[K]int)
	}
	g.inside[k]++
	g.total++
	left := false
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if left {
			return
		}
		left = true
		if g.total--; g.inside[k] > 1 {
			g.inside[k]--
		} else {
			delete(g.inside, k)
		}
	}, nil
}

// size is how many are inside.
func (g *gate[K]) size() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.total
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
