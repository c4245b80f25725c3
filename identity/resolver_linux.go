package identity

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sys/unix"
)

var (
	// ErrUnknownOwner: nothing reliable is known of who is behind the socket.
	ErrUnknownOwner = errors.New("unknown socket owner")
	// ErrAmbiguousOwner: different programs or users share the socket.
	ErrAmbiguousOwner = errors.New("ambiguous socket owner")
)

// Socket is the kernel's word on a socket of this host (package redirect).
type Socket struct {
	// UID is the file-system uid of the process that made the socket.
	UID uint32
	// Inode names the socket among the descriptors of processes.
	Inode uint64
	// CgroupID and CgroupPath are the cgroup v2 that the socket was made in. The path
	// counts from the cgroup root, "/system.slice/nginx.service", and is "" where it
	// is not known; both are zero on machines with cgroup v1 only.
	CgroupID   uint64
	CgroupPath string
	// Trusted is false when UID may not be the maker's: in FIN_WAIT2 and TIME_WAIT
	// the kernel says 0 of everybody's socket.
	Trusted bool
	// Listener is the cookie of a socket that listens, 0 of one that is connected:
	// listeners are asked for again and again, so their owners are remembered.
	Listener uint64
	// Caller is who connected the socket, if the kernel recorded it: then that is
	// whose the socket is, and UID and the cgroup above are only who made it. Inode
	// and Trusted do not matter.
	Caller *Caller
}

// Bounds of what a Resolver remembers; beyond, the least recently used goes.
const (
	maxWorkloads   = 4096
	maxProcesses   = 8192
	maxExecutables = 1024
	maxHints       = 4096
	// Each of these has a descriptor open.
	maxListeners   = 1024
	maxCgroupFiles = 1024
)

// How many searches for a socket's owner run at a time, in all and for one user.
// They read what users may make long; who is known already is found without.
const maxScans, maxScansPerUser = 64, 4

// Resolver finds the workload behind a socket. Safe for concurrent use; it has no
// goroutines, and nothing that must be closed: the descriptors that it holds are
// bounded.
type Resolver struct {
	proc   string // mount point of procfs
	cgroup string // mount point of cgroup v2, "" if there is none
	host   Attributes
	users  *userDB
	asks   []string // of OnRequest
	exes   *executables
	scans  *shares
	// perProcess tells processes apart, see NewProcessResolver.
	perProcess bool
	// runtimes is what SetContainers has set.
	runtimes Containers
	// descriptors is how many of one process's are looked at: maxDescriptors.
	descriptors int

	workloads *lru.Cache[workloadKey, cachedWorkload]
	processes *lru.Cache[processKey, processFacts]
	sockets   *lru.Cache[uint64, hint]   // by inode: listeners are asked for again and again
	groups    *lru.Cache[groupKey, hint] // the last owner in a cgroup

	listeners   *lru.Cache[uint64, *heldListener] // by cookie
	callers     *lru.Cache[callerKey, seenProgram]
	programs    *lru.Cache[FileID, seenProgram] // by what a caller's record says
	cgroupFiles *lru.Cache[processKey, *cgroupFile]
}

type workloadKey struct {
	Key
	exe, cgroup string
}

type cachedWorkload struct {
	w         *Workload
	users     uint64 // serial of the user database
	container uint64 // serial of what is known of the container
}

// processKey is unambiguous for as long as the machine runs.
type processKey struct {
	pid   int
	start uint64
}

type groupKey struct {
	cgroup uint64
	uid    uint32
}

// hint says where a socket was found; nothing is believed of it unseen.
type hint struct {
	processKey
	fds [3]int
}

// NewResolver reads what all workloads of the host have in common. Attributes of
// OnRequest are there only if they are asked for here.
func NewResolver(asks ...string) (*Resolver, error) {
	if err := checkAsked(asks); err != nil {
		return nil, err
	}
	host, err := HostAttributes()
	if err != nil {
		return nil, err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	return &Resolver{
		proc:   "/proc",
		cgroup: cgroup2Mount(string(mounts)),
		host:   host,
		asks:   asks,
		users:  &userDB{passwd: "/etc/passwd", group: "/etc/group", fresh: usersFresh},
		exes:   newExecutables(maxExecutables),
		scans:  newShares(maxScans, maxScansPerUser),

		descriptors: maxDescriptors,

		workloads: newLRU[workloadKey, cachedWorkload](maxWorkloads),
		processes: newLRU[processKey, processFacts](maxProcesses),
		sockets:   newLRU[uint64, hint](maxHints),
		groups:    newLRU[groupKey, hint](maxHints),

		listeners:   newClosingLRU[uint64, *heldListener](maxListeners),
		callers:     newLRU[callerKey, seenProgram](maxProcesses),
		programs:    newLRU[FileID, seenProgram](maxExecutables),
		cgroupFiles: newClosingLRU[processKey, *cgroupFile](maxCgroupFiles),
	}, nil
}

// NewProcessResolver is a Resolver for sources that attest processes: each process is
// a workload of its own (Key.Process), those of one container too. One that has ended,
// or runs another program by now, is ErrUnknownOwner: nobody can attest it any more.
//
// Where several processes hold a socket, the workload is the one that is found first;
// whoever shares a socket shares its identity.
func NewProcessResolver(asks ...string) (*Resolver, error) {
	r, err := NewResolver(asks...)
	if err != nil {
		return nil, err
	}
	r.perProcess = true
	return r, nil
}

// Resolve finds the workload behind s: the process that connected the socket where
// that was recorded, otherwise the one that holds it; or its container. The
// attributes are
//
//	os.kernel os.distribution       of the host
//	os.user os.group                by passwd(5) and group(5)
//	proc.uid                        decimal
//	proc.exe                        the path of the executable
//	proc.exe_sha256                 of its contents
//	proc.cgroup                     path
//	proc.unit proc.user_unit        the systemd unit, and the one below a user's manager
//	proc.slice                      the innermost slice that the unit is in
//	container.id
//	container.* image.* k8s.*       what the container's runtime says, see SetContainers
//
// and those of OnRequest that were asked for.
//
// A process that has ended leaves what the socket itself tells, its uid and
// cgroup, so policy that asks for more does not match; a recorded caller also
// leaves its executable, if that was seen running before. In a container the
// workload is the container: users and files there are its image's, and get no
// os.user and no proc.exe.
//
// proc.exe is set only where the path leads, on this host, to the very file that
// runs: a user with a mount namespace of its own can give any file any name. The
// file of a running process may be replaced (an upgrade): a process that was seen
// before keeps its proc.exe, another one has only proc.exe_sha256.
//
// Errors: ErrUnknownOwner, ErrAmbiguousOwner, and those of ctx and of reading.
func (r *Resolver) Resolve(ctx context.Context, s Socket) (*Workload, error) {
	if s.Caller != nil {
		return r.caller(ctx, s)
	}
	if !s.Trusted || s.Inode == 0 {
		return nil, fmt.Errorf("%w: the socket is closed, or closing", ErrUnknownOwner)
	}
	if f := parseCgroup(s.CgroupPath); f.container != "" && s.CgroupID != 0 && !r.perProcess {
		return r.meet(ctx, facts{cgroupID: s.CgroupID, cgroup: s.CgroupPath})
	}
	f, err := r.owner(ctx, s)
	if errors.Is(err, errGone) {
		// Without a cgroup that says something, a container's process could pass for
		// one of the host.
		if r.perProcess || s.CgroupPath == "" || s.CgroupPath == "/" {
			return nil, fmt.Errorf("%w: no process has socket %d", ErrUnknownOwner, s.Inode)
		}
		return r.workload(facts{cgroupID: s.CgroupID, cgroup: s.CgroupPath, uid: s.UID})
	}
	if err != nil {
		return nil, err
	}
	return r.meet(ctx, f)
}

// facts are what a workload is made of.
type facts struct {
	cgroupID uint64
	cgroup   string
	uid      uint32
	exe      FileID // zero: the process is gone
	exePath  string // "": not proven
	sum      string
	asked    asked
	process  Process
}

// workload makes the workload of f, or finds the one that was made before.
func (r *Resolver) workload(f facts) (*Workload, error) {
	return r.workloadIn(f, parseCgroup(f.cgroup))
}

// workloadIn is workload, with what f.cgroup says.
func (r *Resolver) workloadIn(f facts, cg cgroupFacts) (*Workload, error) {
	if !r.perProcess {
		f.process = Process{}
	}
	if cg.container != "" {
		of := facts{cgroupID: f.cgroupID, cgroup: f.cgroup, process: f.process}
		if r.perProcess {
			of.exe = f.exe // which is to be attested
		}
		f = of
	}
	u, serial, err := r.users.lookup(f.uid)
	if err != nil {
		return nil, err
	}
	about, containerSerial := r.about(cg)
	k := workloadKey{Key{CgroupID: f.cgroupID, Exe: f.exe, UID: f.uid, Process: f.process, Asked: f.asked.key()}, f.exePath, f.cgroup}
	if c, ok := r.workloads.Get(k); ok && c.users == serial && c.container == containerSerial {
		return c.w, nil
	}
	m := make(map[string][]string)
	set := func(key, value string) {
		if value != "" {
			m[key] = []string{value}
		}
	}
	set("proc.cgroup", f.cgroup)
	set("proc.unit", cg.unit)
	set("proc.user_unit", cg.userUnit)
	set("proc.slice", cg.slice)
	set("container.id", cg.container)
	if cg.container == "" {
		set("proc.uid", strconv.FormatUint(uint64(f.uid), 10))
		set("proc.exe", f.exePath)
		set("proc.exe_sha256", f.sum)
		set("os.user", u.name)
		m["os.group"] = u.groups
		for _, a := range f.asked {
			set(a.Key, a.Value)
		}
	}
	w := &Workload{Key: k.Key, Attributes: NewAttributes(m).Union(about).Union(r.host)}
	r.workloads.Add(k, cachedWorkload{w, serial, containerSerial})
	return w, nil
}

// place finds the cgroup of a socket and its owner. Normally it is the socket's. On
// a machine where systemd uses cgroup v1, alone or beside an empty v2, it is the
// owner's there.
func (r *Resolver) place(s Socket, p *process) (id uint64, path string, err error) {
	if s.placed() {
		return s.CgroupID, s.CgroupPath, nil
	}
	v2, v1, err := p.cgroups()
	if err != nil {
		return 0, "", err
	}
	return r.placeOf(s, v2, v1)
}

// placed tells whether the socket's cgroup says where its owner belongs.
func (s *Socket) placed() bool { return s.CgroupID != 0 && s.CgroupPath != "" && s.CgroupPath != "/" }

// placeOf is place for an owner that is in the cgroups v2 and v1.
func (r *Resolver) placeOf(s Socket, v2, v1 string) (id uint64, path string, err error) {
	if v2 == "" || v2 == "/" {
		if s.CgroupPath == "" && s.CgroupID > rootCgroup {
			return 0, "", fmt.Errorf("%w: the socket was made in another cgroup than its owner's", ErrAmbiguousOwner)
		}
		if v1 == "" || v1 == "/" {
			return s.CgroupID, v2, nil
		}
		// Inodes of v1 are another series than those of v2: name it by its path. The
		// top bit keeps it off the numbers of v2.
		sum := sha256.Sum256([]byte(v1))
		return 1<<63 | binary.BigEndian.Uint64(sum[:8]), v1, nil
	}
	id, err = r.cgroupID(v2)
	if err != nil {
		return 0, "", err
	}
	// Out of the root cgroup nobody but root moves a process.
	if s.CgroupID > rootCgroup && s.CgroupID != id {
		return 0, "", fmt.Errorf("%w: the socket was made in another cgroup than its owner's", ErrAmbiguousOwner)
	}
	return id, v2, nil
}

// rootCgroup is the id of cgroup v2's root on every kernel.
const rootCgroup = 1

// cgroupID: since Linux 5.5 the id of a cgroup is the inode of its directory.
func (r *Resolver) cgroupID(path string) (uint64, error) {
	if r.cgroup == "" {
		return 0, fmt.Errorf("%w: cgroup v2 is not mounted", ErrUnknownOwner)
	}
	var st unix.Stat_t
	if err := unix.Stat(r.cgroup+path, &st); err != nil {
		return 0, procError("stat", err)
	}
	return st.Ino, nil
}
