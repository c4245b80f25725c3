package integration

import (
	"strings"
	"testing"
	"time"

	"github.com/symbolon/symbolon/internal/fleet"
)

// Open connections live on when the certificates that they began with have ended: SPIRE
// renews them, and each proxy shows the other the newer one. Inside the tunnel where it
// encrypts, also through a balancer, behind which no other connection would reach the
// same proxy; by another tunnel where the bytes have left TLS.
func TestConnectionsOutliveTheirCertificates(t *testing.T) {
	const ttl = 40 // seconds; SPIRE renews at half of it, and its agents ask every 5
	w := newSpireWorld(t, []string{"prod.example", "shop.example"})
	other := w.copyOfSelf()
	inClear := byPath("/acme/prod/clear", self(t), "shop.example")
	secret := byPath("/acme/prod/secret", other, "shop.example")
	echo := byPath("/acme/prod/echo", self(t), "prod.example")
	inClear.SVIDTTL, secret.SVIDTTL, echo.SVIDTTL = ttl, ttl, ttl
	w.entry(w.clients, inClear)
	w.entry(w.clients, secret)
	w.entry(w.servers, echo)
	w.apply(strings.Replace(basePolicy, "protection: encrypted", "protection: authenticated", 1) + profileID("clear", "spiffe://prod.example/acme/prod/clear") + profileID("secret", "spiffe://prod.example/acme/prod/secret") +
		profileID("echo", "spiffe://shop.example/acme/prod/echo") +
		allow("in-the-clear", "clear", "echo", "") + allow("in-secret", "secret", "echo", "with: [encrypt]") + `---
kind: Service
namespace: /acme/prod
name: echo
addresses: {cidrs: [10.2.0.2/32], ports: [tcp/7002]}
`)
	w.enrolSPIRE()
	w.echo(w.Server)
	w.eventually("SPIRE's entries are known to its agents", func() bool {
		return w.try(w.Client, "echo", "10.2.0.2:7001", "hello") == "hello" &&
			w.tryFile(w.Client, other, "client.service", "echo", "10.2.0.2:7001", "hello") == "hello"
	})
	held := map[string]*running{
		"authenticated": w.begin(w.Client, "", "hold", "10.2.0.2:7002"),
		"encrypted":     w.beginFile(w.Client, other, "", "hold", "10.2.0.2:7002"),
	}
	for protection, h := range held {
		w.eventually(protection+" connection is open", func() bool { return h.said() == "open" })
	}
	began := time.Now()
	for time.Since(began) < (ttl+8)*time.Second {
		for protection, h := range held {
			if said := h.said(); said != "open" {
				t.Fatalf("the %s connection, %v after its beginning: %s", protection, time.Since(began), said)
			}
		}
		time.Sleep(time.Second)
	}
	for name, p := range map[string]*fleet.Proxy{"client": w.client, "server": w.server} {
		if n := w.metric(p, `symbolon_certificate_renewals_total{result="renewed"}`); n < 2 {
			t.Errorf("%v certificates renewed in connections of the %s's side", n, name)
		}
	}
}
