package redirect

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

func transparentConfig(b Backend) Config {
	cfg := config(b)
	cfg.Transparent = true
	return cfg
}

// tproxyIn is proxyIn for Config.Transparent: the inbound listener answers with the
// client's address and the one that it called.
func tproxyIn(t *testing.T, n netNS, cfg Config) {
	t.Helper()
	ct := n.conntrack()
	ct.Transparent(DefaultInboundPort)
	say := func(name string) func(*net.TCPConn) {
		return func(c *net.TCPConn) {
			tuple, err := ct.ClientTuple(c)
			answer := name + " " + tuple.Dst.String() + " from " + tuple.Src.String()
			if err != nil {
				answer = name + ": " + err.Error()
			}
			_, _ = io.WriteString(c, answer) // a client that has gone is told nothing
		}
	}
	for _, a := range cfg.OutboundAddrs() {
		n.serve(a.String(), "", say("outbound"))
	}
	n.serveInbound(cfg, say("inbound"))
}

// serveInbound starts the inbound listener that cfg asks for.
func (n netNS) serveInbound(cfg Config, serve func(*net.TCPConn)) {
	n.t.Helper()
	l := n.serve(cfg.InboundAddr().String(), "", serve)
	check(n.t, cfg.PrepareInbound(l.(*net.TCPListener)))
}

// Every way a connection can take on a host whose inbound ones come by TPROXY.
func TestTransparentInbound(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		linkLocal4(near, far)
		far.serve("[::]:8080", "far app", nil)
		near.serve("[::]:8080", "near app", nil)
		near.serve("10.77.1.2:8081", "near app", nil)
		near.serve("[::]:22", "near ssh", nil)
		cfg := transparentConfig(b)
		tproxyIn(t, near, cfg)
		r := near.rules(cfg)
		near.install(r)
		near.install(r)
		if drift := near.verify(r); len(drift) > 0 {
			t.Fatalf("after Install: %q", drift)
		}
		if drift := near.verify(near.rules(cfg)); len(drift) > 0 {
			t.Fatalf("seen by another process: %q", drift)
		}
		for _, c := range []struct {
			name string
			from netNS
			mark int
			src  string
			to   string
			want string
		}{
			{"remote to protected", far, 0, "10.77.1.1:40001", "10.77.1.2:8080", "inbound 10.77.1.2:8080 from 10.77.1.1:40001"},
			{"the same port to another", far, 0, "10.77.1.1:40001", "10.77.1.2:8081", "inbound 10.77.1.2:8081 from 10.77.1.1:40001"},
			{"remote to protected v6", far, 0, "[fd77:1::1]:40001", "[fd77:1::2]:8080", "inbound [fd77:1::2]:8080 from [fd77:1::1]:40001"},
			{"remote to a port that nobody serves", far, 0, "10.77.1.1:40002", "10.77.1.2:9", "inbound 10.77.1.2:9 from 10.77.1.1:40002"},
			{"remote to link-local", far, 0, "169.254.7.8:40001", "169.254.7.7:8080", "inbound 169.254.7.7:8080 from 169.254.7.8:40001"},
			{"remote to link-local v6", far, 0, "[fe80::b%eth0]:40001", "[fe80::a%eth0]:8080", "inbound [fe80::a]:8080 from [fe80::b]:40001"},
			{"remote to excluded port", far, 0, "", "10.77.1.2:22", "near ssh"},
			{"remote to excluded port v6", far, 0, "", "[fd77:1::2]:22", "near ssh"},
			{"app to remote", near, 0, "10.77.1.2:40001", "10.77.1.1:8080", "outbound 10.77.1.1:8080 from 10.77.1.2:40001"},
			{"app to own address v6", near, 0, "[fd77:1::2]:40001", "[fd77:1::2]:8080", "outbound [fd77:1::2]:8080 from [fd77:1::2]:40001"},
			{"tunnel to this host", near, MarkTunnel, "10.77.1.2:40003", "10.77.1.2:8080", "inbound 10.77.1.2:8080 from 10.77.1.2:40003"},
			{"tunnel to loopback", near, MarkTunnel, "127.0.0.1:40003", "127.0.0.1:8080", "inbound 127.0.0.1:8080 from 127.0.0.1:40003"},
			{"tunnel to remote", near, MarkTunnel, "", "10.77.1.1:8080", "far app"},
			{"proxy to local app", near, MarkApp, "", "127.0.0.1:8080", "near app"},
			{"proxy to local app v6", near, MarkApp, "", "[fd77:1::2]:8080", "near app"},
			{"straight to the listener", far, 0, "", "10.77.1.2:15006", "refused"},
			{"straight to the listener v6", far, 0, "", "[fd77:1::2]:15006", "refused"},
			{"straight to the listener from here", near, 0, "", "10.77.1.2:15006", "refused"},
		} {
			if got := c.from.reaches(c.mark, c.src, c.to); got != c.want {
				t.Errorf("%s: reached %q, want %q", c.name, got, c.want)
			}
		}
		// An open connection lives on while the rules go and come, and when conntrack
		// forgets it.
		for _, to := range []string{"10.77.1.2:8080", "[fd77:1::2]:8080"} {
			conn, err := far.dial(0, "", to)
			check(t, err)
			defer conn.Close()
			greeting(t, conn)
			near.sh("conntrack -F 2>/dev/null")
			echoes(t, conn)
			near.do(func() {
				check(t, r.Remove(context.Background(), func(context.Context) error {
					echoes(t, conn)
					if got := far.reaches(0, "", to); got != "near app" {
						t.Errorf("a new connection while draining reached %q", got)
					}
					return nil
				}))
			})
			echoes(t, conn)
			near.leftNothing()
			near.install(r)
			echoes(t, conn)
		}
	})
}

// The same client port may be connected to several of our ports at once, and no
// connection resets another, whether conntrack remembers it or not: with REDIRECT the
// second one's port is rewritten, and a forgotten first one is reset.
func TestTransparentConnectionsDoNotMeet(t *testing.T) {
	near, far := twoHosts(t)
	cfg := transparentConfig(BackendDefault)
	tproxyIn(t, near, cfg)
	near.install(near.rules(cfg))
	for _, a := range []struct{ from, to string }{{"10.77.1.1:40001", "10.77.1.2:"}, {"[fd77:1::1]:40001", "[fd77:1::2]:"}} {
		var open []*net.TCPConn
		for _, port := range []string{"8080", "8081", "8082"} {
			conn, err := far.dial(0, a.from, a.to+port)
			check(t, err)
			defer conn.Close()
			if got, want := greeting(t, conn), "inbound "+a.to+port+" from "+a.from; got != want {
				t.Errorf("reached %q, want %q", got, want)
			}
			open = append(open, conn)
			near.sh("conntrack -F 2>/dev/null")
		}
		for _, conn := range open {
			echoes(t, conn)
		}
	}
}

func TestTransparentDeadProxyFailsClosed(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		near.serve("[::]:8080", "near app", nil)
		near.install(near.rules(transparentConfig(b)))
		for _, to := range []string{"10.77.1.2:8080", "[fd77:1::2]:8080"} {
			ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
			var c net.Conn
			var err error
			far.do(func() { c, err = (&net.Dialer{}).DialContext(ctx, "tcp", to) })
			cancel()
			if err == nil {
				t.Errorf("connection to %s was accepted: %q", to, greeting(t, c))
				c.Close()
			}
		}
		near.mustReach("refused", 0, "10.77.1.2:8080")
		// Without the rules that take it, the guard refuses.
		near.sh("iptables-" + string(b) + " -t mangle -F SYMBOLON_MPRE; ip6tables-" + string(b) + " -t mangle -F SYMBOLON_MPRE")
		far.mustReach("refused", 0, "10.77.1.2:8080")
		far.mustReach("refused", 0, "[fd77:1::2]:8080")
	})
}

// With fail open the rules lapse, TPROXY's too.
func TestTransparentLapses(t *testing.T) {
	near, far := twoHosts(t)
	near.serve("[::]:8080", "near app", nil)
	cfg := transparentConfig(BackendDefault)
	cfg.FailClosed = false
	near.install(near.rules(cfg))
	eventually(t, "the rules lapse", func() bool { return far.reaches(0, "", "10.77.1.2:8080") == "near app" })
	eventually(t, "the v6 rules lapse", func() bool { return far.reaches(0, "", "[fd77:1::2]:8080") == "near app" })
}

// One way of taking connections may follow the other on a host, with nothing left of
// the first.
func TestTransparentComesAndGoes(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		near.serve("[::]:8080", "near app", nil)
		plain, transparent, both := config(b), transparentConfig(b), transparentConfig(b)
		both.PreserveSource = true
		tproxyIn(t, near, transparent)
		for _, cfg := range []Config{plain, transparent, plain, both, transparent, both, plain} {
			r := near.rules(cfg)
			near.install(r)
			if drift := near.verify(r); len(drift) > 0 {
				t.Errorf("%+v: %q", cfg, drift)
			}
			for _, to := range []string{"10.77.1.2:8080", "[fd77:1::2]:8080"} {
				if got := far.reaches(0, "", to); !strings.HasPrefix(got, "inbound "+to+" from") {
					t.Errorf("transparent %v, source %v: %s reached %q", cfg.Transparent, cfg.PreserveSource, to, got)
				}
			}
		}
		if out := near.sh("for t in iptables ip6tables; do $t-" + string(b) + "-save -t mangle; $t-" + string(b) + "-save -t nat; done; ip rule; ip -6 rule"); strings.Contains(out, "_M") || strings.Contains(out, "_POST") || strings.Contains(out, "19712") {
			t.Errorf("left by an earlier configuration:\n%s", out)
		}
		near.install(near.rules(both))
		near.do(func() { check(t, Cleanup(context.Background())) })
		near.leftNothing()
	})
}

// Others' rules: a DNAT of our ports does not reach the application, not even before
// Watch has put ours first.
func TestTransparentAndForeignDNAT(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		near.serve("[::]:8080", "near app", nil)
		cfg := transparentConfig(b)
		tproxyIn(t, near, cfg)
		ipt := "iptables-" + string(b)
		near.sh(ipt + " -t nat -A PREROUTING -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 8080")
		r := near.rules(cfg)
		near.install(r)
		if got := far.reaches(0, "10.77.1.1:40001", "10.77.1.2:80"); got != "inbound 10.77.1.2:80 from 10.77.1.1:40001" {
			t.Errorf("with a DNAT behind ours: reached %q", got)
		}
		near.sh(ipt + " -t nat -I PREROUTING -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 8080")
		if drift := strings.Join(near.verify(r), "; "); !strings.Contains(drift, "SYMBOLON_PRE is not the first") {
			t.Errorf("drift: %q", drift)
		}
		if got := far.reaches(0, "10.77.1.1:40002", "10.77.1.2:80"); strings.Contains(got, "app") {
			t.Errorf("with a DNAT before ours: reached %q", got)
		}
		near.do(func() { check(t, r.Repair(context.Background())) })
		if got := far.reaches(0, "10.77.1.1:40003", "10.77.1.2:80"); got != "inbound 10.77.1.2:80 from 10.77.1.1:40003" {
			t.Errorf("after the repair: reached %q", got)
		}
	})
}
