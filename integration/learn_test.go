package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/symbolon/symbolon/internal/netlab"
)

// PostgreSQL, Redis and nginx are used while their namespace learns; what was learned is
// accepted, and from then on exactly that passes.
func TestLearnRealPrograms(t *testing.T) {
	w := newWorld(t, "nginx", "postgres", "initdb", "redis-server", "redis-cli", "curl", "psql")
	profiles := clientProfiles
	for unit, app := range map[string]string{"nginx.service": "nginx", "postgresql.service": "postgres", "redis-server.service": "redis"} {
		profiles += profile(unit, app)
	}
	if _, err := w.Server.Nginx(w.ctx(), netlab.Nginx{Port: 80, Body: secret}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Server.Postgres(w.ctx(), 5432); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Server.Redis(w.ctx(), 6379); err != nil {
		t.Fatal(err)
	}
	w.apply(profiles)
	must := func(args ...string) string {
		t.Helper()
		out, err := w.fleet.Must(w.ctx(), args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	traffic := func(when string) {
		t.Helper()
		for _, args := range [][]string{
			{"curl", "-sS", "--max-time", "20", "http://10.2.0.2:80/"},
			{"psql", "-At", "-h", "10.2.0.2", "-U", "postgres", "-c", "select '" + secret + "'"},
			{"redis-cli", "-h", "10.2.0.2", "echo", secret},
		} {
			if out, err := w.Client.Output(w.ctx(), args[0], args[1:]...); err != nil || !strings.Contains(out, secret) {
				t.Errorf("%s: %v: %q, %v", when, args, out, err)
			}
		}
	}
	must("learn", "start", "/acme/prod")
	if err := w.fleet.Settle(w.ctx()); err != nil {
		t.Fatal(err)
	}
	traffic("in learn")
	if l := w.recorded(w.client, "let through", to(5432, "allow")); l.Reason != "learn" || l.WouldVerdict != "deny" || l.Protection != "encrypted" || l.Destination.Workload != "postgres" {
		t.Errorf("the controller has told whose address that is, so there is a tunnel; recorded %+v", l)
	}
	w.eventually("three edges were seen", func() bool {
		return strings.Contains(must("learn", "suggest", "/acme/prod", "--keys", "app", "-o", "json"), `"covered": "3"`)
	})
	suggested := must("learn", "suggest", "/acme/prod", "--keys", "app")
	file := filepath.Join(t.TempDir(), "learned.yaml")
	if err := os.WriteFile(file, []byte(suggested), 0o600); err != nil {
		t.Fatal(err)
	}
	must("learn", "accept", "/acme/prod", "-f", file, "--enforce")
	if err := w.fleet.Settle(w.ctx()); err != nil {
		t.Fatal(err)
	}
	traffic("enforced")
	if t.Failed() {
		t.Log(suggested)
	}
	// Another program to a known port, and a known one to another.
	for _, port := range []string{"5432", "6380"} {
		if r, err := w.Client.Run(w.ctx(), "curl", "-sS", "--max-time", "10", "http://10.2.0.2:"+port+"/"); err != nil || r.ExitCode == 0 {
			t.Errorf("curl reached port %s: %+v, %v", port, r, err)
		}
	}
	if l := w.recorded(w.client, "denied", to(5432, "deny")); l.Source.Workload != "tools" || l.Destination.Workload != "postgres" || l.Reason != "default" {
		t.Errorf("record: %+v", l)
	}
}
