package proxy

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/redirect"
)

// Under a flood, when the kernel answers by SYN cookies, another program must not get the
// connection to an application that has ended: what was looked at is who gets the bytes.
// Otherwise the ACK of the handshake may wait for them.
func TestHeldAndSYNCookies(t *testing.T) {
	const cookies = "/proc/sys/net/ipv4/tcp_syncookies"
	was := must(os.ReadFile(cookies))(t)
	t.Cleanup(func() { _ = os.WriteFile(cookies, was, 0) })
	p := newWorld(t).p
	for _, address := range []string{"127.0.0.1:7001", "[::1]:7001", "[::]:7001"} {
		for _, mode := range []string{"1", "2"} { // 2: for every handshake
			if err := os.WriteFile(cookies, []byte(mode), 0); err != nil {
				t.Fatal(err)
			}
			to := netip.MustParseAddrPort(address)
			if to.Addr().IsUnspecified() { // an application on both families
				to = netip.MustParseAddrPort("127.0.0.1:7001")
			}
			first := listen(t, address)
			tuple := redirect.Tuple{Src: netip.AddrPortFrom(to.Addr(), 40000), Dst: to}
			listens := must(p.diag.Listener(tuple.Dst, tuple.Src))(t)
			var app *socket
			x := p.newConn(nil, &slot{p: p}, symbolonv1.Reporter_REPORTER_SERVER)
			if err := x.reach(t.Context(), tuple, netip.Addr{}, nil, listens, func(_ context.Context, c *socket, err error) error {
				app = c
				return err
			}); err != nil {
				t.Fatal(err)
			}
			if app.held != (mode == "1") {
				t.Errorf("%s, tcp_syncookies %s: held %t", address, mode, app.held)
			}
			_ = first.Close()
			second := listen(t, address)
			// It has given out cookies, or takes none.
			own := must(redirect.Dialer(redirect.MarkApp, redirect.DefaultKeepAlive).Dial("tcp", to.String()))(t)
			_ = must(second.AcceptTCP())(t).Close()
			_ = own.Close()
			c := must(app.attach())(t)
			_, err := c.Write([]byte("secret"))
			if err == nil {
				_ = c.SetReadDeadline(time.Now().Add(patience))
				_, err = c.Read(make([]byte, 1))
			}
			if !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%s, tcp_syncookies %s: %v, want a reset: another program got the connection", address, mode, err)
			}
			_ = c.Close()
			_ = second.Close()
		}
	}
}
