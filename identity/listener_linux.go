package identity

import (
	"errors"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// heldListener is a listening socket's owner, found once. Its process is held open, so
// that a few calls tell whether it is still the same one: with this socket, this
// program and this user.
type heldListener struct {
	key   processKey
	inode uint64
	link  string // of the descriptor, below /proc/PID
	exe   FileID
	euid  uint32
	facts facts // but the place

	mu      sync.RWMutex
	process *process // nil: closed
}

func (l *heldListener) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.process != nil {
		l.process.close()
		l.process = nil
	}
}

// stillListens is owner for a listener that is remembered; errGone if it is not, or
// its owner is another.
func (r *Resolver) stillListens(s Socket) (facts, error) {
	if s.Listener == 0 {
		return facts{}, errGone
	}
	l, ok := r.listeners.Get(s.Listener)
	if !ok {
		return facts{}, errGone
	}
	f, err := r.confirm(s, l)
	if errors.Is(err, errGone) {
		r.listeners.Remove(s.Listener)
	}
	return f, err
}

func (r *Resolver) confirm(s Socket, l *heldListener) (facts, error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.process == nil || l.inode != s.Inode {
		return facts{}, errGone
	}
	if !isLink(l.process.dir, l.link, socketLink(s.Inode)) {
		return facts{}, errGone
	}
	euid, err := l.process.euid()
	if err != nil {
		return facts{}, err
	}
	// A program that runs itself anew has other arguments.
	now, err := r.askedOf(l.process)
	if err != nil {
		return facts{}, err
	}
	// Last, because the uid of a process that has ended reads as 0.
	exe, err := l.process.exe()
	if err != nil {
		return facts{}, err
	}
	if exe != l.exe || euid != l.euid {
		return facts{}, errGone
	}
	f := l.facts
	f.asked = now
	f.cgroupID, f.cgroup, err = r.placeNow(s.owned(), l.key, l.process)
	return f, err
}

// rememberListener keeps what was found about s.
func (r *Resolver) rememberListener(s Socket, h *holder, fd int, f facts) {
	if s.Listener == 0 {
		return
	}
	dir, err := unix.FcntlInt(uintptr(h.dir), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return // short of descriptors: it is found again
	}
	// What was there before is closed.
	r.listeners.Remove(s.Listener)
	r.listeners.Add(s.Listener, &heldListener{
		key: h.key, inode: s.Inode, link: "fd/" + strconv.Itoa(fd), exe: h.exe, euid: h.euid, facts: f,
		process: &process{h.pid, dir},
	})
}

// owned is s without the place where a manager made it for somebody else.
func (s Socket) owned() Socket {
	if isManager(s.CgroupPath) {
		s.CgroupID, s.CgroupPath = 0, ""
	}
	return s
}

// cgroupFile is /proc/PID/cgroup, held open. Once its process has ended it says so.
type cgroupFile struct {
	mu sync.RWMutex
	fd int // -1: closed
}

func (f *cgroupFile) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd >= 0 {
		unix.Close(f.fd)
		f.fd = -1
	}
}

// maxCgroupText is more than the names in /proc/PID/cgroup can be long, of which
// there are about a dozen.
const maxCgroupText = 16 * unix.PathMax

// read returns the process's cgroups now. Errors: errGone, and those of reading.
func (f *cgroupFile) read() (v2, v1 string, err error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.fd < 0 {
		return "", "", errGone
	}
	for size := 1024; ; size *= 4 {
		b := make([]byte, size)
		n, err := unix.Pread(f.fd, b, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return "", "", procError("pread", err)
		}
		if n < size || size > maxCgroupText {
			v2, v1 = parseCgroups(b[:n])
			return v2, v1, nil
		}
	}
}

// placeNow is place for a process that is asked about again and again.
func (r *Resolver) placeNow(s Socket, k processKey, p *process) (id uint64, path string, err error) {
	if s.placed() {
		return s.CgroupID, s.CgroupPath, nil
	}
	f, ok := r.cgroupFiles.Get(k)
	if !ok {
		fd, err := unix.Openat(p.dir, "cgroup", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return 0, "", procError("openat", err)
		}
		f = &cgroupFile{fd: fd}
		if was, known, _ := r.cgroupFiles.PeekOrAdd(k, f); known {
			f.close()
			f = was
		}
	}
	return r.placeBy(f, s, k)
}

// placeBy is place by a process's file f.
func (r *Resolver) placeBy(f *cgroupFile, s Socket, k processKey) (id uint64, path string, err error) {
	v2, v1, err := f.read()
	if errors.Is(err, errGone) {
		r.cgroupFiles.Remove(k)
	}
	if err != nil {
		return 0, "", err
	}
	return r.placeOf(s, v2, v1)
}
