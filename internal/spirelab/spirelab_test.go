package spirelab_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/symbolon/symbolon/internal/netlab"
	"github.com/symbolon/symbolon/internal/spirelab"
)

// guest is a user and a group: not nobody, who may not run what is in root's cache.
const guest = "0:65534"

// eventually waits until what the agent gives the user is want.
func eventually(t *testing.T, a *spirelab.Agent, user string, want spirelab.Given) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		got, err := a.Fetch(ctx, user)
		diff := cmp.Diff(want, got)
		if diff == "" {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("the Workload API on %s (-want +got): %s; error: %v", a.Host.Name(), diff, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Two trust domains that trust each other: each agent attests its host's processes,
// and gives the other domain's bundle where the entry says so, and only there.
func TestTwoTrustDomains(t *testing.T) {
	spirelab.Test(t)
	w := netlab.Test(t)
	net := w.TwoHosts()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()

	var servers []*spirelab.Server
	for i, name := range []string{"east", "west"} {
		h := w.Host(name)
		addr := fmt.Sprintf("10.8.%d.", i+1)
		w.Link(net.Router, h, []string{addr + "1/24"}, []string{addr + "2/24"})
		h.DefaultRoute(addr + "1")
		s, err := spirelab.StartServer(ctx, h, spirelab.ServerConfig{TrustDomain: name + ".example", Address: addr + "2"})
		if err != nil {
			t.Fatal(err)
		}
		servers = append(servers, s)
	}
	east, west := servers[0], servers[1]
	if err := east.Federate(ctx, west); err != nil {
		t.Fatal(err)
	}
	a, err := east.Agent(ctx, net.Client, spirelab.AgentConfig{})
	if err != nil {
		t.Fatal(err)
	}
	b, err := west.Agent(ctx, net.Server, spirelab.AgentConfig{})
	if err != nil {
		t.Fatal(err)
	}

	root := []string{"unix:gid:0", "unix:path:" + a.Program()}
	id, err := a.Entry(ctx, spirelab.Entry{Path: "/ns/prod/fetch", Selectors: root, FederatesWith: []string{"west.example"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Entry(ctx, spirelab.Entry{Path: "/guest", Selectors: []string{"unix:gid:65534"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Entry(ctx, spirelab.Entry{Path: "/fetch", Selectors: root}); err != nil {
		t.Fatal(err)
	}
	eventually(t, a, "", spirelab.Given{IDs: []string{"spiffe://east.example/ns/prod/fetch"}, Federated: []string{"spiffe://west.example"}})
	eventually(t, a, guest, spirelab.Given{IDs: []string{"spiffe://east.example/guest"}})
	eventually(t, b, "", spirelab.Given{IDs: []string{"spiffe://west.example/fetch"}})

	// A killed agent comes back by its keys, without a token, and so does the server.
	if err := a.Daemon().Kill(); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := east.Daemon().Kill(); err != nil {
		t.Fatal(err)
	}
	if err := east.Start(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, a, guest, spirelab.Given{IDs: []string{"spiffe://east.example/guest"}})
	if err := east.Delete(ctx, id); err != nil {
		t.Fatal(err)
	}
	eventually(t, a, "", spirelab.Given{})
	keysInMemory(t, w)
}

// keysInMemory looks for private keys below the world's directory, which may be on a
// disk, and below the one in memory, where they are.
func keysInMemory(t *testing.T, w *netlab.World) {
	t.Helper()
	memory, err := w.MemoryDir()
	if err != nil {
		t.Fatal(err)
	}
	if n := keys(t, memory); n < 4 { // of two servers and two agents
		t.Errorf("%d files with keys in memory: this test would not know one on a disk", n)
	}
	if n := keys(t, w.Dir()); n > 0 {
		t.Errorf("%d files with keys below %s", n, w.Dir())
	}
}

// keys counts the files that SPIRE's disk KeyManager wrote below dir.
func keys(t *testing.T, dir string) (n int) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && strings.HasSuffix(path, "keys.json") {
			n++
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Programs are looked for where hack/spire.sh leaves them.
func TestProgramsAreTheScripts(t *testing.T) {
	script, err := os.ReadFile("../../hack/spire.sh")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(script), "\nversion="+spirelab.Version+"\n") {
		t.Errorf("hack/spire.sh builds another version than %s", spirelab.Version)
	}
	t.Setenv("SYMBOLON_SPIRE", t.TempDir())
	if _, err := spirelab.Program("spire-agent"); err == nil || !strings.Contains(err.Error(), "make spire") {
		t.Errorf("an empty directory: %v", err)
	}
}
