package integration

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/fleet"
	"github.com/symbolon/symbolon/internal/netlab"
)

// The tunnel goes to the application's own destination, so a router that
// translates addresses needs no change, and the identity survives it.
func TestThroughNAT(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)
	w.apply(allow("client-echo", "client", "echo", ""))
	w.Router.SNAT(w.RouterToServer)
	// 10.1.0.1:8001 and its IPv6 twin are port forwardings to the server.
	w.Router.DNAT(netip.MustParseAddrPort("10.1.0.1:8001"), netip.MustParseAddrPort("10.2.0.2:7001"))
	w.Router.DNAT(netip.MustParseAddrPort("[fd00:1::1]:8001"), netip.MustParseAddrPort("[fd00:2::2]:7001"))
	for _, tc := range []struct{ name, dials, seen, source string }{
		{"SNAT v4", "10.2.0.2:7001", "10.2.0.2:7001", "10.2.0.1:"},
		{"SNAT v6", "[fd00:2::2]:7001", "[fd00:2::2]:7001", "[fd00:2::1]:"},
		{"SNAT and DNAT v4", "10.1.0.1:8001", "10.2.0.2:7001", "10.2.0.1:"},
		{"SNAT and DNAT v6", "[fd00:1::1]:8001", "[fd00:2::2]:7001", "[fd00:2::1]:"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w.expect("echo", w.try(w.Client, "echo", tc.dials, tc.name[:4]), tc.name[:4])
			c := w.recorded(w.client, "the client's record", func(l *flow.Line) bool { return l.Destination.Address == tc.dials && l.Outcome == "allow" })
			s := w.recorded(w.server, "the server's record", func(l *flow.Line) bool { return l.FlowID == c.FlowID })
			if s.Destination.Address != tc.seen || !strings.HasPrefix(s.Source.Address, tc.source) {
				t.Errorf("the server sees %s to %s, want %s… to %s", s.Source.Address, s.Destination.Address, tc.source, tc.seen)
			}
			if s.Source.Address == c.Source.Address {
				t.Error("nothing was translated")
			}
			if s.Source.SPIFFEID != c.Source.SPIFFEID || s.Source.Workload != "client" || c.Destination.SPIFFEID != s.Destination.SPIFFEID {
				t.Errorf("the identity did not survive: %s and %s", c.Source.SPIFFEID, s.Source.SPIFFEID)
			}
		})
	}
	t.Run("one client port for three connections", w.samePort)
}

// Three connections from one client address and port, as a NAT in the way may make
// them: each gets to its own port, is its own client's, and harms no other.
func (w *world) samePort(t *testing.T) {
	t.Helper()
	for _, to := range []struct{ dials, source string }{{"10.2.0.2", "10.2.0.1"}, {"[fd00:2::2]", "[fd00:2::1]"}} {
		fam := map[bool]int{true: 4, false: 6}[!strings.Contains(to.dials, "[")]
		rule := []string{"POSTROUTING", "-p", "tcp", "-m", "multiport", "--dports", "7011,7012,7013", "-j", "SNAT", "--to-source", to.source + ":40001-40001"}
		w.Router.IPTables(fam, append([]string{"-t", "nat", "-I"}, rule...)...)
		w.expect("three at once", w.try(w.Client, "three", to.dials), "012012")
		for port := portMany; port < portMany+3; port++ {
			dst := fmt.Sprintf("%s:%d", to.dials, port)
			l := w.recorded(w.server, dst, func(l *flow.Line) bool { return l.Destination.Address == dst && l.Outcome == "allow" })
			if l.Source.Address != to.source+":40001" || l.Source.Workload != "client" || l.Destination.Workload != "echo" || l.BytesSent != 4 {
				t.Errorf("record: %+v", l)
			}
		}
		w.Router.IPTables(fam, append([]string{"-t", "nat", "-D"}, rule...)...)
	}
}

// A balancer of layer 4 without a proxy spreads tunnels over two protected
// backends, and checks their health in plain TCP.
func TestThroughBalancer(t *testing.T) {
	w := newBareWorld(t, "haproxy", "nginx", "curl")
	// Two backends and the balancer behind the router's second leg.
	balancer, second := w.net.Host("lb"), w.net.Host("server2")
	w.net.Link(w.Router, balancer, []string{"10.3.0.1/24", "fd00:3::1/64"}, []string{"10.3.0.2/24", "fd00:3::2/64"})
	balancer.DefaultRoute("10.3.0.1")
	balancer.DefaultRoute("fd00:3::1")
	w.net.Link(w.Router, second, []string{"10.4.0.1/24", "fd00:4::1/64"}, []string{"10.4.0.2/24", "fd00:4::2/64"})
	second.DefaultRoute("10.4.0.1")
	second.DefaultRoute("fd00:4::1")
	w.enrol()
	other, err := w.fleet.Proxy(w.ctx(), second, fleet.Enrolment{Namespace: "/acme/prod"})
	if err != nil {
		t.Fatal(err)
	}
	w.apply(profile("nginx.service", "web") + `---
kind: Profile
namespace: /acme/prod
name: curl
match: {proc.exe: /usr/bin/curl}
workload: curl
labels: {app: curl, env: prod}
---
kind: Service
namespace: /acme/prod
name: web-lb
addresses: {cidrs: [10.3.0.2/32, "fd00:3::2/128"], ports: [tcp/80]}
---
kind: External
namespace: /acme/prod
name: lb-checks
labels: {ext: lb-checks}
addresses: {cidrs: [10.3.0.2/32, "fd00:3::2/128"]}
` + allow("curl-web", "curl", "web", ""))
	for h, body := range map[*netlab.Host]string{w.Server: "first", second: "second"} {
		if _, err := h.Nginx(w.ctx(), netlab.Nginx{Port: 80, Body: body}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := balancer.Balancer(w.ctx(), netlab.Balancer{
		Port: 80, Check: true,
		Backends: []netip.AddrPort{netip.MustParseAddrPort("10.2.0.2:80"), netip.MustParseAddrPort("10.4.0.2:80")},
	}); err != nil {
		t.Fatal(err)
	}
	for _, url := range []string{"http://10.3.0.2/", "http://[fd00:3::2]/"} {
		seen := map[string]int{}
		for range 6 {
			out, err := w.Client.Output(w.ctx(), "curl", "-sS", "-g", "--max-time", "20", url)
			if err != nil {
				t.Fatal(err)
			}
			seen[strings.TrimSpace(out)]++
		}
		if seen["first"] != 3 || seen["second"] != 3 {
			t.Errorf("%s: answers %v, want three of each backend", url, seen)
		}
	}
	for p, addr := range map[*fleet.Proxy]string{w.server: "10.2.0.2:80", other: "10.4.0.2:80"} {
		l := w.recorded(p, "backend", func(l *flow.Line) bool { return l.Destination.Address == addr && l.Outcome == "allow" })
		if l.Source.SPIFFEID != "spiffe://acme.example/acme/prod/curl" || !strings.HasPrefix(l.Source.Address, "10.3.0.2:") || l.Protection != "encrypted" {
			t.Errorf("backend's record: %+v", l)
		}
	}
	if l := w.recorded(w.client, "service", func(l *flow.Line) bool { return l.Destination.Address == "10.3.0.2:80" }); l.Destination.External != "/acme/prod/web-lb" {
		t.Errorf("the client's record does not name the Service: %+v", l)
	}
	// The balancer's own requests are nobody's: without a policy for lb-checks it
	// gets no page, though it is on the way of every tunnel.
	r, err := balancer.Run(w.ctx(), "curl", "-sS", "--max-time", "10", "http://10.2.0.2/")
	if err != nil || r.ExitCode == 0 {
		t.Errorf("the balancer itself got %q (%v)", r.Stdout, err)
	}
	// With one, it does.
	w.apply(`
kind: Policy
namespace: /acme/prod
name: lb-checks-web
subject: {ext: lb-checks}
verb: allow
object: {app: web}
`)
	if out, err := balancer.Output(w.ctx(), "curl", "-sS", "--max-time", "10", "http://10.2.0.2/"); err != nil || strings.TrimSpace(out) != "first" {
		t.Errorf("the balancer as External got %q (%v)", out, err)
	}
	if l := w.recorded(w.server, "check", func(l *flow.Line) bool { return l.Source.External == "/acme/prod/lb-checks" && l.Outcome == "allow" }); l.Protection != "none" || l.ServerPolicy != "/acme/prod/lb-checks-web" {
		t.Errorf("record of the External: %+v", l)
	}
}
