package netlab

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"time"
)

// iptablesTimeout bounds one call of iptables, which may wait for its lock.
const iptablesTimeout = 30 * time.Second

// IPTables runs iptables and, for family 6 or 0 (both), ip6tables in the host:
// h.IPTables(0, "-A", "FORWARD", "-j", "DROP").
func (h *Host) IPTables(family int, args ...string) {
	h.world.reporter.Helper()
	if h.world.Err() != nil {
		return
	}
	if err := h.iptables(family, args...); err != nil {
		h.world.fail("host %s: %w", h.name, err)
	}
}

func (h *Host) iptables(family int, args ...string) error {
	var tools []string
	switch family {
	case 0:
		tools = []string{"iptables", "ip6tables"}
	case 4:
		tools = []string{"iptables"}
	case 6:
		tools = []string{"ip6tables"}
	default:
		return fmt.Errorf("iptables: unknown address family %d", family)
	}
	ctx, cancel := context.WithTimeout(context.Background(), iptablesTimeout)
	defer cancel()
	for _, tool := range tools {
		if _, err := h.Output(ctx, tool, append([]string{"-w"}, args...)...); err != nil {
			return err
		}
	}
	return nil
}

// SNAT gives connections that leave the host by out another source: one of the
// given addresses for their family, or out's own addresses if none is given.
func (h *Host) SNAT(out *Interface, to ...netip.Addr) {
	h.world.reporter.Helper()
	if len(to) == 0 {
		for _, a := range []netip.Addr{out.V4(), out.V6()} {
			if a.IsValid() {
				to = append(to, a)
			}
		}
	}
	for _, a := range to {
		h.IPTables(family(a), "-t", "nat", "-A", "POSTROUTING", "-o", out.Name, "-j", "SNAT", "--to-source", a.String())
	}
}

// DNAT sends TCP connections that come to the host for the address and port dst
// on to another: the port forwarding of a router.
func (h *Host) DNAT(dst, to netip.AddrPort) {
	h.world.reporter.Helper()
	h.IPTables(family(dst.Addr()), "-t", "nat", "-A", "PREROUTING", "-p", "tcp",
		"-d", dst.Addr().String(), "--dport", strconv.Itoa(int(dst.Port())),
		"-j", "DNAT", "--to-destination", to.String())
}

// Partition makes the host drop every packet it should forward, connections that
// stand included, until heal is called. Nothing is told to the senders.
func (h *Host) Partition() (heal func()) {
	h.world.reporter.Helper()
	h.IPTables(0, "-I", "FORWARD", "-j", "DROP")
	return func() {
		h.world.reporter.Helper()
		h.IPTables(0, "-D", "FORWARD", "-j", "DROP")
	}
}

// Loss makes the host drop the given fraction (0 to 1) of the packets it should
// forward, at random, until heal is called.
func (h *Host) Loss(fraction float64) (heal func()) {
	h.world.reporter.Helper()
	rule := []string{"FORWARD", "-m", "statistic", "--mode", "random",
		"--probability", strconv.FormatFloat(fraction, 'f', 6, 64), "-j", "DROP"}
	h.IPTables(0, append([]string{"-I"}, rule...)...)
	return func() {
		h.world.reporter.Helper()
		h.IPTables(0, append([]string{"-D"}, rule...)...)
	}
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 4
	}
	return 6
}
