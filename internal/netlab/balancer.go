package netlab

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// maxBalancerConns bounds HAProxy's connections, which cost it memory in advance.
const maxBalancerConns = 20000

// Balancer is a layer-4 load balancer: HAProxy in TCP mode. It connects to the
// backends from its own address, as most balancers do.
type Balancer struct {
	Port     uint16 // where it listens, on IPv4 and IPv6
	Backends []netip.AddrPort
	// Check connects to each backend every 200 ms, says nothing, and takes those
	// out that refuse: what health checks of layer 4 do.
	Check bool
	// Algorithm is HAProxy's "balance"; empty means roundrobin.
	Algorithm string
	// Unit names the daemon; empty means haproxy.service.
	Unit string
}

// Balancer starts HAProxy in the host.
func (h *Host) Balancer(ctx context.Context, b Balancer) (*Daemon, error) {
	unit := orDefault(b.Unit, "haproxy.service")
	dir, err := h.world.mkdir(h.name, unit)
	if err != nil {
		return nil, fmt.Errorf("netlab: %w", err)
	}
	config := filepath.Join(dir, "haproxy.cfg")
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return nil, fmt.Errorf("netlab: open files limit: %w", err)
	}
	// HAProxy refuses to start where the limit is below what it may need: two
	// descriptors per connection and some of its own.
	maxConn := min(maxBalancerConns, files.Max/2-100)
	if err := writeConfig(config, b.config(maxConn)); err != nil {
		return nil, fmt.Errorf("netlab: %w", err)
	}
	return h.Start(ctx, Service{
		Unit:    unit,
		Command: []string{"haproxy", "-f", config, "-db"},
		Ports:   []uint16{b.Port},
	})
}

func (b Balancer) config(maxConn uint64) string {
	var s strings.Builder
	fmt.Fprintf(&s, `global
    maxconn %d

defaults
    mode tcp
    balance %s
    timeout connect 5s
    timeout client 10m
    timeout server 10m

listen balancer
    bind 0.0.0.0:%d
    bind [::]:%d v6only
`, maxConn, orDefault(b.Algorithm, "roundrobin"), b.Port, b.Port)
	check := ""
	if b.Check {
		check = " check inter 200ms rise 1 fall 1"
	}
	for i, backend := range b.Backends {
		fmt.Fprintf(&s, "    server backend%d %s%s\n", i+1, backend, check)
	}
	return s.String()
}

func orDefault(s, def string) string {
	if s == "" {
		return def
	}
	return s
}
