package integration

import (
	"context"
	"net/netip"
	"strings"
	"testing"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/fleet"
)

// newWorldWith has proxies with more in their configuration.
func newWorldWith(t *testing.T, config string, tools ...string) *world {
	t.Helper()
	w := newBareWorld(t, tools...)
	w.enrolWith(config)
	w.echo(w.Server)
	return w
}

// The server's proxy takes inbound connections by TPROXY, and its applications see
// where clients are: through tunnels, from clients without a proxy, and behind strict
// reverse path filters.
func TestTransparentAndPreservedSource(t *testing.T) {
	w := newWorldWith(t, "redirect: {inbound: tproxy, preserve_source: true}")
	w.strictPaths()
	w.apply(allow("client-echo", "client", "echo", "") + `---
kind: External
namespace: /acme/prod
name: outside
labels: {ext: outside}
addresses: {cidrs: [10.2.0.1/32, "fd00:2::1/128"]}
---
kind: Policy
namespace: /acme/prod
name: outside-echo
subject: {ext: outside}
verb: allow
object: {app: echo}
`)
	for _, protection := range []string{"encrypted", "authenticated"} {
		w.apply(strings.Replace(basePolicy, "protection: encrypted", "protection: "+protection, 1))
		t.Run(protection, func(t *testing.T) {
			w.families(t, func(t *testing.T, addr string) {
				tcpMeaning(w, addr, protection)
				client := map[bool]string{true: "10.1.0.2", false: "fd00:1::2"}[!strings.Contains(addr, "[")]
				w.seesClient(addr, client)
			})
		})
	}
	t.Run("from this host", func(t *testing.T) {
		// A workload of the server's own host: nothing to preserve, and nothing in the way.
		w.apply(profile("neighbour.service", "neighbour") + allow("neighbour-echo", "neighbour", "echo", ""))
		for _, addr := range []string{"10.2.0.2", "127.0.0.1", "[::1]"} {
			w.expect(addr, w.tryAs(w.Server, "neighbour.service", "echo", addr+":7001", "near"), "near")
		}
	})
	t.Run("a client without a proxy", func(t *testing.T) {
		for _, to := range []struct{ addr, self string }{{"10.2.0.2", "10.2.0.1"}, {"[fd00:2::2]", "fd00:2::1"}} {
			// From the router, whose own port must be in the record.
			said := strings.Fields(w.try(w.Router, "ask", to.addr+":7006"))
			self, seen := netip.MustParseAddrPort(said[0]), netip.MustParseAddrPort(said[1])
			if self.Addr().String() != to.self || seen.Addr() != self.Addr() || seen.Port() == self.Port() {
				t.Errorf("the client is %s, and the application saw %s", self, seen)
			}
			w.recorded(w.server, "the client's own port", func(l *flow.Line) bool {
				return l.Source.Address == self.String() && l.Source.External == "/acme/prod/outside" && l.Outcome == "allow"
			})
		}
	})
	t.Run("one client port for three connections", w.samePort)
	t.Run("the application starts again", func(t *testing.T) {
		// Its port is also the local port of what the proxy holds open for it.
		said := make(chan string, 1)
		go func() { said <- w.try(w.Client, "hold", "10.2.0.2:7002") }()
		w.waitLive(w.server, portGreet)
		if err := w.echoDaemon.Kill(); err != nil {
			t.Fatal(err)
		}
		w.echo(w.Server)
		w.expect("after the restart", w.try(w.Client, "echo", "10.2.0.2:7001", "again"), "again")
		if got := <-said; got != "open\nreset" && got != "open\neof" {
			t.Errorf("the connection to the application that went: %q", got)
		}
	})
	t.Run("dead", func(t *testing.T) {
		if err := w.server.Daemon().Kill(); err != nil {
			t.Fatal(err)
		}
		if got := w.try(w.Client, "knock", "10.2.0.2:7001", "1500ms"); got != "reset" && got != "timeout" {
			t.Errorf("with a dead proxy: %q", got)
		}
		if got := w.try(w.Router, "knock", "10.2.0.2:7001", "1500ms"); got != "timeout" {
			t.Errorf("a client without a proxy, with a dead proxy: %q", got)
		}
		if err := w.server.Start(w.ctx()); err != nil {
			t.Fatal(err)
		}
		if err := w.fleet.Settle(w.ctx()); err != nil {
			t.Fatal(err)
		}
		w.seesClient("10.2.0.2", "10.1.0.2")
	})
	t.Run("cleanup leaves nothing", func(t *testing.T) {
		if err := w.server.Daemon().Stop(); err != nil {
			t.Fatal(err)
		}
		if err := w.server.Cleanup(w.ctx()); err != nil {
			t.Fatal(err)
		}
		for _, list := range []string{"iptables-save", "ip6tables-save", "ipset list -n", "ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all"} {
			out, err := w.Server.Output(w.ctx(), "sh", "-c", list)
			if err != nil || strings.Contains(strings.ToLower(out), "symbolon") || strings.Contains(out, "19712") {
				t.Errorf("%s: %v\n%s", list, err, out)
			}
		}
		w.expect("without the proxy", w.try(w.Router, "echo", "10.2.0.2:7001", "bare"), "bare")
	})
}

// With REDIRECT the address is preserved all the same.
func TestPreservedSource(t *testing.T) {
	w := newWorldWith(t, "redirect: {preserve_source: true}")
	w.strictPaths()
	w.apply(allow("client-echo", "client", "echo", ""))
	for addr, client := range map[string]string{"10.2.0.2": "10.1.0.2", "[fd00:2::2]": "fd00:1::2"} {
		tcpMeaning(w, addr, "encrypted")
		w.seesClient(addr, client)
		w.expect("200 at once", w.try(w.Client, "many", addr+":7005", "200", "4000"), "200 ok")
	}
}

// strictPaths turns the strict reverse path filter on: what comes from an address must
// come by the way that leads there.
func (w *world) strictPaths() {
	w.t.Helper()
	if out, err := w.Server.Output(w.ctx(), "sh", "-c", "for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 1 > $f; done"); err != nil {
		w.t.Fatalf("%v\n%s", err, out)
	}
}

// seesClient: the application saw a connection from the client's address, but not
// from the port that the client's proxy called from.
func (w *world) seesClient(addr, client string) {
	w.t.Helper()
	said := strings.Fields(w.try(w.Client, "ask", addr+":7006"))
	if len(said) != 2 {
		w.t.Fatalf("ask: %q", said)
	}
	if seen := netip.MustParseAddrPort(said[1]); seen.Addr().String() != client {
		w.t.Errorf("the application saw %s, want %s", seen, client)
	}
}

// waitLive waits until p has an open connection to a port on which bytes have passed.
func (w *world) waitLive(p *fleet.Proxy, port uint16) {
	w.t.Helper()
	w.eventually("an open connection", func() bool {
		var live []flow.Line
		if err := p.Debug(context.Background(), "connections", &live); err != nil {
			w.t.Fatal(err)
		}
		for _, l := range live {
			if a, err := netip.ParseAddrPort(l.Destination.Address); err == nil && a.Port() == port && l.BytesReceived > 0 {
				return true
			}
		}
		return false
	})
}
