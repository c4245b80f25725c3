package identity

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// cgroups makes cgroups of the given names below one of this test's own, and
// returns their paths in order. They go with the test, after its processes.
func cgroups(t testing.TB, names ...string) []string {
	t.Helper()
	needRoot(t)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	mount := cgroup2Mount(string(mounts))
	if mount == "" {
		t.Skip("needs cgroup v2")
	}
	top, err := os.MkdirTemp(mount, "sl-identity-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeCgroup(t, top) })
	var out []string
	for _, name := range names {
		dir := filepath.Join(top, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for at := dir; at != top; at = filepath.Dir(at) {
			t.Cleanup(func() { removeCgroup(t, at) })
		}
		out = append(out, strings.TrimPrefix(dir, mount))
	}
	return out
}

// removeCgroup waits for the kernel, which lets go of ended processes a little
// later.
func removeCgroup(t testing.TB, dir string) {
	deadline := time.Now().Add(5 * time.Second)
	for {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			t.Errorf("cgroup %s: %v", dir, err)
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// within starts a command in a cgroup.
func within(t testing.TB, r *Resolver, cgroup string, then func(*exec.Cmd)) func(*exec.Cmd) {
	t.Helper()
	dir, err := os.Open(r.cgroup + cgroup)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	return func(cmd *exec.Cmd) {
		if then != nil {
			then(cmd)
		}
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = &syscall.SysProcAttr{}
		}
		cmd.SysProcAttr.UseCgroupFD = true
		cmd.SysProcAttr.CgroupFD = int(dir.Fd())
	}
}

func socketIn(t testing.TB, r *Resolver, cgroup string, uid uint32, inode uint64) Socket {
	t.Helper()
	id, err := r.cgroupID(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	return Socket{UID: uid, Inode: inode, CgroupID: id, CgroupPath: cgroup, Trusted: true}
}

func TestResolveInACgroup(t *testing.T) {
	cg := cgroups(t, "web.service", "db.service")
	r := newResolver(t)
	exe := program(t, publicDir(t), "server")
	l := listen(t)
	web := start(t, exe, "dial "+l.Addr().String(), within(t, r, cg[0], as(nobody)))
	db := start(t, exe, "dial "+l.Addr().String(), within(t, r, cg[1], as(nobody)))

	w := mustResolve(t, r, socketIn(t, r, cg[0], nobody, web.inode))
	expect(t, w, map[string]string{"proc.unit": "web.service", "proc.cgroup": cg[0], "proc.exe": exe, "os.user": "nobody"})
	d := mustResolve(t, r, socketIn(t, r, cg[1], nobody, db.inode))
	expect(t, d, map[string]string{"proc.unit": "db.service", "proc.cgroup": cg[1], "proc.exe": exe})
	if w.Key == d.Key {
		t.Error("two units are one workload")
	}

	t.Run("the socket went to another cgroup", func(t *testing.T) {
		// Its place of origin is known, its holder is nobody there.
		w := mustResolve(t, r, socketIn(t, r, cg[0], nobody, db.inode+1<<40))
		expect(t, w, map[string]string{"proc.unit": "web.service", "proc.exe": "", "proc.uid": "65534"})
		w = mustResolve(t, newResolver(t), socketIn(t, r, cg[0], nobody, db.inode))
		expect(t, w, map[string]string{"proc.unit": "web.service", "proc.exe": ""})
	})
	t.Run("the cgroup was made anew", func(t *testing.T) {
		s := socketIn(t, r, cg[0], nobody, 1<<40)
		s.CgroupID += 1 << 40
		expect(t, mustResolve(t, r, s), map[string]string{"proc.exe": ""})
	})
	t.Run("its path could not be found", func(t *testing.T) {
		s := socketIn(t, r, cg[0], nobody, web.inode)
		s.CgroupPath = ""
		expect(t, mustResolve(t, newResolver(t), s), map[string]string{"proc.unit": "web.service", "proc.exe": exe})
		s.CgroupID += 1 << 40
		if w, err := newResolver(t).Resolve(t.Context(), s); !errors.Is(err, ErrAmbiguousOwner) {
			t.Errorf("made elsewhere: %v, %v", w, err)
		}
	})
	t.Run("by the last owner", func(t *testing.T) {
		for range 3 {
			r.sockets.Purge()
			if again := mustResolve(t, r, socketIn(t, r, cg[0], nobody, web.inode)); again != w {
				t.Error("another workload")
			}
		}
	})
}

// In one unit, too, two programs that share a socket are not told apart.
func TestResolveSharedInACgroup(t *testing.T) {
	cg := cgroups(t, "web.service")[0]
	r := newResolver(t)
	dir := publicDir(t)
	one, two := program(t, dir, "one"), program(t, dir, "two")
	c, inode := dial(t, listen(t))
	inherit := with(t, c, nil)
	start(t, one, "hold", within(t, r, cg, inherit))
	s := socketIn(t, r, cg, 0, inode)
	expect(t, mustResolve(t, r, s), map[string]string{"proc.exe": one})
	start(t, two, "hold", within(t, r, cg, inherit))
	// Not by the memory of this very socket, but wherever the cgroup is looked at.
	r.sockets.Purge()
	if w, err := r.Resolve(t.Context(), s); !errors.Is(err, ErrAmbiguousOwner) {
		t.Errorf("%v, %v", w, err)
	}
}

// A manager makes the sockets of its services; who has them is who they belong to.
func TestResolveActivatedSocket(t *testing.T) {
	cg := cgroups(t, "init.scope", "web.service")
	r := newResolver(t)
	dir := publicDir(t)
	manager, service := program(t, dir, "manager"), program(t, dir, "service")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	inode, err := inodeOf(l.(*net.TCPListener))
	if err != nil {
		t.Fatal(err)
	}
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	inherit := func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{f} }
	s := socketIn(t, r, cg[0], 0, inode)

	start(t, manager, "hold", within(t, r, cg[0], inherit))
	web := start(t, service, "hold", within(t, r, cg[1], inherit))
	f.Close()
	l.Close()
	for range 2 {
		expect(t, mustResolve(t, r, s), map[string]string{"proc.unit": "web.service", "proc.exe": service, "proc.cgroup": cg[1]})
	}
	web.end()
	expect(t, mustResolve(t, r, s), map[string]string{"proc.exe": manager, "proc.unit": "init.scope"})
}

// The manager of one user does not speak for others.
func TestResolveActivatedSocketOfAnotherUser(t *testing.T) {
	cg := cgroups(t, "init.scope", "web.service")
	r := newResolver(t)
	exe := program(t, publicDir(t), "service")
	l := start(t, exe, "listen", within(t, r, cg[0], as(nobody)))
	expect(t, mustResolve(t, r, socketIn(t, r, cg[0], nobody, l.inode)), map[string]string{"os.user": "nobody"})

	c, inode := dial(t, listen(t))
	start(t, exe, "hold", within(t, r, cg[1], with(t, c, nil))) // root's process has it
	w := mustResolve(t, r, socketIn(t, r, cg[0], nobody, inode))
	expect(t, w, map[string]string{"os.user": "nobody", "proc.exe": ""})
}
