package integration

import (
	"fmt"
	"testing"

	"github.com/symbolon/symbolon/internal/fleet"
	"github.com/symbolon/symbolon/internal/netlab"
)

// With tunnel.fast_open new tunnels begin in their SYN, and applications see of each other
// what they see without. Where the kernel does not let them, the status says why.
func TestFastOpen(t *testing.T) {
	w := newBareWorld(t)
	sysctl := func(value string) {
		for _, h := range []*netlab.Host{w.Client, w.Server} {
			h.Sysctl("net.ipv4.tcp_fastopen", value)
		}
	}
	sysctl("1") // as Linux has it
	w.enrolWith("tunnel: {fast_open: true, reuse: false}\n")
	w.echo(w.Server)
	w.apply(allow("client-echo", "client", "echo", ""))

	w.expect("without the server's kernel", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
	w.fastOpen("on, but net.ipv4.tcp_fastopen is 1, so that this host does not take data from one; set it to 3")
	sysctl("3")
	w.fastOpen("on")

	capture, err := w.Router.Capture("any", "tcp port 7001")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5 { // one brings the cookie; a client that was denied one asks in another way first
		w.expect(fmt.Sprintf("connection %d", i), w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
	}
	if _, err := capture.Stop(); err != nil {
		t.Fatal(err)
	}
	if rows, err := capture.Tshark(w.ctx(), "tcp.flags.syn == 1 && tcp.flags.ack == 0 && tcp.len > 0", "frame.number"); err != nil || len(rows) == 0 {
		t.Errorf("%d SYNs with data (%v)", len(rows), err)
	}
	tcpMeaning(w, "10.2.0.2", "encrypted")
}

// fastOpen compares what both proxies' status says.
func (w *world) fastOpen(want string) {
	w.t.Helper()
	for _, p := range []*fleet.Proxy{w.client, w.server} {
		var s struct {
			FastOpen string `json:"fast_open"`
		}
		if err := p.Debug(w.ctx(), "status", &s); err != nil {
			w.t.Fatal(err)
		}
		w.expect("status of "+p.Host.Name(), s.FastOpen, want)
	}
}
