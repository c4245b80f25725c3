package integration

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/fleet"
	"github.com/symbolon/symbolon/internal/netlab"
)

// A killed proxy lets nothing through, in or out; one that is started again
// carries on, as the same host, without a new join token.
func TestKilledProxyFailsClosed(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)
	w.apply(allow("client-echo", "client", "echo", ""))
	w.expect("before", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
	for _, p := range []*fleet.Proxy{w.client, w.server} {
		t.Run(p.Host.Name(), func(t *testing.T) {
			before := status(t, p)
			capture, err := w.Router.Capture("any", "tcp port 7001")
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Daemon().Kill(); err != nil {
				t.Fatal(err)
			}
			for range 5 {
				if got := w.try(w.Client, "echo", "10.2.0.2:7001", secret); got != "refused" && got != "reset" {
					t.Errorf("with a dead proxy: %q", got)
				}
				if got := w.try(w.Router, "echo", "10.2.0.2:7001", secret); p == w.server && got != "refused" && got != "reset" {
					t.Errorf("a stranger, with the server's proxy dead: %q", got)
				}
			}
			if _, err := capture.Stop(); err != nil {
				t.Fatal(err)
			}
			// A stranger speaks in the clear, but nobody hears: no answer comes.
			if answered(t, capture) {
				t.Error("the server answered while its proxy was dead")
			}
			if err := p.Start(w.ctx()); err != nil {
				t.Fatal(err)
			}
			if err := w.fleet.Settle(w.ctx()); err != nil {
				t.Fatal(err)
			}
			w.expect("after the restart", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
			if after := status(t, p); after.HostID != before.HostID {
				t.Errorf("another host after the restart: %s, was %s", after.HostID, before.HostID)
			}
		})
	}
	t.Run("cleanup leaves nothing", func(t *testing.T) {
		if err := w.client.Daemon().Stop(); err != nil {
			t.Fatal(err)
		}
		if err := w.client.Cleanup(w.ctx()); err != nil {
			t.Fatal(err)
		}
		for _, list := range [][]string{{"iptables-save"}, {"ip6tables-save"}, {"ipset", "list", "-n"}} {
			out, err := w.Client.Output(w.ctx(), list[0], list[1:]...)
			if err != nil || strings.Contains(strings.ToLower(out), "symbolon") {
				t.Errorf("%v: %v\n%s", list, err, out)
			}
		}
	})
}

type hostStatus struct {
	HostID     string `json:"host_id"`
	Generation uint64 `json:"generation"`
}

func status(t *testing.T, p *fleet.Proxy) (s hostStatus) {
	t.Helper()
	if err := p.Debug(context.Background(), "status", &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// answered: the server's application sent something.
func answered(t *testing.T, c *netlab.Capture) bool {
	t.Helper()
	streams, err := c.Streams()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range streams {
		if s.Src.Port() == portEcho && len(s.Data) > 0 && s.Data[0] != 22 { // not a handshake of the other proxy's
			return true
		}
	}
	return false
}

// While the rules are put in place a hundred times over, no connection gets around
// the proxy, and none is lost.
func TestRulesReappliedUnderLoad(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)
	w.apply(allow("client-echo", "client", "echo", ""))
	capture, err := w.Router.Capture("any", "tcp port 7001")
	if err != nil {
		t.Fatal(err)
	}
	const workers = 2
	said := make(chan string, workers)
	for range workers {
		go func() { said <- w.try(w.Client, "connect", "10.2.0.2:7001", "12") }()
	}
	for i := range 100 {
		if out, err := w.Client.Output(w.ctx(), "sh", "-c", reapply); err != nil {
			t.Fatalf("round %d: %v\n%s", i, err, out)
		}
	}
	for range workers {
		counts := <-said
		if !strings.HasPrefix(counts, "map[ok:") || strings.Contains(counts, " ") {
			t.Errorf("a worker's connections: %s, want only ok", counts)
		}
	}
	if _, err := capture.Stop(); err != nil {
		t.Fatal(err)
	}
	if n, err := capture.Packets(); err != nil || n < 1000 {
		t.Fatalf("%d packets (%v)", n, err)
	}
	if found, err := capture.Contains([]byte("ping")); err != nil || found {
		t.Errorf("a connection went around the proxy: ping is on the wire (%v)", err)
	}
}

// reapply is what 'iptables-restore' of another program does to the host's rules:
// the whole table is taken out and put back in one transaction.
const reapply = `iptables-save -t nat | iptables-restore && iptables-save -t filter | iptables-restore`

// Without the controller everything goes on; what happened is told afterwards.
func TestControllerAway(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)
	w.apply(allow("client-echo", "client", "echo", ""))
	w.expect("before", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
	if err := w.fleet.ControllerDaemon().Kill(); err != nil {
		t.Fatal(err)
	}
	w.expect("without the controller", w.try(w.Client, "echo", "10.2.0.2:7001", "away"), "away")
	w.expect("denied all the same", w.try(w.Client, "echo", "10.2.0.2:7999", "away"), "reset")
	if err := w.fleet.StartController(w.ctx()); err != nil {
		t.Fatal(err)
	}
	// It remembers: a change of policy reaches the proxies again.
	w.apply(strings.Replace(allow("client-echo", "client", "echo", ""), "verb: allow", "verb: deny", 1))
	w.expect("denied now", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "reset")
	id := w.recorded(w.client, "away", func(l *flow.Line) bool { return l.Outcome == "allow" && l.BytesSent == 4 }).FlowID
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		out, err := w.fleet.Must(w.ctx(), "flows", "-o", "json")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(out, id) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("flow %s never reached the controller:\n%s", id, out)
		}
	}
}

// An operator's mistake changes nothing.
func TestBadPolicyKeepsTheGeneration(t *testing.T) {
	w := newBareWorld(t)
	before, err := w.fleet.Generation(w.ctx())
	if err != nil {
		t.Fatal(err)
	}
	file := w.fleet.Dir + "/bad.yaml"
	for _, tc := range []struct{ yaml, want string }{
		{"kind: Policy\nnamespace: /acme/prod\nname: x\nsubjct: {app: web}\nverb: allow\nobject: any\n", "subject"},
		{"kind: Policy\nnamespace: /acme/prod\nname: x\nsubject: {ap: web}\nverb: allow\nobject: any\n", "app"},
		{"kind: Policy\nnamespace: /acme/prod\nname: x\nsubject: {}\nverb: allow\nobject: any\n", "any"},
	} {
		if err := os.WriteFile(file, []byte(tc.yaml), 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := w.fleet.CLI(w.ctx(), "policy", "apply", "-f", file)
		if err != nil {
			t.Fatal(err)
		}
		if r.ExitCode == 0 || !strings.Contains(r.Stderr, "^") || !strings.Contains(r.Stderr, "bad.yaml:4") || !strings.Contains(r.Stderr, tc.want) {
			t.Errorf("exit code %d:\n%s", r.ExitCode, r.Stderr)
		}
	}
	if after, err := w.fleet.Generation(w.ctx()); err != nil || after != before {
		t.Errorf("generation %d, was %d (%v)", after, before, err)
	}
}

// A join token works once, and only at its own controller.
func TestJoinTokens(t *testing.T) {
	w := newWorld(t)
	third := w.net.Host("third")
	w.net.Link(w.Router, third, []string{"10.5.0.1/24"}, []string{"10.5.0.2/24"})
	third.DefaultRoute("10.5.0.1")
	used, err := w.client.JoinToken()
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct{ token, want string }{
		"used":      {used, "already used"},
		"wrong pin": {used[:strings.LastIndex(used, ".")+1] + strings.Repeat("ab", 32), "pins"},
		"nonsense":  {"symbolon1.x", "malformed join token"},
	} {
		t.Run(name, func(t *testing.T) {
			file := w.fleet.Dir + "/" + strings.ReplaceAll(name, " ", "-") + ".token"
			if err := os.WriteFile(file, []byte(tc.token), 0o600); err != nil {
				t.Fatal(err)
			}
			r, err := third.Run(w.ctx(), w.fleet.Bin+"/symbolon-proxy", "--controller-address", w.fleet.Address,
				"--controller-join-token-file", file, "--socket", fmt.Sprintf("%s/third.sock", w.fleet.Dir), "--flows", "")
			if err != nil {
				t.Fatal(err)
			}
			if r.ExitCode == 0 || !strings.Contains(r.Stderr, tc.want) {
				t.Errorf("exit code %d, %q; want %q in it", r.ExitCode, r.Stderr, tc.want)
			}
			if secret := strings.Split(used, ".")[2]; strings.Contains(r.Stderr+r.Stdout, secret) {
				t.Error("the token's secret was printed")
			}
		})
	}
}
