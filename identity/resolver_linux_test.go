package identity

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const nobody = 65534

func newResolver(t testing.TB) *Resolver {
	t.Helper()
	r, err := NewResolver()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// listen is where the tests' clients connect to; connections are taken and kept.
func listen(t testing.TB) *net.TCPListener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var conns []net.Conn
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns = append(conns, c)
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
		for _, c := range conns {
			c.Close()
		}
	})
	return l.(*net.TCPListener)
}

func dial(t testing.TB, l net.Listener) (*net.TCPConn, uint64) {
	t.Helper()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	inode, err := inodeOf(c.(*net.TCPConn))
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn), inode
}

// inRoot is a socket made in the root cgroup: the cgroup says nothing.
func inRoot(uid uint32, inode uint64) Socket {
	return Socket{UID: uid, Inode: inode, CgroupID: 1, CgroupPath: "/", Trusted: true}
}

func sumOf(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

// mustResolve resolves s. What Known says of it, before and after, must be the same.
func mustResolve(t testing.TB, r *Resolver, s Socket) *Workload {
	t.Helper()
	before, was := r.Known(s)
	w, err := r.Resolve(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	after, is := r.Known(s)
	if was && before != w || is && after != w {
		t.Errorf("known before (%t) as %v, after (%t) as %v; it is %v", was, before, is, after, w)
	}
	return w
}

// expect compares some attributes; "" stands for none.
func expect(t testing.TB, w *Workload, want map[string]string) {
	t.Helper()
	for k, v := range want {
		if got := w.Attributes.Get(k); got != v {
			t.Errorf("%s=%q, want %q", k, got, v)
		}
	}
}

func TestResolveReadsTheProcess(t *testing.T) {
	needRoot(t)
	r := newResolver(t)
	exe := program(t, publicDir(t), "client")
	c := start(t, exe, "dial "+listen(t).Addr().String(), as(nobody))
	w := mustResolve(t, r, inRoot(nobody, c.inode))
	expect(t, w, map[string]string{
		"os.user":         "nobody",
		"proc.uid":        "65534",
		"proc.exe":        exe,
		"proc.exe_sha256": sumOf(t, exe),
		"container.id":    "",
	})
	if !w.Attributes.Has("os.group") || !w.Attributes.Has("os.kernel") || !w.Attributes.Has("os.distribution") {
		t.Errorf("incomplete: %s", w.Attributes)
	}
	if again := mustResolve(t, r, inRoot(nobody, c.inode)); again != w {
		t.Error("the same workload was made twice")
	}
	root := start(t, exe, "dial "+listen(t).Addr().String(), nil)
	if other := mustResolve(t, r, inRoot(0, root.inode)); other.Key == w.Key {
		t.Error("two users of one program are one workload")
	}
}

func TestResolveWithoutHolder(t *testing.T) {
	r := newResolver(t)
	c, inode := dial(t, listen(t))
	closed := inRoot(uint32(os.Geteuid()), inode)
	c.Close()
	if w, err := r.Resolve(t.Context(), closed); !errors.Is(err, ErrUnknownOwner) {
		t.Errorf("nothing is known but a uid: %v, %v", w, err)
	}
	closed.CgroupID, closed.CgroupPath, closed.UID = 4242, "/system.slice/gone.service", 0
	w := mustResolve(t, r, closed)
	expect(t, w, map[string]string{"proc.unit": "gone.service", "os.user": "root", "proc.uid": "0", "proc.exe": "", "proc.exe_sha256": ""})
	if w.Key != (Key{CgroupID: 4242}) {
		t.Errorf("key %+v", w.Key)
	}
}

func TestResolveRefusesWhatTheKernelDoesNotKnow(t *testing.T) {
	r := newResolver(t)
	_, inode := dial(t, listen(t))
	for name, s := range map[string]Socket{
		"uid of a closing socket": {UID: 0, Inode: inode, CgroupID: 7, CgroupPath: "/system.slice/x.service"},
		"no inode":                {UID: 0, CgroupID: 7, CgroupPath: "/system.slice/x.service", Trusted: true},
	} {
		if w, err := r.Resolve(t.Context(), s); !errors.Is(err, ErrUnknownOwner) {
			t.Errorf("%s: %v, %v", name, w, err)
		}
	}
}

func TestResolveSharedSocket(t *testing.T) {
	needRoot(t)
	dir := publicDir(t)
	one, two := program(t, dir, "one"), program(t, dir, "two")
	l := listen(t)
	// share gives the holders a socket that this process made and keeps no more.
	share := func(t *testing.T, holders ...func(change func(*exec.Cmd)) *child) uint64 {
		c, inode := dial(t, l)
		f, err := c.File()
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		for _, h := range holders {
			h(func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{f} })
		}
		f.Close()
		return inode
	}
	holder := func(t *testing.T, exe string, uid uint32) func(func(*exec.Cmd)) *child {
		return func(change func(*exec.Cmd)) *child {
			return start(t, exe, "hold", func(cmd *exec.Cmd) {
				if uid != 0 {
					as(uid)(cmd)
				}
				change(cmd)
			})
		}
	}
	t.Run("by one program", func(t *testing.T) {
		inode := share(t, holder(t, one, 0), holder(t, one, 0))
		expect(t, mustResolve(t, newResolver(t), inRoot(0, inode)), map[string]string{"proc.exe": one})
	})
	t.Run("by two programs", func(t *testing.T) {
		inode := share(t, holder(t, one, 0), holder(t, two, 0))
		if w, err := newResolver(t).Resolve(t.Context(), inRoot(0, inode)); !errors.Is(err, ErrAmbiguousOwner) {
			t.Errorf("%v, %v", w, err)
		}
	})
	t.Run("by a master and its workers", func(t *testing.T) {
		inode := share(t, holder(t, one, 0), holder(t, two, nobody))
		expect(t, mustResolve(t, newResolver(t), inRoot(0, inode)), map[string]string{"proc.exe": one, "os.user": "root"})
	})
	t.Run("made by root, which gave it up", func(t *testing.T) {
		inode := share(t, holder(t, one, nobody), holder(t, one, nobody))
		r := newResolver(t)
		for range 2 {
			expect(t, mustResolve(t, r, inRoot(0, inode)), map[string]string{"proc.exe": one, "os.user": "nobody"})
		}
	})
	t.Run("made by root, left to two users", func(t *testing.T) {
		inode := share(t, holder(t, one, nobody), holder(t, one, 1))
		if w, err := newResolver(t).Resolve(t.Context(), inRoot(0, inode)); !errors.Is(err, ErrAmbiguousOwner) {
			t.Errorf("%v, %v", w, err)
		}
	})
	t.Run("slipped to root by a user", func(t *testing.T) {
		inode := share(t, holder(t, one, 0))
		s := inRoot(nobody, inode)
		if w, err := newResolver(t).Resolve(t.Context(), s); !errors.Is(err, ErrUnknownOwner) {
			t.Errorf("%v, %v", w, err)
		}
		s.CgroupID, s.CgroupPath = 4242, "/system.slice/x.service"
		expect(t, mustResolve(t, newResolver(t), s), map[string]string{"os.user": "nobody", "proc.exe": ""})
	})
}

// A set-user-ID program does what its caller wants, whoever it runs as.
func TestResolveRefusesSetUserID(t *testing.T) {
	needRoot(t)
	exe := program(t, publicDir(t), "tool")
	if err := os.Chmod(exe, 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	c := start(t, exe, "dial "+listen(t).Addr().String(), as(nobody))
	if uid := ownerOf(t, c.cmd.Process.Pid); uid != 0 {
		t.Skipf("set-user-ID has no effect in %s", filepath.Dir(exe))
	}
	if w, err := newResolver(t).Resolve(t.Context(), inRoot(0, c.inode)); !errors.Is(err, ErrAmbiguousOwner) {
		t.Errorf("%v, %v", w, err)
	}
}

func ownerOf(t testing.TB, pid int) uint32 {
	t.Helper()
	p, err := openProcess("/proc", pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	uid, err := p.euid()
	if err != nil {
		t.Fatal(err)
	}
	return uid
}

// In a mount namespace of its own a program can have any name.
func TestResolveIgnoresForgedNames(t *testing.T) {
	needRoot(t)
	dir := publicDir(t)
	victim, evil := program(t, dir, "victim"), program(t, dir, "evil")
	c := start(t, "/bin/sh", "dial "+listen(t).Addr().String(), func(cmd *exec.Cmd) {
		cmd.Args = []string{"sh", "-c", `mount --bind "$1" "$2" && exec "$2"`, "sh", evil, victim}
		cmd.Env = append(cmd.Env, "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	})
	if says, err := os.Readlink("/proc/" + strconv.Itoa(c.cmd.Process.Pid) + "/exe"); err != nil || says != victim {
		t.Fatalf("the forgery did not work: %q, %v", says, err)
	}
	w := mustResolve(t, newResolver(t), inRoot(0, c.inode))
	expect(t, w, map[string]string{"proc.exe": "", "proc.exe_sha256": sumOf(t, evil)})
}

func TestResolveAfterUpgrade(t *testing.T) {
	needRoot(t)
	dir := publicDir(t)
	exe := program(t, dir, "server")
	old := sumOf(t, exe)
	c := start(t, exe, "listen", nil)
	r := newResolver(t)
	expect(t, mustResolve(t, r, inRoot(0, c.inode)), map[string]string{"proc.exe": exe, "proc.exe_sha256": old})

	if err := os.Remove(exe); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(program(t, dir, "server-2"), exe); err != nil {
		t.Fatal(err)
	}
	// Seen before: known by its name, and by what it still runs.
	for range 2 {
		expect(t, mustResolve(t, r, inRoot(0, c.inode)), map[string]string{"proc.exe": exe, "proc.exe_sha256": old})
	}
	// Not seen before: the name is gone, and not guessed.
	expect(t, mustResolve(t, newResolver(t), inRoot(0, c.inode)), map[string]string{"proc.exe": "", "proc.exe_sha256": old})
	// The new version is another one.
	fresh := start(t, exe, "listen", nil)
	expect(t, mustResolve(t, r, inRoot(0, fresh.inode)), map[string]string{"proc.exe": exe, "proc.exe_sha256": sumOf(t, exe)})
}

// The contents count, however the file's times are set.
func TestResolveRewrittenExecutable(t *testing.T) {
	needRoot(t)
	dir := publicDir(t)
	exe := program(t, dir, "tool")
	var st unix.Stat_t
	if err := unix.Stat(exe, &st); err != nil {
		t.Fatal(err)
	}
	r := newResolver(t)
	c := start(t, exe, "listen", nil)
	before := mustResolve(t, r, inRoot(0, c.inode))
	c.end()
	f, err := os.OpenFile(exe, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("LOOT"), st.Size-4); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, exe, []unix.Timespec{st.Atim, st.Mtim}, 0); err != nil {
		t.Fatal(err)
	}
	after := mustResolve(t, r, inRoot(0, start(t, exe, "listen", nil).inode))
	expect(t, after, map[string]string{"proc.exe_sha256": sumOf(t, exe)})
	if after.Key == before.Key {
		t.Error("two versions are one workload")
	}
}

func TestResolveFollowsExec(t *testing.T) {
	needRoot(t)
	l := listen(t)
	c, inode := dial(t, l)
	r := newResolver(t)
	cat, err := filepath.EvalSymlinks("/bin/cat")
	if err != nil {
		t.Fatal(err)
	}
	sh, err := filepath.EvalSymlinks("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", "read line; exec /bin/cat")
	with(t, c, nil)(cmd)
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
	cmd.ExtraFiles[0].Close()
	c.Close()
	expect(t, mustResolve(t, r, inRoot(0, inode)), map[string]string{"proc.exe": sh})
	if _, err := stdin.Write([]byte("go\nready\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := stdout.Read(make([]byte, 8)); err != nil { // cat runs
		t.Fatal(err)
	}
	expect(t, mustResolve(t, r, inRoot(0, inode)), map[string]string{"proc.exe": cat})
}

func TestResolveContainer(t *testing.T) {
	r := newResolver(t)
	id := strings.Repeat("ab", 32)
	_, inode := dial(t, listen(t))
	s := Socket{UID: 0, Inode: inode, CgroupID: 99, CgroupPath: "/system.slice/docker-" + id + ".scope", Trusted: true}
	w := mustResolve(t, r, s)
	expect(t, w, map[string]string{"container.id": id, "os.user": "", "proc.uid": "", "proc.exe": "", "proc.cgroup": s.CgroupPath})
	s.UID = 999
	if again := mustResolve(t, r, s); again != w {
		t.Error("a container's users are workloads of their own")
	}
}

func TestResolveHonoursTheContext(t *testing.T) {
	_, inode := dial(t, listen(t))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if w, err := newResolver(t).Resolve(ctx, inRoot(uint32(os.Geteuid()), inode)); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, %v", w, err)
	}
}

func TestResolveConcurrently(t *testing.T) {
	r := newResolver(t)
	l := listen(t)
	var first sync.Map
	var wg sync.WaitGroup
	for range 8 {
		_, inode := dial(t, l)
		wg.Go(func() {
			for range 20 {
				w, err := r.Resolve(t.Context(), inRoot(uint32(os.Geteuid()), inode))
				if err != nil {
					t.Error(err)
					return
				}
				first.Store(w.Key, true)
			}
		})
	}
	wg.Wait()
	n := 0
	for range first.Range {
		n++
	}
	if n != 1 {
		t.Errorf("%d workloads, want 1", n)
	}
}

func TestResolveDoesNotLeakDescriptors(t *testing.T) {
	r := newResolver(t)
	c, inode := dial(t, listen(t))
	s := inRoot(uint32(os.Geteuid()), inode)
	mustResolve(t, r, s)
	count := func() int {
		names, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(names)
	}
	before := count()
	for range 20 {
		mustResolve(t, r, s)
		r.sockets.Purge()
	}
	c.Close()
	for range 20 {
		if _, err := r.Resolve(t.Context(), s); err == nil {
			t.Fatal("a closed socket has an owner")
		}
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors, then %d", before, after)
	}
}

// What is open stays with the process it was opened for.
func TestProcessOutlivesItsNumber(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := start(t, self, "hold", nil)
	p, err := openProcess("/proc", c.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if _, err := p.start(); err != nil {
		t.Fatal(err)
	}
	c.end()
	if _, err := p.start(); !errors.Is(err, errGone) {
		t.Errorf("start: %v", err)
	}
	if _, err := p.exe(); !errors.Is(err, errGone) {
		t.Errorf("exe: %v", err)
	}
	if _, err := p.holds(t.Context(), 1, nil, maxDescriptors); !errors.Is(err, errGone) {
		t.Errorf("holds: %v", err)
	}
}

func TestHoldsFindsAnyDescriptor(t *testing.T) {
	p, err := openProcess("/proc", os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	l := listen(t)
	var inodes []uint64
	var conns []*net.TCPConn
	for range 40 {
		c, inode := dial(t, l)
		conns, inodes = append(conns, c), append(inodes, inode)
	}
	conns[11].Close() // a gap
	for i, inode := range inodes {
		fd, err := p.holds(t.Context(), inode, []int{0, 1, 1 << 20}, maxDescriptors)
		if err != nil {
			t.Fatal(err)
		}
		if (fd >= 0) != (i != 11) {
			t.Errorf("socket %d: descriptor %d", i, fd)
		}
	}
}

func TestDistribution(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want []string
	}{
		{"NAME=\"Debian GNU/Linux\"\nVERSION_ID=\"12\"\nID=debian\nID_LIKE=x\n", []string{"debian", "debian-12"}},
		{"ID='arch'\n", []string{"arch"}},
		{"# ID=x\n\nVERSION_ID=3\n", nil},
	} {
		if got := distribution(tt.in); strings.Join(got, " ") != strings.Join(tt.want, " ") {
			t.Errorf("%q: %q, want %q", tt.in, got, tt.want)
		}
	}
}

func BenchmarkResolve(b *testing.B) {
	l := listen(b)
	uid := uint32(os.Geteuid())
	b.Run("listener", func(b *testing.B) {
		r := newResolver(b)
		inode, err := inodeOf(l)
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			mustResolve(b, r, inRoot(uid, inode))
		}
	})
	// Each socket is new to the resolver, its process is not.
	b.Run("client", func(b *testing.B) {
		r := newResolver(b)
		var inodes []uint64
		for range 64 {
			_, inode := dial(b, l)
			inodes = append(inodes, inode)
		}
		i := 0
		for b.Loop() {
			r.sockets.Remove(inodes[i])
			mustResolve(b, r, inRoot(uid, inodes[i]))
			i = (i + 1) % len(inodes)
		}
	})
	// Nothing is known: every process of the machine is looked at.
	b.Run("cold", func(b *testing.B) {
		r := newResolver(b)
		_, inode := dial(b, l)
		for b.Loop() {
			r.sockets.Purge()
			r.groups.Purge()
			mustResolve(b, r, inRoot(uid, inode))
		}
	})
}
