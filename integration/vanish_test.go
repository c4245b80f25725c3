package integration

import (
	"strings"
	"testing"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/netlab"
)

// What happens when the other side is gone and does not say so.
func TestVanishedPeers(t *testing.T) {
	w := newWorldWith(t, "tunnel: {peer_timeout: 1s}\ndrain_timeout: 100ms", "ss")
	w.apply(allow("client-echo", "client", "echo", ""))

	t.Run("keepalives on every socket", func(t *testing.T) {
		said := make(chan string, 1)
		go func() { said <- w.try(w.Client, "hold", "10.2.0.2:7002") }()
		w.waitLive(w.client, portGreet)
		w.waitLive(w.server, portGreet)
		for _, h := range []*netlab.Host{w.Client, w.Server} {
			w.eventually("nothing is on its way", func() bool {
				out, err := h.Output(w.ctx(), "ss", "-Htnop", "state", "established")
				if err != nil {
					t.Fatal(err)
				}
				sockets, kept := 0, 0
				for line := range strings.Lines(out) {
					if strings.Contains(line, `"symbolon-proxy"`) && !strings.Contains(line, ":7443") {
						sockets++
						if strings.Contains(line, "timer:(keepalive,") {
							kept++
						}
					}
				}
				return sockets == 2 && kept == 2
			})
		}

		// The server's proxy is killed: its end of the tunnel closes, as if all had been
		// said. The application must not think so.
		if err := w.server.Daemon().Kill(); err != nil {
			t.Fatal(err)
		}
		w.expect("the stream was cut short", <-said, "open\nreset")
		l := w.recorded(w.client, "truncation", func(l *flow.Line) bool { return strings.HasSuffix(l.Destination.Address, ":7002") })
		if l.Reason != "truncated" && l.Reason != "reset" {
			t.Errorf("record: %+v", l)
		}
		if err := w.server.Start(w.ctx()); err != nil {
			t.Fatal(err)
		}
		if err := w.fleet.Settle(w.ctx()); err != nil {
			t.Fatal(err)
		}
	})

	for _, protection := range []string{"encrypted", "authenticated"} {
		w.apply(strings.Replace(basePolicy, "protection: encrypted", "protection: "+protection, 1))
		w.families(t, func(t *testing.T, addr string) {
			said := make(chan string, 1)
			go func() { said <- w.try(w.Client, "chat", addr+":7002") }()
			w.waitLive(w.client, portGreet)
			heal := w.Router.Partition()
			if got := <-said; got != "reset" && got != "broken pipe" {
				t.Errorf("the client whose server is gone: %q", got)
			}
			heal()
			l := w.recorded(w.client, "vanished", func(l *flow.Line) bool { return l.Destination.Address == addr+":7002" && l.Protection == protection })
			if l.Reason != "timed-out" {
				t.Errorf("record: %+v", l)
			}
		})
	}
}
