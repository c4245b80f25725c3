package identity

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// callerOf is what the kernel would record of a process that connects now.
func callerOf(t testing.TB, r *Resolver, pid int, uid uint32, cgroup string) Socket {
	t.Helper()
	p, err := openProcess("/proc", pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	start, err := p.start()
	if err != nil {
		t.Fatal(err)
	}
	exe, err := p.exe()
	if err != nil {
		t.Fatal(err)
	}
	c := &Caller{
		PID: pid, Start: start*clockTick + 4_567_890,
		RealUID: uid, UID: uid, ActingRealUID: uid, ActingUID: uid, Exe: exe, CgroupID: 1, CgroupPath: "/",
	}
	if cgroup != "" {
		if c.CgroupID, err = r.cgroupID(cgroup); err != nil {
			t.Fatal(err)
		}
		c.CgroupPath = cgroup
	}
	return Socket{UID: uid, CgroupID: c.CgroupID, CgroupPath: c.CgroupPath, Caller: c}
}

func TestResolveCaller(t *testing.T) {
	cg := cgroups(t, "web.service")[0]
	r := newResolver(t)
	exe := program(t, publicDir(t), "client")
	c := start(t, exe, "hold", within(t, r, cg, as(nobody)))
	s := callerOf(t, r, c.cmd.Process.Pid, nobody, cg)
	w := mustResolve(t, r, s)
	expect(t, w, map[string]string{
		"proc.exe": exe, "proc.exe_sha256": sumOf(t, exe), "proc.uid": "65534", "proc.unit": "web.service", "os.user": "nobody",
	})
	// By its socket it is the same workload.
	d := start(t, exe, "dial "+listen(t).Addr().String(), within(t, r, cg, as(nobody)))
	if by := mustResolve(t, r, socketIn(t, r, cg, nobody, d.inode)); by != w {
		t.Errorf("by its socket %+v, by its record %+v", by, w)
	}
	// Ended: as it was.
	c.end()
	if again := mustResolve(t, r, s); again != w {
		t.Errorf("after its end: %s", again.Attributes)
	}
	// Another process of the program, which ends before anyone looks.
	other := *s.Caller
	other.PID, other.Start = 1<<22+1, other.Start+1
	s.Caller = &other
	if again := mustResolve(t, r, s); again != w {
		t.Errorf("another of its kind: %s", again.Attributes)
	}
}

// A caller that has ended, of a program that was never seen: its user and cgroup are
// known, and nothing that another process with its number has.
func TestResolveCallerWithARecycledPID(t *testing.T) {
	cg := cgroups(t, "web.service")[0]
	r := newResolver(t)
	dir := publicDir(t)
	mine, others := program(t, dir, "mine"), program(t, dir, "others")
	was := start(t, mine, "hold", within(t, r, cg, as(nobody)))
	s := callerOf(t, r, was.cmd.Process.Pid, nobody, cg)
	was.end()
	now := start(t, others, "hold", within(t, r, cg, as(nobody)))
	s.Caller.PID = now.cmd.Process.Pid
	expect(t, mustResolve(t, r, s), map[string]string{"proc.exe": "", "proc.exe_sha256": "", "proc.uid": "65534", "proc.unit": "web.service"})
	// Even one of the same program is another process, but its program is known then.
	mustResolve(t, r, callerOf(t, r, start(t, mine, "hold", within(t, r, cg, as(nobody))).cmd.Process.Pid, nobody, cg))
	expect(t, mustResolve(t, r, s), map[string]string{"proc.exe": mine, "proc.unit": "web.service"})

	t.Run("where the cgroup says nothing", func(t *testing.T) {
		s.CgroupID, s.CgroupPath, s.Caller.CgroupID, s.Caller.CgroupPath = 1, "/", 1, "/"
		if w, err := r.Resolve(t.Context(), s); !errors.Is(err, ErrUnknownOwner) {
			t.Errorf("%v, %v", w, err)
		}
	})
}

// Whoever connects and then executes another program connected as the first.
func TestResolveCallerThatCalledExec(t *testing.T) {
	cg := cgroups(t, "web.service")[0]
	r := newResolver(t)
	sh, err := filepath.EvalSymlinks("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	for _, seen := range []bool{false, true} {
		cmd := exec.Command("/bin/sh", "-c", "read line; exec /bin/cat")
		within(t, r, cg, nil)(cmd)
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { stdin.Close(); cmd.Wait() })
		s := callerOf(t, r, cmd.Process.Pid, 0, cg)
		want := ""
		if seen {
			want = sh
			mustResolve(t, r, s)
		}
		if _, err := stdin.Write([]byte("go\nready\n")); err != nil {
			t.Fatal(err)
		}
		if _, err := stdout.Read(make([]byte, 8)); err != nil { // cat runs
			t.Fatal(err)
		}
		expect(t, mustResolve(t, r, s), map[string]string{"proc.exe": want, "proc.uid": "0"})
	}
}

// Two names of one file: which one an ended process ran it by, nobody knows.
func TestResolveCallerOfALinkedProgram(t *testing.T) {
	cg := cgroups(t, "web.service")[0]
	r := newResolver(t)
	dir := publicDir(t)
	exe := program(t, dir, "tool")
	if err := os.Link(exe, filepath.Join(dir, "alias")); err != nil {
		t.Fatal(err)
	}
	c := start(t, exe, "hold", within(t, r, cg, nil))
	s := callerOf(t, r, c.cmd.Process.Pid, 0, cg)
	expect(t, mustResolve(t, r, s), map[string]string{"proc.exe": exe})
	gone := *s.Caller
	gone.PID = 1<<22 + 1
	s.Caller = &gone
	expect(t, mustResolve(t, r, s), map[string]string{"proc.exe": "", "proc.exe_sha256": ""})
}

// A program that was replaced, or whose name leads elsewhere now, is not guessed.
func TestResolveCallerOfAReplacedProgram(t *testing.T) {
	cg := cgroups(t, "web.service")[0]
	r := newResolver(t)
	dir := publicDir(t)
	exe := program(t, dir, "tool")
	c := start(t, exe, "hold", within(t, r, cg, nil))
	s := callerOf(t, r, c.cmd.Process.Pid, 0, cg)
	w := mustResolve(t, r, s)
	if err := os.Rename(program(t, dir, "tool-2"), exe); err != nil {
		t.Fatal(err)
	}
	// The process itself was seen, and so was what it ran.
	if again := mustResolve(t, r, s); again != w {
		t.Errorf("%s", again.Attributes)
	}
	gone := *s.Caller
	gone.PID = 1<<22 + 1
	s.Caller = &gone
	expect(t, mustResolve(t, r, s), map[string]string{"proc.exe": "", "proc.exe_sha256": "", "proc.unit": "web.service"})
}

// Callers that may act for somebody else, and sockets that somebody else made.
func TestResolveCallerRefusesWhatIsAmbiguous(t *testing.T) {
	cg := cgroups(t, "web.service", "db.service", "init.scope")
	r := newResolver(t)
	exe := program(t, publicDir(t), "client")
	c := start(t, exe, "hold", within(t, r, cg[0], as(nobody)))
	id := func(path string) uint64 {
		n, err := r.cgroupID(path)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for name, tt := range map[string]struct {
		change func(*Socket)
		want   error
	}{
		"as it is":                    {func(*Socket) {}, nil},
		"set-user-ID":                 {func(s *Socket) { s.Caller.RealUID, s.Caller.ActingRealUID = 1, 1 }, ErrAmbiguousOwner},
		"root for a user":             {func(s *Socket) { s.Caller.RealUID, s.Caller.ActingRealUID = 0, 0 }, nil},
		"with another's credentials":  {func(s *Socket) { s.Caller.ActingUID = 0 }, ErrAmbiguousOwner},
		"in another's name":           {func(s *Socket) { s.Caller.ActingRealUID = 0 }, ErrAmbiguousOwner},
		"another user's socket":       {func(s *Socket) { s.UID = 1 }, ErrAmbiguousOwner},
		"made while it was root":      {func(s *Socket) { s.UID = 0 }, nil},
		"a socket of another cgroup":  {func(s *Socket) { s.CgroupID, s.CgroupPath = id(cg[1]), cg[1] }, ErrAmbiguousOwner},
		"a socket made by a manager":  {func(s *Socket) { s.CgroupID, s.CgroupPath, s.UID = id(cg[2]), cg[2], 0 }, nil},
		"a socket of a gone cgroup":   {func(s *Socket) { s.CgroupID, s.CgroupPath = 1<<40, "" }, ErrAmbiguousOwner},
		"a thread of the kernel's":    {func(s *Socket) { s.Caller.Exe = FileID{} }, nil},
		"whose cgroup has no path":    {func(s *Socket) { s.CgroupPath, s.Caller.CgroupPath, s.Caller.PID = "", "", 1<<22+1 }, ErrUnknownOwner},
		"untrusted, without an inode": {func(s *Socket) { s.Trusted, s.Inode = false, 0 }, nil},
	} {
		s := callerOf(t, r, c.cmd.Process.Pid, nobody, cg[0])
		tt.change(&s)
		w, err := r.Resolve(t.Context(), s)
		if !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
			continue
		}
		if err != nil {
			continue
		}
		want := map[string]string{"proc.exe": exe, "proc.uid": "65534", "proc.unit": "web.service"}
		if s.Caller.Exe == (FileID{}) {
			want["proc.exe"] = ""
		}
		for k, v := range want {
			if got := w.Attributes.Get(k); got != v {
				t.Errorf("%s: %s=%q, want %q", name, k, got, v)
			}
		}
	}
}

func TestResolveCallerInAContainer(t *testing.T) {
	r := newResolver(t)
	path := "/system.slice/docker-" + strings.Repeat("ab", 32) + ".scope"
	s := callerOf(t, r, os.Getpid(), uint32(os.Geteuid()), "")
	s.CgroupID, s.CgroupPath, s.Caller.CgroupID, s.Caller.CgroupPath = 99, path, 99, path
	w := mustResolve(t, r, s)
	expect(t, w, map[string]string{"container.id": strings.Repeat("ab", 32), "proc.exe": "", "proc.uid": ""})
	s.Caller.PID = 1<<22 + 1 // gone makes no difference
	if again := mustResolve(t, r, s); again != w {
		t.Errorf("%s", again.Attributes)
	}
}

// Where cgroup v2 says nothing the process's own place counts, as long as it is
// there; descriptors that were opened for that are let go.
func TestResolveCallerInTheRootCgroup(t *testing.T) {
	needRoot(t)
	r := newResolver(t)
	exe := program(t, publicDir(t), "client")
	c := start(t, exe, "hold", as(nobody))
	if b, err := os.ReadFile("/proc/" + strconv.Itoa(c.cmd.Process.Pid) + "/cgroup"); err != nil || !strings.Contains(string(b), "0::/\n") {
		t.Skipf("this process is not in the root of cgroup v2: %q, %v", b, err)
	}
	s := callerOf(t, r, c.cmd.Process.Pid, nobody, "")
	w := mustResolve(t, r, s)
	expect(t, w, map[string]string{"proc.exe": exe, "os.user": "nobody"})
	for range 3 {
		if again := mustResolve(t, r, s); again != w {
			t.Error("another workload")
		}
	}
	c.end()
	if w, err := r.Resolve(t.Context(), s); !errors.Is(err, ErrUnknownOwner) {
		t.Errorf("after its end: %v, %v", w, err)
	}
	if n := r.cgroupFiles.Len(); n != 0 {
		t.Errorf("%d descriptors are kept of processes that have ended", n)
	}
}

// The owner of a listener is confirmed cheaply, and not beyond its time.
func TestResolveListenerThatChanges(t *testing.T) {
	cg := cgroups(t, "web.service")[0]
	r := newResolver(t)
	dir := publicDir(t)
	one, two := program(t, dir, "one"), program(t, dir, "two")
	l, err := newListener()
	if err != nil {
		t.Fatal(err)
	}
	inode, err := inodeOf(l)
	if err != nil {
		t.Fatal(err)
	}
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	inherit := func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{f} }
	s := socketIn(t, r, cg, 0, inode)
	s.Listener = 4711
	first := start(t, one, "hold", within(t, r, cg, inherit))
	w := mustResolve(t, r, s)
	expect(t, w, map[string]string{"proc.exe": one})
	if _, ok := r.listeners.Get(s.Listener); !ok {
		t.Fatal("not remembered")
	}
	r.sockets.Purge()
	r.groups.Purge()
	if again := mustResolve(t, r, s); again != w {
		t.Error("another workload")
	}
	// Handed on to another program, and the first ends.
	second := start(t, two, "hold", within(t, r, cg, inherit))
	f.Close()
	first.end()
	expect(t, mustResolve(t, r, s), map[string]string{"proc.exe": two})
	// The cookie is the socket's, whatever its inode.
	other := start(t, one, "listen", within(t, r, cg, nil))
	s.Listener, s.Inode = 4712, other.inode
	expect(t, mustResolve(t, r, s), map[string]string{"proc.exe": one})
	second.end()
	s.Listener, s.Inode = 4711, inode
	expect(t, mustResolve(t, r, s), map[string]string{"proc.exe": "", "proc.unit": "web.service"})
	if _, ok := r.listeners.Get(4711); ok {
		t.Error("remembered without a process")
	}
}

// A listener whose process executes another program, or changes its user, is
// another's from then on.
func TestResolveListenerThatCallsExec(t *testing.T) {
	cg := cgroups(t, "web.service")[0]
	r := newResolver(t)
	l, err := newListener()
	if err != nil {
		t.Fatal(err)
	}
	inode, err := inodeOf(l)
	if err != nil {
		t.Fatal(err)
	}
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	cat, err := filepath.EvalSymlinks("/bin/cat")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", "read line; exec /bin/cat")
	cmd.ExtraFiles = []*os.File{f}
	within(t, r, cg, nil)(cmd)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stdin.Close(); cmd.Wait() })
	f.Close()
	s := socketIn(t, r, cg, 0, inode)
	s.Listener = 4711
	before := mustResolve(t, r, s)
	if _, err := stdin.Write([]byte("go\nready\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := stdout.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	after := mustResolve(t, r, s)
	expect(t, after, map[string]string{"proc.exe": cat})
	if after.Key == before.Key {
		t.Error("two programs are one workload")
	}
}

// The descriptors that a Resolver holds are bounded, and closed when they go.
func TestResolverClosesWhatItHolds(t *testing.T) {
	r := newResolver(t)
	self, err := openProcess("/proc", os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer self.close()
	before := openDescriptors(t)
	for i := range uint64(2 * maxCgroupFiles) {
		if _, _, err := r.placeNow(inRoot(0, 1), processKey{1, i}, self); err != nil {
			t.Fatal(err)
		}
		r.rememberListener(Socket{Inode: 1, Listener: i + 1}, &holder{process: self}, 0, facts{})
	}
	if n := openDescriptors(t) - before; n > maxCgroupFiles+maxListeners+8 {
		t.Errorf("%d descriptors are held", n)
	}
	r.cgroupFiles.Purge()
	r.listeners.Purge()
	for end := time.Now().Add(5 * time.Second); openDescriptors(t) > before+8; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d descriptors, then %d", before, openDescriptors(t))
		}
	}
}

func newListener() (*net.TCPListener, error) {
	return net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
}

func openDescriptors(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

func BenchmarkResolveCaller(b *testing.B) {
	r := newResolver(b)
	s := callerOf(b, r, os.Getpid(), uint32(os.Geteuid()), "")
	for _, place := range []string{"in the root cgroup", "in a unit"} {
		b.Run(place, func(b *testing.B) {
			if place == "in a unit" {
				const unit = "/system.slice/x.service"
				s.CgroupID, s.CgroupPath, s.Caller.CgroupID, s.Caller.CgroupPath = 4242, unit, 4242, unit
			}
			b.ReportAllocs()
			for b.Loop() {
				mustResolve(b, r, s)
			}
		})
	}
}
