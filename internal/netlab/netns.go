package netlab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// netnsDir is where iproute2 keeps named network namespaces (ip-netns(8)).
const netnsDir = "/run/netns"

// inode identifies a network namespace for as long as it lives.
type inode struct{ dev, ino uint64 }

func inodeOf(path string) (inode, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return inode{}, err
	}
	return inode{st.Dev, st.Ino}, nil
}

// createNetns makes a network namespace named so that iproute2 finds it.
func createNetns(name string) (netns.NsHandle, error) {
	if err := prepareNetnsDir(); err != nil {
		return netns.None(), fmt.Errorf("prepare %s: %w", netnsDir, err)
	}
	handle := netns.None()
	err := onThread(func() (err error) {
		handle, err = netns.NewNamed(name) // leaves the thread in the new one
		return err
	})
	if err != nil {
		_ = removeNetns(name)
		return netns.None(), fmt.Errorf("make network namespace %s: %w", name, err)
	}
	return handle, nil
}

// prepareNetnsDir makes /run/netns a shared mount, as "ip netns add" does. Were
// this left to it, its later recursive bind mount would cover our entries and
// keep the namespaces alive below it. The lock is the one iproute2 takes.
func prepareNetnsDir() error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	dir, err := os.Open(netnsDir)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	err = unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
	if !errors.Is(err, unix.EINVAL) { // EINVAL: not a mount point yet
		return err
	}
	if err := unix.Mount(netnsDir, netnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	return unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
}

// removeNetns removes the name; the namespace goes when nothing holds it any
// more. A name that is not there is no error.
func removeNetns(name string) error {
	path := filepath.Join(netnsDir, name)
	err := unix.Unmount(path, unix.MNT_DETACH)
	// EINVAL: the file is there without a mount (a crash in between).
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// onThread runs f, which may change the thread's network namespace, and restores
// that. If it cannot be restored the thread stays locked, so that the runtime
// ends it with the goroutine and no other goroutine ever runs on it.
func onThread(f func() error) (err error) {
	runtime.LockOSThread()
	origin, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("own network namespace: %w", err)
	}
	defer func() {
		restored := netns.Set(origin)
		origin.Close()
		if restored != nil {
			err = errors.Join(err, fmt.Errorf("restore network namespace: %w", restored))
			return
		}
		runtime.UnlockOSThread()
	}()
	return f()
}
