package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/symbolon/symbolon/internal/fleet"
	"github.com/symbolon/symbolon/internal/spirelab"
)

// Two SPIREs, and all that a host can have of one: the client's host enrols by its SVID
// (x509pop), its processes are attested one by one; the server's host has one SVID for all,
// by the Workload API. Both trust domains are TrustDomains of the controller's, whose word
// on their workloads policy goes by.
func TestSPIREHostsAndTrustDomains(t *testing.T) {
	w := newSpireWorld(t, []string{"east.example", "west.example"})
	east, west := w.clients.Server, w.servers.Server

	// The client's host has a certificate of SPIRE's, and no join token.
	hostID := w.joinBySVID(w.clients, "/hosts/client")
	// The proxy of the server's has two entries: the rule says which is for its workloads.
	proxy, err := filepath.EvalSymlinks(filepath.Join(w.fleet.Bin, "symbolon-proxy"))
	w.must(err)
	w.entry(w.servers, byPath("/acme/prod/west-host", proxy, "east.example"))
	w.server, err = w.fleet.Proxy(w.ctx(), w.Server, fleet.Enrolment{
		Namespace: "/acme/prod", Labels: map[string]string{"role": "db"},
		Config: fmt.Sprintf("identity: {source: workload-api, workload_api: %q, spire: {path_prefix: /acme/prod/}}\nredirect: {exclude_outbound: [%s/32]}",
			"unix://"+w.servers.Socket, west.Address),
	})
	w.must(err)
	w.entry(w.clients, byPath("/acme/prod/client", self(t), "west.example"))
	w.echo(w.Server)

	t.Run("enrolled", func(t *testing.T) {
		defer w.under(t)()
		out, err := w.fleet.Must(w.ctx(), "host", "list", "-o", "json")
		w.must(err)
		for _, word := range []string{hostID, `"host.spiffe_id"`, `"host.role"`, `"web"`} {
			if !strings.Contains(out, word) {
				t.Errorf("no %s among the hosts:\n%s", word, out)
			}
		}
	})
	// To its own host each is what the controller says of its unit, and of a trust domain that
	// the controller does not know it says nothing. To the other host, of another trust domain,
	// each is what its ID is: tokens stay at home.
	w.apply(profileID("echo", "spiffe://west.example/acme/prod/west-host") + profileID("caller", "spiffe://east.example/acme/prod/client") +
		"---\nkind: Policy\nnamespace: /acme/prod\nname: out\nsubject: {tier: front}\nverb: allow\nobject: {app: echo}\nports: [tcp/7001-7002]\n" +
		"---\nkind: Policy\nnamespace: /acme/prod\nname: in\nsubject: {app: caller}\nverb: allow\nobject: {tier: back}\nports: [tcp/7001-7002]\n" +
		"---\nkind: Profile\nnamespace: /acme/prod\nname: front\nmatch: {proc.unit: client.service, host.role: web}\nlabels: {tier: front}\n" +
		"---\nkind: Profile\nnamespace: /acme/prod\nname: back\nmatch: {proc.unit: echo.service, host.role: db}\nlabels: {tier: back}\n")
	w.eventually("of whom the controller says nothing, no policy lets anything", func() bool {
		w.expect("without TrustDomains", w.try(w.Client, "echo", "10.2.0.2:7001", "x"), "reset")
		l := w.last(w.client, "spiffe://east.example/acme/prod/client")
		return l != nil && l.Outcome == "deny" && l.Reason == "default" && len(l.Source.Attributes["tier"]) == 0
	})
	for _, s := range []*spirelab.Server{east, west} {
		bundle, err := s.BundleJSON(w.ctx())
		w.must(err)
		url, id := s.BundleEndpoint()
		w.trusts(w.fleet, s.TrustDomain, url, id, bundle)
	}
	w.eventually("the controller vouches for both", func() bool {
		return w.try(w.Client, "echo", "10.2.0.2:7001", "hello") == "hello"
	})
	for p, want := range map[*fleet.Proxy][4]string{
		w.client: {"front", "", "token policy", "/acme/prod/out"},
		w.server: {"", "back", "policy token", "/acme/prod/in"},
	} {
		l := w.recorded(p, "allowed", to(7001, "allow"))
		for what, x := range map[string][2]string{
			"source":      {l.Source.SPIFFEID, "spiffe://east.example/acme/prod/client"},
			"destination": {l.Destination.SPIFFEID, "spiffe://west.example/acme/prod/west-host"},
			"its tier":    {strings.Join(l.Source.Attributes["tier"], " "), want[0]},
			"the other's": {strings.Join(l.Destination.Attributes["tier"], " "), want[1]},
			"whose word":  {l.Source.AttributesFrom + " " + l.Destination.AttributesFrom, want[2]},
			"policy":      {l.ClientPolicy + l.ServerPolicy, want[3]},
		} {
			if x[0] != x[1] {
				t.Errorf("%s, %s: %q, want %q", p.Host.Name(), what, x[0], x[1])
			}
		}
	}
	w.expect("a port of which nothing is said", w.try(w.Client, "ask", "10.2.0.2:7006"), "reset")

	t.Run("one identity for the whole host", func(t *testing.T) {
		defer w.under(t)()
		var all []struct {
			SPIFFEID string `json:"spiffe_id"`
		}
		w.must(w.server.Debug(w.ctx(), "identities", &all))
		if len(all) == 0 || slices.ContainsFunc(all, func(x struct {
			SPIFFEID string `json:"spiffe_id"`
		}) bool {
			return x.SPIFFEID != "spiffe://west.example/acme/prod/west-host"
		}) {
			t.Errorf("identities: %+v", all)
		}
	})
	t.Run("agent away", func(t *testing.T) {
		defer w.under(t)()
		held := w.begin(w.Client, "", "hold", "10.2.0.2:7002")
		w.eventually("a connection is open", func() bool { return held.said() == "open" })
		w.must(w.servers.Daemon().Kill())
		var status struct{ Identity struct{ Error, Since string } }
		w.eventually("the proxy has noticed", func() bool {
			w.must(w.server.Debug(w.ctx(), "status", &status))
			return status.Identity.Error != "" && status.Identity.Since != ""
		})
		w.expect("without the agent", w.try(w.Client, "echo", "10.2.0.2:7001", "still"), "still")
		w.must(w.servers.Start(w.ctx()))
		w.eventually("it is back", func() bool {
			status.Identity.Error = ""
			w.must(w.server.Debug(w.ctx(), "status", &status))
			return status.Identity.Error == ""
		})
		w.expect("the open connection", held.said(), "open")
	})
	t.Run("all of a trust domain revoked", func(t *testing.T) {
		defer w.under(t)()
		held := w.begin(w.Client, "", "hold", "10.2.0.2:7002")
		w.eventually("a connection is open", func() bool { return held.said() == "open" })
		_, err := w.fleet.Must(w.ctx(), "ca", "revoke", "--label", "spiffe.trust_domain=west.example", "--reason", "test")
		w.must(err)
		w.expect("the open connection", held.wait(), "open\nreset")
		w.expect("a new one", w.try(w.Client, "echo", "10.2.0.2:7001", "x"), "reset")
		// The server's host has a certificate of the controller's only, by which this client can
		// be told nothing; on record is why, all the same.
		if l := w.recorded(w.server, "refused", to(7001, "deny")); l.Reason != "revoked" {
			t.Errorf("record: %+v", l)
		}
	})
}

// under has failures counted as t's until the function that it returns is called.
func (w *spireWorld) under(t *testing.T) (back func()) {
	outer := w.t
	w.t = t
	return func() { w.t = outer }
}

// joinBySVID starts the client's proxy on a host that enrols by an SVID of its SPIRE, and
// returns its SPIFFE ID. The host is what the entry of enrolment.x509pop says.
func (w *spireWorld) joinBySVID(a *spirelab.Agent, path string) string {
	w.t.Helper()
	id := a.Server.ID(path)
	w.entry(a, byPath(path, a.Program()))
	var dir string
	w.eventually("the host has its SVID", func() (ok bool) {
		var err error
		dir, err = a.Write(w.ctx(), "join")
		return err == nil
	})
	pem, err := a.Server.BundlePEM(w.ctx())
	w.must(err)
	roots := filepath.Join(w.net.Dir(), "spire-roots.pem")
	w.must(os.WriteFile(roots, []byte(pem), 0o600))
	w.must(w.fleet.Reconfigure(w.ctx(), fmt.Sprintf("--enrolment-x509pop=[{ca_file: %q, spiffe_ids: [%q], namespace: /acme/prod, labels: {role: web}}]",
		roots, a.Server.ID("/hosts/*"))))
	w.client, err = w.fleet.Proxy(w.ctx(), a.Host, fleet.Enrolment{
		Join: fmt.Sprintf("join: x509pop, cert_file: %q, key_file: %q, ca_file: %q",
			filepath.Join(dir, "svid.0.pem"), filepath.Join(dir, "svid.0.key"), w.fleet.CAFile()),
		Config: fmt.Sprintf("identity: {source: spire, spire: {admin_socket: %q}}\nredirect: {exclude_outbound: [%s/32]}", a.AdminSocket, a.Server.Address),
	})
	w.must(err)
	return id
}
