package proxy

import (
	"errors"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/redirect"
)

// socket is a connected TCP socket: the runtime's, or, where it never needs to wait
// before an event loop has it, a bare descriptor.
type socket struct {
	*net.TCPConn     // nil: fd
	fd           int // -1: handed on, or closed
}

func (s *socket) detach() (fd int, err error) {
	if s.TCPConn != nil {
		return mtls.DetachTCP(s.TCPConn)
	}
	fd, s.fd = s.fd, -1
	return fd, nil
}

// attach makes it the runtime's.
func (s *socket) attach() (*net.TCPConn, error) {
	if s.TCPConn == nil {
		fd := s.fd
		s.fd = -1
		c, err := mtls.AttachTCP(fd)
		if err != nil {
			return nil, err
		}
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

// reset closes it with an RST instead of a FIN.
func (s *socket) reset() {
	switch {
	case s.TCPConn != nil:
		_ = reset(s.TCPConn)
	case s.fd >= 0:
		_ = unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		_ = unix.Close(s.fd)
		s.fd = -1
	}
}
