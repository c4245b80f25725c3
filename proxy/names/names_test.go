package names

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// zone is what lookups find.
type zone struct {
	mu    sync.Mutex
	four  map[string]answer
	took  time.Duration
	slow  string // names with this prefix are never answered
	count map[string]int
}

func (z *zone) set(name string, ttl time.Duration, addrs ...string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	a := answer{ttl: ttl}
	for _, s := range addrs {
		a.addrs = append(a.addrs, netip.MustParseAddr(s))
	}
	z.four[name] = a
}

func (z *zone) fail(name string, err error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.four[name] = answer{err: err}
}

func (z *zone) lookup(ctx context.Context, name string) [2]answer {
	took := z.took
	if z.slow != "" && strings.HasPrefix(name, z.slow) {
		took = time.Hour
	}
	select {
	case <-ctx.Done():
		return failed(ctx.Err())
	case <-time.After(took):
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	z.count[name]++
	a, ok := z.four[name]
	if !ok {
		a = answer{err: errNone}
	}
	return [2]answer{a, {err: errNone}}
}

func (z *zone) asked(name string) int {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.count[name]
}

// inTime runs f with Names at work on a clock of its own.
func inTime(t *testing.T, f func(t *testing.T, n *Names, z *zone)) {
	synctest.Test(t, func(t *testing.T) {
		z := &zone{four: make(map[string]answer), count: make(map[string]int), took: 10 * time.Millisecond}
		n := New(Options{})
		n.lookup = z.lookup
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { n.Run(ctx); close(ended) }()
		defer func() { cancel(); <-ended }()
		f(t, n, z)
	})
}

func wantNames(t *testing.T, n *Names, addr, want string) {
	t.Helper()
	if got := strings.Join(n.Of(netip.MustParseAddr(addr)), " "); got != want {
		t.Errorf("%s has %q, want %q", addr, got, want)
	}
}

func TestNamesAreKeptFresh(t *testing.T) {
	inTime(t, func(t *testing.T, n *Names, z *zone) {
		z.set("a", 100*time.Second, "192.0.2.1", "192.0.2.2")
		z.set("b", 100*time.Second, "192.0.2.2")
		n.Want([]string{"a", "b"})
		n.Settled(t.Context())
		wantNames(t, n, "192.0.2.1", "a")
		wantNames(t, n, "192.0.2.2", "a b")
		wantNames(t, n, "::ffff:192.0.2.1", "a")
		wantNames(t, n, "192.0.2.3", "")
		time.Sleep(69 * time.Second)
		if got := z.asked("a"); got != 1 {
			t.Errorf("%d lookups before 70 %% of the TTL had passed", got)
		}
		z.set("a", 100*time.Second, "192.0.2.3")
		time.Sleep(22 * time.Second)
		if got := z.asked("a"); got != 2 {
			t.Errorf("%d lookups when 90 %% of the TTL had passed", got)
		}
		wantNames(t, n, "192.0.2.3", "a")
		wantNames(t, n, "192.0.2.1", "a") // for its own TTL, and a minute
		time.Sleep(70 * time.Second)
		wantNames(t, n, "192.0.2.1", "")
		wantNames(t, n, "192.0.2.3", "a")
		n.Want([]string{"b"})
		wantNames(t, n, "192.0.2.3", "")
		asked := z.asked("a")
		time.Sleep(time.Hour)
		if got := z.asked("a"); got != asked {
			t.Error("a name that nobody wants any more is looked up")
		}
		wantNames(t, n, "192.0.2.2", "b")
	})
}

// Lookups of many names do not come at once for ever: the times between two differ.
func TestLookupsAreSpread(t *testing.T) {
	inTime(t, func(t *testing.T, n *Names, z *zone) {
		var names []string
		for i := range 100 {
			names = append(names, fmt.Sprint("n", i))
			z.set(names[i], time.Hour, "192.0.2.1")
		}
		n.Want(names)
		n.Settled(t.Context())
		times := make(map[time.Time]int)
		for _, s := range n.statuses() {
			times[s.Next.Truncate(time.Second)]++
		}
		if len(times) < 50 {
			t.Errorf("100 names are due in %d different seconds", len(times))
		}
	})
}

func TestTheLastGoodAnswerStaysForABoundedTime(t *testing.T) {
	for _, x := range []struct {
		err   error
		stays time.Duration // after the TTL
	}{{errors.New("no server answers"), staleFailure}, {errNone, staleNegative}} {
		inTime(t, func(t *testing.T, n *Names, z *zone) {
			z.set("a", 100*time.Second, "192.0.2.1")
			n.Want([]string{"a"})
			n.Settled(t.Context())
			z.fail("a", x.err)
			time.Sleep(100*time.Second + x.stays - time.Second)
			wantNames(t, n, "192.0.2.1", "a")
			s := n.statuses()[0]
			if s.Error != x.err.Error() || len(s.Addresses) != 1 {
				t.Errorf("shown as %+v", s)
			}
			time.Sleep(2 * time.Second)
			wantNames(t, n, "192.0.2.1", "")
			// And it comes back, soon after it can.
			z.set("a", 100*time.Second, "192.0.2.4")
			time.Sleep(retryMax + time.Second)
			wantNames(t, n, "192.0.2.4", "a")
		})
	}
}

// An answer of no addresses is not undone by failures that follow it.
func TestAFailureDoesNotProlongWhatIsGone(t *testing.T) {
	inTime(t, func(t *testing.T, n *Names, z *zone) {
		z.set("a", 10*time.Second, "192.0.2.1")
		n.Want([]string{"a"})
		n.Settled(t.Context())
		z.fail("a", errNone)
		time.Sleep(10 * time.Second)
		z.fail("a", errors.New("no server answers"))
		time.Sleep(staleNegative + time.Second)
		wantNames(t, n, "192.0.2.1", "")
	})
}

func TestANameThatAClientAsksFor(t *testing.T) {
	inTime(t, func(t *testing.T, n *Names, z *zone) {
		z.set("x.example.com", 100*time.Second, "192.0.2.1")
		has := func(name, addr string) bool { return n.Has(t.Context(), "w", name, netip.MustParseAddr(addr)) }
		if has("x.example.com", "192.0.2.66") {
			t.Error("an address that the name does not have")
		}
		if !has("x.example.com", "192.0.2.1") || z.asked("x.example.com") != 1 {
			t.Error("an address that the name has")
		}
		wantNames(t, n, "192.0.2.1", "") // for who has not asked it is nobody's
		// Another answer may have come meanwhile, but nobody makes us ask more than once a second.
		for range 50 {
			has("x.example.com", "192.0.2.2")
		}
		z.set("x.example.com", 100*time.Second, "192.0.2.2")
		time.Sleep(askEvery)
		if !has("x.example.com", "192.0.2.2") || !has("x.example.com", "192.0.2.1") {
			t.Error("after a new answer")
		}
		if got := z.asked("x.example.com"); got != 2 {
			t.Errorf("%d lookups", got)
		}
		time.Sleep(4 * time.Minute)
		if len(n.statuses()) != 0 {
			t.Errorf("it is still known: %+v", n.statuses())
		}
		if has("nowhere.example.com", "192.0.2.1") {
			t.Error("a name that is not there")
		}
	})
}

// The attacks: a client that makes up names, many at a time, and one whose names are
// answered late or never.
func TestNamesThatClientsMakeUpAreBounded(t *testing.T) {
	inTime(t, func(t *testing.T, n *Names, z *zone) {
		z.took = 2 * time.Second
		n.Want([]string{"kept"})
		z.set("kept", time.Hour, "192.0.2.1")
		var clients sync.WaitGroup
		began := time.Now()
		for i := range 3 * maxAsked {
			clients.Go(func() { n.Has(t.Context(), "w", fmt.Sprintf("n%d.example.com", i), netip.MustParseAddr("192.0.2.9")) })
		}
		n.Settled(t.Context())
		wantNames(t, n, "192.0.2.1", "kept") // those who ask do not keep others from being looked up
		n.mu.RLock()
		known := len(n.known)
		n.mu.RUnlock()
		if known > maxAsked+1 {
			t.Errorf("%d names are known", known)
		}
		clients.Wait()
		if d := time.Since(began); d > askWait+z.took {
			t.Errorf("clients waited for %v", d)
		}
		n.mu.RLock()
		defer n.mu.RUnlock()
		if n.asked > maxAsked || n.asked != len(n.known)-1 {
			t.Errorf("%d names counted, %d known", n.asked, len(n.known))
		}
	})
}

// The attack: a workload asks for more names that are never answered than can be looked up
// at once, and for those that another one needs. That one does not wait for it, nor lose
// what is known of its own.
func TestOneWorkloadDoesNotKeepAnothersNamesFromBeingLookedUp(t *testing.T) {
	inTime(t, func(t *testing.T, n *Names, z *zone) {
		z.slow = "slow"
		addr := netip.MustParseAddr("192.0.2.1")
		for i := range 20 {
			z.set(fmt.Sprintf("good%d.example.com", i), time.Hour, addr.String())
		}
		good := func(name string) {
			t.Helper()
			began := time.Now()
			if !n.Has(t.Context(), "good", name, addr) || time.Since(began) > 2*z.took {
				t.Errorf("%s was found after %v, or not", name, time.Since(began))
			}
		}
		good("good0.example.com")
		var clients sync.WaitGroup
		for i := range 3 * maxAsked {
			clients.Go(func() { n.Has(t.Context(), "bad", fmt.Sprintf("slow%d.example.com", i), addr) })
		}
		time.Sleep(time.Millisecond)
		for i := range 20 {
			clients.Go(func() { n.Has(t.Context(), "bad", fmt.Sprintf("good%d.example.com", i), addr) })
		}
		time.Sleep(time.Millisecond)
		for i := range 20 {
			good(fmt.Sprintf("good%d.example.com", i))
		}
		if got := z.asked("good0.example.com"); got != 1 {
			t.Errorf("what was known had to be looked up %d times", got)
		}
		clients.Wait()
		n.mu.RLock()
		defer n.mu.RUnlock()
		if len(n.askers) != 0 || len(n.asks) != 0 {
			t.Errorf("left behind: %d who ask, %d turns", len(n.askers), len(n.asks))
		}
	})
}

func TestSettledDoesNotWaitForEver(t *testing.T) {
	inTime(t, func(t *testing.T, n *Names, z *zone) {
		z.took = time.Hour
		n.Want([]string{"a"})
		began := time.Now()
		n.Settled(t.Context())
		if d := time.Since(began); d < settleWait || d > settleWait+time.Second {
			t.Errorf("waited %v", d)
		}
	})
}

// A name has as many addresses as fit; the ones that were in no answer for the longest go.
func TestAddressesOfANameAreBounded(t *testing.T) {
	inTime(t, func(t *testing.T, n *Names, z *zone) {
		n.Want([]string{"a"})
		for i := range 10 {
			var addrs []string
			for j := range maxAddresses {
				addrs = append(addrs, fmt.Sprintf("198.51.%d.%d", i, j))
			}
			z.set("a", time.Second, addrs...)
			time.Sleep(1500 * time.Millisecond)
		}
		n.mu.RLock()
		defer n.mu.RUnlock()
		if got := len(n.known["a"].until); got > 2*maxAddresses || len(n.byAddr) != got {
			t.Errorf("%d addresses, %d by address", got, len(n.byAddr))
		}
		if _, ok := n.known["a"].until[netip.MustParseAddr("198.51.9.1")]; !ok {
			t.Error("the newest are not among them")
		}
	})
}
