package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

var (
	// ErrNoConnects means that this kernel, or this process's rights in it, do not
	// allow connect records.
	ErrNoConnects = errors.New("no connect records")
	// ErrNoCaller means that an accepted connection has no connect record: its socket
	// was connected before the records began, or by multipath TCP, or a flood of
	// handshakes pushed its record out.
	ErrNoCaller = errors.New("no record of who connected")
)

// Caller is the process that called connect(2), as it was in that moment.
type Caller struct {
	// Tuple is the connection as the caller sees it.
	Tuple
	// PID is the process (not the thread), Start when it began, in nanoseconds since
	// boot: together they are unambiguous.
	PID   int
	Start uint64
	// RealUID and UID (effective) are the process's credentials. ActingRealUID and
	// ActingUID are those that it used: others than its own only where the kernel
	// acts for it in somebody's name.
	RealUID, UID             uint32
	ActingRealUID, ActingUID uint32
	// CgroupID is the cgroup v2 that the caller was in.
	CgroupID uint64
	// Socket is what sock_diag would say of the socket, where it was made and by
	// whom, but for Inode and State, which are 0.
	Socket SocketOwner
	Exe    Executable
	// Command is the thread's name, which it may choose.
	Command string
}

// Executable is the file that a process runs, as the kernel keeps it. Some file
// systems report another Dev to stat(2); Ino, Size and times agree. The zero value is
// a thread of the kernel's.
type Executable struct {
	Dev, Ino     uint64 // Dev as makedev(3) makes it
	Size         int64
	Mtime, Ctime int64 // nanoseconds
}

// Connects are the kernel's records of who called connect(2) for the connections
// that a listener of ours accepts: exact, whatever the caller did since. Small eBPF
// programs write them; they see every cgroup, act on one network namespace, change
// nothing, and go with Close or the process. Safe for concurrent use.
//
// Needed: Linux 5.16 or later with its type information (/sys/kernel/btf/vmlinux),
// CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (or CAP_SYS_ADMIN), the root of cgroup v2
// mounted, alone or beside v1, and the host's own PID and user namespaces.
type Connects struct {
	maps     connectMaps
	programs []*ebpf.Program
	links    []link.Link
}

// OpenConnects begins to record connections that are redirected to the outbound
// port of cfg in the calling thread's network namespace. ErrNoConnects, with the
// reason, where that cannot be had.
func OpenConnects(cfg Config) (*Connects, error) {
	c := &Connects{}
	if err := c.open(cfg.withDefaults().OutboundPort); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", ErrNoConnects, err), c.Close())
	}
	return c, nil
}

func (c *Connects) open(port uint16) error {
	if err := mayUseBPF(); err != nil {
		return err
	}
	root, err := cgroupRoot()
	if err != nil {
		return err
	}
	if err := hostNamespaces(); err != nil {
		return err
	}
	netns, err := netnsCookie()
	if err != nil {
		return err
	}
	offsets, err := readOffsets()
	if err != nil {
		return err
	}
	if c.maps, err = newConnectMaps(); err != nil {
		return err
	}
	connect := connectProgram(c.maps, offsets, netns, os.Getpid())
	// From the end of a connection to its beginning: no half of a record is looked for.
	for _, p := range []struct {
		name   string
		kind   ebpf.ProgramType
		attach ebpf.AttachType
	}{
		{"sl_handshake", ebpf.SockOps, ebpf.AttachCGroupSockOps},
		{"sl_connect4", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect},
		{"sl_connect6", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Connect},
	} {
		code := connect
		if p.kind == ebpf.SockOps {
			code = handshakeProgram(c.maps, netns, port)
		}
		prog, err := loadProgram(p.name, p.kind, p.attach, code)
		if err != nil {
			return err
		}
		c.programs = append(c.programs, prog)
		l, err := link.AttachCgroup(link.CgroupOptions{Path: root, Attach: p.attach, Program: prog})
		if err != nil {
			return fmt.Errorf("attach %s to %s: %w", p.name, root, err)
		}
		c.links = append(c.links, l)
	}
	return nil
}

// Close ends recording.
func (c *Connects) Close() error {
	var errs []error
	for _, l := range c.links {
		errs = append(errs, l.Close())
	}
	for _, p := range c.programs {
		errs = append(errs, p.Close())
	}
	c.links, c.programs = nil, nil
	c.maps.close()
	return errors.Join(errs...)
}

// Fits tells whether the record is beyond doubt that of an accepted connection, which
// was redirected. If not, the client's port was rewritten, or the connection was made
// straight to the listener, or two handshakes at a time drew one sequence number:
// Conntrack.ClientTuple says which, and must give the record's Tuple.
func (c *Caller) Fits(conn Accepted) bool {
	remote, err := addrPort(conn.RemoteAddr())
	if err != nil || remote != c.Src {
		return false
	}
	local, err := addrPort(conn.LocalAddr())
	return err == nil && local != c.Dst
}

// Caller tells who made the connection that a listener of ours accepted, if the
// record Fits. ErrNoCaller if there is no record, which says nothing about the
// connection.
func (c *Connects) Caller(conn syscall.Conn) (Caller, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return Caller{}, fmt.Errorf("connect record: %w", err)
	}
	var b [recLen]byte
	if cerr := raw.Control(func(fd uintptr) {
		key := int32(fd)
		err = c.maps.accepted.Lookup(&key, &b)
	}); cerr != nil {
		return Caller{}, fmt.Errorf("connect record: %w", cerr)
	}
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return Caller{}, ErrNoCaller
	}
	if err != nil {
		return Caller{}, fmt.Errorf("connect record: %w", err)
	}
	return parseCaller(b[:])
}

func parseCaller(b []byte) (Caller, error) {
	u32 := func(at int) uint32 { return binary.NativeEndian.Uint32(b[at:]) }
	u64 := func(at int) uint64 { return binary.NativeEndian.Uint64(b[at:]) }
	// Since Linux 6.13 the top bit says that somebody has asked for the time.
	when := func(sec, nsec int) int64 { return int64(u64(sec))*1e9 + int64(u32(nsec)&^(1<<31)) }
	c := Caller{
		PID: int(u32(recTGID)), Start: u64(recStart),
		RealUID: u32(recRUID), UID: u32(recEUID), ActingRealUID: u32(recActingRUID), ActingUID: u32(recActingEUID),
		CgroupID: u64(recCgroup),
		Socket:   SocketOwner{UID: u32(recSockUID), CgroupID: u64(recSockCgroup), Cookie: u64(recCookie)},
		Tuple: Tuple{
			Src: netip.AddrPortFrom(recordAddr(b[recKey+keyAddr:]), uint16(u32(recSrcPort))),
			Dst: netip.AddrPortFrom(recordAddr(b[recDst:]), uint16(u32(recDstPort))),
		},
	}
	if ino := u64(recExeIno); ino != 0 {
		dev := u32(recExeDev) // 12 bits of major number, 20 of minor
		c.Exe = Executable{
			Dev: unix.Mkdev(dev>>20, dev&(1<<20-1)), Ino: ino, Size: int64(u64(recExeSize)),
			Mtime: when(recExeMtime, recExeMtimeNs), Ctime: when(recExeCtime, recExeCtimeNs),
		}
	}
	c.Command, _, _ = strings.Cut(string(b[recComm:recComm+16]), "\x00")
	if c.PID == 0 || c.Start == 0 || c.CgroupID == 0 || c.Socket.CgroupID == 0 {
		return Caller{}, ErrNoCaller // unfinished
	}
	return c, nil
}

func recordAddr(b []byte) netip.Addr { return netip.AddrFrom16([16]byte(b[:16])).Unmap() }

// rootCgroup is the id of cgroup v2's root on every kernel. In a cgroup namespace
// something else is mounted as the root.
const rootCgroup = 1

// cgroupRoot is where the root of cgroup v2 is mounted.
func cgroupRoot() (string, error) {
	g, err := OpenCgroups()
	if err != nil {
		return "", err
	}
	defer g.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(g.root.Fd()), &st); err != nil {
		return "", fmt.Errorf("cgroup root: %w", err)
	}
	if st.Ino != rootCgroup {
		return "", fmt.Errorf("%s is not the root of cgroup v2: the proxy is in a cgroup namespace", g.mount)
	}
	return g.mount, nil
}

// Inodes of the first namespaces (linux/nsfs.h: PID_NS_INIT_INO, USER_NS_INIT_INO).
const initPIDNS, initUserNS = 0xEFFFFFFC, 0xEFFFFFFD

// hostNamespaces makes sure that the numbers of processes and users in records are
// those that this process sees.
func hostNamespaces() error {
	for name, want := range map[string]uint64{"pid": initPIDNS, "user": initUserNS} {
		var st unix.Stat_t
		if err := unix.Stat("/proc/self/ns/"+name, &st); err != nil {
			return fmt.Errorf("%s namespace: %w", name, err)
		}
		if st.Ino != want {
			return fmt.Errorf("the proxy is not in the host's %s namespace", name)
		}
	}
	return nil
}

func netnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, os.NewSyscallError("SO_NETNS_COOKIE", err)
	}
	return cookie, nil
}

// mayUseBPF asks before the kernel does, whose refusals are hard to tell from its
// ignorance.
func mayUseBPF() error {
	var data [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0]); err != nil {
		return os.NewSyscallError("capget", err)
	}
	has := func(capability int) bool { return data[capability/32].Effective&(1<<(capability%32)) != 0 }
	var missing []string
	for _, c := range []struct {
		name   string
		number int
	}{{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN}, {"CAP_BPF", unix.CAP_BPF}, {"CAP_PERFMON", unix.CAP_PERFMON}} {
		if !has(c.number) && !has(unix.CAP_SYS_ADMIN) {
			missing = append(missing, c.name)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("the proxy lacks %s", strings.Join(missing, ", "))
	}
	return nil
}
