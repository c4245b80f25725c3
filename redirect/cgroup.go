package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sys/unix"
)

var (
	// ErrNoCgroup means that this machine has no cgroup v2 hierarchy mounted, neither
	// alone nor beside v1.
	ErrNoCgroup = errors.New("no cgroup v2 hierarchy is mounted")
	// ErrCgroupGone means that a cgroup has been removed.
	ErrCgroupGone = errors.New("cgroup no longer exists")
)

// fileIDKernfs is the kernel's FILEID_KERNFS: the handle is the kernfs node's 64-bit
// number, which for a cgroup directory is its id.
const fileIDKernfs = 0xfe

// Cgroups gives the paths of cgroup v2 directories by their ids. Safe for
// concurrent use.
type Cgroups struct {
	root  *os.File
	mount string
	// paths of ids that were asked for: a cgroup v2 keeps its path as long as it is
	// there, and its id is never another's.
	paths *lru.Cache[uint64, string]
}

// maxPaths is how many paths are remembered.
const maxPaths = 4096

// OpenCgroups finds the cgroup v2 hierarchy. ErrNoCgroup on machines with v1 only.
func OpenCgroups() (*Cgroups, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("find cgroups: %w", err)
	}
	mount, ok := cgroup2Mount(string(info))
	if !ok {
		return nil, ErrNoCgroup
	}
	root, err := os.Open(mount)
	if err != nil {
		return nil, fmt.Errorf("find cgroups: %w", err)
	}
	paths, err := lru.New[uint64, string](maxPaths)
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return &Cgroups{root, mount, paths}, nil
}

// Close releases the hierarchy.
func (c *Cgroups) Close() error { return c.root.Close() }

// Path is the path of a cgroup within the hierarchy, such as
// /system.slice/nginx.service. It needs CAP_DAC_READ_SEARCH. ErrCgroupGone if it
// has been removed, unless its path was asked for before.
func (c *Cgroups) Path(id uint64) (string, error) {
	if p, ok := c.paths.Get(id); ok {
		return p, nil
	}
	p, err := c.find(id)
	if err == nil {
		c.paths.Add(id, p)
	}
	return p, err
}

func (c *Cgroups) find(id uint64) (string, error) {
	handle := unix.NewFileHandle(fileIDKernfs, binary.NativeEndian.AppendUint64(nil, id))
	// Not O_PATH: the kernel must not find a directory that is going away.
	fd, err := unix.OpenByHandleAt(int(c.root.Fd()), handle, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC)
	if errors.Is(err, unix.ESTALE) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return "", fmt.Errorf("cgroup %d: %w", id, ErrCgroupGone)
	}
	if err != nil {
		return "", fmt.Errorf("cgroup %d: %w", id, os.NewSyscallError("open_by_handle_at", err))
	}
	defer unix.Close(fd)
	full, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return "", fmt.Errorf("cgroup %d: %w", id, err)
	}
	within, ok := strings.CutPrefix(full, c.mount)
	if !ok || strings.HasSuffix(full, " (deleted)") || (within != "" && within[0] != '/' && c.mount != "/") {
		return "", fmt.Errorf("cgroup %d: %w: its path is %q", id, ErrCgroupGone, full)
	}
	return path.Join("/", within), nil
}

// cgroup2Mount finds in /proc/self/mountinfo (proc(5)) where cgroup v2 is mounted,
// rather as a whole than a part of it.
func cgroup2Mount(mountinfo string) (mount string, ok bool) {
	for line := range strings.Lines(mountinfo) {
		before, after, found := strings.Cut(line, " - ")
		fields := strings.Fields(before)
		kind, _, _ := strings.Cut(after, " ")
		if !found || kind != "cgroup2" || len(fields) < 5 {
			continue
		}
		if root := fields[3]; root == "/" {
			return unescapeMount(fields[4]), true
		}
		if !ok {
			mount, ok = unescapeMount(fields[4]), true
		}
	}
	return mount, ok
}

// unescapeMount undoes mountinfo's octal escapes of space, tab, newline and
// backslash.
var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace
