package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/flow"
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
	l := w.recorded(w.client, "denied", to(5432, "deny"))
	if l.Source.Workload != "tools" || l.Destination.Workload != "postgres" || l.Reason != "default" {
		t.Errorf("record: %+v", l)
	}
	w.missingPolicy(l)
}

// missingPolicy makes of a denial, by nothing but what explain says of it, the policy that
// is missing; with it the client gets through.
func (w *world) missingPolicy(denied *flow.Line) {
	t := w.t
	t.Helper()
	x := &symbolonv1.ExplainResponse{}
	w.eventually("the controller knows the connection", func() bool {
		r, err := w.fleet.CLI(w.ctx(), "explain", "--flow", denied.FlowID, "-o", "json")
		return err == nil && r.ExitCode == 1 && protojson.Unmarshal([]byte(r.Stdout), x) == nil
	})
	if len(x.GetSides()) != 2 || x.GetAllow() {
		t.Fatalf("explained: %v", x)
	}
	for _, side := range x.GetSides() {
		if side.GetAllow() || side.GetReason() != symbolonv1.Reason_REASON_DEFAULT || len(side.GetCandidates()) == 0 {
			t.Errorf("explained: %v", side)
		}
		for _, c := range side.GetCandidates() {
			if c.GetMatches() || c.GetFailed() == "" {
				t.Errorf("a policy that is there: %v", c)
			}
		}
	}
	app := func(e *symbolonv1.ExplainEndpoint) string { return e.GetAttributes()["app"].GetValues()[0] }
	w.apply(fmt.Sprintf("---\nkind: Policy\nnamespace: %s\nname: missing\nsubject: {app: %s}\nverb: allow\nobject: {app: %s}\nports: [%s/%d]\n",
		x.GetFrom().GetNamespace(), app(x.GetFrom()), app(x.GetTo()), x.GetProtocol(), x.GetPort()))
	// PostgreSQL speaks no HTTP: that it is asked at all is the record's to say.
	if _, err := w.Client.Run(w.ctx(), "curl", "-sS", "--max-time", "10", "http://10.2.0.2:5432/"); err != nil {
		t.Fatal(err)
	}
	w.recorded(w.client, "what was missing", func(l *flow.Line) bool {
		return to(5432, "allow")(l) && l.Source.Workload == denied.Source.Workload && l.ClientPolicy == "/acme/prod/missing" && l.ServerPolicy == l.ClientPolicy
	})
	r, err := w.fleet.CLI(w.ctx(), "explain", "--flow", denied.FlowID)
	if err != nil || r.ExitCode != 0 || !strings.Contains(r.Stdout, "allowed, encrypted") {
		t.Errorf("explained again: %+v, %v", r, err)
	}
}
