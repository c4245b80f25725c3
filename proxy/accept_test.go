package proxy

import (
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/redirect"
)

// accepted connects to a bareListener of its own.
func accepted(t *testing.T, address string) (*bareListener, *net.TCPConn, *socket) {
	t.Helper()
	l := must(bare(listen(t, address), redirect.DefaultKeepAlive))(t)
	t.Cleanup(func() { _ = l.Close() })
	l.elders.left.Store(0)
	c, err := redirect.Dialer(redirect.MarkApp, redirect.DefaultKeepAlive).Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	s, err := l.accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.reset)
	return l, c.(*net.TCPConn), s
}

// What goes to applications, on this machine, is not paced by BBR; whatever else the
// machine is set to stays.
func TestAcceptedIsNotPaced(t *testing.T) {
	for set, want := range map[string]string{"bbr": "reno", "cubic": "cubic", "reno": "reno"} {
		l := listen(t, "127.0.0.1:0")
		raw := must(l.SyscallConn())(t)
		var err error
		if cerr := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, set)
		}); errors.Join(cerr, err) != nil {
			t.Logf("not on this kernel: %s: %v", set, errors.Join(cerr, err))
			continue
		}
		b := must(bare(l, redirect.DefaultKeepAlive))(t)
		t.Cleanup(func() { _ = b.Close() })
		c, err := redirect.Dialer(redirect.MarkApp, redirect.DefaultKeepAlive).Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		s := must(b.accept())(t)
		t.Cleanup(s.reset)
		if err := s.control(func(fd int) {
			got, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
			if err != nil || got != want {
				t.Errorf("listener with %s: accepted with %q, %v; want %s", set, got, err, want)
			}
		}); err != nil {
			t.Error(err)
		}
	}
}

// What an accepted connection needs it has from its listener, without being asked.
func TestBareAccept(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0", "[::]:0"} {
		_, c, s := accepted(t, address)
		if s.LocalAddr().String() != c.RemoteAddr().String() || s.RemoteAddr().String() != c.LocalAddr().String() {
			t.Errorf("%s: %v to %v, and the client says %v to %v", address, s.RemoteAddr(), s.LocalAddr(), c.LocalAddr(), c.RemoteAddr())
		}
		k := redirect.DefaultKeepAlive
		for name, o := range map[string]struct{ level, name, want int }{
			"nodelay":   {unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
			"oobinline": {unix.SOL_SOCKET, unix.SO_OOBINLINE, 1},
			"keepalive": {unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
			"keepidle":  {unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(k.Idle / time.Second)},
			"keepintvl": {unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(k.Interval / time.Second)},
			"keepcnt":   {unix.IPPROTO_TCP, unix.TCP_KEEPCNT, k.Count},
		} {
			if err := s.control(func(fd int) {
				if got, err := unix.GetsockoptInt(fd, o.level, o.name); err != nil || got != o.want {
					t.Errorf("%s: %s is %d, %v; want %d", address, name, got, err, o.want)
				}
			}); err != nil {
				t.Error(err)
			}
		}
		if err := s.control(func(fd int) {
			if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
				t.Errorf("%s: flags %#x, %v", address, flags, err)
			}
		}); err != nil {
			t.Error(err)
		}
	}
}

// Connections that waited before the listener was set up inherit nothing, and are not to be
// told from others: a service manager's socket takes them before there is a proxy.
func TestElderConnections(t *testing.T) {
	l := listen(t, "127.0.0.1:0")
	const elders = 5
	dial := func() {
		t.Helper()
		c, err := redirect.Dialer(redirect.MarkApp, redirect.DefaultKeepAlive).Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
	}
	for range elders {
		dial()
	}
	b := must(bare(l, redirect.DefaultKeepAlive))(t)
	t.Cleanup(func() { _ = b.Close() })
	if n := int(b.elders.left.Load()) - runtime.NumCPU(); n != elders {
		t.Errorf("%d connections waited, counted %d", elders, n)
	}
	dial()
	for i := range elders + 1 {
		s := must(b.accept())(t)
		t.Cleanup(s.reset)
		if err := s.control(func(fd int) {
			inline, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE)
			alive, err2 := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE)
			if errors.Join(err, err2) != nil || inline != 1 || alive != 1 {
				t.Errorf("connection %d: oobinline %d, keepalive %d, %v", i, inline, alive, errors.Join(err, err2))
			}
		}); err != nil {
			t.Error(err)
		}
	}
}

// Closing ends an accept that waits, and one that comes later; nobody can connect any
// more.
func TestBareListenerCloses(t *testing.T) {
	l, _, _ := accepted(t, "127.0.0.1:0")
	ended := make(chan error, 1)
	go func() { _, err := l.accept(); ended <- err }()
	runtime.Gosched()
	_ = l.Close()
	if err := within(t, ended, "the accept's end"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("ends with %v", err)
	}
	if _, err := l.accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
	if c, err := redirect.Dialer(redirect.MarkApp, redirect.DefaultKeepAlive).Dial("tcp", l.Addr().String()); err == nil {
		_ = c.Close()
		t.Error("somebody listens")
	}
}

// A bare descriptor is closed once, whoever comes first, and used by nobody afterwards:
// the number may be another connection's by then.
func TestBareSocketIsClosedOnce(t *testing.T) {
	for range 200 {
		_, c, s := accepted(t, "127.0.0.1:0")
		var wg sync.WaitGroup
		var fds sync.Map
		for i := range 4 {
			wg.Go(func() {
				switch i {
				case 0:
					s.reset()
				case 1:
					_ = s.Close()
				case 2:
					if fd, err := s.detach(); err == nil {
						fds.Store(fd, true)
					}
				case 3:
					_ = s.control(func(fd int) {
						if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
							t.Errorf("run on what is closed: %v", err)
						}
					})
				}
			})
		}
		wg.Wait()
		fds.Range(func(fd, _ any) bool { _ = unix.Close(fd.(int)); return true })
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("the client reads %v", err)
		}
		if err := s.control(func(int) { t.Error("run on what is closed") }); !errors.Is(err, net.ErrClosed) {
			t.Errorf("afterwards: %v", err)
		}
		if _, err := s.detach(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("afterwards detached: %v", err)
		}
		if _, err := s.attach(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("afterwards attached: %v", err)
		}
		if _, err := s.waiter(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("afterwards waited for: %v", err)
		}
	}
}

// Who waits on a bare socket hears of a reset, and goes when told to; the socket is as
// before.
func TestWaitOnABareSocket(t *testing.T) {
	_, c, s := accepted(t, "127.0.0.1:0")
	w := must(s.waiter())(t)
	said := make(chan error, 1)
	go func() { said <- hangup(w) }()
	if _, err := io.WriteString(c, "hello"); err != nil { // is none
		t.Fatal(err)
	}
	_ = w.SetReadDeadline(time.Unix(1, 0))
	if err := within(t, said, "the waiter's end"); err != nil {
		t.Errorf("told %v", err)
	}
	w.done()
	w = must(s.waiter())(t)
	defer w.done()
	go func() { said <- hangup(w) }()
	_ = reset(c)
	if err := within(t, said, "the reset"); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("told %v", err)
	}
}
