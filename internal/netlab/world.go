package netlab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Options tune a world; the zero value is good.
type Options struct {
	// TempDir is where the world's directory is made; empty means os.TempDir().
	// Service users (postgres, www-data) must be able to traverse it. Leftovers
	// are swept from os.TempDir() and from here.
	TempDir string
}

// World is a set of hosts and what runs in them. Building calls are made from
// one goroutine at a time; everything else is safe for concurrent use.
type World struct {
	id       string
	dir      string
	cgroups  *cgroups // nil where the machine has no usable cgroup v2
	reporter reporter
	grace    time.Duration // what Test gives descriptors to close after Close

	mu      sync.Mutex
	err     error
	hosts   []*Host
	running []*Daemon // in order of start
	serial  int
	closed  bool
}

// reporter hears of failures of building calls; testing.TB is one.
type reporter interface {
	Helper()
	Fatal(args ...any)
}

type silent struct{}

func (silent) Helper()      {}
func (silent) Fatal(...any) {}

var errClosed = errors.New("netlab: world is closed")

// New sweeps what dead processes left and makes an empty world. It needs root.
func New(opts Options) (*World, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("netlab: needs root (network namespaces)")
	}
	temp := opts.TempDir
	if temp == "" {
		temp = os.TempDir()
	}
	if err := sweep(os.TempDir(), memoryDir, temp); err != nil {
		return nil, err
	}
	me, err := self()
	if err != nil {
		return nil, fmt.Errorf("netlab: %w", err)
	}
	w := &World{id: me.newID(), reporter: silent{}, grace: leakGrace}
	w.dir = filepath.Join(temp, w.id)
	if err := os.Mkdir(w.dir, 0o755); err != nil {
		return nil, fmt.Errorf("netlab: %w", err)
	}
	// Mkdir is subject to the umask; other users must be able to traverse.
	if err := os.Chmod(w.dir, 0o755); err != nil {
		return nil, fmt.Errorf("netlab: %w", err)
	}
	if w.cgroups, err = newCgroups(w.id); err != nil {
		os.RemoveAll(w.dir)
		return nil, fmt.Errorf("netlab: %w", err)
	}
	return w, nil
}

// ID returns the world's unique name, sl-<pid>-<start time>-<random>.
func (w *World) ID() string { return w.id }

// Dir returns the world's directory, mode 0755, removed by Close.
func (w *World) Dir() string { return w.dir }

// HasCgroups reports whether programs can be given cgroups of their own here
// (cgroup v2 is mounted, alone or beside v1, and writable).
func (w *World) HasCgroups() bool { return w.cgroups != nil }

// Err returns the first failure of a building call.
func (w *World) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil && w.closed {
		return errClosed
	}
	return w.err
}

// fail keeps err if it is the first, and tells the reporter.
func (w *World) fail(format string, args ...any) {
	w.reporter.Helper()
	err := fmt.Errorf("netlab: "+format, args...)
	w.mu.Lock()
	if w.err == nil {
		w.err = err
	}
	w.mu.Unlock()
	w.reporter.Fatal(err)
}

// mkdir makes a directory and its parents below the world's own, which all users
// can traverse whatever the umask.
func (w *World) mkdir(elem ...string) (string, error) {
	dir := w.dir
	for _, e := range elem {
		dir = filepath.Join(dir, e)
		if err := os.Mkdir(dir, 0o755); errors.Is(err, fs.ErrExist) {
			continue
		} else if err != nil {
			return "", err
		}
		if err := os.Chmod(dir, 0o755); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// writeConfig writes a file that every user can read, whatever the umask.
func writeConfig(path, text string) error {
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Chmod(path, 0o644)
}

// next returns a number that no other call of this world got.
func (w *World) next() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.serial++
	return w.serial
}

// Close stops the daemons, the last started first, kills every other process in
// the world's namespaces and cgroups, and removes namespaces, links, cgroups and
// files. It reports what it could not remove. Closing twice is harmless.
func (w *World) Close() error {
	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		return nil
	}
	w.closed = true
	running, hosts := w.running, w.hosts
	w.mu.Unlock()

	var errs []error
	for i := len(running) - 1; i >= 0; i-- {
		// What a daemon answers to being stopped is its owner's concern (Stop);
		// here it only has to be gone, and killAll below proves that.
		_ = running[i].Stop()
	}
	namespaces := make(map[inode]bool)
	for _, h := range hosts {
		namespaces[h.inode] = true
	}
	if err := killAll(namespaces); err != nil {
		errs = append(errs, err)
	}
	for _, h := range hosts {
		if err := h.close(); err != nil {
			errs = append(errs, err)
		}
	}
	if w.cgroups != nil {
		if err := removeCgroup(w.cgroups.dir); err != nil {
			errs = append(errs, err)
		}
	}
	for _, dir := range []string{w.dir, filepath.Join(memoryDir, w.id)} {
		if err := os.RemoveAll(dir); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("netlab: close %s: %w", w.id, errors.Join(errs...))
	}
	return nil
}
