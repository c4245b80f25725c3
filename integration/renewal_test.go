package integration

import (
	"testing"
	"time"
)

// An open connection lives on when the certificates that it began with have ended: SPIRE
// renews them, and each proxy shows the other the newer one inside the tunnel. So it is
// through a balancer, too, where no other connection would reach the same proxy.
func TestConnectionsOutliveTheirCertificates(t *testing.T) {
	const ttl = 40 // seconds; SPIRE renews at half of it, and its agents ask every 5
	w := newSpireWorld(t, []string{"prod.example", "shop.example"})
	client, server := byPath("/acme/prod/client", self(t), "shop.example"), byPath("/acme/prod/echo", self(t), "prod.example")
	client.SVIDTTL, server.SVIDTTL = ttl, ttl
	w.entry(w.clients, client)
	w.entry(w.servers, server)
	w.apply(profileID("client", "spiffe://prod.example/acme/prod/client") + profileID("echo", "spiffe://shop.example/acme/prod/echo") +
		allow("client-echo", "client", "echo", "ports: [tcp/7001, tcp/7002]") + `---
kind: Service
namespace: /acme/prod
name: echo
addresses: {cidrs: [10.2.0.2/32], ports: [tcp/7002]}
`)
	w.enrolSPIRE()
	w.echo(w.Server)
	w.eventually("SPIRE's entries are known to its agents", func() bool {
		return w.try(w.Client, "echo", "10.2.0.2:7001", "hello") == "hello"
	})
	held := w.begin(w.Client, "", "hold", "10.2.0.2:7002")
	w.eventually("a connection is open", func() bool { return held.said() == "open" })
	began := time.Now()
	for time.Since(began) < (ttl+8)*time.Second {
		if said := held.said(); said != "open" {
			t.Fatalf("%v after its beginning: %s", time.Since(began), said)
		}
		time.Sleep(time.Second)
	}
	if n := w.metric(w.client, `symbolon_certificate_renewals_total{result="renewed"}`); n < 1 {
		t.Errorf("%v certificates renewed in connections of the client's side", n)
	}
	if n := w.metric(w.server, `symbolon_certificate_renewals_total{result="renewed"}`); n < 1 {
		t.Errorf("%v certificates renewed in connections of the server's side", n)
	}
}
