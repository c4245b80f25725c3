package proxy

import (
	"net/netip"
	"sync"
	"time"

	"github.com/symbolon/symbolon/mtls"
)

const (
	// keepIdle is how long a tunnel waits for its next connection on the client's
	// side; the server's waits a little longer, so that it is not the one to close.
	keepIdle       = 10 * time.Second
	keepIdleServer = keepIdle + 5*time.Second
	// keepPerRoute and keepTotal bound the tunnels that wait.
	keepPerRoute = 64
	keepTotal    = 4096
)

// route is what a tunnel can be reused for: one workload's connections, under the
// very credential that the tunnel was made with, from one source address to one
// destination. It never serves another workload.
type route struct {
	endpoint *mtls.Endpoint
	src      netip.Addr
	dst      netip.AddrPort
}

type waiting struct {
	tunnel kept
	since  time.Time
}

// pool keeps tunnels between two connections. Safe for concurrent use.
type pool struct {
	mu     sync.Mutex
	idle   map[route][]waiting
	total  int
	closed bool
}

// take returns the tunnel that was used last, if there is one.
func (p *pool) take(r route, now time.Time) (t kept, ok bool) {
	for {
		if t = p.pop(r); t.Conn == nil {
			return t, false
		}
		// The clock and the network have gone on since it was put here.
		if now.Before(t.Peer().NotAfter) && t.Idle() {
			return t, true
		}
		_ = t.Close()
	}
}

func (p *pool) pop(r route) kept {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := p.idle[r]
	if len(list) == 0 {
		return kept{}
	}
	last := list[len(list)-1]
	list[len(list)-1] = waiting{}
	p.total--
	if list = list[:len(list)-1]; len(list) == 0 {
		delete(p.idle, r)
	} else {
		p.idle[r] = list
	}
	return last.tunnel
}

// put keeps t, or closes it where there are enough.
func (p *pool) put(r route, t kept, now time.Time) {
	p.mu.Lock()
	keep := !p.closed && p.total < keepTotal && len(p.idle[r]) < keepPerRoute
	if keep {
		if p.idle == nil {
			p.idle = make(map[route][]waiting)
		}
		p.idle[r] = append(p.idle[r], waiting{t, now})
		p.total++
	}
	p.mu.Unlock()
	if !keep {
		_ = t.Close()
	}
}

// sweep closes what has waited for too long.
func (p *pool) sweep(now time.Time) {
	var old []kept
	p.mu.Lock()
	for r, list := range p.idle {
		n := 0 // the oldest stand first
		for n < len(list) && now.Sub(list[n].since) > keepIdle {
			old = append(old, list[n].tunnel)
			n++
		}
		if p.total -= n; n == len(list) {
			delete(p.idle, r)
		} else if n > 0 {
			p.idle[r] = append([]waiting(nil), list[n:]...)
		}
	}
	p.mu.Unlock()
	for _, t := range old {
		_ = t.Close()
	}
}

// close ends all, and keeps none any more.
func (p *pool) close() {
	p.mu.Lock()
	all := p.idle
	p.idle, p.total, p.closed = nil, 0, true
	p.mu.Unlock()
	for _, list := range all {
		for _, w := range list {
			_ = w.tunnel.Close()
		}
	}
}
