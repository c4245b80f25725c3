package controller

import (
	"bytes"
	"context"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/symbolon/symbolon/controller/store"
)

const (
	// peersDelay gathers hosts that come one after another into one push.
	peersDelay = time.Second
	// maxPeers bounds the addresses that a host is told, and with it the message: 20
	// bytes each. What is beyond is not known to have a proxy, and learn passes it by.
	maxPeers = 65536
)

// peers are the addresses of all enrolled hosts, as each told them last, connected or
// not. Hosts in learn are told them: where to use a tunnel; and hosts that see Externals
// by name, which none of them is. A host can lie here, and so make others ask it, or
// nobody, for a tunnel; it opens nothing.
// Safe for concurrent use.
type peers struct {
	log *zap.Logger

	mu      sync.Mutex
	byHost  map[string][]netip.Addr
	current *peerSet
	changed chan struct{} // closed and replaced when current changes
	timer   *time.Timer   // runs when current is not what byHost makes
	closed  bool
}

// peerSet is one state of the list, sorted, 4 or 16 bytes each. It does not change.
type peerSet struct{ addresses [][]byte }

func newPeers(log *zap.Logger, hosts []*hostRecord) *peers {
	p := &peers{log: log, byHost: make(map[string][]netip.Addr), changed: make(chan struct{})}
	for _, h := range hosts {
		p.byHost[h.ID] = peerAddresses(h.Addresses)
	}
	p.current = p.build()
	return p
}

// peerAddresses are those of a host's that somebody else can connect to.
func peerAddresses(texts []string) []netip.Addr {
	var out []netip.Addr
	for _, t := range texts {
		if a, err := netip.ParseAddr(t); err == nil && a.Zone() == "" && a.Unmap().IsGlobalUnicast() {
			out = append(out, a.Unmap())
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// set is what a host said, or that it has gone: nil.
func (p *peers) set(hostID string, texts []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := peerAddresses(texts)
	if slices.Equal(p.byHost[hostID], now) {
		return
	}
	p.byHost[hostID] = now
	if len(now) == 0 {
		delete(p.byHost, hostID)
	}
	// The moment is not put off again: hosts that come and go cannot hold it back.
	if p.timer == nil && !p.closed {
		p.timer = time.AfterFunc(peersDelay, p.flush)
	}
}

func (p *peers) flush() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.timer = nil
	next := p.build()
	if p.closed || slices.EqualFunc(next.addresses, p.current.addresses, bytes.Equal) {
		return
	}
	p.current = next
	close(p.changed)
	p.changed = make(chan struct{})
}

// build is called with the lock held, or before anybody else knows p.
func (p *peers) build() *peerSet {
	all := slices.Concat(slices.Collect(maps.Values(p.byHost))...)
	slices.SortFunc(all, netip.Addr.Compare)
	all = slices.Compact(all) // hosts of two sites may have the same private one
	if len(all) > maxPeers {
		p.log.Warn("too many addresses of hosts: namespaces in learn do not know the rest, and pass them by", zap.Int("addresses", len(all)), zap.Int("limit", maxPeers))
		all = all[:maxPeers]
	}
	s := &peerSet{addresses: make([][]byte, len(all))}
	for i, a := range all {
		s.addresses[i] = a.AsSlice()
	}
	return s
}

// now is the list, and a channel that closes when it is another.
func (p *peers) now() (*peerSet, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.current, p.changed
}

func (p *peers) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	if p.timer != nil {
		p.timer.Stop()
		p.timer = nil
	}
}

// reported keeps what a host says of its addresses: it may be away when another asks,
// and so may be this controller. The list hears of it from the store (followHosts).
func (s *Server) reported(ctx context.Context, host *hostRecord, addresses []string) error {
	if slices.Equal(host.Addresses, addresses) {
		return nil
	}
	return s.hosts.update(ctx, host.ID, func(h *hostRecord) { h.Addresses = addresses })
}

// follow takes a host's addresses from its record.
func (p *peers) follow(kv store.KV) error {
	h := &hostRecord{}
	if err := getJSON(kv, h); err != nil {
		return err
	}
	p.set(h.ID, h.Addresses)
	return nil
}
