package integration

import (
	"strings"
	"testing"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/netlab"
	"github.com/symbolon/symbolon/internal/spirelab"
)

// Two SPIRE servers that trust each other, a host of each: unmodified programs reach each
// other where policy lets them, as those whom their SPIRE says they are, over TLS. Whoever's
// entry does not federate stays out, and so does whoever has no entry.
func TestSPIREFederated(t *testing.T) {
	w := newSpireWorld(t, []string{"east.example", "west.example"}, "nginx", "postgres", "initdb", "curl", "psql", "tshark")
	curl, psql := programFile(t, "curl"), programFile(t, "psql")
	w.entry(w.clients, byPath("/acme/prod/report", curl, "west.example"))
	w.entry(w.clients, byPath("/acme/prod/psql", psql, "west.example"))
	w.entry(w.clients, byPath("/acme/prod/alone", self(t)))
	w.entry(w.servers, byPath("/acme/prod/web", programFile(t, "nginx"), "east.example"))
	// No namespace of ours has this path: it is in its host's.
	w.entry(w.servers, spirelab.Entry{Path: "/ns/data/sa/db", Selectors: []string{"unix:user:postgres"}, FederatesWith: []string{"east.example"}})
	w.apply(profileID("report", "spiffe://east.example/acme/prod/report") +
		profileID("psql", "spiffe://east.example/acme/prod/psql") +
		profileID("alone", "spiffe://east.example/acme/prod/alone") +
		profileID("web", "spiffe://west.example/acme/prod/web") +
		profileID("db", "spiffe://west.example/ns/data/sa/db") +
		allow("report-web", "report", "web", "ports: [tcp/7080]") +
		allow("psql-db", "psql", "db", "") +
		allow("alone-web", "alone", "web", ""))
	w.enrolSPIRE()
	if _, err := w.Server.Nginx(w.ctx(), netlab.Nginx{Port: 7080, Body: secret}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Server.Postgres(w.ctx(), 5432); err != nil {
		t.Fatal(err)
	}
	capture, err := w.Router.Capture("any", "tcp port 7080 or tcp port 5432")
	w.must(err)
	get := []string{curl, "-sS", "--max-time", "20", "http://10.2.0.2:7080/"}
	query := []string{psql, "-At", "-h", "10.2.0.2", "-U", "postgres", "-c", "select '" + secret + "', 6*7"}
	w.eventually("SPIRE's entries are known to its agents", func() bool {
		return w.says(w.Client, get...) == secret && w.says(w.Client, query...) == secret+"|42"
	})
	for range 3 {
		w.expect("curl", w.says(w.Client, get...), secret)
		w.expect("psql", w.says(w.Client, query...), secret+"|42")
	}
	t.Run("records", func(t *testing.T) {
		l := w.recorded(w.server, "psql", to(5432, "allow"))
		for what, x := range map[string][2]string{
			"source":      {l.Source.SPIFFEID, "spiffe://east.example/acme/prod/psql"},
			"destination": {l.Destination.SPIFFEID, "spiffe://west.example/ns/data/sa/db"},
			"protection":  {l.Protection, "encrypted"},
			"suite":       {l.CipherSuite, "TLS_AES_256_GCM_SHA384"},
		} {
			if x[0] != x[1] {
				t.Errorf("%s: %q, want %q", what, x[0], x[1])
			}
		}
	})
	t.Run("denied by policy", func(t *testing.T) {
		w.expect("curl to PostgreSQL", w.says(w.Client, curl, "-sS", "--max-time", "10", "http://10.2.0.2:5432/"), "")
		if l := w.recorded(w.client, "denied", to(5432, "deny")); l.Source.SPIFFEID != "spiffe://east.example/acme/prod/report" {
			t.Errorf("record: %+v", l)
		}
	})
	t.Run("an entry that does not federate", func(t *testing.T) {
		w.eventually("the entry is known to the agent", func() bool {
			w.expect("to nginx", w.try(w.Client, "echo", "10.2.0.2:7080", "x"), "reset")
			return w.last(w.client, "spiffe://east.example/acme/prod/alone") != nil
		})
		if l := w.last(w.client, "spiffe://east.example/acme/prod/alone"); l.Outcome != "deny" || l.Reason != "wrong-trust-domain" {
			t.Errorf("record: %+v", l)
		}
	})
	t.Run("no entry", func(t *testing.T) {
		w.expect("another program", w.tryFile(w.Client, w.copyOfSelf(), "", "echo", "10.2.0.2:7080", "x"), "reset")
		w.recorded(w.client, "no entry", func(l *flow.Line) bool { return l.Outcome == "deny" && l.Reason == "no-identity" })
	})
	if _, err := capture.Stop(); err != nil {
		t.Fatal(err)
	}
	spireOnTheWire(t, w, capture)
}

// spireOnTheWire holds that all there was is TLS 1.3 with AES-256-GCM, and nobody's name.
func spireOnTheWire(t *testing.T, w *spireWorld, capture *netlab.Capture) {
	t.Helper()
	if n, err := capture.Packets(); err != nil || n < 20 {
		t.Fatalf("the capture has %d packets (%v): it proves nothing", n, err)
	}
	for _, clear := range []string{secret, "select", "HTTP/1.1", "GET /", "spiffe://", "west.example", "acme/prod"} {
		if found, err := capture.Contains([]byte(clear)); err != nil || found {
			t.Errorf("%q is on the wire in the clear (%v)", clear, err)
		}
	}
	rows, err := capture.Tshark(w.ctx(), "tls.handshake.type == 2", "tls.handshake.ciphersuite", "tls.handshake.extensions.supported_version")
	if err != nil || len(rows) == 0 {
		t.Fatalf("%d ServerHellos (%v)", len(rows), err)
	}
	for _, r := range rows {
		if r[0] != "0x1302" || r[1] != "0x0304" {
			t.Errorf("ServerHello with suite %s and version %s, want 0x1302 and 0x0304", r[0], r[1])
		}
	}
}

// Agents come and go; what they attested stays good for as long as its SVID is. What SPIRE
// takes back is taken back at once, on both sides.
func TestSPIREAgentAwayAndEntriesDeleted(t *testing.T) {
	w := newSpireWorld(t, []string{"prod.example"})
	client := w.entry(w.clients, byPath("/acme/prod/client", self(t)))
	server := w.entry(w.servers, byPath("/acme/prod/echo", self(t)))
	w.apply(profileID("client", "spiffe://prod.example/acme/prod/client") + profileID("echo", "spiffe://prod.example/acme/prod/echo") +
		allow("client-echo", "client", "echo", ""))
	w.enrolSPIRE()
	w.echo(w.Server)
	w.eventually("SPIRE's entries are known to its agents", func() bool {
		return w.try(w.Client, "echo", "10.2.0.2:7001", "hello") == "hello"
	})

	served := func() (n int) {
		lines, err := w.client.Flows()
		w.must(err)
		for _, l := range lines {
			if to(7001, "allow")(&l) {
				n++
			}
		}
		return n
	}
	before := served()
	held := w.begin(w.Client, "", "hold", "10.2.0.2:7002")
	again := w.begin(w.Client, "", "connect", "10.2.0.2:7001", "8")
	w.eventually("a connection is open", func() bool { return held.said() == "open" })
	const others = 8 // more than the records that may still be missing of those before
	w.eventually("the process that connects again and again is attested", func() bool { return served() > before+others })
	for _, a := range []*spirelab.Agent{w.clients, w.servers} {
		w.must(a.Daemon().Kill())
	}
	// Whom the agent has attested goes on; whom it has never seen has to wait for it.
	w.expect("while the agents are away, a new process", w.try(w.Client, "echo", "10.2.0.2:7001", "x"), "reset")
	for _, a := range []*spirelab.Agent{w.clients, w.servers} {
		w.must(a.Start(w.ctx()))
	}
	if said := again.wait(); !strings.HasPrefix(said, "map[ok:") || strings.Contains(said, " ") {
		t.Errorf("a process that connected again and again: %s, want ok and nothing else", said)
	}
	w.eventually("the agents are back", func() bool { return w.try(w.Client, "echo", "10.2.0.2:7001", "back") == "back" })
	w.expect("the open connection", held.said(), "open")

	w.must(w.clients.Server.Delete(w.ctx(), client))
	w.expect("the open connection of a deleted entry", held.wait(), "open\nreset")
	w.expect("a new one", w.try(w.Client, "echo", "10.2.0.2:7001", "x"), "reset")

	w.entry(w.clients, byPath("/acme/prod/client", self(t)))
	w.eventually("the entry is there again", func() bool { return w.try(w.Client, "echo", "10.2.0.2:7001", "again") == "again" })
	held = w.begin(w.Client, "", "hold", "10.2.0.2:7002")
	w.eventually("a connection is open", func() bool { return held.said() == "open" })
	w.must(w.servers.Server.Delete(w.ctx(), server))
	w.expect("the open connection to a deleted entry", held.wait(), "open\nreset")
}

// One policy, whoever gives the SVIDs: the controller, or SPIRE.
func TestSamePoliciesFromBothSources(t *testing.T) {
	policy := profileID("client", "spiffe://prod.example/acme/prod/client") + profileID("echo", "spiffe://prod.example/acme/prod/echo") +
		allow("client-echo", "client", "echo", "ports: [tcp/7001]\nwhere: {same: [env]}\nwith: [encrypt]") + `---
kind: Policy
namespace: /acme/prod
name: never-7002
subject: {app: client}
verb: deny
object: any
ports: [tcp/7002]
`
	story := func(t *testing.T, w *spireWorld) {
		other := w.copyOfSelf()
		w.apply(policy)
		w.echo(w.Server)
		w.eventually("the workloads are known", func() bool { return w.try(w.Client, "echo", "10.2.0.2:7001", "hello") == "hello" })
		if l := w.recorded(w.client, "allowed", to(7001, "allow")); l.ClientPolicy != "/acme/prod/client-echo" || l.Protection != "encrypted" {
			t.Errorf("record: %+v", l)
		}
		w.expect("a port that is denied", w.try(w.Client, "greet", "10.2.0.2:7002"), "reset")
		if l := w.recorded(w.client, "denied", to(7002, "deny")); l.ClientPolicy != "/acme/prod/never-7002" {
			t.Errorf("record: %+v", l)
		}
		w.expect("a port of which nothing is said", w.try(w.Client, "ask", "10.2.0.2:7006"), "reset")
		w.expect("another program", w.tryFile(w.Client, other, "other.service", "echo", "10.2.0.2:7001", "x"), "reset")
		w.expect("the other way", w.tryAs(w.Server, "echo.service", "echo", "10.1.0.2:7001", "x"), "reset")
	}
	t.Run("controller", func(t *testing.T) {
		w := &spireWorld{world: newWorld(t)}
		story(t, w)
	})
	t.Run("spire", func(t *testing.T) {
		w := newSpireWorld(t, []string{"prod.example"})
		w.entry(w.clients, byPath("/acme/prod/client", self(t)))
		w.entry(w.servers, byPath("/acme/prod/echo", self(t)))
		w.enrolSPIRE()
		story(t, w)
	})
}
