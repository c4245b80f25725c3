package proxy

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/redirect"
)

// synSpace is what a SYN has room for over IPv4 with an MTU of 1500, bytes.
const synSpace = 1420

// fastOpenHosts lets both hosts send data in SYNs, and take it.
func fastOpenHosts(t *testing.T) {
	t.Helper()
	const file = "/proc/sys/net/ipv4/tcp_fastopen"
	here := func(f func() error) error { return f() }
	for _, host := range []func(func() error) error{here, inOther} {
		var was []byte
		if err := host(func() (err error) {
			if was, err = os.ReadFile(file); err == nil {
				err = os.WriteFile(file, []byte("3"), 0)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := host(func() error { return os.WriteFile(file, was, 0) }); err != nil {
				t.Error(err)
			}
		})
	}
}

func fastOpening(o *Options) { o.TLS.FastOpen = true }

// synData tells whether c's SYN brought data that was taken.
func synData(t testing.TB, c *net.TCPConn) bool {
	t.Helper()
	const taken = 32 // TCPI_OPT_SYN_DATA
	var info *unix.TCPInfo
	var err error
	raw := must(c.SyscallConn())(t)
	if cerr := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	return info.Options&taken != 0
}

// inOtherRule has the other host's firewall do so with packets, until undo.
func inOtherRule(t *testing.T, iptables string, rule ...string) (undo func()) {
	t.Helper()
	run := func(what string) error {
		return inOther(func() error {
			if out, err := exec.Command(iptables, append([]string{"-w", what}, rule...)...).CombinedOutput(); err != nil {
				return fmt.Errorf("%s %s %v: %w: %s", iptables, what, rule, err, out)
			}
			return nil
		})
	}
	if err := run("-A"); err != nil {
		t.Fatal(err)
	}
	done := false
	undo = func() {
		if done {
			return
		}
		done = true
		if err := run("-D"); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(undo)
	return undo
}

// callEarly is an application or proxy of the other host's that begins in its SYN, once
// it has a cookie.
func (w *world) callEarly(to netip.AddrPort) *net.TCPConn {
	w.Helper()
	d := redirect.Dialer(redirect.MarkControl, redirect.DefaultKeepAlive)
	d.Timeout = patience
	mark := d.Control
	d.Control = func(network, address string, raw syscall.RawConn) error {
		err := mark(network, address, raw)
		cerr := raw.Control(func(fd uintptr) {
			err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1))
		})
		return errors.Join(cerr, err)
	}
	var c net.Conn
	if err := inOther(func() (err error) { c, err = d.Dial("tcp", to.String()); return err }); err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

// cookie gets one for address. A client that was denied one asks in another way first.
func (w *world) cookie(address string) {
	w.Helper()
	for range trials {
		c := w.callEarly(netip.AddrPortFrom(netip.MustParseAddr(address), appPort))
		_, _ = io.WriteString(c, "x") // where one is known already, nothing leaves before
		_ = c.CloseWrite()
		_, _ = ended(w.T, c)
		w.records.next()
		if synData(w.T, c) {
			return
		}
	}
	w.Fatal("no SYN brings data")
}

// A tunnel to a host that is known begins in its SYN, over IPv4 and IPv6.
func TestFastOpen(t *testing.T) {
	fastOpenHosts(t)
	w := newWorld(t, fastOpening, func(o *Options) { o.NoReuse = true })
	w.creds.set("0", w.web())
	db := w.db()
	for _, address := range []string{other4, other6} {
		t.Run(address, func(t *testing.T) {
			w := w.in(t)
			seen := make(chan bool, 2)
			at := w.serveOther(net.JoinHostPort(address, "0"), func(c *net.TCPConn) {
				x := w.server(c, db, nil)
				o, err := readOpen(x)
				if err != nil {
					t.Error(err)
					return
				}
				seen <- synData(t, c)
				_, _ = x.Write(accepts(o))
				repeats(x)
			})
			for i := range 2 {
				w.asks(at, "hello", nil)
				if r := w.records.next(); r.Outcome != "allow" || r.Protection != "encrypted" || r.KeyExchange != "X25519MLKEM768" {
					t.Errorf("recorded %+v", r)
				}
				if early := within(t, seen, "an open"); i > 0 && !early {
					t.Error("the second tunnel's SYN brought nothing")
				}
			}
		})
	}
}

// A cookie that is forgotten between connect and the first write, as the kernel does when it
// knows of many hosts or takes the network for a black hole, costs a round trip, and no
// connection.
func TestFastOpenForgotten(t *testing.T) {
	fastOpenHosts(t)
	w := newWorld(t)
	at := w.serveOther(other4+":0", func(c *net.TCPConn) { _, _ = io.Copy(c, c) })
	for _, forget := range []bool{false, false, true} { // the first brings the cookie
		fd := must(redirect.ConnectTunnel(netip.Addr{}, at, true))(t)
		if forget {
			if out, err := exec.Command("ip", "tcp_metrics", "flush").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
		c := mtls.Connecting(fd, net.TCPAddrFromAddrPort(at), patience, patience)
		_ = c.SetDeadline(time.Now().Add(patience))
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatalf("forgotten %t: %v", forget, err)
		}
		b := make([]byte, len("hello"))
		if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
			t.Errorf("forgotten %t: read %q, %v", forget, b, err)
		}
		_ = c.Close()
	}
}

// What connect says without fast open, the record says with it: the other end is not
// known of before the handshake.
func TestFastOpenFailures(t *testing.T) {
	for _, hosts := range []struct{ address, iptables, unreachable string }{
		{other4, "iptables", "icmp-host-unreachable"}, {other6, "ip6tables", "icmp6-addr-unreachable"},
	} {
		rules := map[string][]string{
			"refused":     nil,
			"unreachable": {"-j", "REJECT", "--reject-with", hosts.unreachable},
			"timed-out":   {"-j", "DROP"},
		}
		for reason, rule := range rules {
			t.Run(hosts.address+" "+reason, func(t *testing.T) {
				fastOpenHosts(t)
				for _, fast := range []bool{false, true} {
					t.Run(fmt.Sprint(fast), func(t *testing.T) {
						w := newWorld(t, func(o *Options) {
							o.TLS.FastOpen, o.NoReuse = fast, true
							if reason == "timed-out" {
								o.Timeouts.Connect, o.Timeouts.Handshake = time.Second, time.Second
							}
						})
						w.creds.set("0", w.web())
						early := make(chan bool, 2)
						at := w.serveOther(net.JoinHostPort(hosts.address, "0"), func(c *net.TCPConn) { early <- synData(t, c) })
						for range 2 { // the first brings the cookie
							_, _ = w.ask(at, "hello")
							w.records.next()
							if got := <-early; got && !fast {
								t.Fatal("data in a SYN without being asked for")
							}
						}
						to := netip.AddrPortFrom(at.Addr(), 7999)
						if rule != nil {
							inOtherRule(t, hosts.iptables, append([]string{"INPUT", "-p", "tcp", "--dport", "7999"}, rule...)...)
						}
						if _, err := w.ask(to, "hello"); err == nil {
							t.Error("the application was not told")
						}
						if r := w.records.next(); r.Reason != reason || r.Outcome != "error" {
							t.Errorf("recorded %s %s (%s), want %s", r.Outcome, r.Reason, r.Detail, reason)
						}
					})
				}
			})
		}
	}
}

// The inbound listener takes a tunnel that begins in its SYN; without the sysctl it is
// one like any other.
func TestFastOpenInbound(t *testing.T) {
	for _, allowed := range []bool{false, true} {
		t.Run(fmt.Sprintf("sysctl %v", allowed), func(t *testing.T) {
			if allowed {
				fastOpenHosts(t)
			}
			w := newWorld(t, fastOpening)
			e := mtls.NewEndpoint(w.web(), mtls.Options{FastOpen: true})
			for _, address := range []string{protected4, protected6} {
				to := netip.AddrPortFrom(netip.MustParseAddr(address), appPort)
				early := false
				for i := 0; i < 2 || allowed && !early && i < trials; i++ { // a client that was denied a cookie asks in another way first
					tcp := w.callEarly(to)
					x, err := mtls.Dial(w.ctx(), tcp, e, func(*mtls.Peer) (*symbolonv1.Open, error) {
						return mtls.NewOpen(mtls.NewFlowID(), to, symbolonv1.Protection_PROTECTION_ENCRYPTED, 1), nil
					})
					if err != nil {
						t.Fatal(err)
					}
					if _, err := x.ReadVerdict(w.ctx()); err != nil {
						t.Fatal(err)
					}
					speaks(t, x)
					early = early || synData(t, tcp)
					_ = x.Reset()
					if r := w.records.next(); r.Outcome != "allow" || r.Destination.SPIFFEID == "" || r.Source.SPIFFEID == "" {
						t.Errorf("recorded %+v", r)
					}
				}
				if early != allowed {
					t.Errorf("%s: data in a SYN: %v", address, early)
				}
			}
		})
	}
}

// hello is a ClientHello of cred's, as it goes into a SYN.
func (w *world) hello(cred *identity.Credential) []byte {
	w.Helper()
	a, b := pair(w.T)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = mtls.Dial(w.ctx(), a, mtls.NewEndpoint(cred, mtls.Options{FastOpen: true}), nil)
	}()
	buf := make([]byte, 1<<14)
	if _, err := io.ReadFull(b, buf[:5]); err != nil {
		w.Fatal(err)
	}
	n := 5 + int(buf[3])<<8 + int(buf[4])
	if _, err := io.ReadFull(b, buf[5:n]); err != nil {
		w.Fatal(err)
	}
	_ = b.Close()
	<-done
	return buf[:n]
}

// An attacker who sends again what was in a SYN reaches nobody: no application is dialled
// for a ClientHello, however often it comes, and whatever stands behind it.
func TestReplayedSYN(t *testing.T) {
	fastOpenHosts(t)
	w := newWorld(t, fastOpening)
	w.cookie(protected4)
	reached := w.app.accepts.Load()
	hello := w.hello(w.web())
	if len(hello) > synSpace {
		t.Fatalf("a ClientHello of %d bytes does not go into a SYN", len(hello))
	}
	for _, behind := range []string{"", "", "an Open and more"} {
		c := w.callEarly(w.app.addr)
		if _, err := c.Write(append(hello[:len(hello):len(hello)], behind...)); err != nil {
			t.Fatal(err)
		}
		// The server's flight, or its alert; then the replayer has no key to go on with.
		if _, err := io.ReadFull(c, make([]byte, 7)); err != nil {
			t.Fatal(err)
		}
		if !synData(t, c) {
			t.Error("the SYN brought nothing")
		}
		c.Close()
		if r := w.records.next(); r.Outcome == "allow" {
			t.Errorf("recorded %+v", r)
		}
	}
	if n := w.app.accepts.Load() - reached; n > 0 {
		t.Errorf("the application was reached %d times", n)
	}
}

// Bytes in the clear that came with a SYN reach the application only when their client has
// confirmed the connection, and once: an old SYN that comes again is never confirmed. It is
// so without the setting, too: a process that is to take over has the same listeners, and
// sets them as it likes before we have stopped, or before it fails.
func TestUnconfirmedSYN(t *testing.T) {
	for name, own := range map[string]bool{"our setting": true, "a successor's": false} {
		t.Run(name, func(t *testing.T) {
			fastOpenHosts(t)
			var listener *net.TCPListener
			w := newWorld(t, func(o *Options) { o.TLS.FastOpen, listener = own, o.Inbound[0] })
			w.policy(office)
			if !own {
				first := w.call(w.app.addr) // is served: from then on the proxy has its listeners
				speaks(t, first)
				_ = reset(first)
				w.records.next()
				if err := redirect.AcceptFastOpen(listener, true); err != nil {
					t.Fatal(err)
				}
			}
			w.unconfirmed()
		})
	}
}

func (w *world) unconfirmed() {
	w.Helper()
	w.cookie(protected4)
	reached := w.app.accepts.Load()
	let := inOtherRule(w.T, "iptables", "OUTPUT", "-p", "tcp", "--dport", fmt.Sprint(appPort), "--tcp-flags", "SYN,RST,ACK", "ACK", "-j", "DROP")
	c := w.callEarly(w.app.addr)
	if _, err := io.WriteString(c, "pay once"); err != nil {
		w.Fatal(err)
	}
	eventually(w.T, "the proxy has the connection", func() bool { return w.p.open.Load() > 0 })
	time.Sleep(300 * time.Millisecond) // a proxy that does not wait is through by then
	if n := w.app.accepts.Load() - reached; n > 0 {
		w.Errorf("the application was reached %d times by an unconfirmed SYN", n)
	}
	let()
	expect(w.T, c, "pay once")
	if !synData(w.T, c) {
		w.Error("the SYN brought nothing")
	}
	_ = c.CloseWrite()
	_, _ = ended(w.T, c)
	if r := w.records.next(); r.Outcome != "allow" || w.app.accepts.Load()-reached != 1 {
		w.Errorf("recorded %+v", r)
	}
}

// With fast open a client offers one key exchange; servers that have others meet it.
func TestFastOpenOffersOneKeyShare(t *testing.T) {
	w := newWorld(t, fastOpening)
	hello := w.hello(w.web())
	a, b := pair(t)
	offered := make(chan []tls.CurveID, 1)
	go func() {
		_ = tls.Server(b, &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			offered <- h.SupportedCurves
			return nil, net.ErrClosed
		}}).Handshake()
	}()
	if _, err := a.Write(hello); err != nil {
		t.Fatal(err)
	}
	if got := within(t, offered, "a ClientHello"); len(got) != 1 || got[0] != tls.X25519MLKEM768 {
		t.Errorf("offers %v", got)
	}
}

// A listener that another process had set so takes no data from SYNs any more.
func TestFastOpenEndsWithItsSetting(t *testing.T) {
	fastOpenHosts(t)
	w := newWorld(t, func(o *Options) {
		if err := redirect.AcceptFastOpen(o.Inbound[0], true); err != nil {
			t.Fatal(err)
		}
	})
	w.policy(office)
	first := w.call(w.app.addr) // is served: from then on the proxy has its listeners
	speaks(t, first)
	_ = reset(first)
	w.records.next()
	for range 3 {
		c := w.callEarly(w.app.addr)
		speaks(t, c)
		if synData(t, c) {
			t.Error("data in a SYN was taken")
		}
		_ = c.CloseWrite()
		_, _ = ended(t, c)
		w.records.next()
	}
}
