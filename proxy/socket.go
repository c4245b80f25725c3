package proxy

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/proxy/loop"
	"github.com/symbolon/symbolon/redirect"
)

// socket is a connected TCP socket: the runtime's, or, where it never needs to wait
// before an event loop has it, a bare descriptor. Close and reset may be called by
// anyone, and more than once.
type socket struct {
	// inline: the kernel leaves urgent data in its place already.
	inline bool
	// held: redirect.Acknowledge is due once the first bytes may have been written.
	held bool
	// Of a bare accepted one. local is nil where the kernel has to be asked.
	local, remote net.Addr

	mu           sync.Mutex // a descriptor that is closed is somebody else's at once
	*net.TCPConn            // nil: fd
	fd           int        // -1: handed on, or closed
}

// runtime is the connection where it is the runtime's.
func (s *socket) runtime() *net.TCPConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.TCPConn
}

// control runs f, which must not wait, on the descriptor.
func (s *socket) control(f func(fd int)) error {
	if c := s.runtime(); c != nil {
		raw, err := c.SyscallConn()
		if err != nil {
			return err
		}
		return raw.Control(func(fd uintptr) { f(int(fd)) })
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return net.ErrClosed
	}
	f(s.fd)
	return nil
}

// peek is what has arrived, as far as b has room for it, and stays there. Nil: nothing, or
// the end. Errors are those of receive.
func (s *socket) peek(b []byte) (said []byte, err error) { return s.receive(b, unix.MSG_PEEK) }

// receive reads what has arrived into b. Nil: nothing yet, or the end. An error is the
// connection's, which the kernel tells once, be it to one who peeks: whoever reads
// on would take a reset for a clean end.
func (s *socket) receive(b []byte, flags int) (said []byte, err error) {
	if !s.inline { // or an urgent byte would be passed over
		inlineUrgent(s.runtime())
	}
	n := 0
	var rerr error
	err = s.control(func(fd int) { n, _, rerr = unix.Recvfrom(fd, b, flags|unix.MSG_DONTWAIT) })
	switch {
	case err != nil:
		return nil, err
	case errors.Is(rerr, unix.EAGAIN), errors.Is(rerr, unix.EINTR), rerr == nil && n == 0:
		return nil, nil
	case rerr != nil:
		return nil, rerr
	}
	return b[:n], nil
}

// skip takes n bytes away that peek has shown.
func (s *socket) skip(n int) error {
	b := buffers.Get().(*[]byte)
	defer buffers.Put(b)
	for n > 0 {
		got := 0
		var rerr error
		err := s.control(func(fd int) { // MSG_TRUNC: nothing is copied
			got, _, rerr = unix.Recvfrom(fd, (*b)[:min(n, len(*b))], unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		})
		switch {
		case err != nil:
			return err
		case errors.Is(rerr, unix.EINTR):
		case rerr != nil:
			return rerr
		case got == 0:
			return unix.ECONNRESET // what was there is not any more
		default:
			n -= got
		}
	}
	return nil
}

// SyscallConn is for Control only: nobody can wait on a bare descriptor.
func (s *socket) SyscallConn() (syscall.RawConn, error) { return controlled{s}, nil }

type controlled struct{ s *socket }

func (c controlled) Control(f func(fd uintptr)) error {
	return c.s.control(func(fd int) { f(uintptr(fd)) })
}

func (controlled) Read(func(uintptr) bool) error  { return errors.ErrUnsupported }
func (controlled) Write(func(uintptr) bool) error { return errors.ErrUnsupported }

// LocalAddr is net.Conn's.
func (s *socket) LocalAddr() net.Addr {
	if c := s.runtime(); c != nil {
		return c.LocalAddr()
	}
	if s.local != nil {
		return s.local
	}
	var addr net.Addr
	_ = s.control(func(fd int) {
		if sa, err := syscall.Getsockname(fd); err == nil {
			addr = tcpAddr(sa)
		}
	})
	return addr
}

// RemoteAddr is net.Conn's; nil, it is not known.
func (s *socket) RemoteAddr() net.Addr {
	if c := s.runtime(); c != nil {
		return c.RemoteAddr()
	}
	return s.remote
}

// tcpAddr is nil for what is no TCP address.
func tcpAddr(sa syscall.Sockaddr) net.Addr {
	switch a := sa.(type) {
	case *syscall.SockaddrInet4:
		return net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)))
	case *syscall.SockaddrInet6:
		return net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port)))
	}
	return nil
}

func (s *socket) detach() (fd int, err error) {
	if fd = s.take(); fd >= 0 {
		return fd, nil
	}
	if c := s.runtime(); c != nil {
		return mtls.DetachTCP(c)
	}
	return -1, net.ErrClosed
}

// side is the socket for an event loop.
func (s *socket) side() (loop.Side, error) {
	fd, err := s.detach()
	return loop.Side{FD: fd, Inline: s.inline, Held: s.held}, err
}

// take gives up the bare descriptor; -1: it is gone, or the runtime's. It comes before
// runtime, or attach in between would hide the socket from both.
func (s *socket) take() (fd int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.TCPConn != nil {
		return -1
	}
	fd, s.fd = s.fd, -1
	return fd
}

// attach makes it the runtime's.
func (s *socket) attach() (*net.TCPConn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.TCPConn == nil {
		fd := s.fd
		if s.fd = -1; fd < 0 {
			return nil, net.ErrClosed
		}
		if s.held {
			redirect.Acknowledge(fd)
			s.held = false
		}
		c, err := mtls.AttachTCP(fd)
		if err != nil {
			return nil, err
		}
		_ = c.SetKeepAliveConfig(redirect.DefaultKeepAlive) // or Go's own, more of them
		s.TCPConn = c
	}
	return s.TCPConn, nil
}

// connected waits until it is connected to dst. On error it is closed.
func (s *socket) connected(dst netip.AddrPort, deadline time.Time) error {
	c, err := s.attach()
	if err != nil {
		return err
	}
	raw, err := c.SyscallConn()
	if err == nil {
		_ = c.SetWriteDeadline(deadline)
		werr := raw.Write(func(fd uintptr) bool {
			err = redirect.Connected(int(fd), dst)
			return !errors.Is(err, unix.EALREADY)
		})
		if werr != nil {
			err = werr
		}
		_ = c.SetWriteDeadline(time.Time{})
	}
	if err != nil {
		_ = c.Close()
	}
	return err
}

type waitable interface {
	syscall.Conn
	SetReadDeadline(t time.Time) error
}

// waiter is something to wait on, until done.
type waiter struct {
	waitable
	done func()
}

// waiter is for whoever has to wait on the socket after all.
func (s *socket) waiter() (*waiter, error) {
	if c := s.runtime(); c != nil {
		return &waiter{c, func() { _ = c.SetReadDeadline(time.Time{}) }}, nil
	}
	var err error
	fd := -1
	if cerr := s.control(func(old int) { fd, err = unix.FcntlInt(uintptr(old), unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil {
		err = cerr
	}
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "waiting")
	return &waiter{f, func() { _ = f.Close() }}, nil
}

// Close closes it.
func (s *socket) Close() error {
	if fd := s.take(); fd >= 0 {
		return unix.Close(fd)
	}
	if c := s.runtime(); c != nil {
		return c.Close()
	}
	return net.ErrClosed
}

// reset closes it with an RST instead of a FIN.
func (s *socket) reset() {
	if fd := s.take(); fd >= 0 {
		_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		_ = unix.Close(fd)
		return
	}
	if c := s.runtime(); c != nil {
		_ = reset(c)
	}
}
