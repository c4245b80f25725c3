package netlab

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestNamesTellTheirOwner(t *testing.T) {
	me, err := self()
	if err != nil {
		t.Fatal(err)
	}
	id := me.newID()
	for _, tt := range []struct {
		name string
		ok   bool
	}{
		{id, true},
		{id + "-client", true},
		{id + "client", false},
		{"sl-1-2-0123456", false},
		{"sl-abcdef", false},
		{"sl-1-2", false},
		{"x" + id, false},
		{"sl-99999999999999999999-1-01234567", false},
	} {
		got, o, ok := parseName(tt.name)
		if ok != tt.ok || ok && (got != id || o != me) {
			t.Errorf("parseName(%q) = %q, %+v, %v", tt.name, got, o, ok)
		}
	}
}

func TestOwnerAlive(t *testing.T) {
	me, err := self()
	if err != nil {
		t.Fatal(err)
	}
	if !me.alive() {
		t.Error("we are dead")
	}
	if (owner{me.pid, me.start - 1}).alive() {
		t.Error("an earlier process with our pid is alive")
	}
	if (owner{1 << 30, 1}).alive() {
		t.Error("a process that cannot be is alive")
	}
}

// leakRecorder is a testing.TB that keeps errors instead of failing.
type leakRecorder struct {
	testing.TB
	cleanups []func()
	errors   []string
}

func (r *leakRecorder) Helper()           {}
func (r *leakRecorder) Failed() bool      { return false }
func (r *leakRecorder) Cleanup(f func())  { r.cleanups = append(r.cleanups, f) }
func (r *leakRecorder) Error(args ...any) { r.errors = append(r.errors, fmt.Sprint(args...)) }
func (r *leakRecorder) Errorf(f string, args ...any) {
	r.errors = append(r.errors, fmt.Sprintf(f, args...))
}
func (r *leakRecorder) finish() {
	for _, f := range r.cleanups {
		f()
	}
}

func TestALeakedSocketFailsTheTest(t *testing.T) {
	Require(t)
	r := &leakRecorder{TB: t}
	w := Test(r)
	w.grace = 50 * time.Millisecond
	h := w.Host("a")
	ln, err := h.Listen("tcp", "127.0.0.1:7")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	r.finish()
	if len(r.errors) != 1 || !strings.Contains(r.errors[0], "127.0.0.1:7") {
		t.Errorf("a listener left open gave %q", r.errors)
	}
}

func TestALeakedThreadFailsTheTest(t *testing.T) {
	Require(t)
	r := &leakRecorder{TB: t}
	w := Test(r)
	w.grace = 50 * time.Millisecond
	h := w.Host("a")
	entered, leave := make(chan struct{}), make(chan struct{})
	left := make(chan error)
	go func() {
		left <- h.Do(func() error { close(entered); <-leave; return nil })
	}()
	<-entered
	r.finish()
	close(leave)
	if err := <-left; err != nil {
		t.Error(err)
	}
	if len(r.errors) != 1 || !strings.Contains(r.errors[0], "thread") {
		t.Errorf("a thread left in a host gave %q", r.errors)
	}
}

func TestHasSocket(t *testing.T) {
	// Real lines of /proc/net/tcp, tcp6 and udp.
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:0016 0100007F:D431 01 00000000:00000000 00:00000000 00000000     0        0 2 1 0 20 4 30 10 -1
   2: 00000000000000000000000000000000:01BB 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 3
   3: 00000000:3AA0 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4 2 0 0
`
	for _, tt := range []struct {
		state string
		port  uint16
		want  bool
	}{
		{stateListen, 8080, true},
		{stateListen, 443, true},
		{stateListen, 22, false}, // established
		{stateListen, 0, false},
		{stateClose, 15008, true},
		{stateClose, 8080, false},
	} {
		if got := hasSocket(table, tt.state, tt.port); got != tt.want {
			t.Errorf("hasSocket(%s, %d) = %v", tt.state, tt.port, got)
		}
	}
}

func TestReassembly(t *testing.T) {
	a, b := netip.MustParseAddrPort("10.0.0.1:1000"), netip.MustParseAddrPort("[fd00::1]:80")
	seg := func(seq uint32, syn bool, data string) segment { return segment{a, b, seq, syn, []byte(data)} }
	for name, tt := range map[string]struct {
		in   []segment
		want []string
	}{
		"in order":              {[]segment{seg(9, true, ""), seg(10, false, "ab"), seg(12, false, "cd")}, []string{"abcd"}},
		"out of order":          {[]segment{seg(9, true, ""), seg(12, false, "cd"), seg(10, false, "ab")}, []string{"abcd"}},
		"twice":                 {[]segment{seg(9, true, ""), seg(9, true, ""), seg(10, false, "ab"), seg(10, false, "ab"), seg(12, false, "cd")}, []string{"abcd"}},
		"overlapping":           {[]segment{seg(10, false, "abc"), seg(11, false, "bcde")}, []string{"abcde"}},
		"contained":             {[]segment{seg(10, false, "abcd"), seg(11, false, "bc"), seg(14, false, "e")}, []string{"abcde"}},
		"gap":                   {[]segment{seg(10, false, "ab"), seg(13, false, "de")}, []string{"ab", "de"}},
		"sequence wraps":        {[]segment{seg(0xfffffffd, true, ""), seg(0xfffffffe, false, "ab"), seg(0, false, "cd")}, []string{"abcd"}},
		"amid, older one later": {[]segment{seg(12, false, "cd"), seg(10, false, "ab")}, []string{"abcd"}},
		"data with the SYN":     {[]segment{seg(9, true, "ab"), seg(12, false, "cd")}, []string{"abcd"}},
		"ports used again":      {[]segment{seg(9, true, ""), seg(10, false, "ab"), seg(500, true, ""), seg(501, false, "cd")}, []string{"ab", "cd"}},
		"no data":               {[]segment{seg(9, true, "")}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var r reassembly
			for _, s := range tt.in {
				r.add(s)
			}
			var got []string
			for _, s := range r.streams() {
				if s.Src != a || s.Dst != b {
					t.Errorf("stream from %v to %v", s.Src, s.Dst)
				}
				got = append(got, string(s.Data))
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("streams (-want +got):\n%s", d)
			}
		})
	}
}

// pcapHeader is a little-endian file header with Ethernet frames.
var pcapHeader = []byte{
	0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 1, 0, 0, 0,
}

func TestReadPcap(t *testing.T) {
	one := append(bytes.Clone(pcapHeader), 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 3, 0, 0, 0, 'a', 'b', 'c')
	for name, tt := range map[string]struct {
		file []byte
		want []string
		fail bool
	}{
		"empty":          {nil, nil, true},
		"header only":    {pcapHeader, nil, false},
		"one packet":     {one, []string{"abc"}, false},
		"cut in packet":  {append(bytes.Clone(one), one[24:len(one)-1]...), []string{"abc"}, false},
		"cut in header":  {append(bytes.Clone(one), 0, 0), []string{"abc"}, false},
		"another format": {bytes.Repeat([]byte{7}, 24), nil, true},
		"monster packet": {append(bytes.Clone(pcapHeader), 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0), nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			err := readPcap(bytes.NewReader(tt.file), func(p packet) { got = append(got, string(p.data)) })
			if (err != nil) != tt.fail {
				t.Errorf("error %v", err)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("packets (-want +got):\n%s", d)
			}
		})
	}
}

func FuzzPacket(f *testing.F) {
	f.Add(uint32(linkEthernet), bytes.Repeat([]byte{0x45}, 60))
	f.Add(uint32(linkCooked2), append([]byte{0x86, 0xdd}, bytes.Repeat([]byte{0x66}, 80)...))
	f.Fuzz(func(t *testing.T, link uint32, data []byte) {
		s, ok := packet{link, data}.tcp()
		if ok && (!s.src.IsValid() || !s.dst.IsValid() || len(s.data) > len(data)-40) {
			t.Errorf("segment %+v out of %d bytes", s, len(data))
		}
	})
}

func TestToolSaysWhatToInstall(t *testing.T) {
	if _, err := Tool("no-such-tool"); err == nil || !strings.Contains(err.Error(), "apt-get install no-such-tool") {
		t.Errorf("error %v", err)
	}
	t.Setenv("PATH", "/nonexistent")
	saved := toolDirs
	defer func() { toolDirs = saved }()
	toolDirs = nil
	want := []string{"iproute2", "iptables", "openssh-server"}
	if d := cmp.Diff(want, Missing("sshd", "ip6tables", "iptables", "ip")); d != "" {
		t.Errorf("Missing (-want +got):\n%s", d)
	}
	if _, err := Tool("/bin/sh"); err != nil {
		t.Errorf("full path: %v", err)
	}
}

// TestStartTime reads a process whose name would fool a careless parser.
func TestStartTime(t *testing.T) {
	Require(t)
	if _, err := startTime(os.Getpid()); err != nil {
		t.Error(err)
	}
	w := Test(t)
	h := w.Host("a")
	script := w.Dir() + "/a) R 1 (b"
	if err := os.WriteFile(script, []byte("#!/bin/sh\nsleep 1000; :\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	d, err := h.Start(t.Context(), Service{Unit: "odd.service", Command: []string{script}})
	if err != nil {
		t.Fatal(err)
	}
	got, err := startTime(d.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if me, _ := self(); got < me.start {
		t.Errorf("a child began at %d, before us at %d", got, me.start)
	}
}

func TestWithoutCgroupV2ProgramsStillRun(t *testing.T) {
	saved := cgroupRoots
	defer func() { cgroupRoots = saved }()
	cgroupRoots = []string{"/nonexistent"}
	Require(t)
	w, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	h := w.Host("a")
	if w.HasCgroups() || h.Cgroup("x.service") != "" {
		t.Errorf("cgroups where there are none: %q", h.Cgroup("x.service"))
	}
	// Its child leaves the process group: without a cgroup, only the namespace tells.
	d, err := h.Start(t.Context(), Service{Unit: "x.service", Command: []string{"sh", "-c", "setsid sleep 1000 & wait"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Stop(); err != nil {
		t.Error(err)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	if leaks := w.awaitNoLeaks(); len(leaks) > 0 {
		t.Errorf("left: %q", leaks)
	}
}
