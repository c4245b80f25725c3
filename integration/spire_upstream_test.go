package integration

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/symbolon/symbolon/internal/fleet"
	"github.com/symbolon/symbolon/internal/netlab"
	"github.com/symbolon/symbolon/internal/spirelab"
)

// upstreamWorld is a SPIRE with an agent on the controller's host, whose controller has its
// intermediates signed there. Nothing of the controller has been started.
type upstreamWorld struct {
	*spireWorld
	spire *spirelab.Server
	agent *spirelab.Agent
	ctl   *netlab.Host
}

func newUpstreamWorld(t *testing.T) *upstreamWorld {
	t.Helper()
	spirelab.Test(t)
	n := netlab.Test(t, "iptables", "ip6tables", "ipset", "curl", "openssl")
	w := &upstreamWorld{spireWorld: &spireWorld{world: &world{t: t, net: n, TwoHosts: n.TwoHosts()}}}
	t.Cleanup(func() {
		if t.Failed() {
			w.dump()
		}
	})
	link := func(name, prefix string) *netlab.Host {
		h := n.Host(name)
		n.Link(w.Router, h, []string{prefix + "1/24"}, []string{prefix + "2/24"})
		h.DefaultRoute(prefix + "1")
		return h
	}
	w.ctl = link("ctl", "10.9.0.")
	var err error
	w.spire, err = spirelab.StartServer(w.ctx(), link("prod", "10.8.1."), spirelab.ServerConfig{TrustDomain: "prod.example", Address: "10.8.1.2"})
	w.must(err)
	w.agent, err = w.spire.Agent(w.ctx(), w.ctl, spirelab.AgentConfig{})
	w.must(err)
	return w
}

// flags have the controller of a fleet signed for by SPIRE.
func (w *upstreamWorld) flags() []string {
	return []string{
		"--ca-upstream-spire-workload-api=unix://" + w.agent.Socket,
		fmt.Sprintf("--ca-upstream-spire-server=%s:%d", w.spire.Address, spirelab.ServerPort),
	}
}

// start starts the controller.
func (w *upstreamWorld) start() error {
	w.t.Helper()
	var err error
	w.fleet, err = fleet.NewWith(w.ctx(), w.ctl, "10.9.0.2", fleet.Options{TrustDomain: "prod.example", Flags: w.flags()})
	if err == nil {
		w.t.Cleanup(func() {
			if err := w.fleet.Forget(context.Background()); err != nil {
				w.t.Error(err)
			}
		})
	}
	return err
}

// trustedBy is what verifies by the roots in a PEM text, for any use.
func trustedBy(t *testing.T, text string) *x509.CertPool {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(text)) {
		t.Fatalf("no certificate in %q", text)
	}
	return pool
}

// A controller below a SPIRE server: its hosts and SPIRE's are of one trust domain, each
// believes the other's, and neither notices that SPIRE is away. SPIRE's roots change, and
// everybody follows.
func TestSPIREIsTheControllersUpstream(t *testing.T) {
	w := newUpstreamWorld(t)
	controller, err := filepath.EvalSymlinks(filepath.Join(w.bin(), "symbolon-controller"))
	w.must(err)

	// An entry that is not for this is refused, in words.
	entry := w.entry(w.agent, byPath("/ca/symbolon", controller))
	if err := w.start(); err == nil {
		t.Fatal("a controller without a downstream entry has started")
	} else if !strings.Contains(err.Error(), "-downstream") {
		t.Errorf("without a downstream entry: %v", err)
	}
	w.must(w.spire.Delete(w.ctx(), entry))
	w.entry(w.agent, spirelab.Entry{Path: "/ca/symbolon", Selectors: []string{"unix:path:" + controller}, Downstream: true})
	w.eventually("the controller has started", func() bool { return w.start() == nil })
	w.apply(basePolicy + profile("client.service", "client") + profile("echo.service", "echo") +
		profileID("echo", "spiffe://prod.example/acme/prod/spire-echo") + profileID("client", "spiffe://prod.example/acme/prod/spire-client") +
		allow("client-echo", "client", "echo", ""))

	// The client's SVIDs are the controller's, the server's are SPIRE's: one trust domain.
	w.servers, err = w.spire.Agent(w.ctx(), w.Server, spirelab.AgentConfig{Delegates: []string{delegate}})
	w.must(err)
	proxy, err := filepath.EvalSymlinks(filepath.Join(w.bin(), "symbolon-proxy"))
	w.must(err)
	w.entry(w.servers, spirelab.Entry{Path: delegate, Selectors: []string{"unix:uid:0", "unix:path:" + proxy}})
	w.entry(w.servers, byPath("/acme/prod/spire-echo", self(t)))
	w.client, err = w.fleet.Proxy(w.ctx(), w.Client, fleet.Enrolment{Namespace: "/acme/prod"})
	w.must(err)
	w.server = w.enrolAt(w.servers)
	w.echo(w.Server)
	w.eventually("the controller's workload reaches SPIRE's", func() bool {
		return w.try(w.Client, "echo", "10.2.0.2:7001", "hello") == "hello"
	})
	l := w.recorded(w.server, "allowed", to(7001, "allow"))
	for what, x := range map[string][2]string{
		"source":      {l.Source.SPIFFEID, "spiffe://prod.example/acme/prod/client"},
		"destination": {l.Destination.SPIFFEID, "spiffe://prod.example/acme/prod/spire-echo"},
		"whose word":  {l.Source.AttributesFrom, "extension"},
	} {
		if x[0] != x[1] {
			t.Errorf("%s: %q, want %q", what, x[0], x[1])
		}
	}

	t.Run("status", func(t *testing.T) {
		defer w.under(t)()
		// The agent may drop the entry of before after the controller has used its SVID, and give
		// the new one's a moment later.
		w.eventually("ca status says how it is with SPIRE", func() bool {
			out, err := w.fleet.Must(w.ctx(), "ca", "status")
			w.must(err)
			return !slices.ContainsFunc([]string{"SPIRE's, one of 1", "DOWNSTREAM", "✓ unix://" + w.agent.Socket, "✓ 10.8.1.2:8081, signed"},
				func(word string) bool { return !strings.Contains(out, word) })
		})
		if r, err := w.fleet.CLI(w.ctx(), "ca", "rotate", "--root"); err != nil || r.ExitCode == 0 || !strings.Contains(r.Stderr, "rotated there") {
			t.Errorf("the root is rotated here: %+v, %v", r, err)
		}
	})
	t.Run("a host by an entry of SPIRE's", func(t *testing.T) {
		defer w.under(t)()
		var status struct {
			HostID string `json:"host_id"`
		}
		w.must(w.client.Debug(w.ctx(), "status", &status))
		w.entry(w.agent, byPath("/symbolon/host/"+status.HostID, w.agent.Program()))
		var dir string
		w.eventually("SPIRE calls a program so", func() (ok bool) {
			var err error
			dir, err = w.agent.Write(w.ctx(), "forged")
			return err == nil
		})
		r, err := w.ctl.Run(w.ctx(), "curl", "-sS", "--cacert", w.fleet.CAFile(), "--cert", filepath.Join(dir, "svid.0.pem"), "--key", filepath.Join(dir, "svid.0.key"),
			"-H", "Content-Type: application/json", "-d", "{}", "https://127.0.0.1:7443/symbolon.v1.ProxyService/RenewHost")
		if err != nil || !strings.Contains(r.Stdout, "permission_denied") || !strings.Contains(r.Stdout, "none of this controller's") {
			t.Errorf("it is taken for the host: %+v, %v", r, err)
		}
	})
	t.Run("SPIRE away", func(t *testing.T) {
		defer w.under(t)()
		held := w.begin(w.Client, "", "hold", "10.2.0.2:7002")
		w.eventually("a connection is open", func() bool { return held.said() == "open" })
		w.must(w.spire.Daemon().Kill())
		if r, err := w.fleet.CLI(w.ctx(), "ca", "rotate", "--intermediate"); err != nil || r.ExitCode == 0 || !strings.Contains(r.Stderr, "the SPIRE server at 10.8.1.2") {
			t.Errorf("an intermediate of a server that is away: %+v, %v", r, err)
		}
		out, err := w.fleet.Must(w.ctx(), "ca", "status")
		w.must(err)
		if !strings.Contains(out, "✗ 10.8.1.2:8081, signed") || !strings.Contains(out, "failing since") {
			t.Errorf("ca status does not say that the server is away:\n%s", out)
		}
		// A restart goes on with what is valid, and issues.
		w.must(w.fleet.Reconfigure(w.ctx()))
		w.expect("while SPIRE is away", w.tryAs(w.Client, "other.service", "echo", "10.2.0.2:7001", "x"), "reset")
		w.expect("while SPIRE is away", w.try(w.Client, "echo", "10.2.0.2:7001", "still"), "still")
		w.must(w.spire.Start(w.ctx()))
		w.eventually("the intermediate is rotated", func() bool {
			r, err := w.fleet.CLI(w.ctx(), "ca", "rotate", "--intermediate")
			return err == nil && r.ExitCode == 0
		})
		w.expect("the open connection", held.said(), "open")
		w.expect("a new one", w.try(w.Client, "echo", "10.2.0.2:7001", "again"), "again")
	})
	t.Run("SPIRE's root changes", func(t *testing.T) {
		defer w.under(t)()
		held := w.begin(w.Client, "", "hold", "10.2.0.2:7002")
		w.eventually("a connection is open", func() bool { return held.said() == "open" })
		old := w.caPEM()
		out, err := w.spire.CLI(w.ctx(), "localauthority", "x509", "prepare", "-output", "json")
		w.must(err)
		prepared := authorityID(t, out)
		w.eventually("both roots are believed", func() bool { return strings.Count(w.caPEM(), "BEGIN CERTIFICATE") == 2 })
		_, err = w.spire.CLI(w.ctx(), "localauthority", "x509", "activate", "-authorityID", prepared)
		w.must(err)
		_, err = w.fleet.Must(w.ctx(), "ca", "rotate", "--intermediate")
		w.must(err)
		w.eventually("the controller serves by the new root", func() bool {
			return !w.serves(trustedBy(t, old)) && w.serves(trustedBy(t, w.caPEM()))
		})
		w.expect("the open connection", held.said(), "open")
		w.expect("a new one", w.try(w.Client, "echo", "10.2.0.2:7001", "newroot"), "newroot")
		out, err = w.fleet.Must(w.ctx(), "ca", "status")
		w.must(err)
		if !strings.Contains(out, "one of 2") {
			t.Errorf("ca status:\n%s", out)
		}
	})
	t.Run("not without SPIRE", func(t *testing.T) {
		defer w.under(t)()
		w.must(w.fleet.ControllerDaemon().Stop())
		r, err := w.ctl.Run(w.ctx(), controller, "--trust-domain", "prod.example", "--listen", "127.0.0.1:0", "--data-dir", filepath.Dir(w.fleet.CAFile()))
		if err != nil || r.ExitCode == 0 || !strings.Contains(r.Stderr, "ca.upstream_spire_server back") {
			t.Errorf("a controller that makes a root beside SPIRE's: %+v, %v", r, err)
		}
		w.must(w.fleet.StartController(w.ctx()))
	})
}

// bin is where the programs are, before there is a fleet.
func (w *upstreamWorld) bin() string {
	if dir := os.Getenv("SYMBOLON_BIN"); dir != "" {
		return dir
	}
	dir, err := filepath.Abs("../bin")
	w.must(err)
	return dir
}

func (w *upstreamWorld) caPEM() string {
	w.t.Helper()
	b, err := os.ReadFile(w.fleet.CAFile())
	w.must(err)
	return string(b)
}

// serves tells whether the controller's certificate verifies by some roots.
func (w *upstreamWorld) serves(roots *x509.CertPool) bool {
	w.t.Helper()
	r, err := w.ctl.Run(w.ctx(), "openssl", "s_client", "-connect", "127.0.0.1:7443", "-showcerts")
	w.must(err)
	var chain []*x509.Certificate
	for block, rest := pem.Decode([]byte(r.Stdout)); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		w.must(err)
		chain = append(chain, c)
	}
	if len(chain) == 0 {
		w.t.Fatalf("the controller shows no certificate:\n%s", r.Stderr)
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err = chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err == nil
}

// authorityID is that of a prepared authority, as spire-server says it.
func authorityID(t *testing.T, out string) string {
	t.Helper()
	_, rest, ok := strings.Cut(out, `"authority_id":"`)
	if !ok {
		_, rest, ok = strings.Cut(out, `"authority_id": "`)
	}
	id, _, end := strings.Cut(rest, `"`)
	if !ok || !end || id == "" {
		t.Fatalf("no authority in %s", out)
	}
	return id
}
