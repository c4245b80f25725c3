package integration

import (
	"fmt"
	"testing"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/fleet"
	"github.com/symbolon/symbolon/internal/spirelab"
)

// By SPIRE's Broker API instead of the Delegated Identity API: policy on SPIFFE IDs, nobody
// without an entry, and the end of an entry is the end of its connections.
func TestSPIREBroker(t *testing.T) {
	spirelab.Test(t)
	w := &spireWorld{world: newBareWorld(t)}
	w.startSPIREWith(spirelab.ServerConfig{}, spirelab.AgentConfig{Brokers: []string{delegate}}, "prod.example")
	client := w.entry(w.clients, byPath("/acme/prod/client", self(t)))
	w.entry(w.servers, byPath("/acme/prod/echo", self(t)))
	w.apply(profileID("echo", "spiffe://prod.example/acme/prod/echo") + `---
kind: Policy
namespace: /acme/prod
name: client-echo
subject: {spiffe.id: spiffe://prod.example/acme/prod/client}
verb: allow
object: {app: echo}
`)
	broker := func(a *spirelab.Agent) *fleet.Proxy {
		p, err := w.fleet.Proxy(w.ctx(), a.Host, fleet.Enrolment{
			Namespace: "/acme/prod",
			Config: fmt.Sprintf("identity: {source: spire, workload_api: %q, spire: {api: broker, broker_socket: %q}}\nredirect: {exclude_outbound: [%s/32]}",
				"unix://"+a.Socket, a.BrokerSocket, a.Server.Address),
		})
		w.must(err)
		return p
	}
	w.client, w.server = broker(w.clients), broker(w.servers)
	w.echo(w.Server)
	w.eventually("SPIRE's entries are known to its agents", func() bool {
		return w.try(w.Client, "echo", "10.2.0.2:7001", "hello") == "hello"
	})
	l := w.recorded(w.client, "allowed", to(7001, "allow"))
	for what, x := range map[string][2]string{
		"source":      {l.Source.SPIFFEID, "spiffe://prod.example/acme/prod/client"},
		"destination": {l.Destination.SPIFFEID, "spiffe://prod.example/acme/prod/echo"},
		"policy":      {l.ClientPolicy, "/acme/prod/client-echo"},
		"protection":  {l.Protection, "encrypted"},
	} {
		if x[0] != x[1] {
			t.Errorf("%s: %q, want %q", what, x[0], x[1])
		}
	}
	w.expect("a program without an entry", w.tryFile(w.Client, w.copyOfSelf(), "", "echo", "10.2.0.2:7001", "x"), "reset")
	w.recorded(w.client, "no entry", func(l *flow.Line) bool { return l.Outcome == "deny" && l.Reason == "no-identity" })

	held := w.begin(w.Client, "", "hold", "10.2.0.2:7002")
	w.eventually("a connection is open", func() bool { return held.said() == "open" })
	w.must(w.clients.Daemon().Kill())
	w.must(w.clients.Start(w.ctx()))
	w.eventually("the agent is back", func() bool { return w.try(w.Client, "echo", "10.2.0.2:7001", "back") == "back" })
	w.expect("the open connection", held.said(), "open")
	w.must(w.clients.Server.Delete(w.ctx(), client))
	w.expect("the open connection of a deleted entry", held.wait(), "open\nreset")
	w.expect("a new one", w.try(w.Client, "echo", "10.2.0.2:7001", "x"), "reset")
}
