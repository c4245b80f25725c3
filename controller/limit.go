package controller

import (
	"fmt"
	"net/netip"
	"sync"

	"connectrpc.com/connect"
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

// Certificates per second and host, and in one burst. A host asks for one per
// workload and half an hour, for all of them when it starts or a Profile changes, and
// tries again later if it is refused. Its own renewals do not compete with those.
const (
	issueRate, issueBurst = 50, 500
	renewRate, renewBurst = 1, 20
)

// hostLimits bounds what each enrolled host can have signed.
type hostLimits struct {
	rate  rate.Limit
	burst int

	mu    sync.Mutex
	hosts map[string]*rate.Limiter
}

func newHostLimits(r rate.Limit, burst int) *hostLimits {
	return &hostLimits{rate: r, burst: burst, hosts: make(map[string]*rate.Limiter)}
}

// allow takes one from a host's share, or returns resource_exhausted.
func (l *hostLimits) allow(host, what string) error {
	l.mu.Lock()
	h := l.hosts[host]
	if h == nil {
		h = rate.NewLimiter(l.rate, l.burst)
		l.hosts[host] = h
	}
	l.mu.Unlock()
	if h.Allow() {
		return nil
	}
	err := connect.NewError(connect.CodeResourceExhausted,
		fmt.Errorf("host %s asked for more than %v %s per second (%d at once); try again in a few seconds", host, l.rate, what, l.burst))
	err.Meta().Set("Retry-After", "5")
	return err
}

// forget is for a host that was removed.
func (l *hostLimits) forget(host string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.hosts, host)
}

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
