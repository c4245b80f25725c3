package integration

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/symbolon/symbolon/flow"
)

// Who is revoked stays so while controller and proxies restart, in whatever order and
// manner; and comes back when that ends.
func TestRevocationSurvivesRestarts(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)
	w.apply(allow("client-echo", "client", "echo", ""))
	m := w.newManager(w.server)
	const addr = "10.2.0.2:7001"
	refused := func(when string) {
		t.Helper()
		if got := w.try(w.Client, "echo", addr, "hello"); got != "reset" && got != "refused" {
			t.Errorf("%s: %q", when, got)
		}
	}
	w.expect("before", w.try(w.Client, "echo", addr, "hello"), "hello")
	line := w.recorded(w.client, "the client", to(7001, "allow"))
	revoked := line.Source.SPIFFEID
	if !strings.HasSuffix(revoked, "/acme/prod/client") {
		t.Fatalf("the client is %q", revoked)
	}
	held := w.held("10.2.0.2:7002")
	out, err := w.fleet.Must(w.ctx(), "ca", "revoke", revoked, "--reason", "a test's")
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	w.eventually("both proxies have heard of it", func() bool {
		out, err := w.fleet.Must(w.ctx(), "status")
		return err == nil && strings.Contains(out, "known to all connected hosts")
	})
	t.Logf("acknowledged %v after the answer, the CLI's own time included", time.Since(began))
	w.expect("the held connection", within(t, held), "open\nreset")
	refused("revoked")
	w.recorded(w.client, "the client's side", func(l *flow.Line) bool { return l.Reason == "revoked" })

	if err := w.fleet.ControllerDaemon().Stop(); err != nil {
		t.Fatal(err)
	}
	for name, way := range map[string]func(*manager){
		"restart": (*manager).restart, "reload": (*manager).reload,
		"crash": func(m *manager) { m.end(syscall.SIGKILL); m.start() },
	} {
		way(m)
		refused(name)
		var s struct {
			Revocations int `json:"revocations"`
		}
		if err := w.server.Debug(w.ctx(), "status", &s); err != nil || s.Revocations != 1 {
			t.Errorf("%s: the server's proxy has %d revocations in force, %v", name, s.Revocations, err)
		}
	}
	if err := w.fleet.StartController(w.ctx()); err != nil {
		t.Fatal(err)
	}
	refused("the controller is back")
	if _, err := w.fleet.Must(w.ctx(), "ca", "unrevoke", strings.TrimSpace(out)); err != nil {
		t.Fatal(err)
	}
	w.eventually("it is let in again", func() bool { return w.try(w.Client, "echo", addr, "hello") == "hello" })
}

// within receives, or fails the test.
func within(t *testing.T, said <-chan string) string {
	t.Helper()
	select {
	case s := <-said:
		return s
	case <-time.After(60 * time.Second):
		t.Fatal("the client has not ended")
		return ""
	}
}
