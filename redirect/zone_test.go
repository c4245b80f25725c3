package redirect

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// obey does what the client's first byte says: r, reset; f, end first; else what the
// client does.
func obey(c *net.TCPConn) {
	b := make([]byte, 1)
	if _, err := c.Read(b); err != nil {
		return
	}
	switch b[0] {
	case 'r':
		_ = c.SetLinger(0)
		c.Close()
	case 'f':
		c.Close()
	}
}

// obedient is two hosts with an app each, on port 8080, and a proxy near. Apps greet
// by name, the proxy's listeners by theirs, the destination, and who called it. All
// do what they are told then.
func obedient(t *testing.T) (near, far netNS) {
	t.Helper()
	near, far = twoHosts(t)
	app := func(n netNS, name string) {
		n.serve("[::]:8080", "", func(c *net.TCPConn) {
			_, _ = io.WriteString(c, name)
			obey(c)
		})
	}
	app(near, "near app")
	app(far, "far app")
	ct := near.conntrack()
	listener := func(name string) func(*net.TCPConn) {
		return func(c *net.TCPConn) {
			tuple, err := ct.ClientTuple(c)
			if err != nil {
				_, _ = io.WriteString(c, name+": "+err.Error())
				return
			}
			_, _ = io.WriteString(c, fmt.Sprintf("%s %s from %s", name, tuple.Dst, tuple.Src))
			obey(c)
		}
	}
	var cfg Config
	near.do(func() { cfg = DefaultConfig() })
	for _, a := range cfg.OutboundAddrs() {
		near.serve(a.String(), "", listener("outbound"))
	}
	near.serve(cfg.InboundAddr().String(), "", listener("inbound"))
	return near, far
}

// endings are the ways in which a connection ends that leave different things behind,
// in sockets and in conntrack.
var endings = map[string]func(t *testing.T, c *net.TCPConn){
	"reset by the peer": func(t *testing.T, c *net.TCPConn) { told(t, c, "r", unix.ECONNRESET); c.Close() },
	"half closed, then reset by the peer": func(t *testing.T, c *net.TCPConn) {
		_, err := io.WriteString(c, "r")
		check(t, err)
		_ = c.CloseWrite() // the reset may be here already
		_, _ = c.Read(make([]byte, 1))
		c.Close()
	},
	"ended by the peer": func(t *testing.T, c *net.TCPConn) { told(t, c, "f", io.EOF); c.Close() },
	"ended by us": func(t *testing.T, c *net.TCPConn) {
		check(t, c.CloseWrite())
		_, _ = io.Copy(io.Discard, c) // until the peer's end
		c.Close()
	},
	"reset by us": func(_ *testing.T, c *net.TCPConn) { _ = c.SetLinger(0); c.Close() },
}

// told says what the peer is to do, and waits until it has.
func told(t *testing.T, c *net.TCPConn, do string, want error) {
	t.Helper()
	_, err := io.WriteString(c, do)
	check(t, err)
	check(t, c.SetReadDeadline(time.Now().Add(20*time.Second)))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, want) {
		t.Errorf("told %q, the peer ends with %v, not %v", do, err, want)
	}
}

// beat keeps the rules alive until the test ends.
func (n netNS) beat(r *Rules) {
	n.t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	watching.Go(func() {
		n.do(func() {
			_ = r.Watch(ctx, time.Hour, func(d []string, err error) { n.t.Errorf("drift %q, %v", d, err) })
		})
	})
	n.t.Cleanup(watching.Wait)
	n.t.Cleanup(stop)
}

// onlyInTheirZone says whether all that conntrack knows from these ports to 8080 is
// either redirected or a leg of the proxy's in its zone.
func (n netNS) onlyInTheirZone(when string) {
	n.t.Helper()
	for line := range strings.Lines(n.sh("for f in ipv4 ipv6; do conntrack -L -f $f -p tcp --orig-port-dst 8080 2>/dev/null; done")) {
		if !strings.Contains(line, fmt.Sprintf("zone-orig=%d ", legZone)) && !strings.Contains(line, "sport=15001 ") {
			n.t.Errorf("%s: tracked neither apart nor redirected: %s", when, line)
		}
	}
}

// A connection of the proxy's leaves nothing behind, however it ends, by which an
// application that gets its port would escape redirection, or be taken for the proxy.
func TestPortOfAnEndedLegIsRedirected(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		for _, closed := range []bool{true, false} {
			near, _ := obedient(t)
			cfg := config(b)
			cfg.FailClosed = closed
			r := near.rules(cfg)
			near.install(r)
			near.beat(r)
			port := 20000
			for _, leg := range []struct {
				mark              int
				from, to, reaches string
			}{
				{MarkTunnel, "10.77.1.2", "10.77.1.1:8080", "far app"},
				{MarkTunnel, "[fd77:1::2]", "[fd77:1::1]:8080", "far app"},
				{MarkControl, "10.77.1.2", "10.77.1.1:8080", "far app"},
				{MarkControl, "[fd77:1::2]", "[fd77:1::1]:8080", "far app"},
				{MarkApp, "127.0.0.1", "127.0.0.1:8080", "near app"},
				{MarkApp, "[fd77:1::2]", "[fd77:1::2]:8080", "near app"},
				// By way of the inbound listener.
				{MarkTunnel, "10.77.1.2", "10.77.1.2:8080", "inbound"},
				{MarkTunnel, "[fd77:1::2]", "[fd77:1::2]:8080", "inbound"},
			} {
				for name, end := range endings {
					port++
					from := fmt.Sprintf("%s:%d", leg.from, port)
					c, err := near.dial(leg.mark, from, leg.to)
					check(t, err)
					reaches := leg.reaches
					if reaches == "inbound" {
						reaches = fmt.Sprintf("inbound %s from %s", leg.to, from)
					}
					if got := greeting(t, c); got != reaches {
						t.Errorf("mark %#x to %s reached %q", leg.mark, leg.to, got)
					}
					end(t, c)
					if got, want := near.reaches(0, from, leg.to), fmt.Sprintf("outbound %s from %s", leg.to, from); got != want {
						t.Errorf("fail closed %v: after a leg with mark %#x, %s, its port and destination reached %q, want %q", closed, leg.mark, name, got, want)
					}
				}
			}
			near.onlyInTheirZone("after all")
		}
	})
}

// Where loopback is not intercepted, the guard lets pass what an entry of the proxy's
// translates to there: after a tunnel to this host, that is to the inbound listener.
func TestPortOfATunnelToThisHost(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, _ := obedient(t)
		cfg := config(b)
		cfg.Outbound = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}
		near.install(near.rules(cfg))
		for _, e := range []struct{ from, to string }{{"10.77.1.2:20001", "10.77.1.2:8080"}, {"[fd77:1::2]:20001", "[fd77:1::2]:8080"}} {
			c, err := near.dial(MarkTunnel, e.from, e.to)
			check(t, err)
			if got, want := greeting(t, c), fmt.Sprintf("inbound %s from %s", e.to, e.from); got != want {
				t.Errorf("the tunnel reached %q", got)
			}
			endings["reset by the peer"](t, c)
			if got, want := near.reaches(0, e.from, e.to), fmt.Sprintf("outbound %s from %s", e.to, e.from); got != want {
				t.Errorf("reached %q, want %q", got, want)
			}
		}
	})
}

// The other way round: the proxy's own connection from the port of an application's
// that it has just ended goes where it should, and not to the proxy.
func TestPortOfAnEndedAppIsTheLegs(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, _ := obedient(t)
		near.install(near.rules(config(b)))
		port := 20000
		for _, e := range []struct{ from, to string }{{"10.77.1.2", "10.77.1.1:8080"}, {"[fd77:1::2]", "[fd77:1::1]:8080"}} {
			for name, end := range endings {
				port++
				from := fmt.Sprintf("%s:%d", e.from, port)
				c, err := near.dial(0, from, e.to)
				check(t, err)
				greeting(t, c)
				end(t, c)
				if got := near.reaches(MarkTunnel, from, e.to); got != "far app" {
					t.Errorf("a tunnel from the port of an application's connection, %s, reached %q", name, got)
				}
			}
		}
	})
}

// What the kernel still answers for a leg in TIME_WAIT belongs to the leg: it reaches
// the peer from the leg's port, and makes no connection of its own.
func TestAnswersInTimeWaitStayInTheZone(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := obedient(t)
		near.install(near.rules(config(b)))
		for _, e := range []struct{ tool, from, to string }{
			{"iptables", "10.77.1.2:20001", "10.77.1.1:8080"}, {"ip6tables", "[fd77:1::2]:20002", "[fd77:1::1]:8080"},
		} {
			c, err := near.dial(MarkTunnel, e.from, e.to)
			check(t, err)
			greeting(t, c)
			_, port, _ := net.SplitHostPort(e.from)
			// The acknowledgement of the peer's end is lost, and it ends again.
			lost := " INPUT -p tcp --sport " + port + " --tcp-flags FIN,SYN,ACK ACK -j DROP"
			far.sh(e.tool + " -A" + lost)
			c.Close()
			eventually(t, "the peer ends again", func() bool {
				for line := range strings.Lines(far.sh(e.tool + " -nvxL INPUT")) {
					if strings.Contains(line, "spt:"+port) {
						n := strings.Fields(line)[0]
						return n != "0" && n != "1" && n != "2"
					}
				}
				return false
			})
			far.sh(e.tool + " -D" + lost)
			eventually(t, "the peer's socket ends", func() bool { return far.sh("ss -Htan dport = :"+port) == "" })
		}
		near.onlyInTheirZone("after TIME_WAIT has answered")
	})
}

// A firewall of the operator's that lets in only answers, and translates what leaves,
// does with the proxy's connections as with all others, also when conntrack has been
// flushed in their midst.
func TestLegsBehindAStatefulFirewall(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := obedient(t)
		far.sh("for t in iptables ip6tables; do $t -A INPUT -p tcp --dport 9 -j REJECT; done")
		near.install(near.rules(config(b)))
		for _, tool := range []string{"iptables-" + string(b), "ip6tables-" + string(b)} {
			near.sh(strings.ReplaceAll(`IPT -A INPUT -p tcp -m conntrack --ctstate ESTABLISHED -j ACCEPT
				IPT -A INPUT -p icmp -m conntrack --ctstate RELATED -j ACCEPT; IPT -A INPUT -p icmpv6 -m conntrack --ctstate RELATED -j ACCEPT
				IPT -A INPUT -i eth0 -p tcp -j DROP; IPT -A INPUT -p icmp -j DROP
				IPT -A OUTPUT -p tcp -m conntrack --ctstate INVALID -j DROP
				IPT -t nat -A POSTROUTING -o eth0 -p tcp -j MASQUERADE --to-ports 50000-50100`, "IPT", tool))
		}
		for _, e := range []struct{ from, to, closed string }{
			{"10.77.1.2:20001", "10.77.1.1:8080", "10.77.1.1:9"}, {"[fd77:1::2]:20001", "[fd77:1::1]:8080", "[fd77:1::1]:9"},
		} {
			c, err := near.dial(MarkTunnel, e.from, e.to)
			check(t, err)
			defer c.Close()
			if got := greeting(t, c); got != "far app" {
				t.Fatalf("reached %q", got)
			}
			_, err = io.WriteString(c, "-") // "do as I do"
			check(t, err)
			echoes(t, c)
			if got := near.reaches(MarkTunnel, e.from, e.closed); got != "refused" {
				t.Errorf("what a firewall rejects by ICMP: %q", got)
			}
		}
	})
}

// Conntrack forgets, and the proxy's connections live on, whichever end speaks first.
func TestLegsOutliveAFlush(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		peers := make(chan *net.TCPConn, 1)
		hold := make(chan struct{})
		far.serve("[::]:8080", "", func(c *net.TCPConn) { peers <- c; <-hold })
		t.Cleanup(func() { close(hold) })
		proxyIn(t, near)
		near.install(near.rules(config(b)))
		for _, to := range []string{"10.77.1.1:8080", "[fd77:1::1]:8080"} {
			c, err := near.dial(MarkTunnel, "", to)
			check(t, err)
			defer c.Close()
			peer := <-peers
			for _, ends := range [][2]*net.TCPConn{{c, peer}, {peer, c}} {
				near.sh("conntrack -F 2>/dev/null")
				for i := range 2 {
					_, err := io.WriteString(ends[i], "x")
					check(t, err)
					if got := greeting(t, ends[1-i]); got != "x" {
						t.Errorf("%s: after a flush the other end reads %q", to, got)
					}
				}
			}
		}
	})
}

// The proxy's own connections live on while its rules go, until they are drained.
func TestLegsLiveThroughRemoval(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, _ := obedient(t)
		// Another program's translation keeps the kernel at it when ours has gone.
		near.sh("iptables-" + string(b) + " -t nat -A POSTROUTING -o other -j MASQUERADE")
		r := near.rules(config(b))
		near.install(r)
		var open []*net.TCPConn
		for _, leg := range []struct {
			mark int
			to   string
		}{
			{MarkTunnel, "10.77.1.1:8080"}, {MarkTunnel, "[fd77:1::1]:8080"}, {MarkTunnel, "10.77.1.2:8080"},
			{MarkTunnel, "[fd77:1::2]:8080"}, {MarkApp, "127.0.0.1:8080"}, {MarkControl, "10.77.1.1:8080"},
		} {
			c, err := near.dial(leg.mark, "", leg.to)
			check(t, err)
			defer c.Close()
			greeting(t, c)
			_, err = io.WriteString(c, "-")
			check(t, err)
			echoes(t, c)
			open = append(open, c)
		}
		near.install(r) // again, over open connections
		near.do(func() {
			check(t, r.Remove(context.Background(), func(context.Context) error {
				for _, c := range open {
					echoes(t, c)
				}
				return nil
			}))
		})
		near.leftNothing()
	})
}

// A kernel without the target CT: installing warns, and goes on. What then has the port
// of a tunnel that the peer has reset is refused by the guard; it never goes around.
func TestWithoutZonesTheGuardRefuses(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		dir := t.TempDir()
		for _, name := range []string{"iptables-" + string(b) + "-restore", "ip6tables-" + string(b) + "-restore"} {
			tool, err := findTool(name, "iptables")
			check(t, err)
			check(t, os.WriteFile(filepath.Join(dir, name), []byte(`#!/bin/sh
in=$(cat; echo .)
case "$in" in *zone-orig*) echo 'Warning: Extension CT revision 0 not supported, missing kernel module?' >&2; exit 4;; esac
printf %s "${in%.}" | `+tool+` "$@"
`), 0o755))
		}
		t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
		for _, closed := range []bool{true, false} {
			near, _ := obedient(t)
			cfg := config(b)
			cfg.FailClosed = closed
			r := near.rules(cfg)
			near.install(r)
			near.beat(r)
			if all := strings.Join(r.Warnings(), "; "); strings.Count(all, "cannot be tracked apart") != 2 || !strings.Contains(all, "missing kernel module") {
				t.Errorf("warnings: %q", all)
			}
			if drift := near.verify(r); len(drift) > 0 {
				t.Errorf("drift: %q", drift)
			}
			for _, e := range []struct{ from, to string }{{"10.77.1.2:20001", "10.77.1.1:8080"}, {"[fd77:1::2]:20001", "[fd77:1::1]:8080"}} {
				c, err := near.dial(MarkTunnel, e.from, e.to)
				check(t, err)
				greeting(t, c)
				endings["reset by the peer"](t, c)
				if got := near.reaches(0, e.from, e.to); got != "refused" {
					t.Errorf("fail closed %v: reached %q", closed, got)
				}
			}
			near.do(func() { check(t, r.Remove(context.Background(), nil)) })
			near.leftNothing()
		}
	})
}

// Any other failure is one.
func TestOnlyAMissingFeatureIsForgiven(t *testing.T) {
	for stderr, want := range map[string]bool{
		"iptables-restore v1.8.9 (nf_tables): line 5: RULE_APPEND failed (No such file or directory): rule in chain SYMBOLON_ROUT": true,
		"ip6tables-restore v1.8.9 (legacy): can't initialize ip6tables table `raw': Table does not exist (do you need to insmod?)": true,
		"iptables-restore v1.8.9 (nf_tables): line 5: RULE_APPEND failed (Operation not supported): rule in chain SYMBOLON_ROUT":   true,
		"Another app is currently holding the xtables lock; still 5s 0us time ahead to have a chance to grab the lock...":          false,
		"iptables-restore v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)":        false,
	} {
		if got := lacksZones(fmt.Errorf("raw: %w", &ToolError{Stderr: stderr})); got != want {
			t.Errorf("%s: %v", stderr, got)
		}
	}
	if lacksZones(context.DeadlineExceeded) {
		t.Error("a deadline is no missing feature")
	}
}

// The proxy's mark, without its cgroup, does not make the port of a tunnel that was
// reset a way around.
func TestForgedMarkOnAnEndedLegsPort(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, _ := obedient(t)
		dir, _ := newCgroup(t)
		for _, e := range []struct{ from, to string }{{"10.77.1.2:20001", "10.77.1.1:8080"}, {"[fd77:1::2]:20001", "[fd77:1::1]:8080"}} {
			if got := near.proxyInCgroup(dir, b, "install", fmt.Sprintf("dial %#x %s %s", MarkTunnel, e.to, e.from)); got != "far app\ntrue\n" {
				t.Fatalf("the proxy's own: %q", got)
			}
			if got := near.reaches(MarkTunnel, e.from, e.to); got != "refused" {
				t.Errorf("forged: reached %q", got)
			}
			if got, want := near.reaches(0, e.from, e.to), fmt.Sprintf("outbound %s from %s", e.to, e.from); got != want {
				t.Errorf("without the mark: reached %q", got)
			}
		}
	})
}
