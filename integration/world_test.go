package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/fleet"
	"github.com/symbolon/symbolon/internal/netlab"
)

// world is two protected hosts with a router between them, and a controller:
//
//	client 10.1.0.2 -- router -- 10.2.0.2 server
//	                     |
//	             controller 10.9.0.2
type world struct {
	t *testing.T
	*netlab.TwoHosts
	net            *netlab.World
	fleet          *fleet.Fleet
	client, server *fleet.Proxy
	echoDaemon     *netlab.Daemon // the last that echo started
}

// basePolicy is what the worlds start from: names, labels, nothing allowed.
const basePolicy = `
kind: Namespace
name: /acme
mode: enforce
default: deny
protection: encrypted
attributes: {app: {}, tier: {}, ext: {}, env: {values: [prod, dev]}}
---
kind: Namespace
name: /acme/prod
mode: enforce
---
kind: Namespace
name: /acme/dev
mode: enforce
`

// profile names the programs of a unit.
func profile(unit, app string) string {
	return fmt.Sprintf("---\nkind: Profile\nnamespace: /acme/prod\nname: %[2]s\nmatch: {proc.unit: %[1]s}\nworkload: %[2]s\nlabels: {app: %[2]s, env: prod}\n", unit, app)
}

// allow lets one app talk to another in /acme/prod; more is appended to the policy.
func allow(name, from, to, more string) string {
	return fmt.Sprintf("---\nkind: Policy\nnamespace: /acme/prod\nname: %s\nsubject: {app: %s}\nverb: allow\nobject: {app: %s}\n%s\n", name, from, to, more)
}

const noIntercept = "" // proxies take every port and destination, as by default

func newWorld(t *testing.T, tools ...string) *world {
	t.Helper()
	w := newBareWorld(t, tools...)
	w.enrol()
	return w
}

// newBareWorld has a controller and no proxies yet.
func newBareWorld(t *testing.T, tools ...string) *world {
	t.Helper()
	n := netlab.Test(t, append(tools, "iptables", "ip6tables", "ipset", "tcpdump")...)
	w := &world{t: t, net: n, TwoHosts: n.TwoHosts()}
	ctl := n.Host("ctl")
	n.Link(w.Router, ctl, []string{"10.9.0.1/24", "fd00:9::1/64"}, []string{"10.9.0.2/24", "fd00:9::2/64"})
	ctl.DefaultRoute("10.9.0.1")
	var err error
	if w.fleet, err = fleet.New(w.ctx(), ctl, "10.9.0.2"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			w.dump()
		}
		if err := w.fleet.Forget(context.Background()); err != nil {
			t.Error(err)
		}
	})
	w.apply(basePolicy + profile("client.service", "client") + profile("echo.service", "echo"))
	return w
}

func (w *world) enrol() { w.t.Helper(); w.enrolWith(noIntercept) }

func (w *world) enrolWith(config string) {
	w.t.Helper()
	var err error
	if w.client, err = w.fleet.Proxy(w.ctx(), w.Client, fleet.Enrolment{Namespace: "/acme/prod", Labels: map[string]string{"role": "web"}, Config: config}); err != nil {
		w.t.Fatal(err)
	}
	if w.server, err = w.fleet.Proxy(w.ctx(), w.Server, fleet.Enrolment{Namespace: "/acme/prod", Labels: map[string]string{"role": "db"}, Config: config}); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	w.t.Cleanup(cancel)
	return ctx
}

func (w *world) apply(yaml string) {
	w.t.Helper()
	if err := w.fleet.Apply(w.ctx(), yaml); err != nil {
		w.t.Fatal(err)
	}
}

// dump shows what the proxies recorded: the first thing one asks for.
func (w *world) dump() {
	for _, p := range []*fleet.Proxy{w.client, w.server} {
		if p == nil {
			continue
		}
		b, _ := os.ReadFile(p.FlowFile())
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		w.t.Logf("records of %s, the last of %d:\n%s", p.Host.Name(), len(lines), strings.Join(lines[max(0, len(lines)-5):], "\n"))
	}
}

// self is this test binary, which also is the programs of program_test.go.
func self(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	exe, err = filepath.EvalSymlinks(exe)
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

// try runs a client program in client.service on h, and returns what it says.
func (w *world) try(h *netlab.Host, args ...string) string {
	w.t.Helper()
	return w.tryAs(h, "client.service", args...)
}

func (w *world) tryAs(h *netlab.Host, unit string, args ...string) string {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	c := h.Command(ctx, self(w.t))
	// The race detector would sleep for a second at each program's end.
	c.Env = append(os.Environ(), programEnv+"="+strings.Join(args, " "), "GORACE=atexit_sleep_ms=0")
	c.Unit = unit
	r, err := c.Result()
	if err != nil {
		w.t.Fatalf("%v: %v", args, err)
	}
	if r.ExitCode != 0 {
		w.t.Fatalf("%v: exit code %d\n%s%s", args, r.ExitCode, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout)
}

// echo starts the echo server of program_test.go on h.
func (w *world) echo(h *netlab.Host) *netlab.Daemon {
	w.t.Helper()
	d, err := h.Start(w.ctx(), netlab.Service{
		Unit: "echo.service", Command: []string{self(w.t)}, Env: append(os.Environ(), programEnv+"=server"),
		Ports: []uint16{portEcho, portGreet, portReset, portWatch, portSink, portWho, portMany},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.echoDaemon = d
	return d
}

// eventually waits for what another process brings about.
func (w *world) eventually(what string, holds func() bool) {
	w.t.Helper()
	for end := time.Now().Add(30 * time.Second); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("%s: has not happened", what)
		}
	}
}

// expect compares what a client said.
func (w *world) expect(what, got, want string) {
	w.t.Helper()
	if got != want {
		w.t.Errorf("%s: %q, want %q", what, got, want)
	}
}

// recorded waits for a record of p that match accepts.
func (w *world) recorded(p *fleet.Proxy, what string, match func(*flow.Line) bool) *flow.Line {
	w.t.Helper()
	l, err := p.WaitFlow(context.Background(), match)
	if err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
	return l
}

// to matches records by destination port and outcome.
func to(port uint16, outcome string) func(*flow.Line) bool {
	suffix := fmt.Sprintf(":%d", port)
	return func(l *flow.Line) bool {
		return strings.HasSuffix(l.Destination.Address, suffix) && l.Outcome == outcome
	}
}

// families runs f over IPv4 and IPv6 with the server's address.
func (w *world) families(t *testing.T, f func(t *testing.T, addr string)) {
	for _, a := range []string{"10.2.0.2", "[fd00:2::2]"} {
		t.Run(map[bool]string{true: "v4", false: "v6"}[!strings.Contains(a, "[")], func(t *testing.T) {
			outer := w.t
			w.t = t
			defer func() { w.t = outer }()
			f(t, a)
		})
	}
}
