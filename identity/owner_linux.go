package identity

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// processFacts are what does not change while a process runs one executable.
type processFacts struct {
	exe   FileID
	birth int64  // of the file, 0 if its file system does not say
	path  string // "": not proven
	euid  uint32
}

// owner finds the process that holds s. errGone: there is none any more.
//
// Several may: a server and its workers, a parent and its children. The ones with
// the socket's own uid go first (a worker's client sockets; the master that opened
// a listener); those that are left must run one program. If none has that uid and
// root made the socket, its maker gave up being root since, and its uid is what
// counts. A socket that somebody else made gives its maker's name to nobody.
func (r *Resolver) owner(ctx context.Context, s Socket) (facts, error) {
	if f, err := r.stillListens(s); !errors.Is(err, errGone) {
		return f, err
	}
	if was, ok := r.sockets.Get(s.Inode); ok {
		if f, err := r.again(ctx, s, was); !errors.Is(err, errGone) {
			return f, err
		}
		r.sockets.Remove(s.Inode)
	}
	// Where all processes of the machine are candidates, finding the socket at the
	// last owner's is enough: to look for other holders takes milliseconds.
	if was, ok := r.groups.Get(groupKey{s.CgroupID, s.UID}); ok && r.cgroupDir(s) == "" {
		if f, err := r.again(ctx, s, was); !errors.Is(err, errGone) {
			return f, err
		}
	}
	h, err := r.find(ctx, s)
	if err != nil {
		return facts{}, err
	}
	defer h.close()
	return r.settle(ctx, s, h)
}

// find looks for the holder among all that may be it: milliseconds, and more where a
// user wants it so. Hence each user has a share of such work only.
func (r *Resolver) find(ctx context.Context, s Socket) (*holder, error) {
	release, err := r.scans.acquire(ctx, s.UID)
	if err != nil {
		return nil, err
	}
	defer release()
	if isManager(s.CgroupPath) {
		return r.activated(ctx, s)
	}
	list, err := r.candidates(s)
	if err != nil {
		return nil, err
	}
	first, others, err := r.search(ctx, s, list)
	if errors.Is(err, errGone) && s.UID == 0 {
		return r.sole(ctx, s, others)
	}
	return first, err
}

// holder is a process with a descriptor of the socket.
type holder struct {
	*process
	key  processKey
	fd   int
	euid uint32
	exe  FileID
}

// hold opens a process and looks for the socket; errGone if it is not there,
// errTooManyDescriptors if that cannot be said.
func (r *Resolver) hold(ctx context.Context, pid int, inode uint64, guesses []int) (*holder, error) {
	p, err := openProcess(r.proc, pid)
	if err != nil {
		return nil, err
	}
	h := &holder{process: p, key: processKey{pid: pid}}
	if h.fd, err = p.holds(ctx, inode, guesses, r.descriptors); err == nil && h.fd < 0 {
		err = errGone
	}
	if err == nil {
		h.key.start, err = p.start()
	}
	if err == nil {
		h.euid, err = p.euid()
	}
	if err == nil {
		h.exe, err = p.exe()
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return h, nil
}

// again asks the process that was found before; errGone if it is not the one.
func (r *Resolver) again(ctx context.Context, s Socket, was hint) (facts, error) {
	h, err := r.hold(ctx, was.pid, s.Inode, was.fds[:])
	if err != nil {
		return facts{}, errGone
	}
	defer h.close()
	// Another uid than the socket's needs the whole reasoning.
	if h.key != was.processKey || (h.euid != s.UID && !isManager(s.CgroupPath)) {
		return facts{}, errGone
	}
	return r.settle(ctx, s, h)
}

// cgroupDir is where the processes of the socket's cgroup are listed; "" if the
// cgroup says nothing, or is gone.
func (r *Resolver) cgroupDir(s Socket) string {
	if r.cgroup == "" || s.CgroupPath == "" || s.CgroupPath == "/" {
		return ""
	}
	dir := filepath.Join(r.cgroup, s.CgroupPath)
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil || st.Ino != s.CgroupID {
		return ""
	}
	return dir
}

// candidates lists the processes that may hold s: those of its cgroup, or all.
func (r *Resolver) candidates(s Socket) ([]int, error) {
	if dir := r.cgroupDir(s); dir != "" {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err == nil {
			return parsePIDs(strings.Fields(string(b))), nil
		}
		// A threaded cgroup has no list of processes (EOPNOTSUPP).
		if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("processes of cgroup %s: %w", s.CgroupPath, err)
		}
	}
	list, err := pids(r.proc)
	if err != nil {
		return nil, fmt.Errorf("processes: %w", err)
	}
	return list, nil
}

// search goes through the processes with the socket's uid and returns the holder;
// others are those with another uid. The last owner in the same cgroup goes first. A
// process of another program that may have the socket too, out of our sight, is a
// doubt: errTooManyDescriptors. Not so a set-user-ID program beside a known holder:
// any user can start one with descriptors by the thousand.
func (r *Resolver) search(ctx context.Context, s Socket, list []int) (first *holder, others []int, err error) {
	last, hinted := r.groups.Get(groupKey{s.CgroupID, s.UID})
	if i := slices.Index(list, last.pid); hinted && i >= 0 {
		list = append([]int{last.pid}, slices.Delete(list, i, i+1)...)
	}
	unseen, doubt := false, []FileID(nil) // of processes with too many descriptors
	for _, pid := range list {
		if err := ctx.Err(); err != nil {
			break
		}
		p, err := openProcess(r.proc, pid)
		if err != nil {
			continue
		}
		euid, err := p.euid()
		if err == nil && euid != s.UID {
			others = append(others, pid)
		}
		// One more process with the same program would not change the answer.
		var exe FileID
		if err == nil && euid == s.UID {
			exe, err = p.exe()
		}
		p.close()
		if err != nil || euid != s.UID || (first != nil && exe == first.exe) {
			continue
		}
		var guesses []int
		if hinted && pid == last.pid {
			guesses = last.fds[:]
		}
		h, err := r.hold(ctx, pid, s.Inode, guesses)
		if errors.Is(err, errTooManyDescriptors) {
			unseen = true
			if !r.setUserID(pid) {
				doubt = append(doubt, exe)
			}
		}
		if err != nil || h.euid != s.UID {
			if h != nil {
				h.close()
			}
			continue
		}
		if first == nil {
			first = h
			continue
		}
		same := h.exe == first.exe
		h.close()
		if !same {
			err = fmt.Errorf("%w: processes %d and %d share socket %d", ErrAmbiguousOwner, first.pid, pid, s.Inode)
			first.close()
			return nil, nil, err
		}
	}
	err = ctx.Err()
	if err == nil && first == nil && unseen ||
		err == nil && slices.ContainsFunc(doubt, func(exe FileID) bool { return exe != first.exe }) {
		err = errTooManyDescriptors
	}
	if err != nil {
		if first != nil {
			first.close()
		}
		return nil, nil, err
	}
	if first == nil {
		return nil, others, errGone
	}
	return first, others, nil
}

// setUserID tells whether a process runs as somebody who did not start it.
func (r *Resolver) setUserID(pid int) bool {
	p, err := openProcess(r.proc, pid)
	if err != nil {
		return false
	}
	defer p.close()
	ruid, err := p.ruid()
	if err != nil || ruid == 0 {
		return false
	}
	euid, err := p.euid()
	return err == nil && euid != ruid
}

// sole finds the holders among list, which must be of one program and one user. The
// processes are anybody's, so one with too many descriptors is a doubt only where
// nobody is found: otherwise any user could deny the others' sockets.
func (r *Resolver) sole(ctx context.Context, s Socket, list []int) (first *holder, err error) {
	unseen := false
	for _, pid := range list {
		if err = ctx.Err(); err != nil {
			break
		}
		h, herr := r.hold(ctx, pid, s.Inode, nil)
		if herr != nil {
			unseen = unseen || errors.Is(herr, errTooManyDescriptors)
			continue
		}
		if first == nil {
			first = h
			continue
		}
		same := h.exe == first.exe && h.euid == first.euid
		h.close()
		if !same {
			err = fmt.Errorf("%w: processes %d and %d share socket %d", ErrAmbiguousOwner, first.pid, pid, s.Inode)
			break
		}
	}
	if err != nil && first != nil {
		first.close()
	}
	switch {
	case err == nil && first == nil && unseen:
		err = errTooManyDescriptors
	case err == nil && first == nil:
		err = errGone
	}
	if err != nil {
		return nil, err
	}
	return first, nil
}

// activated finds the owner of a socket that a systemd manager made for a service
// (systemd.socket(5)): whoever else has it. Nobody yet: the manager itself.
func (r *Resolver) activated(ctx context.Context, s Socket) (*holder, error) {
	managers, err := r.candidates(s)
	if err != nil {
		return nil, err
	}
	all, err := pids(r.proc)
	if err != nil {
		return nil, fmt.Errorf("processes: %w", err)
	}
	services := slices.DeleteFunc(all, func(pid int) bool { return slices.Contains(managers, pid) })
	// The system's manager makes sockets for every user, a user's for itself.
	if s.CgroupPath != "/init.scope" {
		services = slices.DeleteFunc(services, func(pid int) bool {
			p, err := openProcess(r.proc, pid)
			if err != nil {
				return true
			}
			defer p.close()
			euid, err := p.euid()
			return err != nil || euid != s.UID
		})
	}
	h, err := r.sole(ctx, s, services)
	if errors.Is(err, errGone) {
		h, err = r.sole(ctx, s, managers)
	}
	return h, err
}

// settle reads everything about the holder, then makes sure that it still is: the
// same process, program, user and socket. errGone if it ended or changed.
func (r *Resolver) settle(ctx context.Context, s Socket, h *holder) (facts, error) {
	pf, err := r.describe(h)
	if err != nil {
		return facts{}, err
	}
	at := s
	if isManager(s.CgroupPath) {
		at.CgroupID, at.CgroupPath = 0, "" // the socket's place is its manager's
	}
	f := facts{uid: h.euid, exe: pf.exe, exePath: pf.path, process: Process{h.key.pid, h.key.start}}
	if f.asked, err = r.askedOf(h.process); err != nil {
		return facts{}, err
	}
	if f.cgroupID, f.cgroup, err = r.place(at, h.process); err != nil {
		return facts{}, err
	}
	f.sum, err = r.exes.sum(ctx, h.process, h.exe, h.euid)
	if errors.Is(err, errChanged) {
		return facts{}, errGone
	}
	if err != nil {
		return facts{}, err
	}
	// The descriptor of /proc/PID stays with the process, so there is no other with
	// its number to fear; but it may have called execve, or closed the socket.
	euid, err := h.process.euid()
	if err != nil {
		return facts{}, err
	}
	fd, err := h.holds(ctx, s.Inode, []int{h.fd}, r.descriptors)
	if err != nil {
		return facts{}, err
	}
	// Last, because the uid of a process that has ended reads as 0.
	exe, err := h.process.exe()
	if err != nil {
		return facts{}, err
	}
	if euid != h.euid || exe != h.exe || fd < 0 {
		return facts{}, errGone
	}
	// A manager holds a socket only until its service starts.
	if !isManager(f.cgroup) {
		r.remember(s, h.key, fd)
		r.rememberListener(s, h, fd, f)
	}
	return f, nil
}

// remember where the socket was. A program tends to use the same few descriptors
// for one connection after another.
func (r *Resolver) remember(s Socket, k processKey, fd int) {
	r.sockets.Add(s.Inode, hint{k, [3]int{fd, fd, fd}})
	g := groupKey{s.CgroupID, s.UID}
	n := hint{k, [3]int{fd, fd + 1, fd + 2}}
	if was, ok := r.groups.Get(g); ok && was.processKey == k && !slices.Contains(was.fds[:], fd) {
		n.fds = [3]int{fd, was.fds[0], was.fds[1]}
	} else if ok && was.processKey == k {
		n.fds = was.fds
	}
	r.groups.Add(g, n)
}

// describe finds the name of what h runs, and refuses programs that run as
// somebody's who did not start them.
func (r *Resolver) describe(h *holder) (processFacts, error) {
	was, ok := r.processes.Get(h.key)
	if ok && was.exe == h.exe && was.euid == h.euid {
		return was, nil
	}
	ruid, err := h.ruid()
	if err != nil {
		return processFacts{}, err
	}
	// Root may act for others; a set-user-ID program acts for whoever called it.
	if ruid != h.euid && ruid != 0 {
		return processFacts{}, fmt.Errorf("%w: process %d of user %d runs as user %d", ErrAmbiguousOwner, h.pid, ruid, h.euid)
	}
	return r.name(h)
}

// name finds the name of what h runs.
func (r *Resolver) name(h *holder) (processFacts, error) {
	was, ok := r.processes.Get(h.key)
	if ok && was.exe == h.exe && was.euid == h.euid {
		return was, nil
	}
	birth, err := h.exeBirth()
	if err != nil {
		return processFacts{}, err
	}
	path, err := r.exePath(h)
	if err != nil {
		return processFacts{}, err
	}
	// An upgrade takes the name of what runs away. It was proven before, of this
	// process and this file: the time of birth cannot be set, and tells the file from
	// a later one with its inode.
	if path == "" && ok && birth != 0 && birth == was.birth && was.exe.Dev == h.exe.Dev && was.exe.Ino == h.exe.Ino {
		path = was.path
	}
	now := processFacts{exe: h.exe, birth: birth, path: path, euid: h.euid}
	r.processes.Add(h.key, now)
	return now, nil
}

// exePath is the path of what h runs, if on this host it leads there; "" if not.
// The kernel's word alone is true in the namespace that the file was opened in
// only: any user may bind a file of his own over a system program's name in a
// mount namespace of his, and even pass it out as a descriptor to be executed
// here.
func (r *Resolver) exePath(h *holder) (string, error) {
	path, err := h.process.exePath()
	if err != nil {
		return "", err
	}
	if !filepath.IsAbs(path) {
		return "", nil
	}
	there, err := statFile(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil || there.Dev != h.exe.Dev || there.Ino != h.exe.Ino {
		return "", nil
	}
	return path, nil
}
