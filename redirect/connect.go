package redirect

import (
	"errors"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// ConnectApp connects to a listener of this host, with MarkApp, and keepalives as often as
// keepAlive has them; urgent data stays in its place. That needs no waiting unless the
// listener's queue is full. fd is non-blocking, and the caller's. src is the address to
// connect from, or the zero value. Errors: os.SyscallError; where it holds EALREADY, fd is
// on its way, and Connected tells what comes of it. The last ACK of TCP's handshake is held
// back for the first bytes to bring it: one packet less, and the application need not wake up
// twice. Acknowledge lets it go where there are none.
func ConnectApp(src netip.Addr, dst netip.AddrPort, keepAlive net.KeepAliveConfig) (fd int, err error) {
	options := []option{{unix.SOL_SOCKET, unix.SO_MARK, MarkApp}, {unix.IPPROTO_TCP, unix.TCP_NODELAY, 1}, {unix.SOL_SOCKET, unix.SO_OOBINLINE, 1}, holdACK}
	if keepAlive.Enable {
		// For conntrack, which is to remember it: an end on the same host does not go
		// unseen, so that it does not matter when one that is silent counts as gone.
		options = append(options, keepAliveOptions(keepAlive)[:2]...)
	}
	if fd, err = connect(src, dst, options, false); err != nil {
		return -1, err
	}
	// The answer to the SYN is there already, but the kernel looks at it only once the
	// call has returned.
	if err = Connected(fd, dst); err != nil && !errors.Is(err, unix.EALREADY) {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, err
}

// ConnectTunnel begins to connect to a proxy, with MarkTunnel and DefaultKeepAlive, for one
// who speaks first: the ClientHello brings the last ACK of TCP's handshake. It does not wait:
// whether there is a connection the first write on fd, or Connected, will tell.
// With fastOpen the first bytes leave with the SYN where a cookie of the server's is known;
// where not, the SYN asks for one. fd is non-blocking, and the caller's. src is the address
// to connect from, or the zero value. Errors: os.SyscallError.
func ConnectTunnel(src netip.Addr, dst netip.AddrPort, fastOpen bool) (fd int, err error) {
	if fd, err = connect(src, dst, []option{{unix.SOL_SOCKET, unix.SO_MARK, MarkTunnel}, holdACK}, fastOpen); err != nil {
		return -1, err
	}
	// While the SYN is under way.
	if err := setOptions(fd, append(keepAliveOptions(DefaultKeepAlive), option{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1})); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// holdACK makes TCP wait for data to bring the ACK of a SYN-ACK, for 200 ms at most.
var holdACK = option{unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0}

// Acknowledge ends the holding back of ACKs on a socket, and sends one that is due: TCP
// acknowledges as on any other connection then. An application that writes its answer in
// pieces might wait for it otherwise (Nagle's algorithm).
func Acknowledge(fd int) {
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1) // of any TCP socket
}

// connect begins to connect a socket with the given options.
func connect(src netip.Addr, dst netip.AddrPort, options []option, fastOpen bool) (fd int, err error) {
	family := unix.AF_INET
	if dst.Addr().Is6() && !dst.Addr().Is4In6() {
		family = unix.AF_INET6
	}
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	defer func() {
		if err != nil {
			_ = unix.Close(fd)
			fd = -1
		}
	}()
	if src.IsValid() {
		options = append(options, option{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1})
	}
	if err := setOptions(fd, options); err != nil {
		return fd, err
	}
	if fastOpen {
		if err := beginFast(fd); err != nil {
			return fd, err
		}
	}
	if src.IsValid() {
		if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(src, 0))); err != nil {
			return fd, os.NewSyscallError("bind", err)
		}
	}
	if err := unix.Connect(fd, sockaddr(dst)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return fd, os.NewSyscallError("connect", err)
	}
	return fd, nil
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
