package redirect

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A SYN cookie names addresses and ports, and no listener. Ours gives one to a client
// that lets conntrack forget the connection and then sends its ACK: this must not
// open a connection to the application, which takes the cookie for one of its own.
func TestSYNCookieDoesNotBypass(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		for _, app := range []string{"[::]:8080", "10.77.1.2:8080"} {
			near, far := twoHosts(t)
			near.sh("echo 2 > /proc/sys/net/ipv4/tcp_syncookies") // for every handshake, as under a flood
			accepted := make(chan string, 10)
			near.serve(app, "near app", func(c *net.TCPConn) { accepted <- c.RemoteAddr().String() })
			cfg := transparentConfig(b)
			tproxyIn(t, near, cfg)
			near.install(near.rules(cfg))
			near.mustReach("near app", MarkApp, "10.77.1.2:8080") // gives out cookies
			<-accepted
			if got := far.reaches(0, "10.77.1.1:40122", "10.77.1.2:8080"); got != "inbound 10.77.1.2:8080 from 10.77.1.1:40122" {
				t.Errorf("a handshake by cookie reached %q", got)
			}
			// What far's raw socket begins, its kernel must not reset.
			far.sh("iptables -A OUTPUT -p tcp --tcp-flags RST RST --sport 40123 -j DROP")
			far.do(func() {
				fd := must(t)(unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP))
				defer unix.Close(fd)
				timeout := unix.NsecToTimeval((5 * time.Second).Nanoseconds())
				check(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout))
				to := &unix.SockaddrInet4{Addr: [4]byte{10, 77, 1, 2}}
				check(t, unix.Sendto(fd, rawSegment("10.77.1.1:40123", "10.77.1.2:8080", 0x02, 1000, 0, ""), 0, to))
				flags, cookie := answerOn(t, fd, 40123)
				if flags != 0x12 {
					t.Fatalf("SYN answered with flags %#x", flags)
				}
				near.sh("conntrack -F 2>/dev/null")
				check(t, unix.Sendto(fd, rawSegment("10.77.1.1:40123", "10.77.1.2:8080", 0x18, 1001, cookie+1, "stolen"), 0, to))
				if flags, _ := answerOn(t, fd, 40123); flags&0x04 == 0 {
					t.Errorf("the ACK was answered with flags %#x, not with a reset", flags)
				}
			})
			select {
			case from := <-accepted:
				t.Errorf("app on %s accepted a connection from %s", app, from)
			default:
			}
		}
	})
}

// answerOn reads the next TCP segment to port: its flags and its sequence number.
func answerOn(t *testing.T, fd int, port uint16) (flags byte, seq uint32) {
	t.Helper()
	b := make([]byte, 2048)
	for {
		n, _, err := unix.Recvfrom(fd, b, 0)
		check(t, err)
		if n < 40 {
			continue
		}
		if h := b[int(b[0]&15)*4 : n]; len(h) >= 20 && binary.BigEndian.Uint16(h[2:]) == port {
			return h[13], binary.BigEndian.Uint32(h[4:])
		}
	}
}

// rawSegment is a TCP segment without options, with a right checksum.
func rawSegment(from, to string, flags byte, seq, ack uint32, data string) []byte {
	src, dst := netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
	h := make([]byte, 20, 20+len(data))
	binary.BigEndian.PutUint16(h[0:], src.Port())
	binary.BigEndian.PutUint16(h[2:], dst.Port())
	binary.BigEndian.PutUint32(h[4:], seq)
	binary.BigEndian.PutUint32(h[8:], ack)
	h[12], h[13], h[14] = 5<<4, flags, 0x10
	h = append(h, data...)
	s, d := src.Addr().As4(), dst.Addr().As4()
	pseudo := append(append(append(s[:], d[:]...), 0, unix.IPPROTO_TCP, 0, byte(len(h))), h...)
	if len(pseudo)%2 == 1 {
		pseudo = append(pseudo, 0)
	}
	var sum uint32
	for i := 0; i < len(pseudo); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(pseudo[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(h[16:], ^uint16(sum))
	return h
}
