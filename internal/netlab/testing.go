package netlab

import (
	"os"
	"testing"
)

// logTail is how much of each daemon's log a failed test prints.
const logTail = 4 << 10

// Test makes a world for a test and closes it when the test ends. It calls
// [Require] for the tools. A failing building call ends the test; a failed test
// prints the tails of its daemons' logs. Anything that is left after closing
// (names, processes, threads, sockets in a host) fails the test, so close what
// Dial and Listen return.
func Test(t testing.TB, tools ...string) *World {
	t.Helper()
	Require(t, tools...)
	w, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	w.reporter = t
	t.Cleanup(func() {
		if t.Failed() {
			w.logTails(t)
		}
		// From here on errors belong to Close; a Fatal in a cleanup would skip it.
		w.reporter = silent{}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
		for _, leak := range w.awaitNoLeaks() {
			t.Errorf("netlab: leaked: %s", leak)
		}
	})
	return w
}

// Require fails the test, saying what to install, unless it runs as root and the
// tools are there. It does not skip: a test that did not run proves nothing.
func Require(t testing.TB, tools ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("netlab: needs root (network namespaces): run the tests with sudo")
	}
	if missing := Missing(tools...); len(missing) > 0 {
		t.Fatalf("netlab: missing programs: apt-get install %s", join(missing))
	}
}

func (w *World) logTails(t testing.TB) {
	t.Helper()
	w.mu.Lock()
	started := w.running
	w.mu.Unlock()
	printed := make(map[string]bool) // a unit that was started again has one log
	for _, d := range started {
		if printed[d.LogPath] {
			continue
		}
		printed[d.LogPath] = true
		log := d.Log()
		if len(log) > logTail {
			log = "..." + log[len(log)-logTail:]
		}
		t.Logf("log of %s on %s:\n%s", d.Unit, d.Host.name, log)
	}
}
