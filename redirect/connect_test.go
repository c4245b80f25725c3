package redirect

import (
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// The first bytes of a connection bring the last ACK of its handshake, to an application
// and to a proxy.
func TestFirstBytesBringTheACK(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		l := listen(t, address)
		to := l.Addr().(*net.TCPAddr).AddrPort()
		for name, connect := range map[string]func() (int, error){
			"app":    func() (int, error) { return ConnectApp(netip.Addr{}, to, DefaultKeepAlive) },
			"tunnel": func() (int, error) { return ConnectTunnel(netip.Addr{}, to, false) },
		} {
			fd, err := connect()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Close(fd) })
			if n, err := unix.Write(fd, []byte("x")); n != 1 || err != nil {
				t.Fatalf("%s to %s: wrote %d, %v", name, address, n, err)
			}
			c, err := l.AcceptTCP()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = c.Close() })
			if _, err := c.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			if came := segments(t, c); came != 2 {
				t.Errorf("%s to %s: the first byte came with segment %d, want 2: the one behind the SYN", name, address, came)
			}
			for name, want := range map[string]int{"SO_KEEPALIVE": 1, "TCP_NODELAY": 1} {
				level, option := unix.SOL_SOCKET, unix.SO_KEEPALIVE
				if name == "TCP_NODELAY" {
					level, option = unix.IPPROTO_TCP, unix.TCP_NODELAY
				}
				if got, err := unix.GetsockoptInt(fd, level, option); got != want || err != nil {
					t.Errorf("%s: %s is %d, %v", address, name, got, err)
				}
			}
		}
	}
}

// Acknowledge sends the ACK that has been held back, and lets none be held back any more.
func TestAcknowledge(t *testing.T) {
	l := listen(t, "127.0.0.1:0")
	fd, err := ConnectApp(netip.Addr{}, l.Addr().(*net.TCPAddr).AddrPort(), DefaultKeepAlive)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	quick := func() int {
		t.Helper()
		v, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	Acknowledge(fd)
	if v := quick(); v != 1 {
		t.Errorf("TCP_QUICKACK is %d afterwards", v)
	}
	c, err := l.AcceptTCP() // whose client says nothing
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
}

func listen(t *testing.T, address string) *net.TCPListener {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l.(*net.TCPListener)
}

// segments is how many have come from c's peer, with its SYN.
func segments(t *testing.T, c *net.TCPConn) uint32 {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var info *unix.TCPInfo
	if cerr := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	return info.Segs_in
}
