package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"math"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/symbolon/symbolon/internal/netlab"
)

// Every kind of load against the backend, over loopback: what they count is what
// went through.
func TestLoads(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- serveBackend(ctx, listener) }()
	defer func() { cancel(); <-served }()
	for kind, work := range loads {
		t.Run(kind, func(t *testing.T) {
			ready := 0
			l := &load{ctx: t.Context(), target: listener.Addr().String(), conns: 3, window: 20 * time.Millisecond, ready: func() error { ready++; return nil }}
			defer l.close()
			r, err := work(l)
			if err != nil {
				t.Fatal(err)
			}
			bulk, asks := kind == "up" || kind == "down" || kind == "mixed", kind != "up" && kind != "down"
			if ready != 1 || r.Seconds <= 0 || r.Errors != 0 || (r.Bytes >= piece) != bulk || (r.Requests > 0) != asks {
				t.Errorf("ready %d times, result %+v", ready, r)
			}
			if (kind == "echo" || kind == "connect" || kind == "mixed") && (r.P50 <= 0 || r.P99 < r.P50) {
				t.Errorf("percentiles %+v", r)
			}
		})
	}
}

func TestLoadWithoutBackend(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	target := listener.Addr().String()
	listener.Close()
	for kind, work := range loads {
		l := &load{ctx: t.Context(), target: target, conns: 1, ready: func() error { t.Errorf("%s is ready", kind); return nil }}
		if r, err := work(l); err == nil {
			t.Errorf("%s: %+v", kind, r)
		}
	}
}

// The pair that stands for plain Go: both halves, with certificates from files, and
// nothing for a client that shows none.
func TestRelayPair(t *testing.T) {
	c, err := newCertificates(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	app, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 3)
	go func() { served <- serveBackend(ctx, app) }()
	client, server := freePort(t), freePort(t)
	go func() {
		served <- relayMain(ctx, []string{"-listen", server, "-target", app.Addr().String(), "-ca", c.CA, "-cert", c.ServerCert, "-key", c.ServerKey})
	}()
	go func() {
		served <- relayMain(ctx, []string{"-client", "-listen", client, "-target", server, "-ca", c.CA, "-cert", c.ClientCert, "-key", c.ClientKey})
	}()
	defer func() {
		cancel()
		for range 3 {
			<-served
		}
	}()
	waitFor(t, client)
	waitFor(t, server)
	l := &load{ctx: t.Context(), target: client, conns: 2, window: time.Millisecond, ready: func() error { return nil }}
	if r, err := l.connect(); err != nil || r.Errors > 0 || r.Requests == 0 {
		t.Errorf("through the pair: %+v, %v", r, err)
	}
	l.target = server
	if r, err := l.connect(); err == nil {
		t.Errorf("a client without TLS got %+v", r)
	}
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func waitFor(t *testing.T, address string) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		c, err := net.Dial("tcp", address)
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func TestSinkCountsSinceLastQuestion(t *testing.T) {
	ours, theirs := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- serveConn(theirs) }()
	if _, err := ours.Write([]byte{opSink}); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, 5, 1000} {
		block := append(binary.BigEndian.AppendUint32(nil, uint32(n)), make([]byte, n)...)
		if n > 0 {
			block = append(block, 0, 0, 0, 0)
		}
		if _, err := ours.Write(block); err != nil {
			t.Fatal(err)
		}
		var count [8]byte
		if _, err := io.ReadFull(ours, count[:]); err != nil {
			t.Fatal(err)
		}
		if got := binary.BigEndian.Uint64(count[:]); got != uint64(n) {
			t.Errorf("%d bytes counted, want %d", got, n)
		}
	}
	ours.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestParseStat(t *testing.T) {
	line := "42 (a) (b c) S 7 1 1 0 -1 4194560 1 2 3 4 11 22 33 44 20 0 1 0 5 6 7"
	pid, p, err := parseStat([]byte(line))
	if err != nil || pid != 42 || p != (process{parent: 7, own: 33, reaped: 77}) {
		t.Errorf("%d %+v %v", pid, p, err)
	}
	for _, bad := range []string{"", "42 a S 7", "42 (a) S 7", "x (a) S 7 1 1 0 -1 0 1 2 3 4 11 22 33 44"} {
		if _, p, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q: %+v", bad, p)
		}
	}
}

func TestSnapshot(t *testing.T) {
	s := snapshot{
		1: {parent: 0, own: 100, reaped: 1000},
		2: {parent: 1, own: 200}, 3: {parent: 2, own: 300, reaped: 5}, 4: {parent: 3, own: 400},
		9: {parent: 1, own: 50},
	}
	if got := s.cpu(2); got != 9.05 {
		t.Errorf("a tree's CPU: %v s", got)
	}
	if got := s.others(2); got != 11.5 {
		t.Errorf("all others' CPU: %v s", got)
	}
	now, err := processes()
	if err != nil {
		t.Fatal(err)
	}
	kb, fds, err := now.footprint(os.Getpid())
	if err != nil || kb < 1000 || fds < 3 {
		t.Errorf("our own footprint: %v KB, %v descriptors, %v", kb, fds, err)
	}
	if _, err := parseRss("Pss: 3 kB\n"); err == nil {
		t.Error("no Rss, no error")
	}
}

func TestServerHello(t *testing.T) {
	hello := func(extensions ...byte) []byte {
		b := append(bytes.Repeat([]byte{0}, beforeSessionID), 2, 'i', 'd', 0x13, 0x02, 0)
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(extensions))), extensions...)
		b[0], b[5] = recordHandshake, helloServer
		return b
	}
	versions, psk := []byte{0, 43, 0, 2, 3, 4}, []byte{0, 41, 0, 2, 0, 0}
	streams := []netlab.Stream{
		{Data: hello(versions...)}, {Data: hello(append(versions, psk...)...)}, {Data: hello(psk...)},
		{Data: hello(append(versions, psk...)...)[:60]}, // cut off
		{Data: []byte("GET / HTTP/1.0\r\n\r\n")}, {},
	}
	all, resumed := handshakes(streams)
	if all != 4 || resumed != 2 {
		t.Errorf("%d handshakes, %d resumed", all, resumed)
	}
	for n := range streams[1].Data { // however short: no panic
		serverHello(streams[1].Data[:n])
	}
}

func TestReport(t *testing.T) {
	w := workload{name: "w", title: "Work", metrics: []metric{gbits, perGB}}
	s := func(bytes uint64, cpu float64) *sample {
		return &sample{Round: 1, Load: loaded{Seconds: 1, Bytes: bytes}, ClientCPU: cpu}
	}
	r := &results{
		Systems: []systemInfo{{Name: "direct"}, {Name: "a", Peer: true}, {Name: "b", Peer: true}, {Name: "ours"}, {Name: "absent"}},
		Workloads: []*table{{workload: w, Name: "w", Title: "Work", Samples: map[string][]*sample{
			"direct": {s(4e9, 0)}, "a": {s(1e9, 2), s(3e9, 2), s(1e9, 2)}, "b": {s(5e8, 0.5)},
			"ours": {s(2e9, 2), {Round: 2, Failed: "it broke"}},
		}}},
	}
	var out strings.Builder
	r.writeTable(&out, r.Workloads[0])
	want := `
### Work (` + "`w`" + `)

|        |       Gbit/s |    CPU s/GB |     ± |
|--------|-------------:|------------:|------:|
| direct | 32.00 (4.00) |           – |   0 % |
| a      |  8.00 (1.00) | 2.00 (2.00) | 200 % |
| b      |  4.00 (0.50) | 1.00 (1.00) |   0 % |
| ours   | 16.00 (2.00) | 1.00 (1.00) |   0 % |

ours, round 2: failed: it broke
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Error(diff)
	}
	file := t.TempDir() + "/deep/latest.json"
	if err := r.save(file); err != nil {
		t.Fatal(err)
	}
	if got := r.Workloads[0].Medians["a"]["Gbit/s"]; got != 8 {
		t.Errorf("saved median: %v", got)
	}
}

func TestCallsPerUnit(t *testing.T) {
	const strace = `% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.003000           3       400        12 read
 40.00    0.002000           4       800           write
------ ----------- ----------- --------- --------- ----------------
100.00    0.005000           3      1200        12 total
`
	for want, work := range map[string]loaded{
		"6 system calls a request: write 4 read 2":  {Requests: 200},
		"600 system calls a GB: write 400 read 200": {Bytes: 2e9},
	} {
		if got := callsPerUnit(strace, work); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	const perf = `# started on Sun Nov 22 20:20:04 2026

1300,,raw_syscalls:sys_enter,4000000,100.00,,
50,,context-switches,4000000,100.00,,
70,,sched:sched_wakeup,4000000,100.00,,
0,,syscalls:sys_enter_splice,4000000,100.00,,
<not counted>,,syscalls:sys_enter_read,0,100.00,,
800,,syscalls:sys_enter_write,4000000,100.00,,
`
	const want = "6.5 system calls a request: write 4 sched_wakeup 0.35 context-switches 0.25"
	if got := callsPerUnit(perf, loaded{Requests: 200}); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestMedian(t *testing.T) {
	for want, sorted := range map[float64][]float64{2: {1, 2, 9}, 2.5: {1, 2, 3, 9}, 7: {7}} {
		if got := median(sorted); got != want {
			t.Errorf("%v: %v", sorted, got)
		}
	}
	if !math.IsNaN(median(nil)) {
		t.Error("the median of nothing is something")
	}
}

func TestChoices(t *testing.T) {
	o, err := parse([]string{"-quick", "-systems", "direct,go", "-workloads", "idle"})
	if err != nil || cmp.Diff(o.systems, []string{"direct", "go"}) != "" || cmp.Diff(o.workloads, []string{"idle"}) != "" || o.rounds == 0 || o.duration == 0 {
		t.Errorf("%+v, %v", o, err)
	}
	for _, args := range [][]string{{"-systems", "apache"}, {"-workloads", "x"}, {"-trace", "gdb"}, {"more"}, {"-rounds", "many"}} {
		if o, err := parse(args); err == nil {
			t.Errorf("%v: %+v", args, o)
		}
	}
}

// Decisions are measured without a lab, and what is known costs no allocation.
func TestDecisions(t *testing.T) {
	c, _, size, err := compileMany(1000)
	if err != nil {
		t.Fatal(err)
	}
	d := decided{Policies: 1000, Attributes: 30, BytesPerPolicy: size / 1000}
	if err := d.measure(c, 1); err != nil {
		t.Fatal(err)
	}
	if d.KnownNs <= 0 || d.PortNs <= 0 || d.NewNs <= 0 || d.KnownAllocs != 0 || d.NewAllocs == 0 || d.BytesPerPolicy <= 0 {
		t.Errorf("measured %+v", d)
	}
	var b bytes.Buffer
	writeDecisions(&b, []decided{d})
	if !strings.Contains(b.String(), "| 1000 policies, 30 attributes |") {
		t.Errorf("table:\n%s", b.String())
	}
}
