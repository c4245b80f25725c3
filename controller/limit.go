package controller

import (
	"net/netip"
	"sync"

	"golang.org/x/time/rate"
)

// Enrolments per second, and in one burst. A secret of 256 bits needs no limit
// against guessing: this one is for our CPU and disk.
const (
	enrolRate, enrolBurst               = 100, 200
	enrolRatePerPeer, enrolBurstPerPeer = 20, 50
	// limitedPeers bounds the memory for peers; beyond it they start afresh, and the
	// common limit still holds.
	limitedPeers = 4096
)

// limiter bounds calls, in all and per peer: per IPv4 address or IPv6 /64.
type limiter struct {
	all *rate.Limiter

	mu    sync.Mutex
	peers map[netip.Prefix]*rate.Limiter
}

func newLimiter() *limiter {
	return &limiter{
		all:   rate.NewLimiter(enrolRate, enrolBurst),
		peers: make(map[netip.Prefix]*rate.Limiter),
	}
}

// allow takes "address:port".
func (l *limiter) allow(peer string) bool {
	var who netip.Prefix
	if ap, err := netip.ParseAddrPort(peer); err == nil {
		bits := 64
		addr := ap.Addr().Unmap().WithZone("")
		if addr.Is4() {
			bits = 32
		}
		who, _ = addr.Prefix(bits) // both lengths fit
	}
	l.mu.Lock()
	p := l.peers[who]
	if p == nil {
		if len(l.peers) >= limitedPeers {
			clear(l.peers)
		}
		p = rate.NewLimiter(enrolRatePerPeer, enrolBurstPerPeer)
		l.peers[who] = p
	}
	l.mu.Unlock()
	// The peer's own first: one that is over its limit takes nothing from others.
	return p.Allow() && l.all.Allow()
}
