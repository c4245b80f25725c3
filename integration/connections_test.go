package integration

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/fleet"
)

// The main job: who talks to whom, by which policy, encrypted how.
func TestCrossHost(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)

	t.Run("denied by default", func(t *testing.T) {
		w.expect("echo", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "reset")
		l := w.recorded(w.client, "the client's record", to(portEcho, "deny"))
		if l.Reason != "default" || l.Source.SPIFFEID != "spiffe://acme.example/acme/prod/client" || l.Destination.SPIFFEID != "" {
			t.Errorf("record of a workload that may reach nobody: %+v", l)
		}
		// One that may reach somebody gets to know whom it was denied.
		w.apply(allow("client-web", "client", "web", ""))
		w.expect("echo", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "reset")
		l = w.recorded(w.client, "the client's record", func(l *flow.Line) bool { return l.Destination.SPIFFEID != "" })
		if l.Reason != "default" || l.Outcome != "deny" || l.Destination.SPIFFEID != "spiffe://acme.example/acme/prod/echo" {
			t.Errorf("record: %+v", l)
		}
	})
	w.apply(allow("client-echo", "client", "echo", ""))
	w.families(t, func(t *testing.T, addr string) {
		w.expect("echo with half-close", w.try(w.Client, "echo", addr+":7001", "hello"), "hello")
		for _, p := range []struct {
			name string
			line *flow.Line
		}{
			{"client", w.recorded(w.client, "client", func(l *flow.Line) bool { return l.Destination.Address == addr+":7001" && l.Outcome == "allow" })},
			{"server", w.recorded(w.server, "server", func(l *flow.Line) bool { return l.Destination.Address == addr+":7001" && l.Outcome == "allow" })},
		} {
			l := p.line
			if l.Reporter != p.name || l.Source.Workload != "client" || l.Destination.Workload != "echo" ||
				l.Protection != "encrypted" || l.TLSVersion != "TLS 1.3" || l.CipherSuite != "TLS_AES_256_GCM_SHA384" || l.KeyExchange != "X25519MLKEM768" ||
				l.ClientPolicy+l.ServerPolicy == "" || l.BytesSent != 5 || l.BytesReceived != 5 {
				t.Errorf("%s's record: %+v", p.name, l)
			}
		}
		w.expect("the server speaks first", w.try(w.Client, "greet", addr+":7002"), "220 welcome,thanks")
	})

	t.Run("policy counts on both sides", func(t *testing.T) {
		// The server's namespace denies; the client's own side would allow.
		w.apply(`
kind: Policy
namespace: /acme/prod
name: a-nobody-to-greeter
subject: any
verb: deny
object: {app: echo}
ports: [tcp/7002]
`)
		w.expect("denied port", w.try(w.Client, "greet", "10.2.0.2:7002"), "reset")
		l := w.recorded(w.client, "denial", to(portGreet, "deny"))
		if l.Reason != "policy" || l.ClientPolicy != "/acme/prod/a-nobody-to-greeter" {
			t.Errorf("record: %+v", l)
		}
		w.expect("other port", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
	})

	t.Run("a stranger is nobody", func(t *testing.T) {
		// The same program, but in another unit: no profile gives it labels.
		w.expect("stranger", w.tryAs(w.Client, "stranger.service", "echo", "10.2.0.2:7001", "hello"), "reset")
		l := w.recorded(w.client, "denial", func(l *flow.Line) bool { return l.Source.Workload == "unprofiled.stranger.service" })
		if l.Outcome != "deny" || l.Reason != "default" {
			t.Errorf("record: %+v", l)
		}
	})
}

func TestSameHost(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Client)
	w.expect("denied by default", w.try(w.Client, "echo", "10.1.0.2:7001", "hello"), "reset")
	w.apply(allow("client-echo", "client", "echo", ""))
	for _, addr := range []string{"10.1.0.2", "127.0.0.1", "[::1]", "[fd00:1::2]"} {
		w.expect(addr, w.try(w.Client, "echo", addr+":7001", "hello"), "hello")
		l := w.recorded(w.client, addr, func(l *flow.Line) bool { return l.Destination.Address == addr+":7001" && l.Outcome == "allow" })
		if !l.Local || l.Reporter != "local" || l.Protection != "none" || l.Source.Workload != "client" || l.Destination.Workload != "echo" {
			t.Errorf("%s: record: %+v", addr, l)
		}
	}
	w.expect("nobody listens", w.try(w.Client, "echo", "127.0.0.1:7999", "hello"), "reset")
	if l := w.recorded(w.client, "refused", to(portDead, "error")); l.Reason != "refused" {
		t.Errorf("record: %+v", l)
	}
}

// TCP's meanings, through two proxies, in both protections and families.
func TestTCPMeaning(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)
	for _, protection := range []string{"encrypted", "authenticated"} {
		t.Run(protection, func(t *testing.T) {
			w.apply(strings.Replace(basePolicy, "protection: encrypted", "protection: "+protection, 1) + allow("client-echo", "client", "echo", ""))
			w.families(t, func(t *testing.T, addr string) {
				tcpMeaning(w, addr, protection)
			})
		})
	}
	w.unreachable(t)
}

// unreachable: what the network says of a destination is in the record, and the client
// does not wait in vain.
func (w *world) unreachable(t *testing.T) {
	w.Router.IPTables(0, "-I", "FORWARD", "-p", "tcp", "--dport", "7098", "-j", "DROP")
	w.Router.IPTables(4, "-I", "FORWARD", "-p", "tcp", "--dport", "7097", "-j", "REJECT", "--reject-with", "icmp-host-unreachable")
	w.Router.IPTables(6, "-I", "FORWARD", "-p", "tcp", "--dport", "7097", "-j", "REJECT", "--reject-with", "icmp6-addr-unreachable")
	said := make(chan string, 2)
	meanwhile := *w // families gives w to one test after another
	for _, addr := range []string{"10.2.0.2", "[fd00:2::2]"} {
		go func() { said <- meanwhile.try(w.Client, "echo", addr+":7098", "hello") }() // takes until connecting is given up
	}
	w.families(t, func(t *testing.T, addr string) {
		w.expect("unreachable", w.try(w.Client, "echo", addr+":7097", "hello"), "reset")
		l := w.recorded(w.client, "record", func(l *flow.Line) bool { return l.Destination.Address == addr+":7097" })
		if l.Outcome != "error" || l.Reason != "unreachable" {
			t.Errorf("record: %+v", l)
		}
	})
	for range 2 {
		w.expect("no answer at all", <-said, "reset")
	}
	for _, addr := range []string{"10.2.0.2", "[fd00:2::2]"} {
		l := w.recorded(w.client, "record", func(l *flow.Line) bool { return l.Destination.Address == addr+":7098" })
		if l.Outcome != "error" || l.Reason != "timed-out" {
			t.Errorf("record: %+v", l)
		}
	}
}

// tcpMeaning is what applications see of each other through two proxies.
func tcpMeaning(w *world, addr, protection string) {
	w.t.Helper()
	w.expect("half-close by the client", w.try(w.Client, "echo", addr+":7001", "hello"), "hello")
	if l := w.recorded(w.client, "record", func(l *flow.Line) bool {
		return l.Destination.Address == addr+":7001" && l.Outcome == "allow" && l.Protection == protection
	}); l.Protection != protection {
		w.t.Errorf("protection: %+v", l)
	}
	w.expect("RST by the server", w.try(w.Client, "line", addr+":7003"), "reset")
	w.logs(`watch: "still writing\n" eof`, func() {
		w.expect("half-close by the server, FIN by the client", w.try(w.Client, "watch", addr+":7004", "close"), "half")
	})
	w.logs(`watch: "still writing\n" reset`, func() {
		w.expect("half-close by the server, RST by the client", w.try(w.Client, "watch", addr+":7004", "reset"), "half")
	})
	w.expect("refused", w.try(w.Client, "echo", addr+":7999", "hello"), "reset")
	if l := w.recorded(w.client, "refused", func(l *flow.Line) bool { return l.Destination.Address == addr+":7999" }); l.Reason != "refused" || l.Outcome != "error" {
		w.t.Errorf("record of a refused connection: %+v", l)
	}
	w.expect("urgent data keeps its place", w.try(w.Client, "urgent", addr+":7001"), "AB!CD")
	w.expect("a megabyte", w.try(w.Client, "many", addr+":7005", "1", "1000000"), "1 ok")
	w.quits(addr + ":7001")
}

// quits: who resets a connection before a word is never taken for one that has ended in
// order, whether a tunnel waits for it or not, and however far it has come.
func (w *world) quits(to string) {
	w.t.Helper()
	const n = 20
	quit := func(p *fleet.Proxy) (lines []flow.Line) {
		all, err := p.Flows()
		if err != nil {
			w.t.Fatal(err)
		}
		for _, l := range all {
			if l.Destination.Address == to && l.BytesSent == 0 {
				lines = append(lines, l)
			}
		}
		return lines
	}
	before, served := len(quit(w.client)), len(quit(w.server))
	w.expect("RST before a word", w.try(w.Client, "quits", to, fmt.Sprint(n)), fmt.Sprint(n))
	w.eventually("they are recorded", func() bool { return len(quit(w.client)) == before+n })
	for _, l := range append(quit(w.client)[before:], quit(w.server)[served:]...) {
		if l.Outcome == "allow" && l.Detail != "reset" {
			w.t.Errorf("%s's record of a reset: %s, %s (%s), reused %v", l.Reporter, l.Outcome, l.Reason, l.Detail, l.Reused)
		}
	}
}

// logs runs do, after which the server must say text once more.
func (w *world) logs(text string, do func()) {
	w.t.Helper()
	before := strings.Count(w.echoDaemon.Log(), text)
	do()
	w.eventually("the server says "+text, func() bool { return strings.Count(w.echoDaemon.Log(), text) > before })
}

func TestThousandConnections(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)
	w.apply(allow("client-echo", "client", "echo", ""))
	w.expect("1,000 at once", w.try(w.Client, "many", "10.2.0.2:7005", "1000", "4000"), "1000 ok")
	w.recorded(w.server, "all recorded", func(*flow.Line) bool {
		lines, err := w.server.Flows()
		n := 0
		for _, l := range lines {
			if l.Outcome == "allow" && l.Protection == "encrypted" {
				n++
			}
		}
		return err == nil && n == 1000
	})
}

// A policy that goes takes its live connections with it, and only those.
func TestLiveConnectionsAreCut(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)
	w.apply(allow("client-echo", "client", "echo", ""))
	said := make(chan string, 1)
	go func() { said <- w.try(w.Client, "hold", "10.2.0.2:7002") }()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		var live []flow.Line
		if err := w.client.Debug(ctx, "connections", &live); err != nil {
			t.Fatal(err)
		}
		if len(live) == 1 && live[0].BytesReceived > 0 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	w.apply(strings.Replace(allow("client-echo", "client", "echo", ""), "verb: allow", "verb: deny", 1))
	w.expect("the held connection", <-said, "open\nreset")
	// Whichever proxy hears of the policy first cuts, and the other sees a reset.
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		for _, p := range []*fleet.Proxy{w.client, w.server} {
			lines, err := p.Flows()
			if err != nil {
				t.Fatal(err)
			}
			for _, l := range lines {
				if to(portGreet, "deny")(&l) && l.Reason == "policy-changed" {
					return
				}
			}
		}
		if time.Now().After(end) {
			t.Fatal("neither proxy recorded that the policy cut the connection")
		}
	}
}
