package integration

import (
	"strings"
	"testing"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/fleet"
)

// Connections of one workload to one destination follow each other on one tunnel;
// every one is judged and recorded by itself, and no other workload is ever on it.
func TestTunnelsAreReused(t *testing.T) {
	w := newWorld(t)
	echo := w.echo(w.Server)
	w.apply(profile("other.service", "other") + allow("client-echo", "client", "echo", "") + allow("other-echo", "other", "echo", ""))
	capture, err := w.Router.Capture("any", "tcp port 7001")
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		w.expect("client", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
	}
	w.expect("another workload", w.tryAs(w.Client, "other.service", "echo", "10.2.0.2:7001", "hello"), "hello")
	records := func(p *fleet.Proxy, workload string) (all, reused int, flows map[string]bool) {
		flows = make(map[string]bool)
		lines, err := p.Flows()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range lines {
			if l.Source.Workload == workload && l.Outcome == "allow" {
				all++
				flows[l.FlowID] = true
				if l.Reused {
					reused++
				}
				if l.BytesSent != 5 || l.BytesReceived != 5 || l.CipherSuite != "TLS_AES_256_GCM_SHA384" || l.Protection != "encrypted" {
					t.Errorf("record: %+v", l)
				}
			}
		}
		return all, reused, flows
	}
	w.recorded(w.server, "the last", func(l *flow.Line) bool { return l.Source.Workload == "other" })
	for _, p := range []*fleet.Proxy{w.client, w.server} {
		all, reused, flows := records(p, "client")
		if all != 10 || reused != 9 || len(flows) != 10 {
			t.Errorf("%s: %d records, %d reused, %d flows; want 10, 9, 10", p.Host.Name(), all, reused, len(flows))
		}
		if _, reused, _ := records(p, "other"); reused != 0 {
			t.Errorf("%s: another workload went on the first one's tunnel", p.Host.Name())
		}
	}
	// A policy that changes between two connections counts for the second.
	w.apply(strings.Replace(allow("client-echo", "client", "echo", ""), "verb: allow", "verb: deny", 1))
	w.expect("denied now", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "reset")
	w.apply(allow("client-echo", "client", "echo", ""))
	w.expect("allowed again", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
	// An application that is restarted is another socket, and the same workload.
	if err := echo.Kill(); err != nil {
		t.Fatal(err)
	}
	w.expect("nobody there", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "reset")
	w.echo(w.Server)
	w.expect("there again", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
	// Nor does the server's proxy have to be the same process.
	if err := w.server.Daemon().Kill(); err != nil {
		t.Fatal(err)
	}
	if err := w.server.Start(w.ctx()); err != nil {
		t.Fatal(err)
	}
	w.expect("over a tunnel that died while it waited", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
	if _, err := capture.Stop(); err != nil {
		t.Fatal(err)
	}
	if rows, err := capture.Tshark(w.ctx(), "tls.handshake.type == 1", "frame.number"); err != nil || len(rows) < 3 || len(rows) > 24 {
		t.Errorf("%d ClientHellos on two links for sixteen connections (%v)", len(rows), err)
	}
}
