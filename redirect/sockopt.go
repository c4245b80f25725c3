package redirect

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Socket marks (SO_MARK) of the proxy's own connections. The rules let everything
// of the proxy's cgroup pass whose upper 16 bits are markBase; 0x4d0010 is kept for
// UDP. Setting one needs CAP_NET_ADMIN or CAP_NET_RAW.
const (
	// MarkTunnel is the leg to the other host's proxy. If the destination turns out
	// to be this host, the rules lead it to the inbound listener.
	MarkTunnel = 0x4d0001
	// MarkApp is the leg to a local application: never redirected.
	MarkApp = 0x4d0002
	// MarkControl is the proxy's own business: the controller, a SPIRE server,
	// exports of flows.
	MarkControl = 0x4d0004
	// MarkInbound is on what TPROXY took, and on the sockets that it was given to.
	MarkInbound = 0x4d0005

	// markClient is the leg to a local application that bears its client's address,
	// markAnswer what the application sends back on it.
	markClient = 0x4d0006
	markAnswer = 0x4d0003

	markBase = 0x4d0000
	markMask = 0xffff0000
)

// DefaultKeepAlive finds a dead peer in two minutes, and speaks often enough that
// neither conntrack nor a NAT on the way forgets an idle connection. That matters
// beyond the connection itself: once conntrack has forgotten one, a new connection
// from the same client port to another redirected port would reset it.
var DefaultKeepAlive = net.KeepAliveConfig{Enable: true, Idle: 60 * time.Second, Interval: 15 * time.Second, Count: 4}

// Control returns a function for net.Dialer.Control or net.ListenConfig.Control
// that marks the socket. A dialled TCP socket that is bound to a source address
// also gets IP_BIND_ADDRESS_NO_PORT: its port is chosen at connect, so the port
// range is one per destination and not one for all.
func Control(mark int) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) {
			if err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark); err != nil {
				err = fmt.Errorf("mark socket: %w", os.NewSyscallError("setsockopt SO_MARK", err))
				return
			}
			// A kernel without the option merely has fewer ports.
			if e := unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); e != nil && !errors.Is(e, unix.ENOPROTOOPT) {
				err = os.NewSyscallError("setsockopt IP_BIND_ADDRESS_NO_PORT", e)
			}
		}); cerr != nil {
			return cerr
		}
		return err
	}
}

// Dialer dials with a mark, keepalives and plain TCP (multipath TCP would hide the
// socket behind another one). The caller sets LocalAddr, Deadline and Timeout.
func Dialer(mark int, keepAlive net.KeepAliveConfig) *net.Dialer {
	d := &net.Dialer{Control: Control(mark), KeepAliveConfig: keepAlive, FallbackDelay: -1}
	d.SetMultipathTCP(false)
	return d
}

// ListenConfig is for the proxy's listeners: SO_REUSEADDR, so that a restart need
// not wait for old connections, plain TCP, and keepalives, which accepted connections
// inherit, so that they cost no system calls for each.
func ListenConfig(keepAlive net.KeepAliveConfig) *net.ListenConfig {
	lc := &net.ListenConfig{KeepAlive: -1, Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) {
			err = setOptions(int(fd), append(keepAliveOptions(keepAlive), option{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1}))
		}); cerr != nil {
			return cerr
		}
		return err
	}}
	lc.SetMultipathTCP(false)
	return lc
}

// SetInherited sets on a socket what it, or a connection to it where it listens, is to have
// if nobody else sets anything: keepalives, no delay, urgent data in its place. Errors:
// os.SyscallError.
func SetInherited(fd int, keepAlive net.KeepAliveConfig) error {
	return setOptions(fd, append(keepAliveOptions(keepAlive),
		option{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1}, option{unix.SOL_SOCKET, unix.SO_OOBINLINE, 1}))
}

// option is a socket option with an integer value.
type option struct{ level, name, value int }

// keepAliveOptions are those of keepAlive, none where it is not enabled.
func keepAliveOptions(k net.KeepAliveConfig) []option {
	if !k.Enable {
		return nil
	}
	return []option{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(k.Idle / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(k.Interval / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, k.Count},
	}
}

func setOptions(fd int, options []option) error {
	for _, o := range options {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	return nil
}
