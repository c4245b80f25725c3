package identity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// errGone: the process ended, or is a thread of the kernel's.
var errGone = errors.New("process is gone")

// process is a descriptor of /proc/PID. It stays with the process that it was
// opened for: after that has ended, reads fail, whoever has its number then. So
// facts read through one process are facts about one process.
type process struct {
	pid int
	dir int
}

func openProcess(proc string, pid int) (*process, error) {
	dir, err := unix.Open(proc+"/"+strconv.Itoa(pid), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, procError("open", err)
	}
	return &process{pid, dir}, nil
}

func (p *process) close() { unix.Close(p.dir) }

// procError makes the ways in which /proc says "no such process" one.
func procError(call string, err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return errGone
	}
	return os.NewSyscallError(call, err)
}

func (p *process) read(name string) ([]byte, error) {
	fd, err := unix.Openat(p.dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, procError("openat", err)
	}
	defer unix.Close(fd)
	buf := make([]byte, 0, 1024)
	for {
		buf = slices.Grow(buf, 512)
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, procError("read", err)
		case n == 0:
			return buf, nil
		default:
			buf = buf[:len(buf)+n]
		}
	}
}

// euid is the owner of the directory, and far cheaper than the status file. The
// kernel reports the effective uid there even of processes that may not be dumped
// (task_dump_owner in fs/proc/base.c), and 0 of one that has ended.
func (p *process) euid() (uint32, error) {
	var st unix.Statx_t
	if err := unix.Statx(p.dir, "", unix.AT_EMPTY_PATH, unix.STATX_UID, &st); err != nil {
		return 0, procError("statx", err)
	}
	return st.Uid, nil
}

// start is when the process began, in clock ticks since boot: field 22 of stat.
func (p *process) start() (uint64, error) {
	fields, err := p.stat()
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}

// stat are the fields of stat from the third on, 20 or more.
func (p *process) stat() ([][]byte, error) {
	b, err := p.read("stat")
	if err != nil {
		return nil, err
	}
	// Field 2 is a name that its bearer chose, in parentheses; it may have any byte.
	i := bytes.LastIndexByte(b, ')')
	fields := bytes.Fields(b[i+1:])
	if i < 0 || len(fields) < 20 {
		return nil, fmt.Errorf("malformed stat of process %d", p.pid)
	}
	return fields, nil
}

// ruid is the real uid: whose process this is, whatever it is allowed to do.
func (p *process) ruid() (uint32, error) {
	b, err := p.read("status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		rest, ok := strings.CutPrefix(line, "Uid:")
		if !ok {
			continue
		}
		if f := strings.Fields(rest); len(f) == 4 {
			uid, err := strconv.ParseUint(f[0], 10, 32)
			return uint32(uid), err
		}
	}
	return 0, fmt.Errorf("malformed status of process %d", p.pid)
}

// cgroups returns the paths in cgroup v2 and in systemd's v1 hierarchy, "" for
// those that there are not.
func (p *process) cgroups() (v2, v1 string, err error) {
	b, err := p.read("cgroup")
	if err != nil {
		return "", "", err
	}
	v2, v1 = parseCgroups(b)
	return v2, v1, nil
}

func parseCgroups(b []byte) (v2, v1 string) {
	for line := range strings.Lines(string(b)) {
		_, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		controllers, path, _ := strings.Cut(rest, ":")
		// A cgroup that was removed keeps its last processes, under a name that a
		// new one may bear.
		path, removed := strings.CutSuffix(path, " (deleted)")
		switch {
		case removed:
		case controllers == "":
			v2 = path
		case controllers == "name=systemd":
			v1 = path
		}
	}
	return v2, v1
}

// exe tells which file the process runs. Attributes that the kernel has at hand
// will do: a file system of a user's own making is not asked, and cannot stall us.
func (p *process) exe() (FileID, error) {
	return statFile(p.dir, "exe", 0)
}

// exeBirth is when the file that the process runs was made, in nanoseconds; 0 if its
// file system does not say.
func (p *process) exeBirth() (int64, error) {
	var st unix.Statx_t
	if err := unix.Statx(p.dir, "exe", unix.AT_STATX_DONT_SYNC, unix.STATX_BTIME, &st); err != nil {
		return 0, procError("statx", err)
	}
	if st.Mask&unix.STATX_BTIME == 0 {
		return 0, nil
	}
	return st.Btime.Sec*1e9 + int64(st.Btime.Nsec), nil
}

func statFile(dir int, name string, flags int) (FileID, error) {
	var st unix.Statx_t
	err := unix.Statx(dir, name, flags|unix.AT_STATX_DONT_SYNC, unix.STATX_BASIC_STATS, &st)
	if err != nil {
		return FileID{}, procError("statx", err)
	}
	return fileID(&st), nil
}

func fileID(st *unix.Statx_t) FileID {
	return FileID{
		Dev:   unix.Mkdev(st.Dev_major, st.Dev_minor),
		Ino:   st.Ino,
		Size:  int64(st.Size),
		Mtime: st.Mtime.Sec*1e9 + int64(st.Mtime.Nsec),
		Ctime: st.Ctime.Sec*1e9 + int64(st.Ctime.Nsec),
	}
}

// exePath is the name that the kernel gives the executable. It is true in the mount
// namespace through which the file was opened, which its user may have arranged: see
// Resolver.exePath.
func (p *process) exePath() (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(p.dir, "exe", buf)
	if err != nil {
		return "", procError("readlinkat", err)
	}
	return string(buf[:n]), nil
}

// openExe opens what the process runs; not its name, which may lead elsewhere.
func (p *process) openExe() (*os.File, error) {
	fd, err := unix.Openat(p.dir, "exe", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, procError("openat", err)
	}
	return os.NewFile(uintptr(fd), "exe"), nil
}

const (
	// maxDescriptors is how many of a process's are looked at for one socket, which
	// takes about 0.2 s. RLIMIT_NOFILE commonly lets a user have 524,288 in each
	// process, and a socket hidden behind them would cost seconds per connection.
	maxDescriptors = 65_536
	// descriptorBatch is read between two looks at the clock.
	descriptorBatch = 1024
)

// errTooManyDescriptors: the process has more than are looked at, and the socket is
// not among those.
var errTooManyDescriptors = fmt.Errorf("%w: a process with too many descriptors may have it", ErrUnknownOwner)

// descriptorsAhead is how many descriptors behind the last one found are looked at
// before the whole table.
const descriptorsAhead = 64

// holds finds the descriptor by which the process has the socket; -1 if it has
// none. It looks at the guesses first: reading the table of a process with 10,000
// descriptors costs 30 ms, looking at one of them 1 µs. Of the table it looks at so
// many at most. Errors: errGone, errTooManyDescriptors, and those of ctx and of
// reading.
func (p *process) holds(ctx context.Context, inode uint64, guesses []int, most int) (int, error) {
	table, err := unix.Openat(p.dir, "fd", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, procError("openat", err)
	}
	f := os.NewFile(uintptr(table), "fd")
	defer f.Close()
	want := socketLink(inode)
	for _, fd := range guesses {
		if isLink(table, strconv.Itoa(fd), want) {
			return fd, nil
		}
	}
	// Since Linux 6.2 the directory's size is the number of descriptors. The newest
	// is the last one while there are no gaps.
	var st unix.Stat_t
	if unix.Fstat(table, &st) == nil && st.Size > 0 {
		for fd := int(st.Size) + 1; fd >= max(0, int(st.Size)-2); fd-- {
			if isLink(table, strconv.Itoa(fd), want) {
				return fd, nil
			}
		}
	}
	// A process that opens many at once is ahead of us: the one that follows the last
	// one found comes next.
	if len(guesses) > 0 {
		for fd := guesses[0] + 1; fd <= guesses[0]+descriptorsAhead; fd++ {
			if isLink(table, strconv.Itoa(fd), want) {
				return fd, nil
			}
		}
	}
	for looked := 0; ; {
		if err := ctx.Err(); err != nil {
			return -1, err
		}
		names, err := f.Readdirnames(descriptorBatch)
		if errors.Is(err, io.EOF) {
			return -1, nil
		}
		if err != nil {
			return -1, procError("getdents", err)
		}
		if looked += len(names); looked > most {
			return -1, errTooManyDescriptors
		}
		for _, name := range slices.Backward(names) {
			if isLink(table, name, want) {
				return strconv.Atoi(name)
			}
		}
	}
}

// socketLink is what a descriptor of a socket points to.
func socketLink(inode uint64) string { return "socket:[" + strconv.FormatUint(inode, 10) + "]" }

func isLink(dir int, name, want string) bool {
	var buf [64]byte
	n, err := unix.Readlinkat(dir, name, buf[:])
	return err == nil && string(buf[:n]) == want
}

// pids lists all processes, the youngest first as far as numbers tell: a new
// connection is often a new process's.
func pids(proc string) ([]int, error) {
	d, err := os.Open(proc)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	return parsePIDs(names), nil
}

func parsePIDs(names []string) []int {
	out := make([]int, 0, len(names))
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil && pid > 0 {
			out = append(out, pid)
		}
	}
	slices.Sort(out)
	slices.Reverse(out)
	return out
}
