package proxy

import (
	"errors"
	"net"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/redirect"
)

const (
	acceptPauseMin = 5 * time.Millisecond
	acceptPauseMax = time.Second
)

// acceptor is a listener as the proxy uses it.
type acceptor interface {
	// accept waits for a connection. Errors: net.ErrClosed, the kernel's.
	accept() (*socket, error)
	Addr() net.Addr
	Close() error
}

// accept hands on connections until l is closed. Running out of descriptors is
// waited out, not spun on.
func (p *Proxy) accept(l acceptor, serve func(*socket)) error {
	pause := acceptPauseMin
	for {
		c, err := l.accept()
		switch {
		case err == nil:
			pause = acceptPauseMin
			serve(c)
		case errors.Is(err, net.ErrClosed):
			return nil
		default:
			p.metrics.acceptErrors.Inc()
			p.strain.acceptFailed(err, p.now())
			p.log.Warn("accept failed", zap.Stringer("listener", l.Addr()), zap.Error(err), zap.Duration("pause", pause))
			time.Sleep(pause)
			pause = min(2*pause, acceptPauseMax)
		}
	}
}

// listener gives its connections to the runtime.
type listener struct {
	*net.TCPListener
	keepAlive net.KeepAliveConfig
}

func (l *listener) accept() (*socket, error) {
	c, err := l.AcceptTCP()
	if err != nil {
		return nil, err
	}
	if l.keepAlive.Enable { // of a listener that is not our own the runtime has set others
		_ = c.SetKeepAliveConfig(l.keepAlive) // a connection that has gone shows later
	}
	return &socket{TCPConn: c, fd: -1}, nil
}

// elders are connections that may be older than what is set on their listener, and have
// none of it.
type elders struct{ left atomic.Int32 }

// count finds out how many there are; after the listener fd has been set up.
func (e *elders) count(fd int) error {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	// Of a listener: what waits for accept. And on each processor one may have been made
	// already, which does not wait yet.
	e.left.Store(int32(info.Unacked) + int32(runtime.NumCPU()))
	return nil
}

// next tells whether the next connection may be one.
func (e *elders) next() bool { return e.left.Load() > 0 && e.left.Add(-1) >= 0 }

// bareListener gives out bare descriptors: a connection that an event loop will have
// need not be introduced to the runtime's poller before. What each needs is set on
// the listener once, and inherited.
type bareListener struct {
	*net.TCPListener
	file  *os.File // the same socket, to wait on
	raw   syscall.RawConn
	local net.Addr // of every connection; nil: each has its own

	keepAlive net.KeepAliveConfig
	elders    elders
}

// bare prepares l. Errors: the kernel's; l is as before.
func bare(l *net.TCPListener, keepAlive net.KeepAliveConfig) (*bareListener, error) {
	file, err := l.File()
	if err != nil {
		return nil, err
	}
	b := &bareListener{TCPListener: l, file: file, keepAlive: keepAlive}
	b.raw, err = file.SyscallConn()
	if err == nil {
		cerr := b.raw.Control(func(fd uintptr) { err = b.setUp(int(fd)) })
		err = errors.Join(cerr, err)
	}
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	// After a REDIRECT a connection to a listener on one address has that address.
	if a, ok := l.Addr().(*net.TCPAddr); ok && !a.IP.IsUnspecified() {
		b.local = a
	}
	return b, nil
}

// setUp sets what connections are to inherit, and finds out how many do not.
func (b *bareListener) setUp(fd int) error {
	if err := inherited(fd, b.keepAlive); err != nil {
		return err
	}
	return b.elders.count(fd)
}

// inherited sets what accepted connections take over from their listener.
func inherited(fd int, keepAlive net.KeepAliveConfig) error {
	if err := redirect.SetInherited(fd, keepAlive); err != nil {
		return err
	}
	unpaced(fd)
	return nil
}

// unpaced has reno send, where BBR would, what goes to applications. They are on this
// machine: there is no network between whose bandwidth BBR could find, and its pacing is a
// timer for every packet. Reno is in every kernel, and open to everyone; should it fail,
// nothing is lost but time.
func unpaced(fd int) {
	if is, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION); err == nil && strings.HasPrefix(is, "bbr") {
		_ = unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno")
	}
}

func (b *bareListener) accept() (*socket, error) {
	var fd int
	var from syscall.Sockaddr
	var failed error
	err := b.raw.Read(func(l uintptr) bool {
		for {
			// Not x/sys's, which asks the socket for its protocol.
			fd, from, failed = syscall.Accept4(int(l), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
			if errors.Is(failed, unix.EINTR) || errors.Is(failed, unix.ECONNABORTED) { // reset while it waited
				continue
			}
			return !errors.Is(failed, unix.EAGAIN)
		}
	})
	if err != nil {
		return nil, net.ErrClosed // package os has no word for it here, and no deadline is set
	}
	if failed != nil {
		return nil, os.NewSyscallError("accept4", failed)
	}
	if b.elders.next() {
		if err := inherited(fd, b.keepAlive); err != nil {
			_ = unix.Close(fd)
			return nil, err
		}
	}
	return &socket{fd: fd, inline: true, local: b.local, remote: tcpAddr(from)}, nil
}

// Close ends waiting accepts, too.
func (b *bareListener) Close() error {
	return errors.Join(b.file.Close(), b.TCPListener.Close())
}
