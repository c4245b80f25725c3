package redirect

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A leg to an application does not wait to send, keeps urgent bytes in their place, and is
// not forgotten by conntrack.
func TestConnectAppOptions(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer l.Close()
	for _, k := range []net.KeepAliveConfig{DefaultKeepAlive, {}} {
		fd, err := ConnectApp(netip.Addr{}, l.Addr().(*net.TCPAddr).AddrPort(), k)
		check(t, err)
		for name, o := range map[string]option{
			"mark": {unix.SOL_SOCKET, unix.SO_MARK, MarkApp}, "nodelay": {unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
			"oobinline": {unix.SOL_SOCKET, unix.SO_OOBINLINE, 1},
		} {
			if got, err := unix.GetsockoptInt(fd, o.level, o.name); err != nil || got != o.value {
				t.Errorf("%s is %#x, %v; want %#x", name, got, err, o.value)
			}
		}
		on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE)
		idle, ierr := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)
		if err != nil || ierr != nil || (on == 1) != k.Enable || k.Enable && idle != int(k.Idle/time.Second) {
			t.Errorf("%+v: keepalives %d after %d s, %v, %v", k, on, idle, err, ierr)
		}
		check(t, unix.Close(fd))
	}
}

// The port range is one for each destination, not one for all, also where a source
// address is bound.
func TestPortsAreNotUsedUp(t *testing.T) {
	near, far := twoHosts(t)
	near.sh("echo 40000 40099 > /proc/sys/net/ipv4/ip_local_port_range")
	far.serve("[::]:8080", "far app", nil)
	for _, c := range []struct {
		from string
		to   []string
	}{
		{"10.77.1.2:0", []string{"10.77.1.1:8080", "10.77.1.3:8080", "10.77.1.4:8080"}},
		{"[fd77:1::2]:0", []string{"[fd77:1::1]:8080", "[fd77:1::3]:8080", "[fd77:1::4]:8080"}},
	} {
		for i := range 240 {
			conn, err := near.dial(MarkTunnel, c.from, c.to[i%3])
			if err != nil {
				t.Fatalf("connection %d from %s to %s: %v", i, c.from, c.to[i%3], err)
			}
			defer conn.Close()
		}
	}
}

// Conntrack forgets what is silent for long. A redirected connection that it has
// forgotten is reset by the next one from the same client port; keepalives, which the
// proxy's sockets send well before, keep it known.
func TestKeepalivesKeepConnectionsKnown(t *testing.T) {
	const forgets = 3 * time.Second
	for _, keep := range []bool{true, false} {
		near, far := twoHosts(t)
		near.serve("[::]:15006", "inbound", func(c *net.TCPConn) {
			idle := time.Second
			if !keep {
				idle = time.Minute
			}
			check(t, c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: idle, Interval: time.Second, Count: 4}))
		})
		near.install(near.rules(config(BackendDefault)))
		near.sh("echo 3 > /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established")
		first, err := far.dial(0, "10.77.1.1:40001", "10.77.1.2:8080")
		check(t, err)
		defer first.Close()
		greeting(t, first)
		time.Sleep(2 * forgets) // the time is what this is about
		second, err := far.dial(0, "10.77.1.1:40001", "10.77.1.2:8081")
		check(t, err)
		defer second.Close()
		greeting(t, second)
		if keep {
			echoes(t, first)
			echoes(t, second)
			continue
		}
		check(t, first.SetDeadline(time.Now().Add(10*time.Second)))
		_, _ = first.Write([]byte("x"))
		if _, err := first.Read(make([]byte, 1)); err == nil {
			t.Error("a connection that conntrack had forgotten lives on: this test proves nothing")
		}
	}
	if k := DefaultKeepAlive; !k.Enable || k.Idle+time.Duration(k.Count)*k.Interval > 5*time.Minute {
		t.Errorf("keepalives %+v are slower than the NATs that forget soonest", k)
	}
}
