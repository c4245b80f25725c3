package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
)

// managerOf starts a Manager on a controller.
func managerOf(t *testing.T, c *testController) (*Manager, *ControllerSource) {
	t.Helper()
	s := NewControllerSource(c.client())
	s.SetBundle(acme, []*x509.Certificate{c.root.cert})
	m := NewManager(s)
	t.Cleanup(m.Close)
	return m, s
}

func mustGet(t *testing.T, m *Manager, w *Workload) *Credential {
	t.Helper()
	c, err := m.Get(t.Context(), w)
	if err != nil {
		t.Fatal(err)
	}
	if known, ok := m.Known(w); !ok || known != c {
		t.Errorf("known as %v, %t, want %v", known, ok, c)
	}
	return c
}

func pin(m *Manager, w *Workload) (unpin func()) {
	_, unpin = m.Pin(w)
	return unpin
}

// recorder is a subscriber.
type recorder struct {
	mu    sync.Mutex
	calls []*Credential
}

func (r *recorder) changed(_ Key, c *Credential) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, c)
}

func (r *recorder) take() []*Credential {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	out := r.calls
	r.calls = nil
	return out
}

func worker(n uint64) *Workload {
	return &Workload{Key: Key{CgroupID: n, UID: 1000}, Attributes: Attributes{{"proc.uid", "1000"}}}
}

func TestManagerSharesACredential(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		m, _ := managerOf(t, c)
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if _, err := m.Get(t.Context(), webWorkload); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n := c.count(); n != 1 {
			t.Errorf("%d requests for one workload", n)
		}
		// Another instance of the same facts is the same workload.
		same := *webWorkload
		same.Attributes = append(Attributes(nil), webWorkload.Attributes...)
		mustGet(t, m, &same)
		if n := c.count(); n != 1 {
			t.Errorf("%d requests", n)
		}
	})
}

func TestManagerRotatesAndTells(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		m, s := managerOf(t, c)
		var r recorder
		cancel := m.Subscribe(r.changed)
		first := mustGet(t, m, webWorkload)
		if got := r.take(); len(got) != 1 || got[0] != first {
			t.Fatalf("told %v", got)
		}
		s.Reissue()
		got := r.take()
		if len(got) != 1 || got[0] == first || mustGet(t, m, webWorkload) != got[0] {
			t.Errorf("told %v", got)
		}
		cancel()
		s.Reissue()
		if got := r.take(); len(got) != 0 {
			t.Errorf("told %v after cancelling", got)
		}
	})
}

func TestManagerNeverReturnsAnExpiredCredential(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		m, _ := managerOf(t, c)
		unpin := func() {}
		defer func() { unpin() }()
		var r recorder
		defer m.Subscribe(r.changed)()
		mustGet(t, m, webWorkload)
		unpin = pin(m, webWorkload)
		r.take()
		c.set(func() { c.fail = connect.NewError(connect.CodeUnavailable, errors.New("away")) })
		time.Sleep(23 * time.Hour)
		mustGet(t, m, webWorkload) // the outage stops nothing
		if got := r.take(); len(got) != 0 {
			t.Errorf("told %v", got)
		}
		time.Sleep(time.Hour)
		if known, ok := m.Known(webWorkload); ok {
			t.Errorf("known as %v", known)
		}
		cred, err := m.Get(t.Context(), webWorkload)
		if !errors.Is(err, ErrNoCredential) || connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("%v, %v", cred, err)
		}
		if got := r.take(); len(got) != 1 || got[0] != nil {
			t.Errorf("told %v, want the end", got)
		}
		c.set(func() { c.fail = nil })
		time.Sleep(maxRetry)
		mustGet(t, m, webWorkload)
	})
}

func TestManagerWaitsNoLongerThanAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		c.hang = true
		m, _ := managerOf(t, c)
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		before := time.Now()
		if _, err := m.Get(ctx, webWorkload); !errors.Is(err, ErrNoCredential) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		if d := time.Since(before); d != 2*time.Second {
			t.Errorf("waited %s", d)
		}
	})
}

func TestManagerRefusalIsKnownAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		c.fail = connect.NewError(connect.CodePermissionDenied, errors.New("no"))
		m, _ := managerOf(t, c)
		before := time.Now()
		for range 2 {
			if _, err := m.Get(t.Context(), webWorkload); !errors.Is(err, ErrNoCredential) || connect.CodeOf(err) != connect.CodePermissionDenied {
				t.Errorf("%v", err)
			}
		}
		if d := time.Since(before); d != 0 {
			t.Errorf("after %s", d)
		}
	})
}

func TestManagerForgetsTheIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		m, _ := managerOf(t, c)
		idle, live, busy := worker(1), worker(2), worker(3)
		for _, w := range []*Workload{idle, live, busy} {
			mustGet(t, m, w)
		}
		unpin := pin(m, live)
		for range 40 {
			time.Sleep(time.Minute)
			mustGet(t, m, busy)
		}
		keys := func() (out []uint64) {
			for _, s := range m.Snapshot() {
				out = append(out, s.Workload.Key.CgroupID)
			}
			return out
		}
		if got := keys(); len(got) != 2 || got[0] != 2 || got[1] != 3 {
			t.Errorf("kept %v, want 2 (live connections) and 3 (asked for)", got)
		}
		unpin()
		unpin() // counts once
		time.Sleep(idleTimeout + sweepInterval)
		if got := keys(); len(got) != 0 {
			t.Errorf("kept %v", got)
		}
		n := c.count()
		time.Sleep(24 * time.Hour)
		if c.count() != n {
			t.Error("a forgotten workload is still renewed")
		}
	})
}

func TestManagerNoticesOtherFacts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		m, _ := managerOf(t, c)
		mustGet(t, m, webWorkload)
		defer pin(m, webWorkload)()
		changed := &Workload{Key: webWorkload.Key, Attributes: webWorkload.Attributes.Union(Attributes{{"os.group", "ssl"}})}
		mustGet(t, m, changed)
		if n := c.count(); n != 2 {
			t.Fatalf("%d requests, want a second one", n)
		}
		if got := AttributesFromProto(c.requests[1].Attributes).Get("os.group"); got != "ssl" {
			t.Errorf("asked with os.group=%q", got)
		}
		if got := m.Snapshot(); len(got) != 1 || got[0].Pins != 1 {
			t.Errorf("%+v", got)
		}
	})
}

func TestManagerGetSurvivesReplacement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		s := NewControllerSource(c.client()) // no bundle yet: everybody waits
		m := NewManager(s)
		defer m.Close()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := m.Get(t.Context(), worker(1)); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		m.mu.Lock()
		m.drop(worker(1).Key)
		m.mu.Unlock()
		s.SetBundle(acme, []*x509.Certificate{c.root.cert})
		wg.Wait()
	})
}

// One user's thousands of programs push out his own.
func TestManagerIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		m, _ := managerOf(t, c)
		m.limit = 8
		mustGet(t, m, webWorkload)
		mustGet(t, m, worker(1))
		defer pin(m, worker(1))()
		for n := range uint64(20) {
			time.Sleep(time.Second)
			mustGet(t, m, worker(n+2))
		}
		got := m.Snapshot()
		if len(got) != 8 {
			t.Errorf("%d workloads, want 8", len(got))
		}
		kept := make(map[Key]bool)
		for _, s := range got {
			kept[s.Workload.Key] = true
		}
		if !kept[webWorkload.Key] {
			t.Error("another user's workload was pushed out")
		}
		if !kept[worker(1).Key] {
			t.Error("a workload with live connections was pushed out before idle ones")
		}
		if !kept[worker(21).Key] || kept[worker(2).Key] {
			t.Error("not the oldest was pushed out")
		}
	})
}

// keyRecorder is a subscriber to what is dropped.
type keyRecorder struct {
	mu   sync.Mutex
	keys []Key
}

func (r *keyRecorder) dropped(k Key) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.keys = append(r.keys, k)
}

func (r *keyRecorder) take() []Key {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	out := r.keys
	r.keys = nil
	return out
}

func TestManagerTellsWhatItDrops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		m, s := managerOf(t, c)
		m.limit = 2
		var r keyRecorder
		cancel := m.SubscribeDropped(r.dropped)

		mustGet(t, m, worker(1))
		time.Sleep(time.Second)
		mustGet(t, m, worker(2))
		defer pin(m, worker(2))()
		s.Reissue()
		changed := &Workload{Key: worker(2).Key, Attributes: Attributes{{"os.group", "ssl"}}}
		mustGet(t, m, changed)
		if got := r.take(); len(got) != 0 {
			t.Errorf("told of %v, which are in use", got)
		}
		mustGet(t, m, worker(3))
		if got := r.take(); !slices.Equal(got, []Key{worker(1).Key}) {
			t.Errorf("told of %v, want the one that was evicted", got)
		}
		time.Sleep(idleTimeout + sweepInterval)
		if got := r.take(); !slices.Equal(got, []Key{worker(3).Key}) {
			t.Errorf("told of %v, want the idle one", got)
		}
		cancel()
		mustGet(t, m, worker(4))
		mustGet(t, m, worker(5))
		if got := r.take(); len(got) != 0 {
			t.Errorf("told of %v after cancelling", got)
		}
		if len(m.leaving) != 0 {
			t.Errorf("%d are leaving for ever", len(m.leaving))
		}
	})
}

// TestManagerOrdersWhatItTells: of one workload, the end of its old life comes before
// anything of the new one, for listeners and for Get, however slow a listener is.
func TestManagerOrdersWhatItTells(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		m, _ := managerOf(t, c)
		var mu sync.Mutex
		var heard []string
		say := func(what string) {
			mu.Lock()
			defer mu.Unlock()
			heard = append(heard, what)
		}
		defer m.Subscribe(func(Key, *Credential) { say("changed") })()
		defer m.SubscribeDropped(func(Key) {
			time.Sleep(time.Minute)
			say("dropped")
		})()
		mustGet(t, m, webWorkload)
		synctest.Wait()
		m.mu.Lock()
		m.drop(webWorkload.Key)
		m.mu.Unlock()
		mustGet(t, m, webWorkload)
		say("answered")
		synctest.Wait()
		mu.Lock()
		got := strings.Join(heard, " ")
		mu.Unlock()
		if got != "changed dropped changed answered" && got != "changed dropped answered changed" {
			t.Errorf("heard %q", got)
		}
		time.Sleep(2 * idleTimeout)
		synctest.Wait()
	})
}

// TestManagerCloseDropsNothing: what ends with the program needs no call.
func TestManagerCloseDropsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, _ := managerOf(t, newController(t))
		var r keyRecorder
		m.SubscribeDropped(r.dropped)
		mustGet(t, m, webWorkload)
		m.Close()
		if got := r.take(); len(got) != 0 {
			t.Errorf("told of %v", got)
		}
	})
}

func TestManagerSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		m, _ := managerOf(t, c)
		cred := mustGet(t, m, webWorkload)
		c.set(func() { c.fail = connect.NewError(connect.CodeUnavailable, errors.New("away")) })
		defer pin(m, webWorkload)()
		time.Sleep(time.Hour)
		mustGet(t, m, webWorkload)
		got := m.Snapshot()
		if len(got) != 1 || got[0].Credential != cred || connect.CodeOf(got[0].Err) != connect.CodeUnavailable ||
			got[0].Workload != webWorkload || time.Since(got[0].Used) != 0 || time.Since(got[0].Since) > maxRetry+time.Second {
			t.Errorf("%+v", got)
		}
	})
}

func TestManagerClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		c.hang = true
		m, _ := managerOf(t, c)
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := m.Get(t.Context(), webWorkload); !errors.Is(err, ErrClosed) {
				t.Errorf("waiting: %v", err)
			}
		})
		synctest.Wait()
		m.Close()
		wg.Wait()
		if _, err := m.Get(t.Context(), worker(1)); !errors.Is(err, ErrClosed) {
			t.Errorf("afterwards: %v", err)
		}
		m.Close() // again: nothing
	})
}

// scripted is a source that says what a test wants.
type scripted struct {
	mu      sync.Mutex
	watches map[Key]chan Update
}

func (s *scripted) Watch(ctx context.Context, w *Workload) <-chan Update {
	s.mu.Lock()
	in := s.watches[w.Key]
	s.mu.Unlock()
	out := make(chan Update)
	go func() {
		defer close(out)
		for {
			select {
			case <-ctx.Done():
				return
			case u := <-in:
				select {
				case out <- u:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return out
}

// A source that takes an identity back is obeyed at once, and so is one that gives it
// again.
func TestManagerWithdraws(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		says := make(chan Update)
		m := NewManager(&scripted{watches: map[Key]chan Update{webWorkload.Key: says}})
		t.Cleanup(m.Close)
		var r recorder
		defer m.Subscribe(r.changed)()
		root := newRoot(t, "acme.example")
		cred := func() *Credential {
			svid, err := NewSVID([]*x509.Certificate{root.issue("spiffe://acme.example/web", nil, nil)}, newTestKey(t))
			if err != nil {
				t.Fatal(err)
			}
			return &Credential{SVID: svid}
		}
		first := cred()
		go func() { says <- Update{Credential: first} }()
		if got := mustGet(t, m, webWorkload); got != first {
			t.Fatalf("%v", got)
		}
		says <- Update{Credential: first, Err: errors.New("away")}
		if got := mustGet(t, m, webWorkload); got != first {
			t.Errorf("a source that is away took %v", got)
		}
		r.take()
		says <- Update{Err: ErrWithdrawn}
		if got := r.take(); len(got) != 1 || got[0] != nil {
			t.Errorf("told %v, want that there is none", got)
		}
		if known, ok := m.Known(webWorkload); ok {
			t.Errorf("known as %v", known)
		}
		if got, err := m.Get(t.Context(), webWorkload); !errors.Is(err, ErrNoCredential) || !errors.Is(err, ErrWithdrawn) {
			t.Errorf("got %v, %v", got, err)
		}
		if kept := m.Keep(); len(kept) != 0 {
			t.Errorf("%d kept", len(kept))
		}
		second := cred()
		says <- Update{Credential: second}
		if got := r.take(); len(got) != 1 || got[0] != second || mustGet(t, m, webWorkload) != second {
			t.Errorf("told %v", got)
		}
	})
}

// A workload that has ended is let go of, with whoever waits for it.
func TestManagerEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		says := make(chan Update)
		m := NewManager(&scripted{watches: map[Key]chan Update{webWorkload.Key: says}})
		t.Cleanup(m.Close)
		var dropped []Key
		defer m.SubscribeDropped(func(k Key) { dropped = append(dropped, k) })()
		for range 2 { // the second time it is asked for anew
			waiting := make(chan error)
			go func() {
				_, err := m.Get(t.Context(), webWorkload)
				waiting <- err
			}()
			says <- Update{Err: ErrEnded}
			if err := <-waiting; !errors.Is(err, ErrNoCredential) || !errors.Is(err, ErrEnded) {
				t.Errorf("who waited got %v", err)
			}
			synctest.Wait()
		}
		if len(dropped) != 2 || len(m.Snapshot()) != 0 {
			t.Errorf("dropped %v, %d left", dropped, len(m.Snapshot()))
		}
	})
}
