package containerlab

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	waitFor = 30 * time.Second
	poll    = 20 * time.Millisecond
	// endFor is how long a runtime's helpers have to end by themselves.
	endFor = 10 * time.Second
)

// await waits until get succeeds.
func await(t testing.TB, what string, get func() error) {
	t.Helper()
	if err := within(waitFor, get); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func within(d time.Duration, get func() error) error {
	deadline := time.Now().Add(d)
	for {
		err := get()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(poll)
	}
}

// hold keeps others' leave from removing the cgroups above containers, which runtimes
// make in two steps, until the test ends. Call it before anything that is to be removed.
func hold(t testing.TB) {
	f, err := os.OpenFile("/run/lock/sl-containerlab", os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_SH)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		defer f.Close()
		// Who is not the last leaves it to that one.
		if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
			removeCgroups()
		}
	})
}

// removeCgroups removes those above containers, where they are empty, in every hierarchy.
func removeCgroups() {
	for _, name := range []string{"libpod_parent/conmon", "libpod_parent", "kubepods/burstable/pod*", "kubepods/burstable", "kubepods"} {
		for _, pattern := range []string{"/sys/fs/cgroup/" + name, "/sys/fs/cgroup/*/" + name} {
			found, _ := filepath.Glob(pattern)
			for _, c := range found {
				_ = syscall.Rmdir(c)
			}
		}
	}
}

// leave removes what a runtime has left: helpers that have its directory, which nobody
// else knows, in their arguments; mounts there.
func leave(t testing.TB, dir string) {
	if within(endFor, func() error { return noneOf(dir, func(int) {}) }) != nil {
		_ = noneOf(dir, func(pid int) { _ = syscall.Kill(pid, syscall.SIGKILL) })
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Error(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[1], dir+"/") {
			_ = syscall.Unmount(f[1], syscall.MNT_DETACH)
		}
	}
	if err := within(endFor, func() error { return os.RemoveAll(dir) }); err != nil {
		t.Errorf("%s stays: %v", dir, err)
	}
}

var errRunning = errors.New("processes are left")

// noneOf calls each for the processes that have dir in their arguments; nil: none.
func noneOf(dir string, each func(pid int)) (err error) {
	found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range found {
		b, _ := os.ReadFile(file)
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if pid != os.Getpid() && bytes.Contains(b, []byte(dir)) {
			err = errRunning
			each(pid)
		}
	}
	return err
}
