package integration

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Ten restarts of either proxy, while eight workers connect without pause: not one
// connection is refused or reset, whichever way the sockets go from one process to
// the next.
func TestRestartWithoutLoss(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)
	w.apply(allow("client-echo", "client", "echo", ""))
	client, server := w.newManager(w.client), w.newManager(w.server)
	for name, restart := range map[string]func(*manager){"restart": (*manager).restart, "reload": (*manager).reload} {
		t.Run(name, func(t *testing.T) {
			stop := w.workers(w.Client, 8, "10.2.0.2:7001")
			defer stop()
			for i := range 10 {
				m := []*manager{client, server}[i%2]
				was := m.pid()
				restart(m)
				if m.pid() == was {
					t.Error("the same process")
				}
				w.expect("after a restart", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
			}
			for _, counts := range stop() {
				t.Log(counts)
				if !strings.HasPrefix(counts, "map[ok:") || strings.Contains(counts, " ") {
					t.Errorf("a worker's connections: %s, want only ok", counts)
				}
			}
			for _, m := range []*manager{client, server} {
				got := m.names()
				for i, n := range got {
					got[i] = strings.TrimRight(n, "01")
				}
				if diff := cmp.Diff([]string{"inbound", "outbound-4", "outbound-6", "snapshot-"}, got); diff != "" {
					t.Errorf("kept by the service manager of %s:\n%s", m.proxy.Host.Name(), diff)
				}
			}
		})
	}
}
