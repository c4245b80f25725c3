package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/symbolon/symbolon/internal/netlab"
)

// tour is README.md's "Five minutes" in a world: two hosts, a controller, and the
// example files, with paths and addresses of the world's own.
type tour struct {
	*testing.T
	*netlab.TwoHosts
	ctl     *netlab.Host
	bin     string
	path    []string // where other programs are looked for first
	dir     string   // where the operator stands; bin, etc, var, run and the examples below
	replace *strings.Replacer
	ran     map[string]bool // commands of the README that were run
	proxies []*netlab.Daemon
	// document names what is toured, commands are all that it has.
	document string
	commands []string
}

func newTour(t *testing.T) *tour {
	g := newTourOf(t, "README.md", readme(t))
	g.copyExamples("quickstart")
	return g
}

// newTourOf makes the world for the tour of any document.
func newTourOf(t *testing.T, document string, commands []string) *tour {
	t.Helper()
	w := netlab.Test(t, "iptables", "ip6tables", "ipset", "nginx", "postgres", "initdb", "curl")
	g := &tour{
		T: t, TwoHosts: w.TwoHosts(), ctl: w.Host("ctl"), ran: make(map[string]bool), dir: filepath.Join(w.Dir(), "tour"),
		document: document, commands: commands,
	}
	w.Link(g.Router, g.ctl, []string{"10.9.0.1/24"}, []string{"10.9.0.2/24"})
	g.ctl.DefaultRoute("10.9.0.1")
	bin := os.Getenv("SYMBOLON_BIN")
	if bin == "" {
		bin = "../bin"
	}
	var err error
	if g.bin, err = filepath.Abs(bin); err != nil {
		t.Fatal(err)
	}
	g.replace = strings.NewReplacer("/etc/symbolon", g.dir+"/etc", "/var/lib/symbolon", g.dir+"/var", "198.51.100.5", "10.9.0.2")
	return g
}

// copyExamples makes the operator's clone of the repository, as far as the tour needs
// it.
func (g *tour) copyExamples(name string) {
	err := filepath.WalkDir("../examples/"+name, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		to := filepath.Join(g.dir, strings.TrimPrefix(path, "../"))
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		return os.WriteFile(to, []byte(g.replace.Replace(string(b))), 0o644)
	})
	if err != nil {
		g.Fatal(err)
	}
}

func (g *tour) env(more ...string) []string {
	path := strings.Join(append([]string{g.bin}, g.path...), ":")
	return append([]string{"PATH=" + path + ":" + os.Getenv("PATH"), "HOME=" + g.dir, "NO_COLOR=1"}, more...)
}

// readme are the commands of the section, one a line, in order: what stands in a block
// behind "$ ", or, in a block without prompts, every line.
func readme(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n## Five minutes\n")
	section, _, ok2 := strings.Cut(section, "\n## ")
	if !ok || !ok2 {
		t.Fatal("README.md has no section Five minutes")
	}
	var commands []string
	for i, block := range strings.Split(section, "```\n") {
		if i%2 == 0 {
			continue
		}
		prompts := strings.Contains(block, "$ ")
		for line := range strings.Lines(block) {
			command, isCommand := strings.CutPrefix(strings.TrimSpace(line), "$ ")
			if isCommand || !prompts {
				commands = append(commands, command)
			}
		}
	}
	return commands
}

// took marks the one command of the document that starts so.
func (g *tour) took(start string) string {
	g.Helper()
	for _, c := range g.commands {
		if strings.HasPrefix(c, start) {
			g.ran[c] = true
			return g.replace.Replace(c)
		}
	}
	g.Fatalf("%s has no command %q", g.document, start)
	return ""
}

// missed are the commands that were not run.
func (g *tour) missed() {
	g.Helper()
	for _, c := range g.commands {
		if !g.ran[c] {
			g.Errorf("%s has a command that this test does not run: %s", g.document, c)
		}
	}
}

// run runs a command of the document as it stands there, on h.
func (g *tour) run(h *netlab.Host, start string, env ...string) string {
	g.Helper()
	return g.shell(h, g.took(start), env...)
}

func (g *tour) shell(h *netlab.Host, command string, env ...string) string {
	g.Helper()
	ctx, cancel := context.WithTimeout(g.Context(), time.Minute)
	defer cancel()
	c := h.Command(ctx, "sh", "-c", command)
	c.Dir, c.Env = g.dir, g.env(env...)
	r, err := c.Result()
	if err != nil {
		g.Fatalf("%s: %v", command, err)
	}
	if r.ExitCode > 1 {
		g.Fatalf("%s: exit code %d\n%s%s", command, r.ExitCode, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// program is where the tour has it from.
func (g *tour) program(name string) string {
	for _, dir := range g.path {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return filepath.Join(g.bin, name)
}

// start runs a daemon of the document until ready says nil.
func (g *tour) start(h *netlab.Host, start string, env []string, ready func(context.Context) error) *netlab.Daemon {
	g.Helper()
	args := strings.Fields(g.took(start))
	args[0] = g.program(args[0])
	ctx, cancel := context.WithTimeout(g.Context(), time.Minute)
	defer cancel()
	d, err := h.Start(ctx, netlab.Service{
		Unit: filepath.Base(args[0]) + ".service", Command: args, Env: g.env(env...),
		StopTimeout: 20 * time.Second, Ready: ready,
	})
	if err != nil {
		g.Fatal(err)
	}
	return d
}

// serves: the controller has made what its operator needs, and listens.
func (g *tour) serves(ctx context.Context) error {
	for _, name := range []string{"admin.token", "ca.pem"} {
		if _, err := os.Stat(filepath.Join(g.dir, "var", name)); err != nil {
			return err
		}
	}
	return g.ctl.WaitListen(ctx, "tcp", 7443)
}

// socket tells the two hosts' proxies apart, which share the machine's files.
func (g *tour) socket(h *netlab.Host) string {
	return "SYMBOLON_SOCKET=" + filepath.Join(g.dir, h.Name()+".sock")
}

func (g *tour) proxy(h *netlab.Host) {
	g.Helper()
	g.run(g.ctl, "(umask 077; symbolon host token")
	info, err := os.Stat(filepath.Join(g.dir, "join.token"))
	if err != nil || info.Mode().Perm() != 0o600 {
		g.Fatalf("join.token: %v, %v", info, err)
	}
	g.shell(h, g.replace.Replace("mv join.token /etc/symbolon/ && cp examples/quickstart/proxy.yaml /etc/symbolon/"))
	g.startProxy(h)
}

// startProxy starts the proxy by the document's command.
func (g *tour) startProxy(h *netlab.Host) {
	g.Helper()
	socket := filepath.Join(g.dir, h.Name()+".sock")
	g.Cleanup(func() {
		c := h.Command(context.Background(), filepath.Join(g.bin, "symbolon-proxy"), "forget", "--socket", socket)
		if err := c.Run(); err != nil {
			g.Error(err)
		}
	})
	g.proxies = append(g.proxies, g.start(h, "symbolon-proxy --config", []string{g.socket(h)}, func(ctx context.Context) error {
		return h.Command(ctx, "curl", "-sf", "-o", "/dev/null", "--unix-socket", socket, "http://proxy/readyz").Run()
	}))
}

// expected is what the document prints behind a command, but for the time of day and
// the space between columns.
func (g *tour) expected(start string) [][]string {
	g.Helper()
	text, err := os.ReadFile("../" + g.document)
	if err != nil {
		g.Fatal(err)
	}
	_, after, ok := strings.Cut(string(text), "\n$ "+start)
	if !ok {
		g.Fatalf("%s has no command %q", g.document, start)
	}
	_, after, _ = strings.Cut(after, "\n")
	var rows [][]string
	for line := range strings.Lines(after) {
		if strings.HasPrefix(line, "$ ") || strings.HasPrefix(line, "```") || strings.HasPrefix(line, "...") {
			break
		}
		rows = append(rows, cells(line))
	}
	return rows
}

// cells are the fields of a row without a time.
func cells(line string) []string {
	f := strings.Fields(line)
	if len(f) > 0 && strings.Count(f[0], ":") == 2 {
		f[0] = "TIME"
	}
	return f
}

func (g *tour) prints(out string, rows [][]string) error {
	for _, row := range rows {
		found := false
		for line := range strings.Lines(out) {
			f := cells(line)
			found = found || len(f) >= len(row) && strings.Join(f[:len(row)], " ") == strings.Join(row, " ")
		}
		if !found {
			return fmt.Errorf("no line %q in\n%s", strings.Join(row, " "), out)
		}
	}
	return nil
}

// TestREADMETour runs every command of README.md's tour as it stands there, with the
// example files, and holds the README to what they print.
func TestREADMETour(t *testing.T) {
	g := newTour(t)
	g.run(g.ctl, "install -D -m 644 examples/quickstart/controller.yaml")
	g.start(g.ctl, "symbolon-controller --config", nil, g.serves)
	g.shell(g.ctl, "cp var/admin.token var/ca.pem .")
	g.run(g.ctl, "symbolon config --controller")
	if out := g.run(g.ctl, "symbolon status"); !strings.Contains(out, "acme.example") {
		t.Errorf("status: %s", out)
	}
	if out := g.run(g.ctl, "symbolon policy diff"); !strings.Contains(out, "web-uses-db") {
		t.Errorf("policy diff: %s", out)
	}
	g.run(g.ctl, "symbolon policy apply")
	g.proxy(g.Client)
	g.proxy(g.Server)
	if out := g.run(g.ctl, "symbolon host list"); strings.Count(out, "/acme/prod") != 2 {
		t.Errorf("host list: %s", out)
	}
	if out := g.run(g.ctl, "symbolon explain"); g.prints(out, g.expected("symbolon explain")) != nil {
		t.Errorf("explain: %s", out)
	}

	if _, err := g.Server.Nginx(t.Context(), netlab.Nginx{Port: 80, Body: "it works"}); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Server.Postgres(t.Context(), 5432); err != nil {
		t.Fatal(err)
	}
	if out := g.shell(g.Client, "curl -sS --max-time 20 http://10.2.0.2/"); !strings.Contains(out, "it works") {
		t.Errorf("report to web: %q", out)
	}
	g.shell(g.Client, "! curl -sS --max-time 20 http://10.2.0.2:5432/")
	follow := g.took("symbolon flows")
	once := strings.TrimSuffix(follow, " --follow")
	if once == follow {
		t.Errorf("the tour no longer follows the flows: %s", follow)
	}
	rows := g.expected("symbolon flows")
	if len(rows) != 3 {
		t.Fatalf("the README prints %v", rows)
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		err := g.prints(g.shell(g.ctl, once), rows)
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("flows: %v", err)
		}
	}

	at := " --socket " + filepath.Join(g.dir, g.Client.Name()+".sock")
	if out := g.shell(g.Client, g.took("symbolon-proxy debug rules")+at); !strings.Contains(out, `"drift": null`) && !strings.Contains(out, `"drift": []`) {
		t.Errorf("debug rules: %s", out)
	}
	g.shell(g.Client, g.took("symbolon-proxy debug connections")+at)
	if err := g.proxies[0].Stop(); err != nil {
		t.Fatal(err)
	}
	if out := g.shell(g.Client, "iptables-save; ip6tables-save; ipset list -n"); !strings.Contains(out, "SYMBOLON_OUT") {
		t.Errorf("a stopped proxy leaves its host open: %s", out)
	}
	g.run(g.Client, "symbolon-proxy cleanup")
	g.shell(g.Client, g.took("symbolon-proxy forget")+at)
	if out := g.shell(g.Client, "iptables-save; ip6tables-save; ipset list -n"); strings.Contains(strings.ToLower(out), "symbolon") {
		t.Errorf("cleanup leaves %s", out)
	}

	g.removeServer()
	g.missed()
}

// removeServer takes the other host out, whose proxy ends by itself and cannot come
// back with what it has.
func (g *tour) removeServer() {
	g.Helper()
	var status struct {
		HostID string `json:"host_id"`
	}
	at := " --socket " + filepath.Join(g.dir, g.Server.Name()+".sock")
	out := g.shell(g.Server, "symbolon-proxy debug status"+at)
	if err := json.Unmarshal([]byte(out), &status); err != nil || status.HostID == "" {
		g.Fatalf("debug status: %v: %s", err, out)
	}
	command := g.took("symbolon host remove")
	name := command[strings.LastIndexByte(command, ' ')+1:]
	g.shell(g.ctl, strings.TrimSuffix(command, name)+status.HostID+" --yes")
	proxy := g.proxies[1]
	select {
	case <-proxy.Done():
	case <-time.After(30 * time.Second):
		g.Fatalf("the proxy of a removed host goes on\n%s", proxy.Log())
	}
	if !strings.Contains(proxy.Log(), "enrol again") {
		g.Errorf("it ended with\n%s", proxy.Log())
	}
	again := g.Server.Command(g.Context(), filepath.Join(g.bin, "symbolon-proxy"), "--config", filepath.Join(g.dir, "etc", "proxy.yaml"))
	again.Env = g.env(g.socket(g.Server))
	r, err := again.Result()
	if err != nil || r.ExitCode != 1 || !strings.Contains(r.Stderr, "used") {
		g.Errorf("started again: %v, exit code %d: %s", err, r.ExitCode, r.Stderr)
	}
}
