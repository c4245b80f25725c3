package integration

import (
	"encoding/json"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/fleet"
)

// behind are the hosts that `ca status` names.
func (w *world) behind() []string {
	w.t.Helper()
	out, err := w.fleet.Must(w.ctx(), "ca", "status", "-o", "json")
	if err != nil {
		w.t.Fatal(err)
	}
	var s struct {
		Behind []struct {
			HostID    string `json:"hostId"`
			Connected bool   `json:"connected"`
		} `json:"behind"`
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		w.t.Fatal(err)
	}
	var ids []string
	for _, b := range s.Behind {
		id := b.HostID
		if !b.Connected {
			id += " away"
		}
		ids = append(ids, id)
	}
	return ids
}

// hostSVID is which host p is, and since when its SVID is valid.
func (w *world) hostSVID(p *fleet.Proxy) (id string, since time.Time) {
	w.t.Helper()
	var s struct {
		HostID string    `json:"host_id"`
		Since  time.Time `json:"host_svid_since"`
	}
	if err := p.Debug(w.ctx(), "status", &s); err != nil {
		w.t.Fatal(err)
	}
	return s.HostID, s.Since
}

func (w *world) rotateIntermediate() {
	w.t.Helper()
	if _, err := w.fleet.Must(w.ctx(), "ca", "rotate", "--intermediate"); err != nil {
		w.t.Fatal(err)
	}
}

// The intermediate is rotated again and again under traffic: nothing is refused, the
// connection that is open stays, all SVIDs are new within moments. A host that was away
// is named, and gets its own when it is back.
func TestIntermediateRotationUnderTraffic(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)
	w.apply(allow("client-echo", "client", "echo", ""))
	m := w.newManager(w.client)
	held := w.held("10.2.0.2:7002")
	var first []flow.Line
	if err := w.client.Debug(w.ctx(), "connections", &first); err != nil {
		t.Fatal(err)
	}
	_, clientSince := w.hostSVID(w.client)
	_, serverSince := w.hostSVID(w.server)

	stop := w.workers(w.Client, 4, "10.2.0.2:7001")
	for range 3 {
		w.rotateIntermediate()
		began := time.Now()
		w.eventually("no SVID of an earlier intermediate is left", func() bool { return len(w.behind()) == 0 })
		t.Logf("all SVIDs are new %v after the answer, the CLI's own time included", time.Since(began))
	}
	for _, counts := range stop() {
		t.Log(counts)
		if !strings.HasPrefix(counts, "map[ok:") || strings.Contains(counts, " ") {
			t.Errorf("a worker's connections: %s, want only ok", counts)
		}
	}
	if _, since := w.hostSVID(w.client); !since.After(clientSince) {
		t.Error("the client's host has its old SVID")
	}
	if _, since := w.hostSVID(w.server); !since.After(serverSince) {
		t.Error("the server's host has its old SVID")
	}
	select {
	case said := <-held:
		t.Errorf("the held connection has ended: %q", said)
	default:
	}
	var live []flow.Line
	if err := w.client.Debug(w.ctx(), "connections", &live); err != nil {
		t.Fatal(err)
	}
	if len(live) != 1 || live[0].FlowID != first[0].FlowID {
		t.Errorf("held: %v; before the rotations: %v", live, first)
	}

	id, _ := w.hostSVID(w.client)
	m.end(syscall.SIGTERM)
	within(t, held)
	w.rotateIntermediate()
	w.eventually("only the host that is away is behind, and named", func() bool {
		b := w.behind()
		return len(b) == 1 && b[0] == id+" away"
	})
	m.start()
	w.expect("after it came back", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
	w.eventually("it has caught up", func() bool { return len(w.behind()) == 0 })
	w.expect("at the end", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
}
