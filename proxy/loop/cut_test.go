package loop

import (
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// descriptors is how many this process has open.
func descriptors(t testing.TB) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// A relay ends once, whenever, by whomever and however often it is cut.
func TestCut(t *testing.T) {
	for name, cut := range map[string]func(l *link, s *Loops){
		"before":  func(l *link, s *Loops) { l.relay.Cut(); l.relay.Cut(); s.Add(l.relay) },
		"after":   func(l *link, s *Loops) { s.Add(l.relay); l.relay.Cut(); l.relay.Cut() },
		"at rest": func(l *link, s *Loops) { s.Add(l.relay); time.Sleep(5 * time.Millisecond); l.relay.Cut() },
		"beside": func(l *link, s *Loops) {
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(l.relay.Cut)
			}
			s.Add(l.relay)
			wg.Wait()
		},
		"by all": func(l *link, s *Loops) {
			s.Add(l.relay)
			_ = l.app.CloseWrite()
			go l.peer.Reset()
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(l.relay.Cut)
			}
			wg.Wait()
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, 1)
			for range 20 {
				for _, k := range []kind{{}, {tunnel: true}} {
					if k.tunnel && testing.Short() {
						continue
					}
					l := newLink(t, k)
					cut(l, s)
					if e := l.ended(t); !errors.Is(e.err, ErrCut) && !isReset(e.err) {
						t.Errorf("ends with %v", e.err)
					}
					l.relay.Cut() // harmless
					if _, err := l.app.Read(make([]byte, 1)); !isReset(err) {
						t.Errorf("the application reads %v", err)
					}
				}
			}
		})
	}
}

// A relay whose two sides take nothing is cut all the same.
func TestCutBehindBackpressure(t *testing.T) {
	each(t, func(t *testing.T, k kind) {
		l := begin(t, k)
		for _, c := range []conn{l.app, l.peer} {
			go func() {
				for {
					if _, err := c.Write(make([]byte, 100_000)); err != nil {
						return
					}
				}
			}()
		}
		still(t, "both are held back", func() uint64 { return l.relay.ToFar.Load() + l.relay.ToNear.Load() })
		l.relay.Cut()
		if e := l.ended(t); !errors.Is(e.err, ErrCut) {
			t.Errorf("ends with %v", e.err)
		}
	})
}

// Loops that stop cut what is on them, and what comes after.
func TestClose(t *testing.T) {
	before := descriptors(t)
	s, err := Start(2, nil)
	if err != nil {
		t.Fatal(err)
	}
	var all []*link
	for i := range 20 {
		l := newLink(t, kind{tunnel: i%5 == 0})
		s.Add(l.relay)
		all = append(all, l)
	}
	say(t, all[0].app, all[0].peer, "hello")
	late := newLink(t, kind{})
	var wg sync.WaitGroup
	for _, l := range all {
		wg.Go(l.relay.Cut)
	}
	wg.Go(s.Close)
	wg.Go(func() { s.Add(late.relay) })
	wg.Wait()
	later := newLink(t, kind{})
	s.Add(later.relay)
	later.relay.Cut()
	for _, l := range append(all, late, later) {
		if e := l.ended(t); !errors.Is(e.err, ErrCut) {
			t.Errorf("ends with %v", e.err)
		}
		_ = l.app.Close()
		_ = l.remote.Close()
	}
	s.Close() // harmless
	eventually(t, "no descriptor is left", func() bool { return descriptors(t) <= before })
}

// Many relays at once that come, talk, end, reset and are cut: each ends once, and
// nothing is left of any.
func TestChurn(t *testing.T) {
	total := 2000
	if testing.Short() {
		total = 200
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	total = min(total, int(limit.Cur)/6)
	before := descriptors(t)
	s, err := Start(2, nil)
	if err != nil {
		t.Fatal(err)
	}
	links := make([]*link, total)
	for i := range links {
		links[i] = newLink(t, kind{tunnel: i%20 == 0, framed: i%40 == 0, keep: i%80 == 0})
		s.Add(links[i].relay)
	}
	var wg sync.WaitGroup
	slots := make(chan struct{}, 100)
	for i, l := range links {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			defer func() { _ = l.app.Close(); _ = l.remote.Close() }()
			switch i % 5 {
			case 0, 1:
				n := rand.IntN(200_000)
				go func() { _ = pour(l.app, uint64(i), n, 10_000) }()
				go func() { _ = l.peer.CloseWrite() }()
				if err := drink(l.peer, uint64(i), n, 30_000); err != nil {
					t.Error(err)
				}
			case 2:
				_, _ = l.app.Write(make([]byte, rand.IntN(100_000)))
				_ = l.app.Reset()
			case 3:
				_, _ = io.WriteString(l.peer, "x")
				_ = l.peer.Reset()
			case 4:
				go l.relay.Cut()
				_, _ = l.app.Write(make([]byte, rand.IntN(10_000)))
			}
			select {
			case e := <-l.done:
				if e.kept != nil {
					e.kept.Close()
				}
				if (e.err == nil) != (i%5 < 2) {
					t.Errorf("relay %d (%d) ends with %v", i, i%5, e.err)
				}
			case <-time.After(patience):
				t.Errorf("relay %d (%d) does not end", i, i%5)
			}
		})
	}
	wg.Wait()
	for _, l := range s.loops {
		if n := l.relays.Load(); n != 0 {
			t.Errorf("%d relays are left", n)
		}
		l.mu.Lock()
		if len(l.free) != len(l.ends) {
			t.Errorf("%d of %d slots are free", len(l.free), len(l.ends))
		}
		l.mu.Unlock()
	}
	for _, l := range links {
		if len(l.done) > 0 {
			t.Error("done is called twice")
		}
	}
	s.Close()
	eventually(t, "no descriptor is left", func() bool { return descriptors(t) <= before })
}

// A socket that the kernel does not let us watch is this host's trouble, and said to be.
func TestUnwatchable(t *testing.T) {
	for name, side := range map[string]func(l *link) *Side{
		"near": func(l *link) *Side { return &l.near },
		"far":  func(l *link) *Side { return &l.far },
	} {
		l := newLink(t, kind{})
		s := side(l)
		_ = unix.Close(s.FD)
		null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0) // epoll_ctl(2): EPERM
		if err != nil {
			t.Fatal(err)
		}
		s.FD = null
		l.relay = New(l.near, l.far, func(err error, k *Tunnel) { l.done <- ending{err, k} })
		start(t, 1).Add(l.relay)
		var unwatched *WatchError
		if e := l.ended(t); !errors.As(e.err, &unwatched) || !errors.Is(e.err, unix.EPERM) {
			t.Errorf("%s: ends with %v", name, e.err)
		}
	}
}
