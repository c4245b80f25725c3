package integration

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/fleet"
	"github.com/symbolon/symbolon/internal/netlab"
	"github.com/symbolon/symbolon/internal/spirelab"
)

// spireWorld is a world whose workloads have their SVIDs from a real SPIRE: the client's
// host from the first trust domain, the server's from the last.
//
//	client 10.1.0.2 -- router -- 10.2.0.2 server
//	                   |    |
//	 controller 10.9.0.2    10.8.N.2 a SPIRE server for each trust domain
type spireWorld struct {
	*world
	clients, servers *spirelab.Agent
}

// delegate is the path of the proxies' SPIFFE ID.
const delegate = "/symbolon/proxy"

// newSpireWorld has SPIRE running, the proxies' entries made, and the proxies not started.
func newSpireWorld(t *testing.T, domains []string, tools ...string) *spireWorld {
	t.Helper()
	spirelab.Test(t)
	w := &spireWorld{world: newBareWorld(t, tools...)}
	w.startSPIRE(spirelab.ServerConfig{}, domains...)
	return w
}

// startSPIRE starts a server for each domain, configured alike, and both hosts' agents.
func (w *spireWorld) startSPIRE(config spirelab.ServerConfig, domains ...string) {
	w.t.Helper()
	w.startSPIREWith(config, spirelab.AgentConfig{Delegates: []string{delegate}}, domains...)
}

func (w *spireWorld) startSPIREWith(config spirelab.ServerConfig, agents spirelab.AgentConfig, domains ...string) {
	w.t.Helper()
	var all []*spirelab.Server
	for i, domain := range domains {
		h := w.net.Host(strings.TrimSuffix(domain, ".example"))
		prefix := fmt.Sprintf("10.8.%d.", i+1)
		w.net.Link(w.Router, h, []string{prefix + "1/24"}, []string{prefix + "2/24"})
		h.DefaultRoute(prefix + "1")
		config.TrustDomain, config.Address = domain, prefix+"2"
		s, err := spirelab.StartServer(w.ctx(), h, config)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, other := range all {
			w.must(other.Federate(w.ctx(), s))
			w.must(s.Federate(w.ctx(), other))
		}
		all = append(all, s)
	}
	w.clients = w.agent(all[0], w.Client, agents)
	w.servers = w.agent(all[len(all)-1], w.Server, agents)
}

func (w *spireWorld) agent(s *spirelab.Server, h *netlab.Host, c spirelab.AgentConfig) *spirelab.Agent {
	w.t.Helper()
	a, err := s.Agent(w.ctx(), h, c)
	if err != nil {
		w.t.Fatal(err)
	}
	proxy, err := filepath.EvalSymlinks(filepath.Join(w.fleet.Bin, "symbolon-proxy"))
	if err != nil {
		w.t.Fatal(err)
	}
	w.entry(a, spirelab.Entry{Path: delegate, Selectors: []string{"unix:uid:0", "unix:path:" + proxy}})
	return a
}

// enrolSPIRE starts both hosts' proxies.
func (w *spireWorld) enrolSPIRE() {
	w.t.Helper()
	w.client = w.enrolAt(w.clients)
	w.server = w.enrolAt(w.servers)
}

func (w *spireWorld) enrolAt(a *spirelab.Agent) *fleet.Proxy {
	w.t.Helper()
	p, err := w.fleet.Proxy(w.ctx(), a.Host, fleet.Enrolment{
		Namespace: "/acme/prod",
		Config: fmt.Sprintf("identity: {source: spire, spire: {admin_socket: %q}}\nredirect: {exclude_outbound: [%s/32]}",
			a.AdminSocket, a.Server.Address),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

func (w *spireWorld) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// entry makes an entry and returns its number.
func (w *spireWorld) entry(a *spirelab.Agent, e spirelab.Entry) string {
	w.t.Helper()
	id, err := a.Entry(w.ctx(), e)
	w.must(err)
	return id
}

// byPath is an entry for a program.
func byPath(id, program string, federatesWith ...string) spirelab.Entry {
	return spirelab.Entry{Path: id, Selectors: []string{"unix:path:" + program}, FederatesWith: federatesWith}
}

// programFile is the executable behind a program's name, which SPIRE sees: Debian's
// psql is a script that runs another.
func programFile(t *testing.T, name string) string {
	t.Helper()
	if found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/" + name); len(found) > 0 {
		return found[len(found)-1]
	}
	path, err := netlab.Tool(name)
	if err != nil {
		t.Fatal(err)
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		t.Fatal(err)
	}
	return path
}

// profileID gives the labels of profile to SPIFFE IDs.
func profileID(app string, ids ...string) string {
	return fmt.Sprintf("---\nkind: Profile\nnamespace: /acme/prod\nname: %[1]s-by-id\nmatch: {spiffe.id: [%[2]s]}\nlabels: {app: %[1]s, env: prod}\n", app, strings.Join(ids, ", "))
}

// says runs a command on h to its end and returns what it prints; an error of its own is
// printed nowhere, and says nothing.
func (w *spireWorld) says(h *netlab.Host, command ...string) string {
	w.t.Helper()
	r, err := h.Run(w.ctx(), command[0], command[1:]...)
	if err != nil {
		w.t.Fatal(err)
	}
	return strings.TrimSpace(r.Stdout)
}

// copyOfSelf is this binary in another file: another program, to SPIRE and to us.
func (w *spireWorld) copyOfSelf() string {
	w.t.Helper()
	from, err := os.Open(self(w.t))
	w.must(err)
	defer from.Close()
	path := filepath.Join(w.net.Dir(), "other-program")
	to, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	w.must(err)
	_, err = io.Copy(to, from)
	w.must(err)
	w.must(to.Close())
	return path
}

// tryFile is tryAs with a copy of this binary.
func (w *spireWorld) tryFile(h *netlab.Host, file, unit string, args ...string) string {
	w.t.Helper()
	return w.tryFileAs(h, "", file, unit, args...)
}

func (w *spireWorld) tryFileAs(h *netlab.Host, user, file, unit string, args ...string) string {
	w.t.Helper()
	c := h.Command(w.ctx(), file)
	c.Env = append(os.Environ(), programEnv+"="+strings.Join(args, " "), "GORACE=atexit_sleep_ms=0")
	c.Unit, c.User = unit, user
	r, err := c.Result()
	if err != nil || r.ExitCode != 0 {
		w.t.Fatalf("%v: %v, exit code %d\n%s%s", args, err, r.ExitCode, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout)
}

// last is p's last record of a connection that a SPIFFE ID began; nil: there is none.
func (w *spireWorld) last(p *fleet.Proxy, id string) *flow.Line {
	w.t.Helper()
	lines, err := p.Flows()
	w.must(err)
	for _, l := range slices.Backward(lines) {
		if l.Source.SPIFFEID == id {
			return &l
		}
	}
	return nil
}

// running is a client program under way.
type running struct {
	w      *spireWorld
	cmd    *netlab.Cmd
	out    *os.File
	cancel context.CancelFunc
}

// begin starts a client program of program_test.go in client.service on h.
func (w *spireWorld) begin(h *netlab.Host, user string, args ...string) *running {
	w.t.Helper()
	return w.beginFile(h, self(w.t), user, args...)
}

// beginFile is begin with a copy of this binary.
func (w *spireWorld) beginFile(h *netlab.Host, file, user string, args ...string) *running {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.ctx())
	r := &running{w: w, cmd: h.Command(ctx, file), cancel: cancel}
	r.cmd.Env = append(os.Environ(), programEnv+"="+strings.Join(args, " "), "GORACE=atexit_sleep_ms=0")
	r.cmd.Unit, r.cmd.User = "client.service", user
	out, err := os.CreateTemp(w.t.TempDir(), "out")
	w.must(err)
	r.out = out
	r.cmd.Stdout, r.cmd.Stderr = out, out
	w.must(r.cmd.Start())
	w.t.Cleanup(func() { cancel(); _ = r.cmd.Wait(); out.Close() })
	return r
}

// said is what it has said so far.
func (r *running) said() string {
	r.w.t.Helper()
	b, err := os.ReadFile(r.out.Name())
	r.w.must(err)
	return strings.TrimSpace(string(b))
}

// wait returns what it said when it has ended by itself.
func (r *running) wait() string {
	r.w.t.Helper()
	r.w.must(r.cmd.Wait())
	return r.said()
}
