package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"golang.org/x/sys/unix"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
)

func limited(l Limits) func(*Options) {
	return func(o *Options) { o.Limits = l }
}

// hold opens a tunnel that stays open.
func (w *world) hold() *mtls.Conn {
	w.Helper()
	c, err := w.tunnel(w.web(), symbolonv1.Protection_PROTECTION_ENCRYPTED)
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { c.Close() })
	_ = c.SetReadDeadline(time.Now().Add(patience))
	speaks(w, c)
	return c
}

// refusedFor holds that the next record says which limit refused a connection.
func (w *world) refusedFor(limit string) {
	w.Helper()
	r := w.records.next()
	if r.Reason != "overloaded" || r.Outcome != "deny" || !strings.Contains(r.Detail, "limits."+limit+":") {
		w.Errorf("recorded %s %s (%s), want limits.%s", r.Outcome, r.Reason, r.Detail, limit)
	}
}

func (w *world) refusals(direction, limit string) float64 {
	return value(w.T, w.p.metrics.overloaded.WithLabelValues(direction, limit))
}

// value is a counter's.
func value(t *testing.T, c prometheus.Counter) float64 {
	t.Helper()
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetCounter().GetValue()
}

// beyond connects once more from the other host, and holds that it is reset.
func (w *world) beyond() {
	w.Helper()
	c, err := w.tryCall(netip.Addr{}, w.app.addr)
	if err == nil {
		_, err = ended(w, c)
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		w.Errorf("one more: %v, want a reset", err)
	}
}

// All connections together are bounded. Before the first is refused the proxy says
// that it is not ready; those that are open stay, and when some have ended it takes
// new ones.
func TestConnectionLimit(t *testing.T) {
	l := DefaultLimits
	l.Connections, l.WorkloadShare = 20, 100
	w := newWorld(t, limited(l))
	var open []*mtls.Conn
	for range 17 {
		open = append(open, w.hold())
	}
	if err := w.p.Ready(); err != nil {
		t.Errorf("at 17 of 20: %v", err)
	}
	open = append(open, w.hold())
	eventually(t, "it is not ready", func() bool { return w.p.Ready() != nil })
	if err := w.p.Ready(); !strings.Contains(err.Error(), "limits.connections: 18 of 20") {
		t.Errorf("the reason: %v", err)
	}
	open = append(open, w.hold(), w.hold())
	w.beyond()
	w.refusedFor(limitConnections)
	w.beyond() // so soon, it is counted only
	if n := w.refusals("inbound", limitConnections); n != 2 {
		t.Errorf("%v refusals are counted, want 2", n)
	}
	w.clock.advance(2 * time.Second)
	w.beyond()
	if r := w.records.next(); !strings.Contains(r.Detail, "1 more") {
		t.Errorf("the next record does not tell of those between: %s", r.Detail)
	}
	for _, c := range open {
		speaks(t, c)
	}
	for _, c := range open[:3] {
		c.Close()
		w.records.next()
	}
	// 17 of 20 are 85 %: it stays not ready down to 80 %.
	eventually(t, "three have ended", func() bool { return w.p.open.Load() == 17 })
	time.Sleep(2 * strainEvery)
	if w.p.Ready() == nil {
		t.Error("ready again too soon: it would go back and forth")
	}
	for _, c := range open[3:8] {
		c.Close()
		w.records.next()
	}
	eventually(t, "it is ready again", func() bool { return w.p.Ready() == nil })
	w.good()
	for _, c := range open[8:] {
		c.Close()
	}
	eventually(t, "every place is given back", func() bool { return w.p.open.Load() == 0 })
}

// A tunnel that waits for its next connection holds its place, and gives it back.
func TestReusedTunnelHoldsOnePlace(t *testing.T) {
	w := newWorld(t)
	t1 := w.firstUse()
	if n := w.p.open.Load(); n != 1 {
		t.Errorf("%d places are taken by one tunnel that waits", n)
	}
	w.p.seats.mu.Lock()
	if n := len(w.p.seats.taken); n != 0 {
		t.Errorf("%d workloads have connections, while none is open", n)
	}
	w.p.seats.mu.Unlock()
	t1.Close()
	eventually(t, "the place is given back", func() bool { return w.p.open.Load() == 0 })
}

// Those that wait for their authorization are bounded in all and by source, whatever
// the others do.
func TestHandshakeLimits(t *testing.T) {
	l := DefaultLimits
	l.Handshakes, l.HandshakesPerSource = 6, 4
	w := newWorld(t, limited(l), unhurried)
	wait := func(from string, n int) {
		t.Helper()
		before := w.p.strangers.size()
		for range n {
			w.callFrom(netip.MustParseAddr(from), w.app.addr)
		}
		eventually(t, "they wait", func() bool { return w.p.strangers.size() == before+n })
	}
	wait(other4, 4)
	w.beyond()
	w.refusedFor(limitPerSource)
	wait(otherB, 2)
	c, err := w.tryCall(netip.MustParseAddr(otherB), w.app.addr)
	if err == nil {
		_, err = ended(t, c)
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("one more in all: %v, want a reset", err)
	}
	w.refusedFor(limitHandshakes)
	eventually(t, "it is not ready", func() bool { return w.p.Ready() != nil })
}

// One user's connections that wait do not take the others' places.
func TestHandshakesPerUser(t *testing.T) {
	const slow, other = 23011, 23012
	l := DefaultLimits
	l.HandshakesPerUser = 3
	entered, release := make(chan struct{}), make(chan struct{})
	w := newWorld(t, limited(l), func(o *Options) {
		o.Credentials.(*credentials).stall = func(ctx context.Context, uid string) {
			if uid != fmt.Sprint(slow) {
				return
			}
			entered <- struct{}{}
			select {
			case <-release:
			case <-ctx.Done():
			}
		}
	})
	w.creds.set(fmt.Sprint(other), w.web())
	ended := make(chan struct{}, l.HandshakesPerUser)
	for range l.HandshakesPerUser {
		go func() { _, _ = asUser(t, slow, w.app.addr, "x"); ended <- struct{}{} }()
		within(t, entered, "a search for a credential")
	}
	if got, _ := asUser(t, slow, w.app.addr, "x"); got != "" {
		t.Errorf("one more of the user: %q", got)
	}
	w.refusedFor(limitPerUser)
	if n := w.refusals("outbound", limitPerUser); n != 1 {
		t.Errorf("%v refusals are counted, want 1", n)
	}
	if got, err := asUser(t, other, w.app.addr, "hello"); got != "hello" {
		t.Errorf("another user: %q, %v", got, err)
	}
	close(release)
	for range l.HandshakesPerUser {
		within(t, ended, "the end of a client")
	}
}

// One workload cannot take every place: another one gets through.
func TestWorkloadShare(t *testing.T) {
	const web = 23021
	l := DefaultLimits
	l.Connections, l.WorkloadShare = 20, 50
	w := newWorld(t, limited(l))
	w.creds.set(fmt.Sprint(web), w.web())
	var open []*mtls.Conn
	for range 10 { // half of all: as many as are free then
		open = append(open, w.hold())
	}
	_, err := w.tunnel(w.web(), symbolonv1.Protection_PROTECTION_ENCRYPTED)
	if denied := (*mtls.DeniedError)(nil); !errors.As(err, &denied) || denied.Peer != symbolonv1.Reason_REASON_OVERLOADED {
		t.Errorf("one more of the same workload: %v, want the peer's reason", err)
	}
	w.refusedFor(limitShare)
	if n := w.refusals("inbound", limitShare); n != 1 {
		t.Errorf("%v refusals are counted, want 1", n)
	}
	// What another workload calls is ours again: its own place it has.
	if _, err := asUser(t, web, netip.MustParseAddrPort("10.1.0.1:9"), "x"); err != nil {
		t.Log(err)
	}
	if r := w.records.next(); r.Reason == "overloaded" {
		t.Errorf("another workload: %s (%s)", r.Reason, r.Detail)
	}
	open[0].Close()
	w.records.next()
	eventually(t, "the place is given back", func() bool { return w.p.open.Load() == 9 })
	w.good()
	for _, c := range open[1:] {
		c.Close()
	}
	eventually(t, "all places are given back", func() bool {
		w.p.seats.mu.Lock()
		defer w.p.seats.mu.Unlock()
		return len(w.p.seats.taken) == 0
	})
}

// What each of n workloads that want all gets is the same, and something is left.
func TestSeats(t *testing.T) {
	for _, tc := range []struct{ share, workloads, each int }{
		{50, 1, 500}, {80, 1, 800}, {50, 2, 333}, {50, 4, 200}, {80, 3, 307}, {100, 1, 1000},
	} {
		var s seats
		l := Limits{Connections: 1000, WorkloadShare: tc.share}
		open := 0
		got := make([]int, tc.workloads)
		for range 2 * l.Connections {
			for i := range got {
				if open == l.Connections {
					continue
				}
				_, ok := s.take(identity.Key{UID: uint32(i)}, l, int64(open+1))
				if !ok {
					s.leave(identity.Key{UID: uint32(i)})
					continue
				}
				open++
				got[i]++
			}
		}
		for i, n := range got {
			if n < tc.each-1 || n > tc.each+1 {
				t.Errorf("share %d: workload %d of %d got %d, want %d", tc.share, i+1, tc.workloads, n, tc.each)
			}
		}
	}
}

// Before the process runs out of descriptors, connections are refused with that
// reason; accept never fails.
func TestDescriptorLimit(t *testing.T) {
	used, err := countDescriptors()
	if err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil || used < len(files)-2 || used > len(files)+2 {
		t.Fatalf("%d descriptors, of which %d are listed (%v)", used, len(files), err)
	}
	limit := 0
	w := newWorld(t, func(o *Options) {
		used, _ := countDescriptors()
		limit = used + 150
		o.Descriptors = limit
	})
	var open []*mtls.Conn
	for w.p.descriptors.sample()+perConnection <= limit*(100-descriptorReserve)/100 && len(open) < 100 {
		open = append(open, w.hold())
	}
	if len(open) < 5 || len(open) == 100 {
		t.Fatalf("%d connections fill %d descriptors", len(open), limit)
	}
	w.beyond()
	w.refusedFor(limitDescriptors)
	eventually(t, "it is not ready", func() bool { return w.p.Ready() != nil })
	if err := w.p.Ready(); !strings.Contains(err.Error(), "limits.descriptors") {
		t.Errorf("the reason: %v", err)
	}
	for _, c := range open {
		speaks(t, c)
		c.Close()
		w.records.next()
	}
	eventually(t, "it is ready again", func() bool { return w.p.Ready() == nil })
	w.good()
	if n := value(t, w.p.metrics.acceptErrors); n != 0 {
		t.Errorf("accept failed %v times", n)
	}
}

// Where descriptors do run out, accept waits instead of spinning, the proxy says that
// it is not ready, and it comes back by itself.
func TestOutOfDescriptors(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Descriptors = 1 << 30 }) // it does not see it coming
	c, err := w.tunnel(w.web(), encrypted)                         // it runs, with all the descriptors that it needs for that
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	w.records.next()
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	// The clients' sockets are opened before the limit falls, and connected after.
	var fds []int
	if err := inOther(func() error {
		for range 4 {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			fds = append(fds, fd)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	highest, err := unix.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Close(highest) // the lowest that is free: none is below the limit then
	low := was
	low.Cur = uint64(highest)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	back := func() { _ = unix.Setrlimit(unix.RLIMIT_NOFILE, &was) }
	defer back()
	for _, fd := range fds {
		defer unix.Close(fd)
		if err := unix.Connect(fd, &unix.SockaddrInet4{Port: appPort, Addr: w.app.addr.Addr().As4()}); err != nil {
			t.Fatal(err)
		}
	}
	begin := time.Now()
	eventually(t, "it is not ready", func() bool { return w.p.Ready() != nil })
	if err := w.p.Ready(); !strings.Contains(err.Error(), "cannot be accepted") {
		t.Errorf("the reason: %v", err)
	}
	time.Sleep(500 * time.Millisecond)
	// 5 ms, 10 ms, ...: so many tries in that time, and again whenever a descriptor was
	// free for a moment and a client got in.
	if n, most := value(t, w.p.metrics.acceptErrors), float64(len(fds)+1)*(8+float64(time.Since(begin)/acceptPauseMax)); n < 1 || n > most {
		t.Errorf("accept failed %v times in %v, at most %v are waited out", n, time.Since(begin), most)
	}
	back()
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
	for range fds {
		w.records.next()
	}
	w.good()
	w.clock.advance(acceptTrouble)
	eventually(t, "it is ready again", func() bool { return w.p.Ready() == nil })
}

// What a stranger can make the host buffer is bounded by one record: its bytes stay
// in the socket while it is waited for, and who sends more is no tunnel.
func TestStrangersBytesAreBounded(t *testing.T) {
	w := newWorld(t, unhurried)
	const most = 5 + 16<<10
	const hello = "\x16\x03\x01\x40\x00\x01\x00\x3f\xfc\x03\x03" // of 16 KiB
	c := w.call(w.app.addr)
	for _, b := range [][]byte{[]byte(hello), make([]byte, most-len(hello)-1)} {
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all of it waits", func() bool { return receiveQueue(t, c.LocalAddr().String()) == most-1 })
	eventually(t, "it is looked at", func() bool { return w.p.strangers.size() == 1 })
	// However fast the rest comes, the connection ends.
	_, werr := c.Write(make([]byte, 1<<20)) // it may hear of the reset first
	if _, err := ended(t, c); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(werr, syscall.ECONNRESET) {
		t.Errorf("a client that sends on: %v, want a reset", err)
	}
	if r := w.records.next(); r.Reason != "peer-unprotected" {
		t.Errorf("recorded %s (%s)", r.Reason, r.Detail)
	}
	if n := receiveQueue(t, c.LocalAddr().String()); n != 0 {
		t.Errorf("%d bytes are left", n)
	}
}

// receiveQueue is how many bytes the kernel holds that came from a client.
func receiveQueue(t *testing.T, client string) int {
	t.Helper()
	port := client[strings.LastIndexByte(client, ':')+1:]
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	total := 0
	for _, file := range []string{"/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"} {
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		s := bufio.NewScanner(f)
		for s.Scan() {
			fields := strings.Fields(s.Text())
			if len(fields) < 5 || !strings.HasSuffix(fields[2], fmt.Sprintf(":%04X", n)) {
				continue
			}
			_, rx, _ := strings.Cut(fields[4], ":")
			q, err := strconv.ParseInt(rx, 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			total += int(q)
		}
		_ = f.Close()
	}
	return total
}
