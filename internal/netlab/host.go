package netlab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Host is a network namespace with its loopback up and no forwarding.
type Host struct {
	world  *World
	name   string
	netns  string // its name under /run/netns
	inode  inode
	cookie uint64 // SO_NETNS_COOKIE of its sockets, 0 if the kernel has none
	ns     netns.NsHandle
	links  *netlink.Handle

	interfaces []*Interface
}

// hostSysctls make hosts alike on every machine: a new namespace inherits much
// of net.ipv4 from the machine's own. Duplicate address detection would hold
// back every IPv6 address for a second.
var hostSysctls = [][2]string{
	{"net.ipv4.ip_forward", "0"},
	{"net.ipv4.conf.all.rp_filter", "0"},
	{"net.ipv4.conf.default.rp_filter", "0"},
	{"net.ipv6.conf.all.disable_ipv6", "0"},
	{"net.ipv6.conf.default.disable_ipv6", "0"},
	{"net.ipv6.conf.all.accept_dad", "0"},
	{"net.ipv6.conf.default.accept_dad", "0"},
	{"net.ipv6.conf.default.accept_ra", "0"},
	{"net.ipv6.conf.default.addr_gen_mode", "0"}, // link-local addresses: awaitUp waits for them
}

// Host makes a host. The name is lower-case letters, digits and dashes, unique
// in the world.
func (w *World) Host(name string) *Host {
	w.reporter.Helper()
	h := &Host{world: w, name: name, netns: w.id + "-" + name, ns: netns.None()}
	if w.Err() != nil {
		return h
	}
	if !hostName.MatchString(name) {
		w.fail("host name %q does not match %s", name, hostName)
		return h
	}
	for _, other := range w.hosts {
		if other.name == name {
			w.fail("host %s exists already", name)
			return h
		}
	}
	if err := h.create(); err != nil {
		w.fail("host %s: %w", name, err)
	}
	return h
}

func (h *Host) create() (err error) {
	if h.ns, err = createNetns(h.netns); err != nil {
		return err
	}
	// From here on the world owns the host, so that Close removes it whatever follows.
	h.world.mu.Lock()
	h.world.hosts = append(h.world.hosts, h)
	h.world.mu.Unlock()
	if h.inode, err = inodeOf(h.NetnsPath()); err != nil {
		return err
	}
	if h.links, err = netlink.NewHandleAt(h.ns, unix.NETLINK_ROUTE); err != nil {
		return err
	}
	err = h.enter(func() (err error) {
		h.cookie, err = netnsCookie()
		return err
	})
	if err != nil {
		return err
	}
	for _, s := range hostSysctls {
		if err := h.sysctl(s[0], s[1]); err != nil {
			return err
		}
	}
	lo, err := h.links.LinkByName("lo")
	if err != nil {
		return err
	}
	return h.links.LinkSetUp(lo)
}

// Router makes a host that forwards IPv4 and IPv6.
func (w *World) Router(name string) *Host {
	w.reporter.Helper()
	h := w.Host(name)
	h.Sysctl("net.ipv4.ip_forward", "1")
	h.Sysctl("net.ipv6.conf.all.forwarding", "1")
	return h
}

// close gives back the handles and removes the namespace's name.
func (h *Host) close() error {
	if h.links != nil {
		h.links.Close()
	}
	if h.ns.IsOpen() {
		h.ns.Close()
	}
	return removeNetns(h.netns)
}

// Name returns the host's name in its world.
func (h *Host) Name() string { return h.name }

// Netns returns the namespace's name, as "ip netns" knows it.
func (h *Host) Netns() string { return h.netns }

// NetnsPath returns the namespace's file, for setns(2) and "nsenter --net=".
func (h *Host) NetnsPath() string { return filepath.Join(netnsDir, h.netns) }

// World returns the host's world.
func (h *Host) World() *World { return h.world }

// Sysctl sets a kernel parameter of the host's network namespace, given with
// dots. Only net.* is namespaced, and nothing else is allowed here.
func (h *Host) Sysctl(name, value string) {
	h.world.reporter.Helper()
	if h.world.Err() != nil {
		return
	}
	if err := h.sysctl(name, value); err != nil {
		h.world.fail("host %s: sysctl %s=%s: %w", h.name, name, value, err)
	}
}

func (h *Host) sysctl(name, value string) error {
	if !strings.HasPrefix(name, "net.") || strings.ContainsAny(name, "/") || strings.Contains(name, "..") {
		return fmt.Errorf("sysctl %q is not of a network namespace", name)
	}
	path := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
	return h.enter(func() error { return os.WriteFile(path, []byte(value), 0) })
}

// Do runs f with the calling goroutine's thread in the host's network namespace.
// Sockets that f makes stay there and can be used from anywhere afterwards.
// Goroutines that f starts run in the machine's namespace, not in the host's.
func (h *Host) Do(f func() error) error {
	if err := h.world.Err(); err != nil {
		return err
	}
	return h.enter(f)
}

func (h *Host) enter(f func() error) error {
	return onThread(func() error {
		if err := netns.Set(h.ns); err != nil {
			return fmt.Errorf("enter host %s: %w", h.name, err)
		}
		return f()
	})
}

// Dial connects from the host. The address must be numeric: the resolver would
// look names up in the machine's namespace. The signature is that of
// net.Dialer.DialContext, so that it fits an http.Transport.
func (h *Host) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return h.DialFrom(ctx, &net.Dialer{}, network, address)
}

// DialFrom is Dial with a dialer of the caller's (source address, socket options).
func (h *Host) DialFrom(ctx context.Context, d *net.Dialer, network, address string) (conn net.Conn, err error) {
	if err := numeric(address); err != nil {
		return nil, err
	}
	err = h.Do(func() error {
		conn, err = d.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen opens a listening socket in the host ("tcp", "tcp4", "tcp6"). It is
// plain TCP, as most programs' is, not Go's default of multipath TCP.
func (h *Host) Listen(network, address string) (ln net.Listener, err error) {
	if err := numeric(address); err != nil {
		return nil, err
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	err = h.Do(func() error {
		ln, err = lc.Listen(context.Background(), network, address)
		return err
	})
	return ln, err
}

// ListenPacket opens a UDP socket in the host ("udp", "udp4", "udp6").
func (h *Host) ListenPacket(network, address string) (pc net.PacketConn, err error) {
	if err := numeric(address); err != nil {
		return nil, err
	}
	err = h.Do(func() error {
		pc, err = net.ListenPacket(network, address)
		return err
	})
	return pc, err
}

func numeric(address string) error {
	host, _, err := net.SplitHostPort(address)
	if err != nil || host == "" {
		return err
	}
	if _, err := netip.ParseAddr(host); err != nil {
		return fmt.Errorf("netlab: %q is not numeric: worlds have no resolver", address)
	}
	return nil
}
