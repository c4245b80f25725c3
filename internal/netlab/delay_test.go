package netlab_test

import (
	"testing"
	"time"

	"github.com/symbolon/symbolon/internal/netlab"
)

// A connection over a link of so many milliseconds takes at least two round trips, and
// one again at most when the link is short again.
func TestDelay(t *testing.T) {
	w := netlab.Test(t, "iptables")
	a, b := w.Host("a"), w.Host("b")
	w.Link(a, b, []string{"10.0.0.1/24"}, []string{"10.0.0.2/24"})
	whoami(t, b, "10.0.0.2:80")
	ask(t, a, "10.0.0.2:80")
	const by = 50 * time.Millisecond
	var stops []func() error
	for _, h := range []*netlab.Host{a, b} {
		stop, err := h.Delay("eth0", by)
		if err != nil {
			t.Fatal(err)
		}
		stops = append(stops, stop)
	}
	for range 3 {
		start := time.Now()
		if got := ask(t, a, "10.0.0.2:80"); got != "10.0.0.1" {
			t.Fatalf("answered %q", got)
		}
		if took := time.Since(start); took < 4*by-by/10 {
			t.Errorf("two round trips took %v, want %v or more", took, 4*by)
		}
	}
	for _, stop := range stops {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}
	if got := ask(t, a, "10.0.0.2:80"); got != "10.0.0.1" {
		t.Errorf("afterwards answered %q", got)
	}
}
