package netlab

import (
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// indexBase is above any interface index that a small world's namespaces reach
	// by themselves.
	indexBase = 1000
	// upTimeout bounds the wait for a new cable; usual is less than 1 ms.
	upTimeout = 10 * time.Second
)

// Interface is a host's end of a link.
type Interface struct {
	Host  *Host
	Name  string         // eth0, eth1, ... in the order of linking
	Addrs []netip.Prefix // in the order given to Link or Attach
}

// Link joins two hosts by a cable (a veth pair). Addresses carry their prefix
// length ("10.1.0.2/24", "fd00:1::2/64") and are usable at once.
func (w *World) Link(a, b *Host, addrsA, addrsB []string) (*Interface, *Interface) {
	w.reporter.Helper()
	ia := &Interface{Host: a, Name: fmt.Sprintf("eth%d", len(a.interfaces))}
	ib := &Interface{Host: b, Name: fmt.Sprintf("eth%d", len(b.interfaces))}
	if w.Err() != nil {
		return ia, ib
	}
	if a == b {
		w.fail("link %s to itself", a.name)
		return ia, ib
	}
	if err := cable(ia, ib); err != nil {
		w.fail("link %s %s: %w", a.name, b.name, err)
		return ia, ib
	}
	if err := ia.configure(addrsA); err != nil {
		w.fail("interface %s of %s: %w", ia.Name, a.name, err)
		return ia, ib
	}
	if err := ib.configure(addrsB); err != nil {
		w.fail("interface %s of %s: %w", ib.Name, b.name, err)
		return ia, ib
	}
	for _, i := range []*Interface{ia, ib} {
		if err := i.awaitUp(); err != nil {
			w.fail("interface %s of %s: %w", i.Name, i.Host.name, err)
		}
	}
	return ia, ib
}

// cable makes the pair. It is made inside a's namespace, its peer straight in
// b's: nothing ever appears in the machine's own, and names need not be unique.
func cable(a, b *Interface) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = a.Name
	// The kernel acts on a veth's carrier at once if its index differs from its
	// peer's, else within a second (net/core/link_watch.c, linkwatch_urgent_event).
	// The peer gets the next small number of its namespace.
	attrs.Index = indexBase + a.Host.world.next()
	veth := netlink.NewVeth(attrs)
	veth.PeerName = b.Name
	veth.PeerNamespace = netlink.NsFd(int(b.Host.ns))
	if err := a.Host.links.LinkAdd(veth); err != nil {
		return err
	}
	a.Host.interfaces = append(a.Host.interfaces, a)
	b.Host.interfaces = append(b.Host.interfaces, b)
	return nil
}

// awaitUp returns when the interface is usable. The kernel takes notice of a cable
// and of IPv6 addresses in the background; before that it answers no neighbour
// solicitations, and does not even know its own address for local.
func (i *Interface) awaitUp() error {
	deadline := time.Now().Add(upTimeout)
	for {
		lacks, err := i.lacks()
		if lacks == "" || err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not up after %v: %s", upTimeout, lacks)
		}
		time.Sleep(time.Millisecond)
	}
}

// lacks says what is still to come, "" if nothing is.
func (i *Interface) lacks() (string, error) {
	links := i.Host.links
	link, err := links.LinkByName(i.Name)
	if err != nil {
		return "", err
	}
	if state := link.Attrs().OperState; state != netlink.OperUp {
		return "carrier: " + state.String(), nil
	}
	addrs, err := links.AddrList(link, netlink.FAMILY_V6)
	if err != nil {
		return "", err
	}
	linkLocal := false // given last: the interface takes part in IPv6
	for _, a := range addrs {
		if a.Flags&unix.IFA_F_TENTATIVE != 0 {
			return "tentative address " + a.String(), nil
		}
		linkLocal = linkLocal || a.IP.IsLinkLocalUnicast()
	}
	if !linkLocal {
		return "IPv6 link-local address", nil
	}
	for _, a := range i.Addrs {
		routes, err := links.RouteGet(a.Addr().AsSlice())
		if err != nil || len(routes) != 1 || routes[0].Type != unix.RTN_LOCAL {
			return fmt.Sprintf("local route to %s: %v", a.Addr(), err), nil
		}
	}
	return "", nil
}

// configure gives the interface its addresses and sets it up.
func (i *Interface) configure(addrs []string) error {
	link, err := i.Host.links.LinkByName(i.Name)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a)
		if err != nil {
			return err
		}
		if err := i.Host.links.AddrAdd(link, address(p)); err != nil {
			return fmt.Errorf("address %s: %w", p, err)
		}
		i.Addrs = append(i.Addrs, p)
	}
	return i.Host.links.LinkSetUp(link)
}

func address(p netip.Prefix) *netlink.Addr {
	a := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{
		IP:   p.Addr().AsSlice(),
		Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen()),
	}
}

// V4 returns the interface's first IPv4 address, the zero Addr if it has none.
func (i *Interface) V4() netip.Addr { return firstAddr(i.Addrs, netip.Addr.Is4) }

// V6 returns the interface's first IPv6 address, the zero Addr if it has none.
func (i *Interface) V6() netip.Addr { return firstAddr(i.Addrs, netip.Addr.Is6) }

func firstAddr(addrs []netip.Prefix, is func(netip.Addr) bool) netip.Addr {
	for _, p := range addrs {
		if is(p.Addr()) {
			return p.Addr()
		}
	}
	return netip.Addr{}
}

// Interfaces returns the host's interfaces in the order of linking, without lo.
func (h *Host) Interfaces() []*Interface { return h.interfaces }

// V4 returns the host's first IPv4 address, the zero Addr if it has none.
func (h *Host) V4() netip.Addr {
	for _, i := range h.interfaces {
		if a := i.V4(); a.IsValid() {
			return a
		}
	}
	return netip.Addr{}
}

// V6 returns the host's first IPv6 address, the zero Addr if it has none.
func (h *Host) V6() netip.Addr {
	for _, i := range h.interfaces {
		if a := i.V6(); a.IsValid() {
			return a
		}
	}
	return netip.Addr{}
}

// AddAddress gives the interface one more address, with its prefix length.
func (i *Interface) AddAddress(addr string) {
	w := i.Host.world
	w.reporter.Helper()
	if w.Err() != nil {
		return
	}
	err := i.configure([]string{addr})
	if err == nil {
		err = i.awaitUp()
	}
	if err != nil {
		w.fail("interface %s of %s: %w", i.Name, i.Host.name, err)
	}
}

// Route sends dst ("10.2.0.0/24") by way of the next hop via.
func (h *Host) Route(dst, via string) {
	h.world.reporter.Helper()
	if h.world.Err() != nil {
		return
	}
	if err := h.route(dst, via); err != nil {
		h.world.fail("host %s: route %s via %s: %w", h.name, dst, via, err)
	}
}

// DefaultRoute sends everything of via's address family to via.
func (h *Host) DefaultRoute(via string) {
	h.world.reporter.Helper()
	dst := "0.0.0.0/0"
	if a, err := netip.ParseAddr(via); err == nil && a.Is6() {
		dst = "::/0"
	}
	h.Route(dst, via)
}

func (h *Host) route(dst, via string) error {
	p, err := netip.ParsePrefix(dst)
	if err != nil {
		return err
	}
	gw, err := netip.ParseAddr(via)
	if err != nil {
		return err
	}
	return h.links.RouteAdd(&netlink.Route{Dst: ipNet(p.Masked()), Gw: gw.AsSlice()})
}
