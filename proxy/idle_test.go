package proxy

import (
	"io"
	"net"
	"testing"
	"time"
)

func TestRest(t *testing.T) {
	limit := Idle{Open: time.Minute, HalfClosed: 10 * time.Second}
	start := time.Unix(1000, 0)
	type look struct {
		after time.Duration
		bytes uint64
		half  bool
		want  bool
	}
	for name, looks := range map[string][]look{
		"from the first look on":        {{0, 5, false, false}, {59 * time.Second, 5, false, false}, {60 * time.Second, 5, false, true}},
		"every byte counts":             {{0, 5, false, false}, {59 * time.Second, 6, false, false}, {118 * time.Second, 6, false, false}, {119 * time.Second, 6, false, true}},
		"half a connection rests less":  {{0, 5, true, false}, {10 * time.Second, 5, true, true}},
		"from the moment it is half":    {{0, 5, false, false}, {50 * time.Second, 5, true, false}, {59 * time.Second, 5, true, false}, {60 * time.Second, 5, true, true}},
		"half, and moving all the same": {{0, 5, true, false}, {9 * time.Second, 6, true, false}, {18 * time.Second, 7, true, false}},
	} {
		var r rest
		for i, l := range looks {
			if got := r.tooLong(limit, l.bytes, l.half, start.Add(l.after)); got != l.want {
				t.Errorf("%s: look %d: too long %v, want %v", name, i, got, l.want)
			}
		}
	}
	var r rest
	for i := range 3 {
		if r.tooLong(DefaultIdle, 1, false, start.Add(time.Duration(i)*1000*time.Hour)) {
			t.Error("by default an open connection does not rest for as long as it likes")
		}
	}
}

// Each is looked at in its turn, as often as the others, and nobody whose turn it is not.
func TestRound(t *testing.T) {
	const n = 100
	var r table
	now := time.Unix(1000, 0)
	all := make([]*live, n)
	looks := make(map[*live]int)
	for i := range all {
		all[i] = &live{moved: func() (uint64, bool) { return 0, false }}
		r.mu.Lock()
		r.registerLocked(all[i], now)
		r.mu.Unlock()
		now = now.Add(time.Second)
	}
	gone := map[*live]bool{}
	for _, i := range []int{0, 7, 8, 50, n - 1} {
		r.remove(all[i])
		gone[all[i]] = true
	}
	for second := range 1000 {
		due := r.look(now, n*time.Second)
		if len(due) > 1 {
			t.Fatalf("second %d: %d at once", second, len(due))
		}
		for _, l := range due {
			looks[l]++
		}
		now = now.Add(time.Second)
	}
	for i, l := range all {
		if got := looks[l]; gone[l] != (got == 0) || !gone[l] && got != 10 {
			t.Errorf("connection %d was looked at %d times in ten rounds", i, got)
		}
	}
	if due := r.look(now.Add(n*time.Second), n*time.Second); len(due) != n-len(gone) {
		t.Errorf("%d of %d are looked at", len(due), n-len(gone))
	}
	for _, l := range all {
		if !gone[l] {
			r.remove(l)
		}
	}
	if r.round != (round{}) {
		t.Error("somebody is left")
	}
}

func TestIdleEvery(t *testing.T) {
	for want, idle := range map[time.Duration]Idle{
		time.Hour / 32:   DefaultIdle,
		2 * time.Minute:  {Open: 64 * time.Minute},
		time.Minute:      {Open: 64 * time.Minute, HalfClosed: 32 * time.Minute},
		30 * time.Second: {Open: 16 * time.Minute, HalfClosed: time.Hour},
		sweepEvery:       {Open: 5 * time.Second},
	} {
		if got := idle.every(); got != want {
			t.Errorf("%+v: every %v, want %v", idle, got, want)
		}
	}
}

// A connection of which one half has been forgotten is cut, one that both ends keep
// is not.
func TestForgottenHalf(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Idle = Idle{HalfClosed: time.Minute} })
	forgotten := make(chan struct{})
	defer close(forgotten)
	w.app.handle(func(c *net.TCPConn) { _, _ = io.Copy(c, c); <-forgotten })
	defer w.app.handle(w.app.echo)
	kept, err := w.tunnel(w.web(), encrypted)
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	half, err := w.tunnel(w.web(), encrypted)
	if err != nil {
		t.Fatal(err)
	}
	defer half.Close()
	speaks(t, kept)
	speaks(t, half)
	if err := half.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	_ = half.SetReadDeadline(time.Now().Add(patience))
	go func() { _, err := io.ReadAll(half); ended <- err }()
	for cut := false; !cut; {
		w.clock.advance(time.Minute)
		select {
		case err := <-ended:
			if err == nil {
				t.Error("the forgotten half ended cleanly")
			}
			cut = true
		case <-time.After(2 * sweepEvery):
		}
	}
	if r := w.records.next(); r.Reason != "timed-out" {
		t.Errorf("recorded %s %s (%s)", r.Outcome, r.Reason, r.Detail)
	}
	speaks(t, kept)
}
