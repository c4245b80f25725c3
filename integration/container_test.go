package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/containerlab"
	"github.com/symbolon/symbolon/internal/fleet"
	"github.com/symbolon/symbolon/internal/netlab"
)

// boxes are containers of a real Podman that run this test's programs.
type boxes struct {
	*world
	podman *containerlab.Podman
}

func (b *boxes) command(h *netlab.Host, flag, image string, args ...string) *netlab.Cmd {
	own := []string{flag, "--env", programEnv + "=" + strings.Join(args, " "), "--env", "GORACE=atexit_sleep_ms=0", "--volume", self(b.t) + ":/program:ro", image, "/program"}
	return h.Command(b.ctx(), "podman", b.podman.RunArgs(own...)...)
}

// run runs a program in a new container on h, and returns what it says.
func (b *boxes) run(h *netlab.Host, image string, args ...string) string {
	b.t.Helper()
	r, err := b.command(h, "--rm", image, args...).Result()
	if err != nil || r.ExitCode != 0 {
		b.t.Fatalf("%v: %v\n%s%s", args, err, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout)
}

// Policy goes by the image of a container at both ends: a scanner's finding about it cuts;
// while the runtime does not say which it is, nothing is allowed, until it says so.
func TestImages(t *testing.T) {
	w := newBareWorld(t)
	b := &boxes{w, containerlab.NewPodman(t)}
	app := containerlab.Image{Name: "registry.example/app:1", Hosts: []string{self(t)}}
	server := containerlab.Image{Name: "registry.example/server:1", Hosts: []string{self(t)}}
	b.podman.Load(app)
	b.podman.Load(server)
	digest := b.podman.Digest(app.Name)
	b.podman.Serve()

	runtime := fmt.Sprintf("identity: {containers: [%q]}\n", "docker:"+b.podman.Socket())
	w.enrolWith(runtime)
	w.apply(fmt.Sprintf(`---
kind: Profile
namespace: /acme/prod
name: boxed
match: {image.digest: %q}
workload: boxed
labels: {app: boxed}
---
kind: Profile
namespace: /acme/prod
name: server
match: {image.name: %q, container.runtime: podman}
workload: server
labels: {app: server}
---
kind: Profile
namespace: /acme
name: vulnerable
match: {vuln.critical: {exists: true}}
labels: {tier: vulnerable}
---
kind: Policy
namespace: /acme/prod
name: not-the-vulnerable
subject: {tier: vulnerable}
verb: deny
object: {app: server}
`, digest, server.Name) + allow("boxed-server", "boxed", "server", ""))
	if out, err := b.command(w.Server, "--detach", server.Name, "server").CombinedOutput(); err != nil {
		t.Fatalf("server: %v\n%s", err, out)
	}
	w.eventually("the server listens", func() bool {
		return b.run(w.Client, app.Name, "echo", "10.2.0.2:7001", "hello") == "hello"
	})
	l := w.recorded(w.client, "the connection", to(portEcho, "allow"))
	if l.Source.Workload != "boxed" || l.Destination.Workload != "server" {
		t.Errorf("from %+v to %+v", l.Source, l.Destination)
	}
	for _, p := range []*fleet.Proxy{w.client, w.server} {
		var s struct {
			Runtimes []struct{ Socket, Name, State string } `json:"container_runtimes"`
		}
		if err := p.Debug(w.ctx(), "status", &s); err != nil {
			t.Fatal(err)
		}
		w.expect("runtimes of "+p.Host.Name(), fmt.Sprint(s.Runtimes), fmt.Sprintf("[{docker:%s podman reachable}]", b.podman.Socket()))
	}
	w.expect("from another image", b.run(w.Client, server.Name, "echo", "10.2.0.2:7001", "hello"), "reset")

	t.Run("a finding about the image", func(t *testing.T) {
		said := make(chan string, 1)
		held := b.command(w.Client, "--rm", app.Name, "hold", "10.2.0.2:7002")
		go func() {
			r, err := held.Result()
			said <- fmt.Sprintf("%s %v", strings.TrimSpace(r.Stdout), err)
		}()
		w.eventually("the connection is held", func() bool {
			var live []flow.Line
			if err := w.client.Debug(w.ctx(), "connections", &live); err != nil {
				t.Fatal(err)
			}
			return len(live) == 1 && live[0].BytesReceived > 0
		})
		findings := filepath.Join(t.TempDir(), "findings.yaml")
		text := fmt.Sprintf("scanner: trivy\nfindings:\n- image_digest: %s\n  attributes: {vuln.critical: [CVE-2026-1001]}\n", digest)
		if err := os.WriteFile(findings, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := w.fleet.Must(w.ctx(), "scan", "push", "-f", findings); err != nil {
			t.Fatal(err)
		}
		w.expect("its connection", <-said, "open\nreset <nil>")
		w.expect("a new one", b.run(w.Client, app.Name, "echo", "10.2.0.2:7001", "hello"), "reset")
		if _, err := w.fleet.Must(w.ctx(), "scan", "remove", "--scanner", "trivy", "--yes"); err != nil {
			t.Fatal(err)
		}
		w.expect("one that tries again", b.run(w.Client, app.Name, "until", "10.2.0.2:7001", "hello"), "hello")
	})
	t.Run("the runtime is away", func(t *testing.T) {
		b.podman.Stop()
		said := make(chan string, 1)
		late := b.command(w.Client, "--rm", app.Name, "until", "10.2.0.2:7001", "hello")
		go func() {
			r, err := late.Result()
			said <- fmt.Sprintf("%s %v", strings.TrimSpace(r.Stdout), err)
		}()
		w.recorded(w.client, "what is not known is denied", func(l *flow.Line) bool {
			return l.Outcome == "deny" && l.Source.Workload != "boxed" && l.Source.Workload != "server"
		})
		b.podman.Serve()
		w.expect("after it has come back", <-said, "reset\nhello <nil>")
	})
}
