package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/fleet"
)

// While the controller is away, a proxy that starts again decides at once, by the
// last policy and with the last SVIDs, however it ended. When the controller is back,
// it is told what has changed.
func TestRestartWhileTheControllerIsAway(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)
	w.apply(allow("client-echo", "client", "echo", ""))
	managers := []*manager{w.newManager(w.client), w.newManager(w.server)}
	w.expect("before", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
	before := status(t, w.client)
	if err := w.fleet.ControllerDaemon().Stop(); err != nil {
		t.Fatal(err)
	}
	for _, way := range []struct {
		name string
		do   func(*manager)
	}{
		{"restart", (*manager).restart},
		{"reload", (*manager).reload},
		{"crash", func(m *manager) { m.end(syscall.SIGKILL); m.start() }},
		{"a second crash", func(m *manager) { m.end(syscall.SIGKILL); m.start() }},
	} {
		for _, m := range managers {
			way.do(m)
		}
		w.expect(way.name, w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
		if got := w.try(w.Client, "echo", "10.2.0.2:7002", "x"); got == "x" {
			t.Errorf("%s: %q: what policy denies is allowed", way.name, got)
		}
		if got := status(t, w.client); got != before {
			t.Errorf("%s: %+v, was %+v", way.name, got, before)
		}
	}
	if err := w.fleet.StartController(w.ctx()); err != nil {
		t.Fatal(err)
	}
	w.apply(strings.Replace(allow("client-echo", "client", "echo", ""), "verb: allow", "verb: deny", 1))
	w.settled(before.Generation)
	if got := w.try(w.Client, "echo", "10.2.0.2:7001", "hello"); got != "reset" && got != "refused" {
		t.Errorf("after a newer policy: %q", got)
	}
}

// settled waits until both proxies have a newer generation: the fleet does not see
// processes that it has not started.
func (w *world) settled(older uint64) {
	w.t.Helper()
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if status(w.t, w.client).Generation > older && status(w.t, w.server).Generation > older {
			return
		}
		if time.Now().After(end) {
			w.t.Fatal("the proxies have not heard of the newer generation")
		}
	}
}

// A killed proxy's sockets stay open: what connects in the gap waits and is served by
// the next process. Until then nothing passes, in no direction.
func TestConnectionsWaitForAKilledProxy(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)
	w.apply(allow("client-echo", "client", "echo", ""))
	for _, p := range []*fleet.Proxy{w.client, w.server} {
		t.Run(p.Host.Name(), func(t *testing.T) {
			m := w.newManager(p)
			w.expect("before", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
			m.end(syscall.SIGKILL)
			// Only what begins now: what the killed process had open ends by itself.
			capture, err := w.Router.Capture("any", "tcp port 7001 and tcp[tcpflags] & tcp-syn != 0 or tcp port 7001 and greater 100")
			if err != nil {
				t.Fatal(err)
			}
			const waiting = 8
			said := make(chan string, waiting)
			for range waiting {
				go func() { said <- w.try(w.Client, "echo", "10.2.0.2:7001", secret) }()
			}
			listener := "outbound-4"
			if p == w.server {
				listener = "inbound"
			}
			m.await("connections wait", func() bool { return m.backlog(listener) == waiting })
			if answered(t, capture) {
				t.Error("the server answered while a proxy was dead")
			}
			if n, err := capture.Packets(); p == w.client && (err != nil || n > 0) {
				t.Errorf("%d packets left the host without its proxy (%v)", n, err)
			}
			m.start()
			for range waiting {
				w.expect("a connection of the gap", <-said, secret)
			}
			if _, err := capture.Stop(); err != nil {
				t.Fatal(err)
			}
			if leaked, err := capture.Contains([]byte(secret)); err != nil || leaked {
				t.Errorf("the secret was on the wire: %v, %v", leaked, err)
			}
		})
	}
}

// backlog is how many connections wait to be accepted; the caller holds the lock.
func (m *manager) backlog(listener string) int {
	for _, s := range m.store {
		if s.name != listener {
			continue
		}
		raw, err := s.file.SyscallConn()
		if err != nil {
			m.t.Fatal(err)
		}
		var info *unix.TCPInfo
		_ = raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO) })
		if err != nil {
			m.t.Fatal(err)
		}
		return int(info.Unacked) // of a listener: the length of its queue
	}
	return -1
}

// A new process that cannot take over changes nothing; the next that can does.
func TestFailedReloadChangesNothing(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)
	w.apply(allow("client-echo", "client", "echo", ""))
	m := w.newManager(w.client)
	m.end(syscall.SIGTERM)
	m.configure("handover_timeout: 2s")
	good, err := os.ReadFile(m.config())
	if err != nil {
		t.Fatal(err)
	}
	program := m.program
	m.program = filepath.Join(m.dir, "symbolon-proxy")
	link := func(target string) {
		t.Helper()
		_ = os.Remove(m.program)
		if err := os.Symlink(target, m.program); err != nil {
			t.Fatal(err)
		}
	}
	link(program)
	m.start()
	first := m.pid()
	script := filepath.Join(m.dir, "hangs")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nexec sleep 1000\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name        string
		spoil, mend func()
	}{
		{"the configuration is wrong", func() { m.configure("on_exti: open") }, func() { _ = os.WriteFile(m.config(), good, 0o600) }},
		{"the program hangs", func() { link(script) }, func() { link(program) }},
		{"the program is not there", func() { _ = os.Remove(m.program) }, func() { link(program) }},
		{"it is another proxy by its configuration", func() {
			m.configure("")
			m.edit("controller: {address: \"10.9.0.2:7443\"", "controller: {address: \"10.9.0.2:7444\"")
		}, func() { _ = os.WriteFile(m.config(), good, 0o600) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			stop := w.workers(w.Client, 2, "10.2.0.2:7001")
			tc.spoil()
			failures := strings.Count(m.readLog(), "not handed over")
			if err := syscall.Kill(first, syscall.SIGUSR2); err != nil {
				t.Fatal(err)
			}
			m.await("the reload fails", func() bool { return strings.Count(m.readLog(), "not handed over") > failures })
			tc.mend()
			for _, counts := range stop() {
				if counts != "map[]" && !strings.HasPrefix(counts, "map[ok:") || strings.Contains(counts, " ") {
					t.Errorf("connections meanwhile: %s, want only ok", counts)
				}
			}
			if m.pid() != first {
				t.Error("another main process")
			}
			m.await("nothing is left of it", func() bool { return len(m.processes()) == 1 })
			var rules struct{ Drift []string }
			if err := m.proxy.Debug(t.Context(), "rules", &rules); err != nil || len(rules.Drift) > 0 {
				t.Errorf("the rules have changed: %v, %v", rules.Drift, err)
			}
		})
	}
	m.reload()
	w.expect("after a good one", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
}

func (m *manager) readLog() string {
	b, err := os.ReadFile(m.log.Name())
	if err != nil {
		m.t.Error(err)
	}
	return string(b)
}

// edit changes the configuration.
func (m *manager) edit(was, is string) {
	m.t.Helper()
	b, err := os.ReadFile(m.config())
	if err != nil || !strings.Contains(string(b), was) {
		m.t.Fatalf("%v: no %q in\n%s", err, was, b)
	}
	if err := os.WriteFile(m.config(), []byte(strings.Replace(string(b), was, is, 1)), 0o600); err != nil {
		m.t.Fatal(err)
	}
}

// After a reload the old process keeps its connections for its drain timeout, obeys
// policy until the last has ended, and cuts what is left.
func TestReloadDrains(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Client) // local connections: nobody but the one proxy can cut them
	w.apply(allow("client-echo", "client", "echo", ""))
	m := w.newManager(w.client)
	drain := func(timeout string) {
		t.Helper()
		m.configure("drain_timeout: " + timeout)
		m.reload()
		m.await("the one before has ended", func() bool { return len(m.processes()) == 1 })
	}
	hold := func() <-chan string {
		t.Helper()
		said := make(chan string, 1)
		go func() { said <- w.try(w.Client, "hold", "10.1.0.2:7002") }()
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			var live []flow.Line
			if err := m.proxy.Debug(t.Context(), "connections", &live); err == nil && len(live) == 1 && live[0].BytesReceived > 0 {
				return said
			}
			if time.Now().After(end) {
				t.Fatal("the connection is not open")
			}
		}
	}
	reason := func(why string) func(*flow.Line) bool {
		return func(l *flow.Line) bool { return strings.HasSuffix(l.Destination.Address, ":7002") && l.Reason == why }
	}
	t.Run("cut at the deadline", func(t *testing.T) {
		drain("2s")
		said := hold()
		m.reload()
		if n := len(m.processes()); n != 2 {
			t.Errorf("%d processes, want the old one and the new one", n)
		}
		w.expect("new connections meanwhile", w.try(w.Client, "echo", "10.1.0.2:7001", "hello"), "hello")
		w.expect("the held connection", <-said, "open\nreset")
		w.recorded(w.client, "the cut", reason("shutting-down"))
		m.await("the old one has ended", func() bool { return len(m.processes()) == 1 })
	})
	t.Run("cut by policy", func(t *testing.T) {
		m.edit("drain_timeout: 2s", "drain_timeout: 10m")
		m.reload()
		m.await("the one before has ended", func() bool { return len(m.processes()) == 1 })
		said := hold()
		m.reload()
		file := filepath.Join(m.dir, "deny.yaml")
		deny := strings.Replace(allow("client-echo", "client", "echo", ""), "verb: allow", "verb: deny", 1)
		if err := os.WriteFile(file, []byte(deny), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := w.fleet.Must(context.Background(), "policy", "apply", "-f", file); err != nil {
			t.Fatal(err)
		}
		w.expect("the held connection", <-said, "open\nreset")
		w.recorded(w.client, "the cut", reason("policy-changed"))
		m.await("the old one has ended", func() bool { return len(m.processes()) == 1 })
	})
}

// What was kept is of no use to a host that was forgotten or removed: it must enrol
// anew.
func TestForgottenHostIsNotRestored(t *testing.T) {
	w := newWorld(t)
	m := w.newManager(w.client)
	starts := func() int {
		return strings.Count(m.readLog(), "not enrolled") + strings.Count(m.readLog(), "already used")
	}
	t.Run("forgotten", func(t *testing.T) {
		m.end(syscall.SIGTERM)
		if err := w.client.Forget(w.ctx()); err != nil {
			t.Fatal(err)
		}
		m.launch()
		m.await("it is refused", func() bool { return starts() == 1 })
		if !strings.Contains(m.readLog(), "was removed from the keyring") {
			t.Error("the log does not say why")
		}
	})
	t.Run("removed", func(t *testing.T) {
		m := w.newManager(w.server)
		id := status(t, w.server).HostID
		if _, err := w.fleet.Must(w.ctx(), "host", "remove", id, "--yes"); err != nil {
			if _, err = w.fleet.Must(w.ctx(), "host", "remove", id); err != nil {
				t.Fatal(err)
			}
		}
		m.await("it ends", func() bool { return len(m.processes()) == 0 })
		for _, name := range m.names() {
			if strings.HasPrefix(name, "snapshot") {
				t.Errorf("%s is still kept", name)
			}
		}
		m.launch()
		m.await("it is refused", func() bool {
			return strings.Contains(m.readLog(), "already used")
		})
	})
}

// Keys are kept in memory and nowhere else: no file that any process of the proxy's
// has open is on a disk, but its records and its log.
func TestSnapshotIsSealedMemory(t *testing.T) {
	w := newWorld(t)
	m := w.newManager(w.client)
	m.mu.Lock()
	defer m.mu.Unlock()
	found := false
	for _, s := range m.store {
		if !strings.HasPrefix(s.name, "snapshot-") {
			continue
		}
		found = true
		target, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", s.file.Fd()))
		if err != nil || !strings.HasPrefix(target, "/memfd:") {
			t.Errorf("%s: %s %v", s.name, target, err)
		}
		if _, err := s.file.WriteAt([]byte("x"), 0); err == nil {
			t.Error("it can be written")
		}
		if err := s.file.Truncate(0); err == nil {
			t.Error("it can be cut")
		}
	}
	if !found {
		t.Error("no snapshot is kept")
	}
}
