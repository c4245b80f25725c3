package identity

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func startCrowd(t *testing.T, exe string, uid uint32, addr string) *child {
	t.Helper()
	needRoot(t)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Max <= crowdLast {
		t.Skipf("needs RLIMIT_NOFILE above %d", limit.Max)
	}
	return start(t, exe, "crowd "+addr, as(uid))
}

// narrow is a Resolver to which a crowd's descriptors are too many.
func narrow(t *testing.T) *Resolver {
	t.Helper()
	r := newResolver(t)
	r.descriptors = fewDescriptors
	return r
}

// TestResolveHiddenSocket: behind very many descriptors there is no identity, rather
// than that of somebody who has ended.
func TestResolveHiddenSocket(t *testing.T) {
	l := listen(t)
	crowd := startCrowd(t, program(t, publicDir(t), "crowd"), nobody, l.Addr().String())
	r := narrow(t)
	for range 2 {
		s := inRoot(nobody, crowd.inode)
		if w, err := r.Resolve(t.Context(), s); !errors.Is(err, errTooManyDescriptors) || !errors.Is(err, ErrUnknownOwner) {
			t.Errorf("%v, %v", w, err)
		}
		// A cgroup by itself is not enough either.
		s.CgroupID, s.CgroupPath = 4242, "/system.slice/x.service"
		if w, err := r.Resolve(t.Context(), s); !errors.Is(err, ErrUnknownOwner) {
			t.Errorf("%v, %v", w, err)
		}
	}
	p, err := openProcess("/proc", crowd.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if fd, err := p.holds(t.Context(), crowd.inode, []int{crowdLast}, fewDescriptors); err != nil || fd != crowdLast {
		t.Errorf("where it is known to be: %d, %v", fd, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if fd, err := p.holds(t.Context(), crowd.inode, nil, maxDescriptors); err != nil || fd != crowdLast {
		t.Errorf("where all are looked at: %d, %v", fd, err)
	}
	if _, err := p.holds(ctx, crowd.inode, nil, maxDescriptors); !errors.Is(err, context.Canceled) {
		t.Errorf("without time: %v", err)
	}
}

// TestResolveBesideACrowd: whose identity a process with very many descriptors can
// deny, and whose not.
func TestResolveBesideACrowd(t *testing.T) {
	needRoot(t)
	l := listen(t)
	dir := publicDir(t)
	one, two := program(t, dir, "one"), program(t, dir, "two")
	nobodys := start(t, one, "dial "+l.Addr().String(), as(nobody))
	roots := start(t, one, "dial "+l.Addr().String(), nil)
	// Made by root, left to nobody: any process could have it.
	c, left := dial(t, l)
	f, err := c.File()
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	start(t, one, "hold", func(cmd *exec.Cmd) {
		as(nobody)(cmd)
		cmd.ExtraFiles = []*os.File{f}
	})
	f.Close()
	mine := func(t *testing.T) {
		t.Helper()
		expect(t, mustResolve(t, narrow(t), inRoot(0, roots.inode)), map[string]string{"proc.exe": one, "os.user": "root"})
	}

	t.Run("another user's", func(t *testing.T) {
		startCrowd(t, two, 1000, l.Addr().String())
		mine(t)
		expect(t, mustResolve(t, narrow(t), inRoot(nobody, nobodys.inode)), map[string]string{"proc.exe": one})
		expect(t, mustResolve(t, narrow(t), inRoot(0, left)), map[string]string{"proc.exe": one, "os.user": "nobody"})
	})
	t.Run("the same program's", func(t *testing.T) {
		startCrowd(t, one, nobody, l.Addr().String())
		expect(t, mustResolve(t, narrow(t), inRoot(nobody, nobodys.inode)), map[string]string{"proc.exe": one})
	})
	t.Run("the same user's", func(t *testing.T) {
		startCrowd(t, two, nobody, l.Addr().String())
		if w, err := narrow(t).Resolve(t.Context(), inRoot(nobody, nobodys.inode)); !errors.Is(err, errTooManyDescriptors) {
			t.Errorf("%v, %v", w, err)
		}
		mine(t)
	})
	t.Run("a set-user-ID program's", func(t *testing.T) {
		tool := program(t, dir, "tool")
		if err := os.Chmod(tool, 0o755|os.ModeSetuid); err != nil {
			t.Fatal(err)
		}
		crowd := startCrowd(t, tool, nobody, l.Addr().String())
		if uid := ownerOf(t, crowd.cmd.Process.Pid); uid != 0 {
			t.Skipf("set-user-ID has no effect in %s", dir)
		}
		mine(t)
		// Its own stays unknown.
		if w, err := narrow(t).Resolve(t.Context(), inRoot(0, crowd.inode)); !errors.Is(err, ErrUnknownOwner) {
			t.Errorf("%v, %v", w, err)
		}
	})
}

// TestHugeExecutablesAreNotRead: a sparse file costs its user nothing, and must not
// cost us anything.
func TestHugeExecutablesAreNotRead(t *testing.T) {
	needRoot(t)
	exe := program(t, publicDir(t), "huge")
	if err := os.Truncate(exe, maxExecutable+1); err != nil {
		t.Fatal(err)
	}
	c := start(t, exe, "dial "+listen(t).Addr().String(), as(nobody))
	expect(t, mustResolve(t, newResolver(t), inRoot(nobody, c.inode)), map[string]string{"proc.exe": exe, "proc.exe_sha256": ""})
	if maxExecutable > 256<<20 {
		t.Errorf("up to %d bytes are read", maxExecutable)
	}
}

// TestHashingIsFair: while one user's executables are read, or wait for it, another
// user's are, be it the same file.
func TestHashingIsFair(t *testing.T) {
	needRoot(t)
	r := newResolver(t)
	exe := program(t, publicDir(t), "server")
	l := listen(t)
	nobodys := start(t, exe, "dial "+l.Addr().String(), as(nobody))
	roots := start(t, exe, "dial "+l.Addr().String(), nil)
	var held []func()
	for range maxHashingPerUser {
		release, err := r.exes.slots.acquire(t.Context(), nobody)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, release)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		if w, err := r.Resolve(ctx, inRoot(nobody, nobodys.inode)); !errors.Is(err, context.Canceled) {
			t.Errorf("beyond the share: %v, %v", w, err)
		}
	})
	waitFor(t, func() bool { // until it waits for its share
		r.exes.slots.mu.Lock()
		defer r.exes.slots.mu.Unlock()
		return r.exes.slots.users[nobody].held == maxHashingPerUser+1
	})
	expect(t, mustResolve(t, r, inRoot(0, roots.inode)), map[string]string{"proc.exe": exe, "proc.exe_sha256": sumOf(t, exe)})
	cancel()
	wg.Wait()
	for _, release := range held {
		release()
	}
	expect(t, mustResolve(t, r, inRoot(nobody, nobodys.inode)), map[string]string{"proc.exe_sha256": sumOf(t, exe)})
}

// TestSearchingIsFair: while one user's sockets are looked for, those of others are
// found, and his that are known already.
func TestSearchingIsFair(t *testing.T) {
	needRoot(t)
	r := newResolver(t)
	exe := program(t, publicDir(t), "server")
	l := listen(t)
	nobodys := start(t, exe, "dial "+l.Addr().String(), as(nobody))
	known := start(t, exe, "dial "+l.Addr().String(), as(nobody))
	roots := start(t, exe, "dial "+l.Addr().String(), nil)
	mustResolve(t, r, inRoot(nobody, known.inode))
	for range maxScansPerUser {
		release, err := r.scans.acquire(t.Context(), nobody)
		if err != nil {
			t.Fatal(err)
		}
		defer release()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if w, err := r.Resolve(ctx, inRoot(nobody, nobodys.inode)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("beyond the share: %v, %v", w, err)
	}
	mustResolve(t, r, inRoot(nobody, known.inode))
	mustResolve(t, r, inRoot(0, roots.inode))
}

// waitFor polls: what it waits for happens in the kernel's and other goroutines' time.
func waitFor(t testing.TB, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not happen")
		}
	}
}
