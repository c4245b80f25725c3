package integration

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/spirelab"
)

// composerPlugin is the part of a SPIRE server's configuration that loads our
// CredentialComposer, which asks this world's controller.
func (w *spireWorld) composerPlugin() string {
	w.t.Helper()
	program := filepath.Join(w.fleet.Bin, "symbolon-spire-composer")
	b, err := os.ReadFile(program)
	if err != nil {
		w.t.Fatalf("the composer is not built: run 'make composer' (%v)", err)
	}
	data := filepath.Join(w.fleet.Dir, "controller")
	return fmt.Sprintf(`CredentialComposer "symbolon" {
	plugin_cmd = %q
	plugin_checksum = "%x"
	plugin_data {
		controller = %q
		trust_domain = "acme.example"
		ca_file = %q
		token_file = %q
		snapshot_file = %q
		refresh = "1s"
	}
}
`, program, sha256.Sum256(b), w.fleet.Address, filepath.Join(data, "ca.pem"), filepath.Join(data, "claims.token"), filepath.Join(w.net.Dir(), "claims"))
}

// With the composer, SPIRE's own certificates say what a workload is, and policy decides
// by that; whose certificate says nothing, and of whom nothing else is known, is refused
// for that reason.
func TestSPIREComposer(t *testing.T) {
	spirelab.Test(t)
	w := &spireWorld{world: newBareWorld(t)}
	const from, to = "spiffe://prod.example/acme/prod/client", "spiffe://prod.example/acme/prod/echo"
	w.apply(profileID("client", from) + profileID("echo", to) + allow("client-echo", "client", "echo", "where: {same: [env]}"))
	w.startSPIRE(spirelab.ServerConfig{Plugins: w.composerPlugin()}, "prod.example")
	// SPIRE signs what the composer knows in that moment.
	w.eventually("the composer has the claims", func() bool {
		_, err := os.Stat(filepath.Join(w.net.Dir(), "claims"))
		return err == nil
	})
	w.entry(w.clients, byPath("/acme/prod/client", self(t)))
	server := w.entry(w.servers, byPath("/acme/prod/echo", self(t)))
	w.enrolSPIRE()
	w.echo(w.Server)
	w.eventually("SPIRE's entries are known to its agents", func() bool {
		return w.try(w.Client, "echo", "10.2.0.2:7001", "hello") == "hello"
	})
	l := w.recorded(w.server, "allowed", func(l *flow.Line) bool { return l.Outcome == "allow" })
	for side, e := range map[string]flow.Endpoint{"client": l.Source, "echo": l.Destination} {
		if e.AttributesFrom != "extension" || !slices.Equal(e.Attributes["app"], []string{side}) || !slices.Equal(e.Attributes["env"], []string{"prod"}) {
			t.Errorf("%s: %v by %q", side, e.Attributes, e.AttributesFrom)
		}
	}

	w.must(w.servers.Server.Delete(w.ctx(), server))
	w.entry(w.servers, byPath("/acme/prod/nameless", self(t)))
	w.eventually("the server is somebody of whom nothing is known", func() bool {
		w.try(w.Client, "echo", "10.2.0.2:7001", "x")
		lines, err := w.client.Flows()
		w.must(err)
		return slices.ContainsFunc(lines, func(l flow.Line) bool {
			return strings.HasSuffix(l.Destination.SPIFFEID, "/nameless") && l.Outcome == "deny" && l.Reason == "no-claims"
		})
	})
}

// SVIDs of SPIRE are renewed at half of their life, and nobody notices: neither who has a
// connection open nor who makes new ones, which use the new SVID.
func TestSPIRERotation(t *testing.T) {
	spirelab.Test(t)
	w := &spireWorld{world: newBareWorld(t)}
	const id = "spiffe://prod.example/acme/prod/client"
	w.apply(profileID("client", id) + profileID("echo", "spiffe://prod.example/acme/prod/echo") + allow("client-echo", "client", "echo", ""))
	w.startSPIRE(spirelab.ServerConfig{SVIDTTL: "20s"}, "prod.example")
	w.entry(w.clients, byPath("/acme/prod/client", self(t)))
	w.entry(w.servers, byPath("/acme/prod/echo", self(t)))
	w.enrolSPIRE()
	w.echo(w.Server)
	w.eventually("SPIRE's entries are known to its agents", func() bool {
		return w.try(w.Client, "echo", "10.2.0.2:7001", "hello") == "hello"
	})
	held := w.begin(w.Client, "", "hold", "10.2.0.2:7002")
	again := w.begin(w.Client, "", "connect", "10.2.0.2:7001", "12")
	w.eventually("a connection is open", func() bool { return held.said() == "open" })
	first := w.ends(id)
	w.eventually("the SVIDs in use are others", func() bool {
		return !slices.ContainsFunc(w.ends(id), func(end string) bool { return slices.Contains(first, end) })
	})
	w.expect("the open connection", held.said(), "open")
	if said := again.wait(); !strings.HasPrefix(said, "map[ok:") || strings.Contains(said, " ") {
		t.Errorf("a process that connected again and again: %s, want ok and nothing else", said)
	}
}

// ends are the ends of the SVIDs of an ID that the client's proxy has in use.
func (w *spireWorld) ends(id string) []string {
	w.t.Helper()
	var all []struct {
		SPIFFEID string `json:"spiffe_id"`
		NotAfter string `json:"not_after"`
	}
	w.must(w.client.Debug(w.ctx(), "identities", &all))
	var out []string
	for _, x := range all {
		if x.SPIFFEID == id {
			out = append(out, x.NotAfter)
		}
	}
	if len(out) == 0 || out[0] == "" {
		w.t.Fatalf("no SVID of %s in use: %+v", id, all)
	}
	return out
}
