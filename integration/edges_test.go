package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// edgeSeen is what "flows --edges -o json" prints, as far as this test goes.
type edgeSeen struct {
	From, To struct {
		Workload, External string
		Attributes         map[string][]string
	}
	Port, Connections    int
	Outcome, Reporter    string
	ClientPolicy         string `json:"client_policy"`
	ServerPolicy         string `json:"server_policy"`
	Protection           string
	BytesSent            int  `json:"bytes_sent"`
	AddressOnly          bool `json:"address_only"`
	WouldVerdict, Reason string
}

func (w *world) edges() (out []edgeSeen) {
	w.t.Helper()
	text, err := w.fleet.Must(w.ctx(), "flows", "--edges", "--last", "0", "-o", "json")
	if err != nil {
		w.t.Fatal(err)
	}
	for line := range strings.Lines(text) {
		var e edgeSeen
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			w.t.Fatalf("%v: %q", err, line)
		}
		out = append(out, e)
	}
	return out
}

// simulate returns the exit code, and each edge that changes.
func (w *world) simulate(yaml string) (code int, changes []string) {
	w.t.Helper()
	file := filepath.Join(w.fleet.Dir, "draft.yaml")
	if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
		w.t.Fatal(err)
	}
	r, err := w.fleet.CLI(w.ctx(), "simulate", "-f", file, "--since", "24h", "-o", "json")
	if err != nil || r.Stdout == "" {
		w.t.Fatalf("%v: %s", err, r.Stderr)
	}
	var answer struct {
		Edges []struct {
			Type        string
			From, To    struct{ Workload string }
			Port        int
			Connections string
			After       struct{ ClientPolicy, ServerPolicy string }
		}
	}
	if err := json.Unmarshal([]byte(r.Stdout), &answer); err != nil {
		w.t.Fatal(err)
	}
	for _, e := range answer.Edges {
		changes = append(changes, fmt.Sprintf("%s %s %s %d x%s by %s", e.Type, e.From.Workload, e.To.Workload, e.Port, e.Connections, e.After.ClientPolicy))
	}
	return r.ExitCode, changes
}

// What proxies saw becomes edges of the controller, one for each side, and a draft of
// policy is held against them before it is applied.
func TestEdgesAndSimulate(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)
	w.apply(profile("batch.service", "batch") + allow("client-echo", "client", "echo", "") + allow("batch-many", "batch", "echo", "ports: [tcp/7007]"))
	for range 3 {
		w.expect("allowed", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
	}
	w.expect("allowed", w.try(w.Client, "ask", "10.2.0.2:7006")[:1], "1")
	w.expect("denied", w.tryAs(w.Client, "batch.service", "knock", "10.2.0.2:7001", "5s"), "reset")

	count := func(match func(e *edgeSeen) bool) (n int) {
		for _, e := range w.edges() {
			if match(&e) {
				n += e.Connections
			}
		}
		return n
	}
	side := func(reporter, from string, port int, outcome string) func(*edgeSeen) bool {
		return func(e *edgeSeen) bool {
			return e.Reporter == reporter && e.From.Workload == from && e.To.Workload == "echo" && e.Port == port && e.Outcome == outcome
		}
	}
	w.eventually("both sides' edges are at the controller", func() bool {
		return count(side("client", "client", 7001, "allow")) == 3 && count(side("server", "client", 7001, "allow")) == 3 &&
			count(side("client", "client", 7006, "allow")) == 1 && count(side("server", "client", 7006, "allow")) == 1 &&
			count(side("client", "batch", 7001, "deny")) == 1
	})
	edges := w.edges()
	i := slices.IndexFunc(edges, func(e edgeSeen) bool { return side("server", "client", 7001, "allow")(&e) })
	e := edges[i]
	if e.ServerPolicy != "/acme/prod/client-echo" || e.Protection != "encrypted" || e.AddressOnly || e.BytesSent != 3*len("hello") ||
		!cmp.Equal(e.From.Attributes["app"], []string{"client"}) || len(e.From.Attributes["spiffe.id"]) != 1 || !cmp.Equal(e.To.Attributes["env"], []string{"prod"}) {
		t.Errorf("the server's edge: %+v", e)
	}
	hits, err := w.fleet.Must(w.ctx(), "policy", "list", "-o", "wide", "--kind", "policy")
	if err != nil {
		t.Fatal(err)
	}
	w.expect("hits of both sides", strings.Join(hitsOf(hits, "client-echo"), " "), "8")
	w.expect("hits of nobody", strings.Join(hitsOf(hits, "batch-many"), " "), "0")

	const deny = "kind: Policy\nnamespace: /acme/prod\nname: no-asking\nsubject: {app: client}\nverb: deny\nobject: {app: echo}\nports: [tcp/7006]\n"
	code, changes := w.simulate(deny)
	if diff := cmp.Diff([]string{"SIMULATED_TYPE_NEWLY_DENIED client echo 7006 x1 by /acme/prod/no-asking"}, changes); diff != "" || code != 1 {
		t.Errorf("a draft that denies one: exit code %d\n%s", code, diff)
	}
	code, changes = w.simulate(allow("batch-echo", "batch", "echo", "ports: [tcp/7001]"))
	if diff := cmp.Diff([]string{"SIMULATED_TYPE_NEWLY_ALLOWED batch echo 7001 x1 by /acme/prod/batch-echo"}, changes); diff != "" || code != 0 {
		t.Errorf("a draft that allows one: exit code %d\n%s", code, diff)
	}
	// What was simulated is what happens.
	w.expect("before the apply", w.try(w.Client, "ask", "10.2.0.2:7006")[:1], "1")
	w.apply(deny)
	w.expect("after the apply", w.try(w.Client, "knock", "10.2.0.2:7006", "5s"), "reset")
	w.expect("the others", w.try(w.Client, "echo", "10.2.0.2:7001", "again"), "again")
}

// hitsOf is the number in a policy's row, the third cell from its end.
func hitsOf(table, policy string) (out []string) {
	for line := range strings.Lines(table) {
		f := strings.Split(strings.TrimSpace(line), "   ")
		f = slices.DeleteFunc(f, func(s string) bool { return strings.TrimSpace(s) == "" })
		if len(f) > 4 && strings.TrimSpace(f[2]) == policy {
			out = append(out, strings.TrimSpace(f[len(f)-2]))
		}
	}
	return out
}
