package mtls

import (
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Socket is what a tunnel needs of its TCP connection: a *net.TCPConn, or what Connecting
// makes.
type Socket interface {
	net.Conn
	syscall.Conn
	SetLinger(sec int) error
	CloseWrite() error
}

// fileConn is a TCP socket on the runtime's poller again, for two system calls where
// net.FileConn takes fourteen, and changes the keepalives. It does not know its own
// address.
type fileConn struct {
	*os.File
	remote net.Addr
}

// newFileConn owns fd, which does not block. remote may be nil.
func newFileConn(fd int, remote net.Addr) *fileConn {
	if remote == nil {
		remote = &net.TCPAddr{}
	}
	return &fileConn{os.NewFile(uintptr(fd), "tunnel"), remote}
}

func (f *fileConn) Read(p []byte) (int, error) {
	n, err := f.File.Read(p)
	return n, closedError(err)
}

func (f *fileConn) Write(p []byte) (int, error) {
	n, err := f.File.Write(p)
	return n, closedError(err)
}

// closedError is how package net says it.
func closedError(err error) error {
	if errors.Is(err, os.ErrClosed) {
		return net.ErrClosed
	}
	return err
}

func (f *fileConn) LocalAddr() net.Addr  { return &net.TCPAddr{} }
func (f *fileConn) RemoteAddr() net.Addr { return f.remote }

func (f *fileConn) SetLinger(sec int) error {
	return f.control(func(fd int) error {
		return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: int32(sec)})
	})
}

func (f *fileConn) CloseWrite() error {
	return f.control(func(fd int) error { return unix.Shutdown(fd, unix.SHUT_WR) })
}

func (f *fileConn) control(do func(fd int) error) error {
	var err error
	cerr := onSocket(f, func(fd int) { err = do(fd) })
	return errors.Join(cerr, err)
}

// connecting is a socket whose connection may be coming about still. Its first write waits
// for it, so that a ClientHello is made while the SYN is under way.
type connecting struct {
	*fileConn
	handshake time.Duration

	mu     sync.Mutex
	begun  bool      // the first write is over
	by     time.Time // the first write has to be over
	within time.Time // SetDeadline's
}

// Connecting is a socket that connects to remote, maybe still: whoever dials on it learns
// whether it does, as from a dialler. That may take as long as connect, and the TLS handshake
// afterwards as long as handshake. It owns fd, which does not block.
func Connecting(fd int, remote net.Addr, connect, handshake time.Duration) Socket {
	return &connecting{fileConn: newFileConn(fd, remote), handshake: handshake, by: time.Now().Add(connect)}
}

func (c *connecting) Write(p []byte) (int, error) {
	n, err := c.fileConn.Write(p)
	if c.begun { // nobody else writes, or reads, before
		return n, err
	}
	if n == 0 && errors.Is(err, unix.EINPROGRESS) {
		// TCP Fast Open's cookie was forgotten meanwhile: only now the SYN has left, with
		// nothing.
		n, err = c.fileConn.Write(p)
	}
	if err == nil {
		c.begin()
	}
	return n, err
}

// begin is called when there is a connection.
func (c *connecting) begin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.begun = true
	_ = c.fileConn.SetDeadline(sooner(c.within, time.Now().Add(c.handshake)))
}

// SetDeadline is net.Conn's; until there is a connection no later than it must be there.
func (c *connecting) SetDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.within = t; !c.begun {
		t = sooner(t, c.by)
	}
	return c.fileConn.SetDeadline(t)
}

// sooner is the earlier of two deadlines, of which b is one.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}
