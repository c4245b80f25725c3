package redirect

import (
	"net"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The host's own link-local address is no way around the protection of a local
// port, neither from this host nor from the link.
func TestLinkLocalIsNoWayAround(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		linkLocal4(near, far)
		near.serve("[::]:8080", "near app", nil)
		near.mustReach("near app", 0, "[fe80::a%eth0]:8080")
		near.install(near.rules(config(b)))
		near.mustReach("refused", 0, "[fe80::a%eth0]:8080")
		near.mustReach("refused", 0, "169.254.7.7:8080")
		far.mustReach("refused", 0, "[fe80::a%eth0]:8080")
		far.mustReach("refused", 0, "169.254.7.7:8080")
	})
}

// Neighbours on the link are destinations like any other: with the proxy dead
// nothing reaches them, and what is excluded does.
func TestLinkLocalNeighbours(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		linkLocal4(near, far)
		far.serve("[::]:8080", "far app", nil)
		near.serve("[::]:8080", "near app", nil)
		neighbours := []string{"169.254.7.8:8080", "169.254.169.254:8080", "[fe80::b%eth0]:8080"}
		for _, to := range neighbours {
			near.mustReach("far app", 0, to)
		}
		cfg := config(b)
		near.install(near.rules(cfg))
		for _, to := range neighbours {
			near.mustReach("refused", 0, to)
			near.mustReach("far app", MarkTunnel, to)
			near.mustReach("far app", MarkControl, to)
		}
		// The neighbour is found anew, which takes ICMPv6.
		near.sh("ip -6 neighbour flush dev eth0")
		near.mustReach("far app", MarkTunnel, "[fe80::b%eth0]:8080")

		cfg.ExcludeOutbound = []netip.Prefix{netip.MustParsePrefix("169.254.169.254/32"), netip.MustParsePrefix("fe80::/10")}
		near.install(near.rules(cfg))
		near.mustReach("refused", 0, "169.254.7.8:8080")
		near.mustReach("far app", 0, "169.254.169.254:8080")
		near.mustReach("far app", 0, "[fe80::b%eth0]:8080")
		near.mustReach("refused", 0, "[fe80::a%eth0]:8080") // its own protected port all the same

		cfg.Outbound = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}
		cfg.ExcludeOutbound = nil
		near.install(near.rules(cfg))
		for _, to := range neighbours {
			near.mustReach("far app", 0, to)
		}
	})
}

// A connection to an IPv4 link-local address is redirected with all that the proxy
// needs: who called, whom, and the way to the destination from the same address.
func TestLinkLocalIsRedirectedWhole(t *testing.T) {
	near, far := twoHosts(t)
	linkLocal4(near, far)
	far.serve("[::]:8080", "far app", nil)
	type found struct {
		tuple Tuple
		owner SocketOwner
		err   error
	}
	asked := make(chan found, 1)
	d, ct := near.diag(), near.conntrack()
	near.serve("127.0.0.1:15001", "outbound", func(c *net.TCPConn) {
		var f found
		if f.tuple, f.err = ct.ClientTuple(c); f.err == nil {
			f.owner, f.err = d.Owner(f.tuple.Src, f.tuple.Dst)
		}
		asked <- f
	})
	near.install(near.rules(config(BackendDefault)))
	for to, from := range map[string]string{"169.254.7.8:8080": "169.254.7.7", "169.254.169.254:8080": "10.77.1.2"} {
		conn, err := near.dial(0, "", to)
		check(t, err)
		if got := greeting(t, conn); got != "outbound" {
			t.Fatalf("to %s: reached %q", to, got)
		}
		f := <-asked
		check(t, f.err)
		if f.tuple.Dst.String() != to || f.tuple.Src.Addr().String() != from || f.owner.Inode != inode(t, conn) {
			t.Errorf("to %s: %+v; want from %s, inode %d", to, f, from, inode(t, conn))
		}
		conn.Close()
		if got := near.reaches(MarkTunnel, from+":0", to); got != "far app" {
			t.Errorf("the proxy's own way from %s to %s reached %q", from, to, got)
		}
	}
}

// An ACK out of nowhere makes conntrack know a tuple, so that the SYN that follows
// does not pass the nat table. It must not reach the app.
func TestForgedACKDoesNotBypass(t *testing.T) {
	for _, closed := range []bool{true, false} {
		near, far := twoHosts(t)
		near.serve("[::]:8080", "near app", nil)
		proxyIn(t, near)
		cfg := config(BackendDefault)
		cfg.FailClosed = closed
		// Let the reset that answers the ACK not end the entry before the SYN comes.
		near.sh("iptables -t raw -A OUTPUT -p tcp --tcp-flags RST RST -m mark --mark 0 -m length --length 40 -j DROP")
		near.install(near.rules(cfg))
		far.do(func() {
			fd := must(t)(unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP))
			defer unix.Close(fd)
			segment := tcpSegment("10.77.1.1:40123", "10.77.1.2:8080", 0x10)
			check(t, unix.Sendto(fd, segment, 0, &unix.SockaddrInet4{Addr: [4]byte{10, 77, 1, 2}}))
		})
		eventually(t, "conntrack knows the tuple", func() bool {
			return strings.Contains(near.sh("conntrack -L -p tcp --orig-port-src 40123 2>/dev/null"), "dport=8080")
		})
		near.sh("iptables -t raw -F OUTPUT")
		if got := far.reaches(0, "10.77.1.1:40123", "10.77.1.2:8080"); strings.Contains(got, "app") {
			t.Errorf("fail closed %v: after a forged ACK the connection reached %q", closed, got)
		}
	}
}

// tcpSegment is a bare TCP header with a right checksum.
func tcpSegment(from, to string, flags byte) []byte {
	src, dst := netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
	h := make([]byte, 20)
	h[0], h[1] = byte(src.Port()>>8), byte(src.Port())
	h[2], h[3] = byte(dst.Port()>>8), byte(dst.Port())
	h[7], h[11], h[12], h[13], h[14] = 1, 1, 5<<4, flags, 0x10
	s, d := src.Addr().As4(), dst.Addr().As4()
	pseudo := append(append(append(s[:], d[:]...), 0, unix.IPPROTO_TCP, 0, 20), h...)
	var sum uint32
	for i := 0; i < len(pseudo); i += 2 {
		sum += uint32(pseudo[i])<<8 | uint32(pseudo[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	h[16], h[17] = byte(^sum>>8), byte(^sum)
	return h
}
