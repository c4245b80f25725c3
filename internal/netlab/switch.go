package netlab

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/vishvananda/netlink"
)

// bridgeName is the bridge's name inside a switch's namespace.
const bridgeName = "br0"

// Switch joins any number of hosts on one subnet: a bridge in a namespace of its
// own. Its host has no addresses; it is there to capture on.
type Switch struct {
	Host *Host
}

// Switch makes a switch; its name is a host name.
func (w *World) Switch(name string) *Switch {
	w.reporter.Helper()
	s := &Switch{Host: w.Host(name)}
	if w.Err() != nil {
		return s
	}
	if err := s.create(); err != nil {
		w.fail("switch %s: %w", name, err)
	}
	return s
}

func (s *Switch) create() error {
	h := s.Host
	// With br_netfilter in the kernel, bridged packets would pass iptables.
	for _, name := range []string{"net.bridge.bridge-nf-call-iptables", "net.bridge.bridge-nf-call-ip6tables"} {
		if err := h.sysctl(name, "0"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = bridgeName
	snooping := false // without a querier it holds back neighbour discovery
	bridge := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}
	if err := h.links.LinkAdd(bridge); err != nil {
		return err
	}
	return h.links.LinkSetUp(bridge)
}

// Attach plugs a host into the switch and returns the host's interface.
func (s *Switch) Attach(h *Host, addrs ...string) *Interface {
	w := s.Host.world
	w.reporter.Helper()
	port, end := w.Link(s.Host, h, nil, addrs)
	if w.Err() != nil {
		return end
	}
	if err := s.enslave(port.Name); err != nil {
		w.fail("switch %s: attach %s: %w", s.Host.name, h.name, err)
	}
	return end
}

func (s *Switch) enslave(port string) error {
	bridge, err := s.Host.links.LinkByName(bridgeName)
	if err != nil {
		return err
	}
	link, err := s.Host.links.LinkByName(port)
	if err != nil {
		return fmt.Errorf("port %s: %w", port, err)
	}
	return s.Host.links.LinkSetMaster(link, bridge)
}
