package integration

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/symbolon/symbolon/internal/fleet"
	"github.com/symbolon/symbolon/internal/spirelab"
)

// A program that knows SPIFFE gets its own SVID from the proxy: SPIRE's own client, and
// a program with go-spiffe, each by its Profile.
func TestServedWorkloadAPI(t *testing.T) {
	spirelab.Test(t)
	w := newBareWorld(t)
	agent, err := spirelab.Program("spire-agent")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(w.fleet.Dir, "workload.sock")
	if w.client, err = w.fleet.Proxy(w.ctx(), w.Client, fleet.Enrolment{
		Namespace: "/acme/prod", Config: fmt.Sprintf("identity: {serve_workload_api: %s}\n", socket),
	}); err != nil {
		t.Fatal(err)
	}
	fetch := func(unit string) string {
		c := w.Client.Command(w.ctx(), agent, "api", "fetch", "x509", "-socketPath", socket)
		c.Unit = unit
		r, err := c.Result()
		if err != nil {
			t.Fatal(err)
		}
		return r.Stdout + r.Stderr
	}
	for unit, want := range map[string]string{
		"client.service": "spiffe://" + fleet.TrustDomain + "/acme/prod/client",
		"echo.service":   "spiffe://" + fleet.TrustDomain + "/acme/prod/echo",
		"other.service":  "spiffe://" + fleet.TrustDomain + "/acme/prod/unprofiled.other.service",
	} {
		if got := fetch(unit); !strings.Contains(got, want+"\n") {
			t.Errorf("%s: want %s:\n%s", unit, want, got)
		}
	}
	// The socket's name goes with the proxy.
	if err := w.client.Daemon().Stop(); err != nil {
		t.Fatal(err)
	}
	if got := fetch("client.service"); strings.Contains(got, "spiffe://") {
		t.Errorf("without a proxy:\n%s", got)
	}
}
