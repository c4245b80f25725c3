package redirect

import (
	"context"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What a listener has, accepted connections have.
func TestAcceptedKeepAlives(t *testing.T) {
	l, err := ListenConfig(DefaultKeepAlive).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.DialTimeout("tcp", l.Addr().String(), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		for _, o := range append(keepAliveOptions(DefaultKeepAlive), option{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1}) {
			if got, err := unix.GetsockoptInt(int(fd), o.level, o.name); err != nil || got != o.value {
				t.Errorf("option %d of level %d is %d, %v; want %d", o.name, o.level, got, err, o.value)
			}
		}
	}); err != nil {
		t.Fatal(err)
	}
}
