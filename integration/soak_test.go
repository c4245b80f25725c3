package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/symbolon/symbolon/internal/fleet"
	"github.com/symbolon/symbolon/internal/netlab"
)

const (
	// soakEnv is how long the soak lasts; "make soak" sets it.
	soakEnv     = "SYMBOLON_SOAK"
	soakDefault = 10 * time.Second
	// soakSettle is how long what is left may take to end: tunnels wait 15 s for
	// another connection, conntrack entries soakTracking.
	soakSettle = 90 * time.Second
	// soakTracking, in seconds, is how long conntrack remembers what has ended. Too
	// short, and a late packet on a busy machine makes an entry of its own, which
	// keeps the next connection from that port from being redirected.
	soakTracking = "15"
)

// What may be more after the soak than before. Descriptors, goroutines and tracked
// connections are compared with a proxy that has served nothing yet, memory with one
// that is warm; so many MiB may be the heap's mood.
const (
	soakGoroutines  = 16
	soakDescriptors = 16
	soakConntrack   = 32
	soakMemory      = 24 << 20
	// The controller keeps the last records of every host in memory, up to a bound
	// that a short soak does not reach.
	soakMemoryController = 96 << 20
)

// Everything that connections take is given back: after minutes of connections of
// every kind, proxies and controller have as much as before.
func TestSoak(t *testing.T) {
	duration := soakDefault
	if s := os.Getenv(soakEnv); s != "" {
		var err error
		if duration, err = time.ParseDuration(s); err != nil {
			t.Fatalf("%s: %v", soakEnv, err)
		}
	}
	w := newWorld(t)
	for _, h := range []*netlab.Host{w.Client, w.Server} {
		for _, state := range []string{"time_wait", "close", "close_wait", "fin_wait", "last_ack", "syn_sent", "syn_recv"} {
			h.Sysctl("net.netfilter.nf_conntrack_tcp_timeout_"+state, soakTracking)
		}
	}
	w.echo(w.Server)
	w.apply(profile("other.service", "other") + allow("client-echo", "client", "echo", "") + `
---
kind: Service
namespace: /acme/prod
name: sink
addresses: {cidrs: [10.2.0.2/32], ports: [tcp/7005]}
`)
	cold := w.usage()
	w.churn(max(5*time.Second, duration/10))
	warm := w.usage()
	w.churn(duration)
	w.quiet(cold)
	after := w.usage()
	for who := range after {
		t.Logf("%s\n  cold  %v\n  warm  %v\n  after %v", who, cold[who], warm[who], after[who])
		most := uint64(soakMemory)
		if who == "controller" {
			most = soakMemoryController
		}
		if after[who].memory > warm[who].memory+warm[who].memory/4+most {
			t.Errorf("%s: %d MiB of memory, after the warm-up %d", who, after[who].memory>>20, warm[who].memory>>20)
		}
	}
}

// usage is what a process has, and its host's tracked connections.
type usage struct {
	goroutines, descriptors, conntrack int
	memory                             uint64 // resident, bytes
}

func (u usage) String() string {
	return fmt.Sprintf("%4d goroutines %4d descriptors %4d MiB %5d tracked connections", u.goroutines, u.descriptors, u.memory>>20, u.conntrack)
}

// excess is why u is more than before, beyond the bounds; "": it is not.
func (u usage) excess(before usage) string {
	switch {
	case u.goroutines > before.goroutines+soakGoroutines:
		return fmt.Sprintf("%d goroutines, before %d", u.goroutines, before.goroutines)
	case u.descriptors > before.descriptors+soakDescriptors:
		return fmt.Sprintf("%d descriptors, before %d", u.descriptors, before.descriptors)
	case u.conntrack > before.conntrack+soakConntrack:
		return fmt.Sprintf("%d tracked connections, before %d", u.conntrack, before.conntrack)
	}
	return ""
}

func (w *world) usage() map[string]usage {
	w.t.Helper()
	all := map[string]usage{"controller": w.processUsage(w.fleet.ControllerDaemon().Pid)}
	for _, p := range []*fleet.Proxy{w.client, w.server} {
		u := w.processUsage(p.Daemon().Pid)
		u.goroutines = w.goroutines(p)
		out, err := p.Host.Output(w.ctx(), "sh", "-c", countTracked)
		if err != nil {
			w.t.Fatal(err)
		}
		if u.conntrack, err = strconv.Atoi(strings.TrimSpace(out)); err != nil {
			w.t.Fatal(err)
		}
		all[p.Host.Name()] = u
	}
	return all
}

// countTracked lists the tracked connections, where the kernel can: that drops those
// which have expired, and which the kernel's own count has for a minute more.
const countTracked = "if [ -r /proc/net/nf_conntrack ]; then wc -l < /proc/net/nf_conntrack; else cat /proc/sys/net/netfilter/nf_conntrack_count; fi"

func (w *world) processUsage(pid int) (u usage) {
	w.t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		w.t.Fatal(err)
	}
	u.descriptors = len(fds)
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		w.t.Fatal(err)
	}
	pages, err := strconv.ParseUint(strings.Fields(string(b))[1], 10, 64)
	if err != nil {
		w.t.Fatal(err)
	}
	u.memory = pages * uint64(os.Getpagesize())
	return u
}

func (w *world) goroutines(p *fleet.Proxy) int { return int(w.metric(p, "go_goroutines")) }

// metric is one of the proxy's series, by its name and labels, over its socket.
func (w *world) metric(p *fleet.Proxy, series string) float64 {
	w.t.Helper()
	n, there := w.counted(p, series)
	if !there {
		w.t.Fatalf("no %s among the metrics", series)
	}
	return n
}

// counted is metric for a series that may not be there yet.
func (w *world) counted(p *fleet.Proxy, series string) (n float64, there bool) {
	w.t.Helper()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", p.Socket())
	}}
	req, err := http.NewRequestWithContext(w.ctx(), http.MethodGet, "http://proxy/metrics", nil)
	if err != nil {
		w.t.Fatal(err)
	}
	res, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	body := readAll(res.Body)
	for line := range strings.Lines(body) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				w.t.Fatal(err)
			}
			return n, true
		}
	}
	return 0, false
}

// quiet waits until nothing is left of the connections.
func (w *world) quiet(before map[string]usage) {
	w.t.Helper()
	for end := time.Now().Add(soakSettle); ; time.Sleep(200 * time.Millisecond) {
		left := ""
		for who, u := range w.usage() {
			if e := u.excess(before[who]); e != "" {
				left += who + ": " + e + "; "
			}
		}
		if left == "" {
			return
		}
		if time.Now().After(end) {
			w.t.Fatalf("not given back within %v: %s", soakSettle, left)
		}
	}
}

// churn makes connections of every kind for so long, and holds that each kind ended
// as it should.
func (w *world) churn(duration time.Duration) {
	w.t.Helper()
	file := filepath.Join(w.t.TempDir(), "enough")
	said := make(chan string, 2)
	for _, unit := range []string{"client.service", "other.service"} {
		go func() { said <- w.churnAs(unit, file, duration) }()
	}
	time.Sleep(duration) // the load is the point; what follows waits for conditions
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		w.t.Fatal(err)
	}
	for range 2 {
		for line := range strings.SplitSeq(<-said, "\n") {
			kind, ended, _ := strings.Cut(line, " ")
			want, known := churnEnds[kind]
			if !known || !regexp.MustCompile(`^map\[(`+want+`):\d+( (`+want+`):\d+)*\]$`).MatchString(ended) {
				w.t.Errorf("connections of the kind %q ended %s, want only %q", kind, ended, want)
			}
			w.t.Log(line)
		}
	}
}

func (w *world) churnAs(unit, file string, duration time.Duration) string {
	ctx, cancel := context.WithTimeout(context.Background(), duration+2*time.Minute)
	defer cancel()
	c := w.Client.Command(ctx, self(w.t))
	c.Env = append(os.Environ(), programEnv+"=churn "+unit+" "+file, "GORACE=atexit_sleep_ms=0")
	c.Unit = unit
	r, err := c.Result()
	if err != nil || r.ExitCode != 0 {
		w.t.Errorf("%s: %v, exit code %d\n%s", unit, err, r.ExitCode, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout)
}

// churnEnds is how the connections of each kind end, for the client.
var churnEnds = map[string]string{
	"reused": "ok", "service": "ok", "half-closed": "ok",
	"reset-by-server": "reset", "reset-by-client": "ok", "idle": "ok", "denied": "reset|refused",
}

// churnPause keeps the load to some hundred connections a second, which two
// processors shared with others can bear.
const churnPause = 10 * time.Millisecond

func init() {
	// churn UNIT FILE: connections of the unit's kinds until FILE is there; a line for
	// each kind says how they ended.
	clients["churn"] = func(a []string) (string, error) {
		const host = "10.2.0.2"
		plainEcho := func() (string, error) { b, err := echo(host+":7001", "ping"); return expectText(b, "ping", err) }
		kinds := map[string]func() (string, error){
			"reused":          plainEcho,
			"service":         churnService(host),
			"half-closed":     func() (string, error) { return churnHalfClosed(host) },
			"reset-by-server": func() (string, error) { return clients["line"]([]string{host + ":7003"}) },
			"reset-by-client": func() (string, error) { return churnReset(host) },
			"idle":            func() (string, error) { return churnIdle(host, a[1]) },
		}
		if a[0] != "client.service" {
			kinds = map[string]func() (string, error){"denied": plainEcho}
		}
		var mu sync.Mutex
		var lines []string
		var all sync.WaitGroup
		for kind, once := range kinds {
			all.Go(func() {
				counts := map[string]int{}
				for {
					said, err := once()
					if err != nil {
						said = outcome(err)
					}
					counts[said]++
					if _, err := os.Stat(a[1]); err == nil {
						break
					}
					time.Sleep(churnPause)
				}
				mu.Lock()
				defer mu.Unlock()
				lines = append(lines, fmt.Sprintf("%s %v", kind, counts))
			})
		}
		all.Wait()
		return strings.Join(lines, "\n"), nil
	}
}

// readAll reads to the end, which may come early: what is missing shows.
func readAll(r io.Reader) string {
	b, _ := io.ReadAll(r)
	return string(b)
}

func expectText(got, want string, err error) (string, error) {
	if err != nil {
		return "", err
	}
	if got != want {
		return "other:" + strconv.Quote(got), nil
	}
	return "ok", nil
}

// churnService connects through a Service, whose tunnels are not used again.
func churnService(host string) func() (string, error) {
	data := strings.Repeat("data", 10_000)
	return func() (string, error) {
		b, err := echo(host+":7005", data)
		if err == nil && len(b) == 64 { // the SHA-256, in hexadecimal
			return "ok", nil
		}
		return expectText(b, "a checksum", err)
	}
}

// churnHalfClosed lets the server end its direction first, and goes on writing.
func churnHalfClosed(host string) (string, error) {
	c, err := dial(host + ":7004")
	if err != nil {
		return "", err
	}
	defer c.Close()
	b := readAll(c)
	if _, err := c.Write([]byte("still writing\n")); err != nil {
		return "", err
	}
	return expectText(strings.TrimSpace(b), "half", nil)
}

// churnReset resets in the middle of an exchange.
func churnReset(host string) (string, error) {
	c, err := dial(host + ":7002")
	if err != nil {
		return "", err
	}
	defer c.Close()
	if _, err := c.Read(make([]byte, 1)); err != nil {
		return "", err
	}
	return "ok", c.SetLinger(0)
}

// churnIdle opens connections, leaves them alone for a while, and uses them again.
func churnIdle(host, file string) (string, error) {
	const many, idle = 20, 3 * time.Second
	var open []*net.TCPConn
	defer func() {
		for _, c := range open {
			_ = c.Close()
		}
	}()
	for range many {
		c, err := dial(host + ":7001")
		if err != nil {
			return "", err
		}
		open = append(open, c)
		if _, err := c.Write([]byte("a")); err != nil {
			return "", err
		}
	}
	for end := time.Now().Add(idle); time.Now().Before(end); time.Sleep(churnPause) {
		if _, err := os.Stat(file); err == nil {
			break
		}
	}
	var errs error
	for _, c := range open {
		_, err := c.Write([]byte("b"))
		errs = errors.Join(errs, err, c.CloseWrite())
		if got := readAll(c); got != "ab" {
			errs = errors.Join(errs, fmt.Errorf("idle: %q", got))
		}
	}
	return "ok", errs
}
