package identity

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

func asking(t testing.TB, keys ...string) *Resolver {
	t.Helper()
	r, err := NewResolver(keys...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// What was not asked for is not there; what was makes workloads of processes.
func TestAttributesOnRequest(t *testing.T) {
	needRoot(t)
	exe, l := program(t, publicDir(t), "client"), listen(t)
	args := func(more string) func(*exec.Cmd) {
		return func(c *exec.Cmd) { as(nobody)(c); c.Args = append(c.Args, more) }
	}
	one := start(t, exe, "dial "+l.Addr().String(), args("--role=one"))
	two := start(t, exe, "dial "+l.Addr().String(), args("--role=two"))

	plain := newResolver(t)
	a, b := mustResolve(t, plain, inRoot(nobody, one.inode)), mustResolve(t, plain, inRoot(nobody, two.inode))
	if a.Key != b.Key {
		t.Error("nobody asked, and yet two processes of one program are two workloads")
	}
	for _, k := range OnRequest() {
		if a.Attributes.Has(k) {
			t.Errorf("%s is there unasked", k)
		}
	}

	r := asking(t, AttrArgs, AttrStart)
	a, b = mustResolve(t, r, inRoot(nobody, one.inode)), mustResolve(t, r, inRoot(nobody, two.inode))
	expect(t, a, map[string]string{AttrArgs: exe + " --role=one", "proc.exe": exe})
	expect(t, b, map[string]string{AttrArgs: exe + " --role=two"})
	if a.Key == b.Key {
		t.Error("other arguments are the same workload")
	}
	p, err := openProcess("/proc", one.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	ticks, err := p.start()
	if err != nil {
		t.Fatal(err)
	}
	expect(t, a, map[string]string{AttrStart: strconv.FormatUint(ticks, 10)})
	if again := mustResolve(t, r, inRoot(nobody, one.inode)); again != a {
		t.Error("the same workload was made twice")
	}
}

// A caller that has ended leaves its start, which is in the kernel's record, and
// nothing that only it could tell.
func TestAttributesOnRequestOfTheGone(t *testing.T) {
	r := asking(t, OnRequest()...)
	w := mustResolve(t, r, Socket{Caller: &Caller{
		PID: 1 << 30, Start: 77 * clockTick, CgroupID: 4242, CgroupPath: "/system.slice/gone.service",
	}, CgroupID: 4242, CgroupPath: "/system.slice/gone.service"})
	expect(t, w, map[string]string{AttrStart: "77", AttrArgs: "", AttrParentUnit: "", "proc.unit": "gone.service", "proc.slice": "system.slice"})
}

func TestUnknownAttributeOnRequest(t *testing.T) {
	if _, err := NewResolver("proc.exe"); err == nil || !strings.Contains(err.Error(), AttrArgs) {
		t.Errorf("got %v, want what can be asked for", err)
	}
}

func TestJoinArgs(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"", ""},
		{"a\x00", "a"},
		{"a\x00b c\x00", "a b c"},
		{"nginx: worker process\x00\x00\x00\x00", "nginx: worker process"}, // setproctitle
		{"a\x00\x1b[2J\x00", ""},
		{"a\nb\x00", ""},
		{"\xff\x00", ""},
		{strings.Repeat("x", maxArgs) + "\x00", strings.Repeat("x", maxArgs)},
		{strings.Repeat("x", maxArgs) + "y\x00", ""},
	} {
		if got := joinArgs([]byte(tt.in)); got != tt.want {
			t.Errorf("%q: %q, want %q", tt.in, got, tt.want)
		}
	}
}

// The parent's unit is known while the parent lives, and an orphan's is not: a process
// that leaves its parent does not become a child of whom it likes.
func TestParentUnit(t *testing.T) {
	cg := cgroups(t, "cron.service")
	r := asking(t, AttrParentUnit)
	sh := exec.Command("/bin/sh", "-c", "sleep 1000 </dev/null >/dev/null & echo $!; read line")
	within(t, r, cg[0], nil)(sh)
	stdin, err := sh.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := sh.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := sh.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 16)
	n, err := stdout.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(line[:n])))
	if err != nil {
		t.Fatal(err)
	}
	ended := false
	defer func() {
		_ = syscall.Kill(pid, syscall.SIGKILL)
		if !ended {
			stdin.Close()
			_ = sh.Wait()
		}
	}()
	p, err := openProcess("/proc", pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if unit, err := r.parentUnit(p); err != nil || unit != "cron.service" {
		t.Errorf("with its parent: %q, %v", unit, err)
	}
	ended = true
	stdin.Close()
	_ = sh.Wait()
	if unit, err := r.parentUnit(p); err != nil || unit == "cron.service" {
		t.Errorf("without: %q, %v", unit, err)
	}
	unix.Kill(pid, unix.SIGKILL)
	for end := time.Now().Add(10 * time.Second); unix.Kill(pid, 0) == nil && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond)
	}
}

// A user who leaves a group has an SVID without it, though none of his workloads
// connects anew.
func TestManagerRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		m, _ := managerOf(t, c)
		mustGet(t, m, webWorkload)
		defer pin(m, webWorkload)()
		heard := make(chan *Credential, 8)
		defer m.Subscribe(func(_ Key, c *Credential) { heard <- c })()
		m.Refresh(func(w *Workload) *Workload { return w })
		synctest.Wait()
		if n := c.count(); n != 1 {
			t.Fatalf("%d requests though nothing has changed", n)
		}
		m.Refresh(func(w *Workload) *Workload {
			return &Workload{Key: w.Key, Attributes: w.Attributes.Union(Attributes{{"os.group", "ssl"}})}
		})
		synctest.Wait()
		if n := c.count(); n != 2 {
			t.Fatalf("%d requests, want a second one", n)
		}
		select {
		case got := <-heard:
			if got == nil {
				t.Error("the listeners heard of an end, not of a new SVID")
			}
		default:
			t.Error("the listeners heard nothing")
		}
		if got := m.Snapshot(); len(got) != 1 || got[0].Pins != 1 || got[0].Workload.Attributes.Get("os.group") != "ssl" {
			t.Errorf("%+v", got)
		}
	})
}

// Refresh reads the user database again, and leaves containers alone.
func TestResolverRefresh(t *testing.T) {
	db := writeUsers(t, "web:x:33:33::/:/bin/false\n", "web:x:33:\nssl:x:40:web\n")
	r := newResolver(t)
	r.users = db
	w, err := r.workload(facts{cgroupID: 7, cgroup: "/system.slice/web.service", uid: 33})
	if err != nil {
		t.Fatal(err)
	}
	groups := func(w *Workload) (out []string) {
		for _, a := range w.Attributes.Of("os.group") {
			out = append(out, a.Value)
		}
		return out
	}
	if got := groups(w); !slices.Equal(got, []string{"ssl", "web"}) {
		t.Fatalf("groups %v", got)
	}
	if r.Refresh(w) != w {
		t.Error("nothing changed, and it is another")
	}
	rewrite(t, db.group, "web:x:33:\n")
	now := r.Refresh(w)
	if got := groups(now); !slices.Equal(got, []string{"web"}) || now.Key != w.Key {
		t.Errorf("after: %v", got)
	}
	rewrite(t, db.passwd, "other:x:34:34::/:/bin/false\n")
	if now = r.Refresh(now); now.Attributes.Has("os.user") || now.Attributes.Has("os.group") || !now.Attributes.Has("proc.unit") {
		t.Errorf("of a user that is gone: %s", now.Attributes)
	}
	box := &Workload{Attributes: Attributes{{"container.id", "c"}}}
	if r.Refresh(box) != box {
		t.Error("a container is no user of this host")
	}
}

func writeUsers(t testing.TB, passwd, group string) *userDB {
	t.Helper()
	dir := t.TempDir()
	db := &userDB{passwd: filepath.Join(dir, "passwd"), group: filepath.Join(dir, "group")}
	rewrite(t, db.passwd, passwd)
	rewrite(t, db.group, group)
	return db
}

func rewrite(t testing.TB, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
