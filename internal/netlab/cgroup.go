package netlab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroupRoots are the places where cgroup v2 is mounted: alone, or beside v1
// ("hybrid", systemd's name for it).
var cgroupRoots = []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}

// cgroupTimeout bounds the emptying of a cgroup whose processes were killed.
const cgroupTimeout = 10 * time.Second

// cgroups is a world's part of the cgroup v2 tree. It enables no controllers, so
// that processes may sit in any of its directories.
type cgroups struct {
	root string // mount point
	dir  string // root/<world id>
}

// cgroupRoot returns where cgroup v2 is mounted, "" if it is not.
func cgroupRoot() string {
	for _, dir := range cgroupRoots {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir
		}
	}
	return ""
}

// newCgroups returns nil where there is no cgroup v2, or none that may be
// written (an unprivileged container).
func newCgroups(id string) (*cgroups, error) {
	root := cgroupRoot()
	if root == "" {
		return nil, nil
	}
	dir := filepath.Join(root, id)
	err := os.Mkdir(dir, 0o755)
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &cgroups{root: root, dir: dir}, nil
}

// Cgroup returns the cgroup of a unit as /proc/PID/cgroup shows it, such as
// "/sl-.../server/nginx.service"; "" where the machine has no cgroup v2.
func (h *Host) Cgroup(unit string) string {
	if h.world.cgroups == nil {
		return ""
	}
	return "/" + filepath.Join(h.world.id, h.name, unit)
}

// cgroupDir returns the unit's directory in the cgroup tree.
func (h *Host) cgroupDir(unit string) string {
	return filepath.Join(h.world.cgroups.dir, h.name, unit)
}

// openCgroup makes the unit's cgroup if need be and opens it, for clone3(2) to
// start a process in it. The caller closes it.
func (h *Host) openCgroup(unit string) (*os.File, error) {
	if unit != filepath.Base(unit) || unit == "." || unit == ".." {
		return nil, fmt.Errorf("unit name %q is not one path element", unit)
	}
	dir := h.cgroupDir(unit)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("cgroup: %w", err)
	}
	return os.Open(dir)
}

// removeCgroup kills what is in the directory and below and removes it all. A
// directory that is not there is no error.
func removeCgroup(dir string) error {
	deadline := time.Now().Add(cgroupTimeout)
	for {
		pids, err := cgroupProcs(dir)
		if err != nil {
			return err
		}
		for _, pid := range pids {
			if err := kill(pid, func() bool { return inCgroup(pid, dir) }); err != nil {
				return err
			}
		}
		// A cgroup stays busy for a moment after its last process died.
		err = rmdirAll(dir)
		if err == nil || !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(pollInterval)
	}
}

// cgroupProcs lists the processes in dir and below.
func cgroupProcs(dir string) (pids []int, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // another sweeper was faster
		}
		if err != nil || !d.IsDir() {
			return err
		}
		procs, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
			return err
		}
		for f := range strings.FieldsSeq(string(procs)) {
			// 0 is a process of another pid namespace, not ours to kill.
			if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids, err
}

// inCgroup reports whether the process is in dir or below.
func inCgroup(pid int, dir string) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if ok && strings.HasPrefix(filepath.Join(cgroupRoot(), path)+"/", dir+"/") {
			return true
		}
	}
	return false
}

// rmdirAll removes a tree of cgroups, the deepest first (os.RemoveAll would try
// the control files, which cannot be removed).
func rmdirAll(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := rmdirAll(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}
