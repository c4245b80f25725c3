package identity

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Caller is the kernel's record of the process that called connect(2), as it was in
// that moment (package redirect).
type Caller struct {
	// PID and Start, nanoseconds since boot, are the process's for as long as the
	// machine runs.
	PID   int
	Start uint64
	// RealUID and UID (effective) are its own, ActingRealUID and ActingUID those it
	// acted with.
	RealUID, UID             uint32
	ActingRealUID, ActingUID uint32
	// CgroupID and CgroupPath are where it was, as in Socket.
	CgroupID   uint64
	CgroupPath string
	// Exe is what it ran. On some file systems Dev is not what stat(2) says. Zero: a
	// thread of the kernel's.
	Exe FileID
}

// callerKey is a process as long as it runs one program as one user.
type callerKey struct {
	processKey
	uid uint32
	exe FileID
}

// clockTick is the unit of a process's start in /proc, in nanoseconds: USER_HZ is
// 100 on all of Go's architectures.
const clockTick = 10_000_000

func (c *Caller) key() callerKey {
	return callerKey{processKey{c.PID, c.Start / clockTick}, c.UID, c.Exe}
}

// seenProgram is an executable that was seen running.
type seenProgram struct {
	file      FileID
	path, sum string
}

// caller makes the workload of whoever called connect. Who holds the socket since is
// not asked: the caller may have ended, run another program, or passed it on.
func (r *Resolver) caller(ctx context.Context, s Socket) (*Workload, error) {
	c := s.Caller
	if err := c.check(&s); err != nil {
		return nil, err
	}
	contained := parseCgroup(c.CgroupPath).container != ""
	if contained && !r.perProcess {
		return r.meet(ctx, facts{cgroupID: c.CgroupID, cgroup: c.CgroupPath})
	}
	var f facts
	var err error
	if contained {
		f, err = r.contained(c)
	} else {
		f, err = r.present(ctx, c)
	}
	switch {
	case errors.Is(err, errGone) && r.perProcess:
		err = fmt.Errorf("%w: process %d, which connected, has ended or runs another program, and cannot be attested", ErrUnknownOwner, c.PID)
	case errors.Is(err, errGone):
		f, err = r.gone(c)
	}
	if err != nil {
		return nil, err
	}
	f.process = Process{c.PID, c.key().start}
	return r.meet(ctx, f)
}

// contained are the facts of a caller in a container that still runs what it ran.
// Its files have other numbers in the container's file system than the kernel's
// record has; size and times do, of which nobody can set the ctime.
func (r *Resolver) contained(c *Caller) (facts, error) {
	p, err := r.openCaller(c)
	if err != nil {
		return facts{}, err
	}
	defer p.close()
	exe, err := p.exe()
	if err != nil {
		return facts{}, err
	}
	if exe.Size != c.Exe.Size || exe.Mtime != c.Exe.Mtime || exe.Ctime != c.Exe.Ctime {
		return facts{}, errGone
	}
	return facts{cgroupID: c.CgroupID, cgroup: c.CgroupPath, exe: exe}, nil
}

// check refuses callers that act for somebody else, or with somebody else's socket.
func (c *Caller) check(s *Socket) error {
	switch {
	case c.ActingRealUID != c.RealUID || c.ActingUID != c.UID:
		return fmt.Errorf("%w: process %d of user %d connected as user %d", ErrAmbiguousOwner, c.PID, c.UID, c.ActingUID)
	case c.RealUID != c.UID && c.RealUID != 0:
		// Root may act for others; a set-user-ID program acts for whoever called it.
		return fmt.Errorf("%w: process %d of user %d runs as user %d", ErrAmbiguousOwner, c.PID, c.RealUID, c.UID)
	case s.UID != c.UID && s.UID != 0:
		// Root's may have given up being root since; nobody else can change.
		return fmt.Errorf("%w: user %d made the socket that process %d of user %d connected", ErrAmbiguousOwner, s.UID, c.PID, c.UID)
	case s.CgroupID != c.CgroupID && !isManager(s.CgroupPath):
		return fmt.Errorf("%w: the socket was made in another cgroup than process %d's, which connected it", ErrAmbiguousOwner, c.PID)
	}
	return nil
}

// place is the caller's, in the form of Resolver.place.
func (c *Caller) place() Socket { return Socket{CgroupID: c.CgroupID, CgroupPath: c.CgroupPath} }

// present are the facts of a caller that still runs what it ran, or did when it
// connected before. errGone: it does not, and is not known.
func (r *Resolver) present(ctx context.Context, c *Caller) (facts, error) {
	k, at := c.key(), c.place()
	x, known := r.callers.Get(k)
	f := facts{cgroupID: c.CgroupID, cgroup: c.CgroupPath, uid: c.UID, exe: x.file, exePath: x.path, sum: x.sum}
	// What is asked for of the process is its own, and may change while it runs.
	known = known && len(r.asks) == 0
	if known && at.placed() {
		// The record says everything; that the process was seen proves its program.
		return f, nil
	}
	var err error
	if file, ok := r.cgroupFiles.Get(k.processKey); known && ok {
		f.cgroupID, f.cgroup, err = r.placeBy(file, at, k.processKey)
		return f, err
	}
	p, err := r.openCaller(c)
	if err != nil {
		return facts{}, err
	}
	defer p.close()
	if !known {
		if x, err = r.learn(ctx, p, c); err != nil {
			return facts{}, err
		}
		f.exe, f.exePath, f.sum = x.file, x.path, x.sum
	}
	if f.asked, err = r.askedOf(p); err != nil {
		return facts{}, err
	}
	if f.cgroupID, f.cgroup, err = r.placeNow(at, k.processKey, p); err != nil {
		return facts{}, err
	}
	r.callers.Add(k, x)
	// Without a path it was perhaps run by a false name, which is nothing for others.
	if x.path != "" {
		r.programs.Add(c.Exe, x)
	}
	return f, nil
}

// openCaller opens the process. Another one with its number has started later.
func (r *Resolver) openCaller(c *Caller) (*process, error) {
	p, err := openProcess(r.proc, c.PID)
	if err != nil {
		return nil, err
	}
	start, err := p.start()
	if err == nil && start != c.key().start {
		err = errGone
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// learn reads what p, the caller, runs. errGone if that is not what it connected with.
func (r *Resolver) learn(ctx context.Context, p *process, c *Caller) (seenProgram, error) {
	exe, err := p.exe()
	if err != nil {
		return seenProgram{}, err
	}
	if same, err := p.runs(exe, c.Exe); err != nil || !same {
		return seenProgram{}, cmp.Or(err, errGone)
	}
	named, err := r.name(&holder{process: p, key: c.key().processKey, exe: exe, euid: c.UID})
	if err != nil {
		return seenProgram{}, err
	}
	x := seenProgram{file: exe, path: named.path}
	if x.sum, err = r.exes.sum(ctx, p, exe, c.UID); errors.Is(err, errChanged) {
		err = errGone
	}
	if err != nil {
		return seenProgram{}, err
	}
	// It may have called execve since.
	now, err := p.exe()
	if err == nil && now != exe {
		err = errGone
	}
	return x, err
}

// runs tells whether exe, by stat(2), is the executable that the kernel recorded.
func (p *process) runs(exe, recorded FileID) (bool, error) {
	if exe == recorded {
		return true, nil
	}
	dev := exe.Dev
	if exe.Dev = recorded.Dev; exe != recorded {
		return false, nil
	}
	// Btrfs gives each subvolume a number of its own. Two files of one inode number,
	// size, mtime and ctime, which nobody can set, are not made on purpose.
	f, err := p.openExe()
	if err != nil {
		return false, err
	}
	defer f.Close()
	var opened FileID
	if opened, err = statFile(int(f.Fd()), "", unix.AT_EMPTY_PATH); err != nil {
		return false, err
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return false, os.NewSyscallError("fstatfs", err)
	}
	exe.Dev = dev
	return opened == exe && fs.Type == unix.BTRFS_SUPER_MAGIC, nil
}

// gone are the facts of a caller that has ended, or runs something else by now: what
// the kernel recorded, and what is known of its executable from others that ran it.
func (r *Resolver) gone(c *Caller) (facts, error) {
	at := c.place()
	// As for sockets without a process: without a cgroup that says something, a
	// container's process could pass for one of the host.
	if !at.placed() {
		return facts{}, fmt.Errorf("%w: process %d, which connected, has ended or runs another program", ErrUnknownOwner, c.PID)
	}
	f := facts{cgroupID: c.CgroupID, cgroup: c.CgroupPath, uid: c.UID, asked: r.askedOfGone(c)}
	if x, ok := r.programs.Get(c.Exe); ok && x.named() {
		f.exe, f.exePath, f.sum = x.file, x.path, x.sum
	}
	return f, nil
}

// named tells whether the program's path is beyond doubt: still the only name of
// this very file. A process that ran a file by another name had another path.
func (x seenProgram) named() bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, x.path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_DONT_SYNC, unix.STATX_BASIC_STATS, &st)
	return err == nil && fileID(&st) == x.file && st.Nlink == 1
}
