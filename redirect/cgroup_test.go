package redirect

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// newCgroup makes a cgroup of the test's own; its id is the inode of its directory.
func newCgroup(t *testing.T) (dir string, id uint64) {
	t.Helper()
	c, err := OpenCgroups()
	check(t, err)
	defer c.Close()
	dir = filepath.Join(c.mount, fmt.Sprintf("sl-redirect-%d-%d", os.Getpid(), os.Getppid()), "with space.service")
	check(t, os.MkdirAll(dir, 0o755))
	t.Cleanup(func() {
		for _, d := range []string{dir, filepath.Dir(dir)} {
			eventually(t, "removal of "+d, func() bool {
				err := os.Remove(d)
				return err == nil || errors.Is(err, os.ErrNotExist)
			})
		}
	})
	var st unix.Stat_t
	check(t, unix.Stat(dir, &st))
	return dir, st.Ino
}

func TestCgroupPath(t *testing.T) {
	c, err := OpenCgroups()
	check(t, err)
	defer c.Close()
	dir, id := newCgroup(t)
	within, err := filepath.Rel(c.mount, dir)
	check(t, err)
	if got, err := c.Path(id); err != nil || got != "/"+within {
		t.Errorf("%q, %v; want %q", got, err, "/"+within)
	}
	var root unix.Stat_t
	check(t, unix.Stat(c.mount, &root))
	if got, err := c.Path(root.Ino); err != nil || got != "/" {
		t.Errorf("root: %q, %v", got, err)
	}
	check(t, os.Remove(dir))
	// Exited clients are still known by where they were.
	if got, err := c.Path(id); err != nil || got != "/"+within {
		t.Errorf("after its removal: %q, %v; want %q", got, err, "/"+within)
	}
	c.paths.Purge()
	for _, gone := range []uint64{id, 1 << 62, 0} {
		if got, err := c.Path(gone); !errors.Is(err, ErrCgroupGone) {
			t.Errorf("cgroup %d: %q, %v", gone, got, err)
		}
	}
}

func TestCgroup2Mount(t *testing.T) {
	const v1 = "30 24 0:26 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
	for _, c := range []struct{ name, info, want string }{
		{"v1 only", v1, ""},
		{"unified", "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n", "/sys/fs/cgroup"},
		{"hybrid", v1 + "36 24 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n", "/sys/fs/cgroup/unified"},
		{"a part before the whole", "36 24 0:31 /a /mnt rw - cgroup2 x rw\n37 24 0:31 / /cg rw - cgroup2 x rw\n", "/cg"},
		{"a part only", "36 24 0:31 /a /mnt rw - cgroup2 x rw\n", "/mnt"},
		{"escaped", `36 24 0:31 / /my\040cg rw - cgroup2 x rw` + "\n", "/my cg"},
		{"cut short", "36 24 - cgroup2 x rw\n36 24 0:31 / /x rw\n", ""},
	} {
		if got, ok := cgroup2Mount(c.info); got != c.want || ok != (c.want != "") {
			t.Errorf("%s: %q, %v; want %q", c.name, got, ok, c.want)
		}
	}
}
