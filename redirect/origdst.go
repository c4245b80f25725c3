package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrNotRedirected means that a connection was made straight to one of our
// listeners, or that the kernel knows no other destination for it. It must be
// refused: dialling its destination would lead back here.
var ErrNotRedirected = errors.New("connection was not redirected")

// soOriginalDst is SO_ORIGINAL_DST (linux/netfilter_ipv4.h) and
// IP6T_SO_ORIGINAL_DST (linux/netfilter_ipv6/ip6_tables.h): the same number on two
// levels.
const soOriginalDst = 80

// Accepted is a connection that a listener has accepted, such as a *net.TCPConn.
type Accepted interface {
	syscall.Conn
	LocalAddr() net.Addr
	RemoteAddr() net.Addr
}

// OriginalDst is the destination that the client of an accepted connection named,
// before the kernel redirected it. IPv4 on a dual-stack listener comes back as
// IPv4; there is never a zone. ErrNotRedirected if there is none.
func OriginalDst(conn Accepted) (netip.AddrPort, error) {
	local, err := addrPort(conn.LocalAddr())
	if err != nil {
		return netip.AddrPort{}, err
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("original destination: %w", err)
	}
	var dst netip.AddrPort
	var sysErr error
	if err := raw.Control(func(fd uintptr) {
		if local.Addr().Is4() {
			dst, sysErr = originalDst4(int(fd))
		} else {
			dst, sysErr = originalDst6(int(fd))
		}
	}); err != nil {
		return netip.AddrPort{}, fmt.Errorf("original destination: %w", err)
	}
	switch {
	case errors.Is(sysErr, unix.ENOENT):
		return netip.AddrPort{}, fmt.Errorf("%w: conntrack does not know the connection to %s", ErrNotRedirected, local)
	case sysErr != nil:
		return netip.AddrPort{}, fmt.Errorf("original destination: %w", os.NewSyscallError("getsockopt SO_ORIGINAL_DST", sysErr))
	case dst == local:
		return netip.AddrPort{}, fmt.Errorf("%w: it was made straight to %s", ErrNotRedirected, local)
	}
	return dst, nil
}

// originalDst4 reads a sockaddr_in through the one getter of x/sys whose result is
// at least as long: no unsafe.
func originalDst4(fd int) (netip.AddrPort, error) {
	mreq, err := unix.GetsockoptIPv6Mreq(fd, unix.SOL_IP, soOriginalDst)
	if err != nil {
		return netip.AddrPort{}, err
	}
	b := mreq.Multiaddr // family 2, port 2 (big endian), address 4
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:4])), nil
}

// originalDst6 reads a sockaddr_in6, in the same manner.
func originalDst6(fd int) (netip.AddrPort, error) {
	info, err := unix.GetsockoptIPv6MTUInfo(fd, unix.SOL_IPV6, soOriginalDst)
	if err != nil {
		return netip.AddrPort{}, err
	}
	var port [2]byte
	binary.NativeEndian.PutUint16(port[:], info.Addr.Port) // the field holds network order
	return netip.AddrPortFrom(netip.AddrFrom16(info.Addr.Addr).Unmap(), binary.BigEndian.Uint16(port[:])), nil
}

// addrPort gives a TCP address in the form that all of this package compares: IPv4
// unmapped, no zone.
func addrPort(a net.Addr) (netip.AddrPort, error) {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("%v is no TCP address", a)
	}
	return plain(tcp.AddrPort()), nil
}

func plain(ap netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}
