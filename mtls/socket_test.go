package mtls

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// connectTo begins to connect to a listener.
func connectTo(t *testing.T, to *net.TCPAddr, connect, handshake time.Duration) Socket {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: to.Port, Addr: [4]byte(to.IP.To4())}); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		t.Fatal(err)
	}
	s := Connecting(fd, to, connect, handshake)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// backlogged is a listener whose queue is full: it does not answer SYNs.
func backlogged(t *testing.T) *net.TCPAddr {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	a, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: a.(*unix.SockaddrInet4).Port}
	for {
		c, err := net.DialTimeout("tcp", addr.String(), 200*time.Millisecond)
		if err != nil {
			return addr
		}
		t.Cleanup(func() { _ = c.Close() })
	}
}

// A connection that does not come about ends with the time for connecting, and one whose
// other end does not speak with that for the handshake, however much of the other there is.
func TestConnectingDeadlines(t *testing.T) {
	const short, long = 100 * time.Millisecond, time.Hour
	silent, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	e := NewEndpoint(newAuthority(t, "a.example").workload("/prod/web", nil), Options{})
	for name, c := range map[string]struct {
		to                 *net.TCPAddr
		connect, handshake time.Duration
		want               symbolonv1.Reason
	}{
		"connecting": {backlogged(t), short, long, symbolonv1.Reason_REASON_TIMED_OUT},
		"handshake":  {silent.Addr().(*net.TCPAddr), long, short, symbolonv1.Reason_REASON_HANDSHAKE_TIMEOUT},
	} {
		_, err := Dial(timeout(t), connectTo(t, c.to, c.connect, c.handshake), e, nil)
		if got := ReasonOf(err); got != c.want {
			t.Errorf("%s: %v (%v), want %v", name, got, err, c.want)
		}
	}
}

// The kernel may give up before we do (net.ipv4.tcp_syn_retries): that is no failed handshake.
func TestConnectingGivenUp(t *testing.T) {
	e := NewEndpoint(newAuthority(t, "a.example").workload("/prod/web", nil), Options{})
	c := connectTo(t, backlogged(t), time.Hour, time.Hour)
	if err := onSocket(c, func(fd int) {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 100); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	_, err := Dial(timeout(t), c, e, nil)
	if got := ReasonOf(err); got != symbolonv1.Reason_REASON_TIMED_OUT || !errors.Is(err, unix.ETIMEDOUT) {
		t.Errorf("%v (%v), want %v", got, err, symbolonv1.Reason_REASON_TIMED_OUT)
	}
}

// Whoever gives up does not wait until either is over.
func TestConnectingCancelled(t *testing.T) {
	e := NewEndpoint(newAuthority(t, "a.example").workload("/prod/web", nil), Options{})
	ctx, cancel := context.WithCancel(timeout(t))
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := Dial(ctx, connectTo(t, backlogged(t), time.Hour, time.Hour), e, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
}
