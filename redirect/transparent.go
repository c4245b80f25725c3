package redirect

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// clientPorts are the source ports of legs to local applications that bear their
// client's address. The port must not be one that the client itself uses towards the
// same destination: conntrack would take the one connection for the other. Linux
// gives its programs ports from 32768 on, Windows and macOS from 49152.
var clientPorts = PortRange{16384, 32767}

// clientPortTries is how many ports are tried before giving up.
const clientPortTries = 32

// ErrNoClientPort means that no port was found to reach an application from under its
// client's address.
var ErrNoClientPort = errors.New("no free port under the client's address")

// PrepareInbound lets the inbound listener take what was sent to any address, if
// Transparent says so, which needs CAP_NET_ADMIN or CAP_NET_RAW. A listener that was
// taken over from a proxy with another configuration is changed.
func (c Config) PrepareInbound(l *net.TCPListener) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	mark, transparent := 0, 0
	if c.Transparent {
		mark, transparent = MarkInbound, 1
	}
	if cerr := raw.Control(func(fd uintptr) {
		err = errors.Join(
			os.NewSyscallError("setsockopt SO_MARK", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark)),
			os.NewSyscallError("setsockopt IP_TRANSPARENT", unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, transparent)),
		)
	}); cerr != nil {
		return cerr
	}
	return err
}

// transparentControl marks a socket, and lets it have addresses that are not the
// host's. The option of SOL_IP holds for IPv6 too.
func transparentControl(mark int) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) {
			err = errors.Join(
				os.NewSyscallError("setsockopt SO_MARK", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark)),
				os.NewSyscallError("setsockopt IP_TRANSPARENT", unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1)),
				// Several destinations may be reached from one port.
				os.NewSyscallError("setsockopt SO_REUSEADDR", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)),
			)
		}); cerr != nil {
			return cerr
		}
		return err
	}
}

// Transparent tells ClientTuple that the listener on this port is given connections
// by TPROXY. Call it before the first connection.
func (c *Conntrack) Transparent(port uint16) { c.transparent = port }

// untranslated is the tuple of a connection that TPROXY gave to the listener: its
// socket has the addresses that the client used.
func (c *Conntrack) untranslated(conn Accepted) (tuple Tuple, ok bool, err error) {
	if c.transparent == 0 {
		return Tuple{}, false, nil
	}
	local, err := addrPort(conn.LocalAddr())
	if err != nil || local.Port() == c.transparent {
		return Tuple{}, false, err // REDIRECT's, or made straight to the listener
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return Tuple{}, false, fmt.Errorf("original destination: %w", err)
	}
	var set int
	var sysErr error
	if err := raw.Control(func(fd uintptr) { set, sysErr = unix.GetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT) }); err != nil || sysErr != nil {
		return Tuple{}, false, fmt.Errorf("original destination: %w", errors.Join(err, sysErr))
	}
	if set == 0 {
		return Tuple{}, false, nil // the outbound listener's
	}
	remote, err := addrPort(conn.RemoteAddr())
	return Tuple{Src: remote, Dst: local}, true, err
}

// DialAs connects to a local application's address dst from the address of its client,
// which is another host's, and from any port but the client's own. The application
// sees the client's address. It needs the rules of Config.PreserveSource.
//
// Errors: ErrNoClientPort, and those of net.Dialer.
func (c *Conntrack) DialAs(ctx context.Context, client netip.Addr, dst netip.AddrPort, timeout time.Duration, keepAlive net.KeepAliveConfig) (*net.TCPConn, error) {
	d := Dialer(markClient, keepAlive)
	d.Timeout, d.Control = timeout, transparentControl(markClient)
	ports := int(clientPorts.Last-clientPorts.First) + 1
	for range clientPortTries {
		src := netip.AddrPortFrom(client, clientPorts.First+uint16(rand.IntN(ports)))
		used, err := c.knows(Tuple{Src: src, Dst: dst})
		if err != nil {
			return nil, err
		}
		if used {
			continue
		}
		d.LocalAddr = net.TCPAddrFromAddrPort(src)
		conn, err := d.DialContext(ctx, "tcp", dst.String())
		switch {
		case err == nil:
			return conn.(*net.TCPConn), nil
		case errors.Is(err, unix.EADDRINUSE), errors.Is(err, unix.EADDRNOTAVAIL):
			// A socket has the port, which conntrack does not know.
		default:
			return nil, err
		}
	}
	return nil, fmt.Errorf("from %s to %s: %w", client, dst, ErrNoClientPort)
}

// knows says whether conntrack has a connection between these two, from either.
func (c *Conntrack) knows(t Tuple) (bool, error) {
	err := c.nl.query(conntrackRequest(t), ctNew, func([]byte) error { return nil })
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("conntrack: %w", err)
	}
	return true, nil
}
