package redirect

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// preserving is a host whose proxy reaches the app on port 8080 from the client's own
// address.
type preserving struct {
	near, far netNS
	cfg       Config
	rules     *Rules
	app       chan *net.TCPConn // what the app accepted
	legs      chan *net.TCPConn // what the proxy dialled
	hold      chan struct{}     // the app reads when this is closed
	release   func()
}

func newPreserving(t *testing.T, b Backend, transparent bool) *preserving {
	t.Helper()
	p := &preserving{app: make(chan *net.TCPConn, 100), legs: make(chan *net.TCPConn, 100), hold: make(chan struct{})}
	p.release = sync.OnceFunc(func() { close(p.hold) })
	p.near, p.far = twoHosts(t)
	p.near.sh("for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 1 > $f; done")
	p.near.serve("[::]:8080", "", func(c *net.TCPConn) {
		_, _ = io.WriteString(c, plainAddr(t, c.RemoteAddr()).String())
		p.app <- c
		<-p.hold
	})
	t.Cleanup(p.release)
	p.cfg = config(b)
	p.cfg.Transparent, p.cfg.PreserveSource = transparent, true
	ct := p.near.conntrack()
	if transparent {
		ct.Transparent(DefaultInboundPort)
	}
	var relays sync.WaitGroup
	t.Cleanup(relays.Wait)
	p.near.serveInbound(p.cfg, func(c *net.TCPConn) {
		tuple, err := ct.ClientTuple(c)
		if err != nil {
			t.Error(err)
			return
		}
		var leg *net.TCPConn
		p.near.do(func() {
			leg, err = ct.DialAs(context.Background(), tuple.Src.Addr(), tuple.Dst, 5*time.Second, DefaultKeepAlive)
		})
		if err != nil {
			t.Errorf("dial as %s to %s: %v", tuple.Src.Addr(), tuple.Dst, err)
			return
		}
		p.legs <- leg
		relays.Go(func() {
			defer c.Close()
			_, _ = io.Copy(c, leg) // until either end goes
		})
		_, _ = io.Copy(leg, c)
		leg.Close()
	})
	p.rules = p.near.rules(p.cfg)
	p.near.install(p.rules)
	if drift := p.near.verify(p.rules); len(drift) > 0 {
		t.Fatalf("after Install: %q", drift)
	}
	// Counts what an app's answers look like if they leave the host.
	p.far.sh("for t in iptables ip6tables; do $t -A INPUT -p tcp --sport 8080 --dport 16384:32767; done")
	return p
}

func plainAddr(t *testing.T, a net.Addr) netip.AddrPort {
	t.Helper()
	ap, err := addrPort(a)
	check(t, err)
	return ap
}

// connect opens a connection through the proxy and returns both of the app's ends.
func (p *preserving) connect(t *testing.T, from, to string) (client, app, leg *net.TCPConn) {
	t.Helper()
	client, err := p.far.dial(0, from, to)
	check(t, err)
	t.Cleanup(func() { client.Close() })
	seen := netip.MustParseAddrPort(greeting(t, client))
	self := plainAddr(t, client.LocalAddr())
	if seen.Addr() != self.Addr() || seen.Port() == self.Port() || seen.Port() < clientPorts.First || seen.Port() > clientPorts.Last {
		t.Errorf("the app sees %s; want the address of %s, and a port of %v", seen, self, clientPorts)
	}
	return client, <-p.app, <-p.legs
}

// leaked counts the app's packets that arrived at the other host.
func (p *preserving) leaked() string {
	out := p.far.sh("iptables -nvxL INPUT; ip6tables -nvxL INPUT")
	var n []string
	for line := range strings.Lines(out) {
		if strings.Contains(line, "spt:8080") {
			n = append(n, strings.Fields(line)[0])
		}
	}
	return strings.Join(n, " ")
}

func (p *preserving) mustNotLeak(t *testing.T, when string) {
	t.Helper()
	if n := p.leaked(); n != "0 0" {
		t.Errorf("%s: packets of the app to the client's address on the wire: %s", when, n)
	}
}

var preservedEnds = []struct{ from, to string }{{"10.77.1.1:0", "10.77.1.2:8080"}, {"[fd77:1::1]:0", "[fd77:1::2]:8080"}}

func eachInbound(t *testing.T, test func(t *testing.T, b Backend, transparent bool)) {
	backends(t, func(t *testing.T, b Backend) {
		for name, transparent := range map[string]bool{"redirect": false, "tproxy": true} {
			t.Run(name, func(t *testing.T) { test(t, b, transparent) })
		}
	})
}

func TestAppSeesTheClientsAddress(t *testing.T) {
	eachInbound(t, func(t *testing.T, b Backend, transparent bool) {
		p := newPreserving(t, b, transparent)
		p.release()
		// Another program's masquerading of the client's network.
		p.near.sh("iptables-" + string(b) + " -t nat -A POSTROUTING -s 10.77.1.0/24 ! -o eth0 -j MASQUERADE")
		p.near.install(p.rules)
		for _, e := range preservedEnds {
			for range 20 {
				client, _, _ := p.connect(t, e.from, e.to)
				defer echoes(t, client)
			}
		}
		p.near.install(p.rules) // again, over open connections
		p.mustNotLeak(t, "while all is well")
	})
}

// Whatever is missing: what an app answers never leaves the host for the client.
func TestAnswersNeverLeaveTheHost(t *testing.T) {
	eachInbound(t, func(t *testing.T, b Backend, transparent bool) {
		p := newPreserving(t, b, transparent)
		for _, e := range preservedEnds {
			client, app, _ := p.connect(t, e.from, e.to)
			for _, c := range []struct{ name, command, drift string }{
				{"no rule", "ip rule del pref 77; ip -6 rule del pref 77", "no single rule"},
				{"no route", "ip route flush table 19712; ip -6 route flush table 19712", "is not 'local default dev lo'"},
			} {
				p.near.sh(c.command)
				if drift := strings.Join(p.near.verify(p.rules), "; "); strings.Count(drift, c.drift) != 2 {
					t.Errorf("%s: drift %q", c.name, drift)
				}
				_, err := io.WriteString(app, "x") // waits in the app's socket
				check(t, err)
				time.Sleep(50 * time.Millisecond) // for a packet that must not come
				p.mustNotLeak(t, c.name)
				p.near.do(func() { check(t, p.rules.Repair(context.Background())) })
				if drift := p.near.verify(p.rules); len(drift) > 0 {
					t.Errorf("after repair: %q", drift)
				}
				if got := greeting(t, client); got != "x" {
					t.Errorf("%s: after the repair the client reads %q", c.name, got)
				}
			}
			// Conntrack forgets, and the app is the first to speak.
			p.near.sh("conntrack -F 2>/dev/null")
			_, err := io.WriteString(app, "y")
			check(t, err)
			time.Sleep(50 * time.Millisecond)
			p.mustNotLeak(t, "conntrack flushed")
			client.Close()
		}
	})
}

// The client, or a machine with its address, cannot reach into the leg to the app.
func TestLegIsOutOfReach(t *testing.T) {
	eachInbound(t, func(t *testing.T, b Backend, transparent bool) {
		p := newPreserving(t, b, transparent)
		p.release()
		for _, e := range preservedEnds {
			client, _, leg := p.connect(t, e.from, e.to)
			port := plainAddr(t, leg.LocalAddr())
			// A SYN from the leg's port gets no answer, and does no harm.
			var err error
			p.far.do(func() {
				d := net.Dialer{Timeout: 300 * time.Millisecond, LocalAddr: net.TCPAddrFromAddrPort(port)}
				_, err = d.Dial("tcp", e.to)
			})
			var timeout net.Error
			if !errors.As(err, &timeout) || !timeout.Timeout() {
				t.Errorf("from %s: %v", port, err)
			}
			echoes(t, client)
			if !port.Addr().Is4() {
				continue
			}
			before := p.dropped(b)
			p.far.do(func() {
				fd := must(t)(unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP))
				defer unix.Close(fd)
				check(t, unix.Sendto(fd, rawSegment(port.String(), e.to, 0x18, 1, 1, "injected"), 0, &unix.SockaddrInet4{Addr: [4]byte{10, 77, 1, 2}}))
			})
			eventually(t, "the segment is dropped", func() bool { return p.dropped(b) == before+1 })
			echoes(t, client)
		}
		p.mustNotLeak(t, "after the attack")
	})
}

// Should the proxy call from the very port that its client uses, in spite of all, it
// does not get to its own listener, and the client's connection takes no harm.
func TestLegFromTheClientsPort(t *testing.T) {
	eachInbound(t, func(t *testing.T, b Backend, transparent bool) {
		p := newPreserving(t, b, transparent)
		p.release()
		for _, e := range preservedEnds {
			client, _, _ := p.connect(t, e.from, e.to)
			var err error
			p.near.do(func() {
				d := net.Dialer{Timeout: 300 * time.Millisecond, LocalAddr: client.LocalAddr(), Control: transparentControl(markClient)}
				_, err = d.Dial("tcp", e.to)
			})
			if err == nil {
				t.Errorf("from %s: connected", client.LocalAddr())
			}
			echoes(t, client)
			select {
			case leg := <-p.legs:
				t.Errorf("the listener served a connection of the proxy's own: %s", leg.LocalAddr())
			default:
			}
		}
		p.mustNotLeak(t, "afterwards")
	})
}

// dropped counts what came from outside for a leg, IPv4.
func (p *preserving) dropped(b Backend) int {
	n := 0
	for line := range strings.Lines(p.near.sh("iptables-" + string(b) + " -t mangle -nvxL SYMBOLON_MPRE")) {
		if strings.Contains(line, "DROP") {
			n += must(p.near.t)(strconv.Atoi(strings.Fields(line)[0]))
		}
	}
	return n
}

// The proxy dies, its rules are removed, and an app still holds its half of the
// connection: it is reset, and no byte of it leaves.
func TestCleanupEndsWhatAppsStillHold(t *testing.T) {
	eachInbound(t, func(t *testing.T, b Backend, transparent bool) {
		for _, remove := range []func(p *preserving) error{
			func(*preserving) error { return Cleanup(context.Background()) },
			func(p *preserving) error { return p.rules.Remove(context.Background(), nil) },
		} {
			p := newPreserving(t, b, transparent)
			var apps []*net.TCPConn
			for _, e := range preservedEnds {
				client, app, leg := p.connect(t, e.from, e.to)
				apps = append(apps, app)
				leg.Close() // the app's half is still open
				client.Close()
			}
			p.near.do(func() { check(t, remove(p)) })
			p.near.leftNothing()
			for _, app := range apps {
				eventually(t, "the app's half ends", func() bool {
					_, err := app.Write([]byte("late"))
					return errors.Is(err, unix.ECONNABORTED) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) || errors.Is(err, net.ErrClosed)
				})
			}
			p.mustNotLeak(t, "after the removal")
		}
	})
}

// More connections from one client than its own port range would give, to one app.
func TestDialAsRunsOutClearly(t *testing.T) {
	p := newPreserving(t, BackendDefault, false)
	old := clientPorts
	t.Cleanup(func() { clientPorts = old })
	clientPorts = PortRange{20000, 20003}
	ct := p.near.conntrack()
	var err error
	n := 0
	p.near.do(func() {
		for range 40 {
			var c *net.TCPConn
			if c, err = ct.DialAs(context.Background(), netip.MustParseAddr("10.77.1.1"), netip.MustParseAddrPort("10.77.1.2:8080"), 5*time.Second, DefaultKeepAlive); err != nil {
				return
			}
			defer c.Close()
			n++
		}
	})
	if n != 4 || !errors.Is(err, ErrNoClientPort) || !strings.Contains(err.Error(), "10.77.1.1") {
		t.Errorf("%d connections, then %v", n, err)
	}
}
