package integration

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/symbolon/symbolon/internal/netlab"
	"github.com/symbolon/symbolon/internal/spirelab"
)

// spireTour is docs/spire.md in a world. Each machine has directories of its own, which
// in a world share one file system: in memory, since SPIRE keeps keys in files.
type spireTour struct {
	*tour
	partner *netlab.Host
	spire   string   // where SPIRE's programs are
	env     []string // what the operator exported
}

// consoleCommands are the commands of a document, in order: what stands behind "$ " in its
// console blocks.
func consoleCommands(t *testing.T, document string) (commands []string) {
	t.Helper()
	text, err := os.ReadFile("../" + document)
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range strings.Split(string(text), "```console\n")[1:] {
		block, _, _ = strings.Cut(block, "\n```")
		for line := range strings.Lines(block) {
			if command, ok := strings.CutPrefix(strings.TrimSpace(line), "$ "); ok {
				commands = append(commands, command)
			}
		}
	}
	return commands
}

func newSpireTour(t *testing.T) *spireTour {
	spirelab.Test(t)
	commands := consoleCommands(t, "docs/spire.md")
	if len(commands) < 15 {
		t.Fatalf("docs/spire.md has but %d commands", len(commands))
	}
	g := &spireTour{tour: newTourOf(t, "docs/spire.md", commands)}
	g.partner = g.ctl.World().Host("partner")
	g.partner.World().Link(g.Router, g.partner, []string{"10.8.1.1/24"}, []string{"10.8.1.2/24"})
	g.partner.DefaultRoute("10.8.1.1")
	dir, _, err := spirelab.Dir()
	if err != nil {
		t.Fatal(err)
	}
	g.spire = dir
	g.path = []string{dir}
	return g
}

// at goes to a machine: its directories, and its clone of the examples.
func (g *spireTour) at(h *netlab.Host) {
	g.Helper()
	memory, err := h.World().MemoryDir()
	if err != nil {
		g.Fatal(err)
	}
	g.dir = filepath.Join(memory, h.Name())
	paths := []string{
		"198.51.100.5", "10.9.0.2", "203.0.113.5", "10.8.1.2",
		"/etc/symbolon", g.dir + "/etc", "/var/lib/symbolon", g.dir + "/var", "/usr/local/bin/symbolon-proxy", g.program("symbolon-proxy"),
		"/etc/spire", g.dir + "/etc/spire", "/var/lib/spire", g.dir + "/lib", "/run/spire", g.dir + "/run",
	}
	if h == g.partner {
		paths = append(paths, `trust_domain = "prod.example"`, `trust_domain = "partner.example"`)
	}
	g.replace = strings.NewReplacer(paths...)
	if _, err := os.Stat(g.dir); errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(filepath.Join(g.dir, "etc", "spire"), 0o755); err != nil {
			g.Fatal(err)
		}
		g.copyExamples("quickstart")
		g.copyExamples("spire")
	}
}

// server starts a SPIRE server.
func (g *spireTour) server(h *netlab.Host) *netlab.Daemon {
	g.Helper()
	g.at(h)
	g.run(h, "install -D -m 600 examples/spire/server.conf")
	socket, ok := strings.CutPrefix(g.took("export SPIRE_SERVER_PRIVATE_SOCKET="), "export ")
	if !ok {
		g.Fatal("no socket")
	}
	g.env = []string{socket}
	return g.start(h, "spire-server run", nil, func(ctx context.Context) error {
		c := h.Command(ctx, filepath.Join(g.spire, "spire-server"), "healthcheck")
		c.Env = g.tour.env(g.env...)
		return c.Run()
	})
}

// agent brings what the server's operator gives, and starts the agent with it.
func (g *spireTour) agent(h *netlab.Host) {
	g.Helper()
	g.at(g.ctl)
	from := g.dir
	g.run(g.ctl, "spire-server bundle show > bootstrap.pem", g.env...)
	g.run(g.ctl, "(umask 077; spire-server token generate", g.env...)
	g.at(h)
	for _, name := range []string{"bootstrap.pem", "agent.token"} {
		if err := os.Rename(filepath.Join(from, name), filepath.Join(g.dir, "etc", "spire", name)); err != nil {
			g.Fatal(err)
		}
	}
	g.run(h, "install -D -m 600 examples/spire/agent.conf")
	g.start(h, "spire-agent run", nil, func(ctx context.Context) error {
		socket := filepath.Join(g.dir, "run", "agent", "api.sock")
		if _, err := os.Stat(socket); err != nil {
			return err
		}
		return h.Command(ctx, filepath.Join(g.spire, "spire-agent"), "healthcheck", "-socketPath", socket).Run()
	})
}

// controller starts the controller and applies the policy; operator is the environment of
// its operator.
func (g *spireTour) controller() (operator []string) {
	g.Helper()
	g.at(g.ctl)
	g.run(g.ctl, "install -D -m 644 examples/quickstart/controller.yaml")
	state := filepath.Join(g.dir, "var")
	g.start(g.ctl, "symbolon-controller --config", nil, g.serves)
	operator = []string{
		"SYMBOLON_CONTROLLER=127.0.0.1:7443",
		"SYMBOLON_TOKEN_FILE=" + filepath.Join(state, "admin.token"),
		"SYMBOLON_CA_FILE=" + filepath.Join(state, "ca.pem"),
	}
	g.run(g.ctl, "symbolon policy apply", operator...)
	return operator
}

func (g *spireTour) proxy(h *netlab.Host, operator []string) {
	g.Helper()
	g.at(g.ctl)
	from := filepath.Join(g.dir, "join.token")
	g.run(g.ctl, "(umask 077; symbolon host token", operator...)
	g.at(h)
	if err := os.Rename(from, filepath.Join(g.dir, "etc", "join.token")); err != nil {
		g.Fatal(err)
	}
	g.run(h, "install -D -m 644 examples/spire/proxy.yaml")
	g.startProxy(h)
}

// until repeats what needs a moment to come true.
func (g *spireTour) until(what string, holds func() bool) {
	g.Helper()
	for end := time.Now().Add(time.Minute); !holds(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			g.Fatalf("%s: has not come true within a minute", what)
		}
	}
}

// TestSPIRETour runs every command of docs/spire.md as it stands there, with the example
// files: from nothing to an encrypted connection, and to federation.
func TestSPIRETour(t *testing.T) {
	g := newSpireTour(t)
	server := g.server(g.ctl)
	g.agent(g.Client)
	g.agent(g.Server)
	g.at(g.ctl)
	for _, c := range g.commands {
		if strings.HasPrefix(c, "spire-server entry create") && !strings.Contains(c, "-federatesWith") {
			g.run(g.ctl, c, g.env...)
		}
	}
	operator := g.controller()
	g.proxy(g.Client, operator)
	g.proxy(g.Server, operator)

	if _, err := g.Server.Nginx(t.Context(), netlab.Nginx{Port: 80, Body: "it works"}); err != nil {
		t.Fatal(err)
	}
	// The first connection may come before SPIRE's entries have: ten seconds at most.
	curl := g.took("curl -sS http://10.2.0.2/")
	page := g.expected("curl -sS")
	g.until("the page", func() bool {
		r, err := g.Client.Run(t.Context(), "sh", "-c", curl+" --max-time 20")
		return err == nil && g.prints(r.Stdout, page) == nil
	})
	g.at(g.ctl)
	flows := g.took("symbolon flows")
	g.until("the record", func() bool {
		return g.prints(g.shell(g.ctl, flows, operator...), g.expected("symbolon flows")) == nil
	})
	g.federation(server)
	g.missed()
}

// federation runs the commands of that section, and waits until the server has fetched the
// partner's bundle by itself.
func (g *spireTour) federation(server *netlab.Daemon) {
	g.Helper()
	prod := g.env
	g.server(g.partner)
	g.run(g.partner, "spire-server bundle show -format spiffe > partner.bundle", g.env...)
	from := filepath.Join(g.dir, "partner.bundle")
	g.at(g.ctl)
	if err := os.Rename(from, filepath.Join(g.dir, "partner.bundle")); err != nil {
		g.Fatal(err)
	}
	for _, c := range g.commands {
		if strings.HasPrefix(c, "spire-server federation") || strings.Contains(c, "-federatesWith") {
			if out := g.run(g.ctl, c, prod...); !strings.Contains(out, "partner.example") {
				g.Errorf("%s: %s", c, out)
			}
		}
	}
	g.until("the partner's bundle is fetched", func() bool { return strings.Contains(server.Log(), "Bundle refreshed") })
}
