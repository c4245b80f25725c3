package proxy

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/redirect"
)

// racers are kinds of clients that race with the proxy's question who they are. Each
// has a program, a user, a cgroup and a destination port of its own.
var racers = []string{"stay", "write", "exit", "reset", "exec", "fork", "pass"}

const (
	racerPort   = 21000 // and on, by kind
	racerUID    = 42000
	strangerUID = racerUID + 100 // programs that were never seen running
	decoyUID    = racerUID + 200 // whoever gets the sockets of others
)

// who is the truth about a client.
type who struct {
	kind, exe, sum, cgroup string
	uid                    uint32
}

// verdicts are how often a kind of client was known for what it is; known but for
// its executable, which denies it where policy asks for that; not known at all; and
// taken for another.
type verdicts struct{ known, partly, denied, wrong int }

// raceWorld identifies connections as the proxy does, and ends them.
type raceWorld struct {
	*testing.T
	p       *Proxy
	program []byte // racer
	dir     string
	cgroups string

	mu    sync.Mutex
	truth map[uint16]who // by destination port
	seen  map[string]*verdicts
	odd   []string // what was wrong
	// pending are accepted and not judged yet.
	pending atomic.Int64
}

func newRaceWorld(t *testing.T, connects bool) *raceWorld {
	t.Helper()
	w := &raceWorld{T: t, truth: map[uint16]who{}, seen: map[string]*verdicts{}}
	cfg := redirect.DefaultConfig()
	o := Options{Workloads: must(identity.NewResolver())(t), Timeouts: testTimeouts}
	o.Diag, o.Conntrack, o.Cgroups = must(redirect.NewDiag())(t), must(redirect.NewConntrack())(t), must(redirect.OpenCgroups())(t)
	t.Cleanup(func() { _, _, _ = o.Diag.Close(), o.Conntrack.Close(), o.Cgroups.Close() })
	if connects {
		o.Connects = must(redirect.OpenConnects(cfg))(t)
		t.Cleanup(func() { _ = o.Connects.Close() })
	}
	w.p = New(o)
	w.dir = must(os.MkdirTemp("", "sl-race-"))(t)
	t.Cleanup(func() { os.RemoveAll(w.dir) })
	if err := os.Chmod(w.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	built := filepath.Join(w.dir, "racer")
	if out, err := exec.Command("gcc", "-O1", "-o", built, "testdata/racer.c").CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	w.program = must(os.ReadFile(built))(t)
	w.cgroups = filepath.Join(must(cgroupMount())(t), fmt.Sprintf("sl-race-%d", os.Getpid()))
	w.mkdir(w.cgroups)
	for _, a := range cfg.OutboundAddrs() {
		w.serve(listen(t, a.String()))
	}
	return w
}

// mkdir makes a cgroup, which goes with the test once its processes have.
func (w *raceWorld) mkdir(dir string) {
	w.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		eventually(w.T, "removal of "+dir, func() bool { return os.Remove(dir) == nil })
	})
}

func (w *raceWorld) serve(l *net.TCPListener) {
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			w.pending.Add(1)
			conns.Go(func() {
				defer c.Close() // a client that stays ends then
				w.judge(c)
				w.pending.Add(-1)
			})
		}
	})
	w.Cleanup(func() { l.Close(); conns.Wait() })
}

// judge finds out who made a connection, and compares.
func (w *raceWorld) judge(c *net.TCPConn) {
	tuple, caller, err := w.p.client(c)
	if err != nil {
		w.count("?", verdicts{denied: 1}, "")
		return
	}
	w.mu.Lock()
	truth, ok := w.truth[tuple.Dst.Port()]
	w.mu.Unlock()
	if !ok {
		w.count("?", verdicts{wrong: 1}, tuple.String())
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var workload *identity.Workload
	s, err := w.p.caller(c, tuple, caller)
	if err == nil {
		workload, err = w.p.workloads.Resolve(ctx, s)
	}
	if err != nil {
		w.count(truth.kind, verdicts{denied: 1}, "")
		return
	}
	a := workload.Attributes
	exe, sum := a.Get("proc.exe"), a.Get("proc.exe_sha256")
	switch {
	case a.Get("proc.uid") != strconv.Itoa(int(truth.uid)) || a.Get("proc.cgroup") != truth.cgroup:
		w.count(truth.kind, verdicts{wrong: 1}, fmt.Sprintf("%s: %s; want %+v", tuple, a, truth))
	case exe == "" && sum == "":
		w.count(truth.kind, verdicts{partly: 1}, "")
	case exe != truth.exe || sum != truth.sum:
		w.count(truth.kind, verdicts{wrong: 1}, fmt.Sprintf("%s: runs %s; want %s", tuple, exe, truth.exe))
	default:
		w.count(truth.kind, verdicts{known: 1}, "")
	}
}

func (w *raceWorld) count(kind string, v verdicts, odd string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	x := w.seen[kind]
	if x == nil {
		x = &verdicts{}
		w.seen[kind] = x
	}
	x.known += v.known
	x.partly += v.partly
	x.denied += v.denied
	x.wrong += v.wrong
	if odd != "" && len(w.odd) < 3 {
		w.odd = append(w.odd, odd)
	}
}

func (w *raceWorld) soFar(kind string) (v verdicts) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if x := w.seen[kind]; x != nil {
		v = *x
	}
	return v
}

// client makes a kind of client: its program, which differs in contents from others',
// its user and its cgroup.
func (w *raceWorld) client(kind string, port uint16, uid uint32) who {
	w.Helper()
	x := who{kind: kind, uid: uid, exe: filepath.Join(w.dir, kind)}
	contents := append(w.program[:len(w.program):len(w.program)], kind...)
	if err := os.WriteFile(x.exe, contents, 0o755); err != nil {
		w.Fatal(err)
	}
	sum := sha256.Sum256(contents)
	x.sum = hex.EncodeToString(sum[:])
	dir := filepath.Join(w.cgroups, kind+".service")
	w.mkdir(dir)
	x.cgroup = "/" + filepath.Base(w.cgroups) + "/" + kind + ".service"
	w.mu.Lock()
	defer w.mu.Unlock()
	w.truth[port] = x
	return x
}

// command runs a client's program as it should run.
func (w *raceWorld) command(x who, args ...string) *exec.Cmd {
	w.Helper()
	dir := must(os.Open(filepath.Join(w.cgroups, x.kind+".service")))(w.T)
	w.Cleanup(func() { dir.Close() })
	c := exec.Command(x.exe, args...)
	c.Stderr = os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{
		UseCgroupFD: true, CgroupFD: int(dir.Fd()), Credential: &syscall.Credential{Uid: x.uid, Gid: x.uid}, Pdeathsig: syscall.SIGKILL,
	}
	return c
}

// race lets clients of a kind connect, many at a time.
func (w *raceWorld) race(x who, kind string, count int, port uint16, decoy string) {
	args := []string{kind, strconv.Itoa(count), strconv.Itoa(int(port)), other4, other6}
	if decoy != "" {
		args = append(args, "--", decoy)
	}
	if err := w.command(x, args...).Run(); err != nil {
		w.Errorf("%s: %v", x.kind, err)
	}
}

// run lets count clients of every kind race at once, and tells what they were taken
// for.
func (w *raceWorld) run(count int) {
	w.Helper()
	decoy := w.client("decoy", racerPort-1, decoyUID)
	keep := w.command(decoy, "keep", "sl-race-keeper")
	out, err := keep.StdoutPipe()
	if err != nil {
		w.Fatal(err)
	}
	if err := keep.Start(); err != nil {
		w.Fatal(err)
	}
	defer func() { _, _ = keep.Process.Kill(), keep.Wait() }()
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		w.Fatal(err)
	}
	var clients []who
	for i, kind := range racers {
		clients = append(clients, w.client(kind, racerPort+uint16(i), racerUID+uint32(i)))
	}
	var strangers []who
	for i := range 3 {
		strangers = append(strangers, w.client(fmt.Sprintf("stranger%d", i), racerPort+50+uint16(i), strangerUID+uint32(i)))
	}
	// Every program but the strangers' is seen once, while it runs.
	for i, x := range clients {
		w.race(x, "stay", 1, racerPort+uint16(i), "")
		if v, records := w.soFar(x.kind), w.p.connects != nil; v.known+v.partly+v.denied != 1 || records && v.known != 1 {
			w.Errorf("%s: seen running, it is %+v", x.kind, v)
		}
	}
	start := time.Now()
	var all sync.WaitGroup
	for i, x := range clients {
		of := map[string]string{"exec": decoy.exe, "pass": "sl-race-keeper"}[x.kind]
		all.Go(func() { w.race(x, x.kind, count, racerPort+uint16(i), of) })
	}
	for i, kind := range []string{"exit", "reset", "write"} {
		port := racerPort + 50 + uint16(i)
		all.Go(func() { w.race(strangers[i], kind, 50, port, "") })
	}
	all.Wait()
	// Both listeners' queues are in order: when these have been served, all have. Of
	// those that reset, some never came into the queue.
	w.race(clients[0], "stay", 2, racerPort, "")
	eventually(w.T, "the last judgement", func() bool { return w.pending.Load() == 0 })
	w.mu.Lock()
	defer w.mu.Unlock()
	w.Logf("%d clients of each kind in %.1f s", count, time.Since(start).Seconds())
	for kind, v := range w.seen {
		w.Logf("%-10s %5d known, %5d but for the executable, %5d denied, %5d wrong", kind, v.known, v.partly, v.denied, v.wrong)
	}
	for _, odd := range w.odd {
		w.Log(odd)
	}
}

// Clients that exit, reset, exec, fork and pass their socket on while the proxy asks
// who they are: not one is taken for another, by user, cgroup or executable.
func TestRacingClients(t *testing.T) {
	if testing.Short() {
		t.Skip("24,000 clients")
	}
	w := newRaceWorld(t, true)
	w.run(24000 / (len(racers) - 1)) // six kinds race, one stays
	for kind, v := range w.seen {
		if v.wrong > 0 {
			t.Errorf("%s: %d wrong", kind, v.wrong)
		}
		// A record does not depend on timing; a few may lack memory, or their conntrack
		// entry.
		if !strings.HasPrefix(kind, "stranger") && kind != "?" && (v.known < 2000 || v.known < 9*(v.partly+v.denied)) {
			t.Errorf("%s: only %d known: %+v", kind, v.known, *v)
		}
	}
}

// Without records the executable is the one that has the socket by then. User and
// cgroup are never another's.
func TestRacingClientsWithoutRecords(t *testing.T) {
	w := newRaceWorld(t, false)
	w.run(100)
	for kind, v := range w.seen {
		if v.wrong > 0 && kind != "exec" {
			t.Errorf("%s: %d wrong", kind, v.wrong)
		}
		if kind == "stay" && v.known < 9*(v.partly+v.denied) {
			t.Errorf("%s: only %d known", kind, v.known)
		}
	}
}
