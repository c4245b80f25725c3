package redirect

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ConnectApp connects to a listener of this host, with MarkApp, and keepalives as often as
// keepAlive has them; urgent data stays in its place. That needs no waiting unless the listener's queue is full. fd is
// non-blocking, and the caller's. src is the address to connect from, or the zero
// value. Errors: os.SyscallError; where it holds EALREADY, fd is on its way, and
// Connected tells what comes of it.
func ConnectApp(src netip.Addr, dst netip.AddrPort, keepAlive net.KeepAliveConfig) (fd int, err error) {
	family := unix.AF_INET
	if dst.Addr().Is6() && !dst.Addr().Is4In6() {
		family = unix.AF_INET6
	}
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	defer func() {
		if err != nil && !errors.Is(err, unix.EALREADY) {
			_ = unix.Close(fd)
			fd = -1
		}
	}()
	options := []option{{unix.SOL_SOCKET, unix.SO_MARK, MarkApp}, {unix.IPPROTO_TCP, unix.TCP_NODELAY, 1}, {unix.SOL_SOCKET, unix.SO_OOBINLINE, 1}}
	if keepAlive.Enable {
		// For conntrack, which is to remember it: an end on the same host does not go
		// unseen, so that it does not matter when one that is silent counts as gone.
		options = append(options, option{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
			option{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(keepAlive.Idle / time.Second)})
	}
	if src.IsValid() {
		options = append(options, option{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1})
	}
	if err := setOptions(fd, options); err != nil {
		return fd, err
	}
	if src.IsValid() {
		if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(src, 0))); err != nil {
			return fd, os.NewSyscallError("bind", err)
		}
	}
	// The answer to the SYN is there already, but the kernel looks at it only once the
	// call has returned.
	if err = unix.Connect(fd, sockaddr(dst)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return fd, os.NewSyscallError("connect", err)
	}
	return fd, Connected(fd, dst)
}

// Connected tells what has become of a socket that was connecting: nil, EALREADY in
// the error for not yet, or why not.
func Connected(fd int, dst netip.AddrPort) error {
	if err := unix.Connect(fd, sockaddr(dst)); err != nil && !errors.Is(err, unix.EISCONN) {
		return os.NewSyscallError("connect", err)
	}
	return nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if addr := a.Addr().Unmap(); addr.Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: addr.As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}
