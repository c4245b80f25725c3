package redirect

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// connects records for a listener on port in n.
func (n netNS) connects(port uint16) *Connects {
	n.t.Helper()
	var c *Connects
	var err error
	n.do(func() { c, err = OpenConnects(Config{OutboundPort: port}) })
	check(n.t, err)
	n.t.Cleanup(func() { check(n.t, c.Close()) })
	return c
}

type callerSeen struct {
	Caller
	fits bool
	err  error
}

// callers listens on addr and tells who connects.
func (n netNS) callers(addr string, c *Connects) <-chan callerSeen {
	n.t.Helper()
	seen := make(chan callerSeen, 100)
	n.serve(addr, "", func(conn *net.TCPConn) {
		caller, err := c.Caller(conn)
		seen <- callerSeen{caller, caller.Fits(conn), err}
	})
	return seen
}

// self is what a record says of this process's executable.
func self(t *testing.T) Executable {
	t.Helper()
	var st unix.Statx_t
	check(t, unix.Statx(unix.AT_FDCWD, "/proc/self/exe", 0, unix.STATX_BASIC_STATS, &st))
	return Executable{
		Dev: unix.Mkdev(st.Dev_major, st.Dev_minor), Ino: st.Ino, Size: int64(st.Size),
		Mtime: st.Mtime.Sec*1e9 + int64(st.Mtime.Nsec), Ctime: st.Ctime.Sec*1e9 + int64(st.Ctime.Nsec),
	}
}

// startOf is when a process began, in ticks of 10 ms.
func startOf(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	check(t, err)
	_, rest, _ := strings.Cut(string(b), ") ")
	return strings.Fields(rest)[19]
}

func TestCaller(t *testing.T) {
	n := newNS(t)
	records := n.connects(8080)
	d := n.diag()
	seen := n.callers("[::]:8080", records)
	exe, start := self(t), startOf(t, os.Getpid())
	for _, to := range []string{"127.0.0.1:8080", "[::1]:8080"} {
		c, err := n.dial(0, "", to)
		check(t, err)
		got := <-seen
		check(t, got.err)
		src, dst := ends(t, c)
		if got.Tuple != (Tuple{src, dst}) {
			t.Errorf("%s: %v, want %v", to, got.Tuple, Tuple{src, dst})
		}
		owner, err := d.Owner(src, dst)
		check(t, err)
		owner.Inode, owner.State = 0, 0
		if got.Socket != owner {
			t.Errorf("%s: socket %+v; sock_diag says %+v", to, got.Socket, owner)
		}
		if got.PID != os.Getpid() || got.Exe != exe || got.CgroupID != owner.CgroupID || fmt.Sprint(got.Start/1e7) != start {
			t.Errorf("%s: %+v; want process %d, started %s, of %+v in cgroup %d", to, got.Caller, os.Getpid(), start, exe, owner.CgroupID)
		}
		if got.fits {
			t.Errorf("%s: the record fits, but the connection was not redirected", to)
		}
		c.Close()
	}
}

// An IPv6 socket that speaks IPv4, a connect that does not wait, and one that sends
// its SYN with the first bytes only (TCP fast open) are recorded like any other.
func TestCallerOfUnusualConnects(t *testing.T) {
	n := newNS(t)
	seen := n.callers("127.0.0.1:8080", n.connects(8080))
	to4 := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 8080}
	to6 := &unix.SockaddrInet6{Addr: netip.MustParseAddr("::ffff:127.0.0.1").As16(), Port: 8080}
	refused := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 8081}
	for name, connect := range map[string]func(fd4, fd6 int) error{
		"mapped":       func(_, fd int) error { return unix.Connect(fd, to6) },
		"non-blocking": func(fd, _ int) error { check(t, unix.SetNonblock(fd, true)); return unix.Connect(fd, to4) },
		"twice": func(fd, _ int) error {
			check(t, unix.SetNonblock(fd, true))
			_ = unix.Connect(fd, to4)
			return unix.Connect(fd, to4)
		},
		"after a refusal": func(fd, _ int) error {
			if err := unix.Connect(fd, refused); !errors.Is(err, unix.ECONNREFUSED) {
				return fmt.Errorf("first: %w", err)
			}
			return unix.Connect(fd, to4)
		},
		"fast open": func(fd, _ int) error {
			check(t, unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_FASTOPEN_CONNECT, 1))
			check(t, unix.Connect(fd, to4))
			_, err := unix.Write(fd, []byte("x"))
			return err
		},
		"sent without connect": func(fd, _ int) error { return unix.Sendto(fd, []byte("x"), unix.MSG_FASTOPEN, to4) },
	} {
		t.Run(name, func(t *testing.T) {
			var fd4, fd6 int
			n.do(func() {
				fd4 = must(t)(unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
				fd6 = must(t)(unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
			})
			defer unix.Close(fd4)
			defer unix.Close(fd6)
			if err := connect(fd4, fd6); err != nil && !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.EALREADY) && !errors.Is(err, unix.EISCONN) {
				t.Fatal(err)
			}
			got := <-seen
			if got.err != nil || got.PID != os.Getpid() || got.Dst.String() != "127.0.0.1:8080" {
				t.Errorf("%+v, %v", got.Caller, got.err)
			}
		})
	}
}

// What is not recorded is said to be unknown, never to be somebody.
func TestNoCaller(t *testing.T) {
	n := newNS(t)
	early := make(chan callerSeen, 1)
	accept, opened := make(chan bool), make(chan *Connects, 1)
	n.serve("127.0.0.1:8080", "", func(c *net.TCPConn) {
		close(accept)
		r := <-opened
		caller, err := r.Caller(c)
		early <- callerSeen{Caller: caller, err: err}
	})
	c, err := n.dial(0, "", "127.0.0.1:8080")
	check(t, err)
	defer c.Close()
	<-accept
	records := n.connects(8082)
	opened <- records
	if got := <-early; !errors.Is(got.err, ErrNoCaller) {
		t.Errorf("connected before: %+v, %v", got.Caller, got.err)
	}
	other := n.callers("127.0.0.1:8083", records)
	c, err = n.dial(0, "", "127.0.0.1:8083")
	check(t, err)
	defer c.Close()
	if got := <-other; !errors.Is(got.err, ErrNoCaller) {
		t.Errorf("another listener: %+v, %v", got.Caller, got.err)
	}
	seen := n.callers("127.0.0.1:8082", records)
	for mark, want := range map[int]error{MarkTunnel: ErrNoCaller, MarkApp: ErrNoCaller, 0x4e0001: nil} {
		c, err = n.dial(mark, "", "127.0.0.1:8082")
		check(t, err)
		if got := <-seen; !errors.Is(got.err, want) {
			t.Errorf("our own with mark %#x: %+v, %v", mark, got.Caller, got.err)
		}
		c.Close()
	}
	var mp int
	n.do(func() {
		mp = must(t)(unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP))
	})
	defer unix.Close(mp)
	check(t, unix.Connect(mp, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 8082}))
	if got := <-seen; got.err == nil && got.PID != os.Getpid() || got.err != nil && !errors.Is(got.err, ErrNoCaller) {
		t.Errorf("multipath TCP: %+v, %v", got.Caller, got.err)
	}
}

// Several proxies record at once, each its own namespace; one that ends takes
// nothing from the others.
func TestConnectsOfSeveralProxies(t *testing.T) {
	a, b := newNS(t), newNS(t)
	inA, again, inB := a.connects(8080), a.connects(8080), b.connects(8080)
	type pair struct{ first, second error }
	ask := func(n netNS, first, second *Connects) pair {
		got := make(chan pair, 1)
		l := n.serve("127.0.0.1:8080", "", func(c *net.TCPConn) {
			_, err1 := first.Caller(c)
			_, err2 := second.Caller(c)
			got <- pair{err1, err2}
		})
		defer l.Close()
		c, err := n.dial(0, "", "127.0.0.1:8080")
		check(t, err)
		defer c.Close()
		return <-got
	}
	if got := ask(a, inA, again); got.first != nil || got.second != nil {
		t.Errorf("two in one namespace: %v", got)
	}
	if got := ask(b, inB, inA); got.first != nil || !errors.Is(got.second, ErrNoCaller) {
		t.Errorf("one in each: %v", got)
	}
	check(t, again.Close())
	if got := ask(a, inA, inB); got.first != nil || !errors.Is(got.second, ErrNoCaller) {
		t.Errorf("after one has ended: %v", got)
	}
}

func TestConnectsLeaveNothing(t *testing.T) {
	n := newNS(t)
	c := n.connects(8080)
	var ids []ebpf.ProgramID
	for _, p := range c.programs {
		info, err := p.Info()
		check(t, err)
		id, ok := info.ID()
		if !ok {
			t.Fatal("the program has no id")
		}
		ids = append(ids, id)
	}
	check(t, c.Close())
	check(t, c.Close())
	eventually(t, "the programs' end", func() bool {
		for _, id := range ids {
			if p, err := ebpf.NewProgramFromID(id); err == nil {
				p.Close()
				return false
			}
		}
		return true
	})
}

func init() {
	// Says why there are no records.
	helpers["connects"] = func() {
		c, err := OpenConnects(Config{})
		if err == nil {
			c.Close()
		}
		if errors.Is(err, ErrNoConnects) {
			fmt.Println(err)
		}
	}
}

// Where the kernel does not let us, the error says so.
func TestConnectsThatCannotBeHad(t *testing.T) {
	exe, err := os.Executable()
	check(t, err)
	uidMap := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 65536}}
	for name, c := range map[string]struct {
		attr *syscall.SysProcAttr
		want string
	}{
		"another user":        {&syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}, "CAP_BPF"},
		"a PID namespace":     {&syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}, "host's pid namespace"},
		"a user namespace":    {&syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: uidMap, GidMappings: uidMap}, "host's user namespace"},
		"a mount without cg2": {&syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}, "cgroup v2"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command(exe)
			if strings.HasPrefix(name, "another") { // Go's build directory is closed to other users
				f, err := os.Open(exe)
				check(t, err)
				defer f.Close()
				cmd.Path, cmd.ExtraFiles = "/proc/self/fd/3", []*os.File{f}
			}
			if strings.HasPrefix(name, "a mount") {
				g, err := OpenCgroups()
				check(t, err)
				g.Close()
				cmd = exec.Command("sh", "-ec", `umount -l "$1"; exec "$2"`, "sh", g.mount, exe)
			}
			cmd.Env = append(os.Environ(), "REDIRECT_TEST_HELPER=connects")
			cmd.SysProcAttr = c.attr
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), ErrNoConnects.Error()) || !strings.Contains(string(out), c.want) {
				t.Errorf("%v: %s; want %q", err, out, c.want)
			}
		})
	}
}

// A user who opens connections as fast as he can pushes out none that its owner was
// waiting for; at worst there is no record.
func TestCallerUnderAFlood(t *testing.T) {
	n := newNS(t)
	records := n.connects(8080)
	seen := n.callers("127.0.0.1:8080", records)
	n.serve("127.0.0.1:9000", "", nil) // not ours: what is published stays
	stop := make(chan bool)
	var flood sync.WaitGroup
	opened := make([]int, 4)
	for i := range opened {
		flood.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if c, err := n.dial(0, fmt.Sprintf("127.0.0.%d:0", 2+i), "127.0.0.1:9000"); err == nil {
					_ = c.SetLinger(0)
					c.Close()
					opened[i]++
				}
			}
		})
	}
	lost := 0
	for range 300 {
		c, err := n.dial(0, "", "127.0.0.1:8080")
		check(t, err)
		src, dst := ends(t, c)
		got := <-seen
		switch {
		case errors.Is(got.err, ErrNoCaller):
			lost++
		case got.err != nil || got.Tuple != (Tuple{src, dst}) || got.PID != os.Getpid():
			t.Errorf("%+v, %v; want %s", got.Caller, got.err, Tuple{src, dst})
		}
		_ = c.SetLinger(0)
		c.Close()
	}
	close(stop)
	flood.Wait()
	total := 0
	for _, o := range opened {
		total += o
	}
	t.Logf("%d of 300 without a record beside %d others", lost, total)
}

// Even a full table of others' handshakes lets a new one through.
func TestFullTableOfHandshakes(t *testing.T) {
	n := newNS(t)
	records := n.connects(8080)
	seen := n.callers("127.0.0.1:8080", records)
	var key [keyLen]byte
	var stranger [recLen]byte
	for i := range maxHandshakes + maxHandshakes/2 {
		key[0], key[1], key[2] = byte(i), byte(i>>8), byte(i>>16)
		check(t, records.maps.handshakes.Put(key[:], stranger[:]))
	}
	for range 20 {
		c, err := n.dial(0, "", "127.0.0.1:8080")
		check(t, err)
		if got := <-seen; got.err != nil || got.PID != os.Getpid() {
			t.Errorf("%+v, %v", got.Caller, got.err)
		}
		c.Close()
	}
}

// Another user's process that comes to a port which has just been given up is never
// taken for the one before, nor that one for it.
func TestCallerWhenAPortChangesHands(t *testing.T) {
	n := newNS(t)
	records := n.connects(8080)
	d := n.diag()
	conns := make(chan *net.TCPConn, 2)
	hold := make(chan bool)
	defer close(hold)
	n.serve("127.0.0.1:8080", "", func(c *net.TCPConn) { conns <- c; <-hold })
	const port = "127.0.0.1:40123"
	first, err := n.dial(0, port, "127.0.0.1:8080")
	check(t, err)
	old := <-conns
	_, err = first.Write([]byte("steal"))
	check(t, err)
	check(t, first.SetLinger(0))
	first.Close()

	exe, err := os.Open("/proc/self/exe")
	check(t, err)
	defer exe.Close()
	cmd := exec.Command("/proc/self/fd/3", "127.0.0.1:8080", port)
	cmd.ExtraFiles = []*os.File{exe}
	cmd.Env = []string{"REDIRECT_TEST_HELPER=connect from"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1234, Gid: 1234}}
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	check(t, err)
	n.do(func() { check(t, cmd.Start()) })
	next := <-conns
	was, err := records.Caller(old)
	if err != nil || was.PID != os.Getpid() || was.UID != 0 {
		t.Errorf("before: %+v, %v", was, err)
	}
	is, err := records.Caller(next)
	if err != nil || is.PID != cmd.Process.Pid || is.UID != 1234 || is.Tuple != was.Tuple {
		t.Errorf("after: %+v, %v; want process %d and %s", is, err, cmd.Process.Pid, was.Tuple)
	}
	// By its addresses alone the first would pass for the second: sock_diag sees one
	// socket only. What gives it away is that it was reset.
	owner, err := d.Owner(was.Src, was.Dst)
	if err != nil || owner.UID != 1234 || owner.Cookie != is.Socket.Cookie {
		t.Errorf("sock_diag: %+v, %v", owner, err)
	}
	if err := StillOpen(old); !errors.Is(err, ErrReset) {
		t.Errorf("the first connection: %v, want ErrReset", err)
	}
	check(t, StillOpen(next))
	stdin.Close()
	check(t, cmd.Wait())
}

func init() {
	// Connects to its first argument from its second, and waits.
	helpers["connect from"] = func() {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.MustParseAddrPort(os.Args[2]))}
		c, err := d.Dial("tcp", os.Args[1])
		if err != nil {
			panic(err)
		}
		_, _ = os.Stdin.Read(make([]byte, 1))
		c.Close()
	}
}

// The caller is who called connect, whatever became of it; here it is known by its
// user, its cgroup and its program.
func TestCallerThatIsGone(t *testing.T) {
	near, _ := twoHosts(t)
	near.install(near.rules(config(BackendDefault)))
	records, ct := near.connects(DefaultOutboundPort), near.conntrack()
	dir, id := newCgroup(t)
	cg, err := os.Open(dir)
	check(t, err)
	defer cg.Close()
	// A program of its own, which other users can read.
	place, err := os.MkdirTemp("", "sl-redirect-")
	check(t, err)
	defer os.RemoveAll(place)
	check(t, os.Chmod(place, 0o755))
	own, err := os.ReadFile("/proc/self/exe")
	check(t, err)
	program := filepath.Join(place, "client")
	check(t, os.WriteFile(program, own, 0o755))
	var st unix.Stat_t
	check(t, unix.Stat(program, &st))
	for _, dst := range []string{"10.77.1.1:5432", "[fd77:1::1]:5432"} {
		listen := "127.0.0.1:15001"
		if dst[0] == '[' {
			listen = "[::1]:15001"
		}
		exited, conns := make(chan bool), make(chan callerSeen, 1)
		var tuple Tuple
		l := near.serve(listen, "", func(c *net.TCPConn) {
			var err error
			if tuple, err = ct.ClientTuple(c); err != nil {
				t.Error(err)
			}
			<-exited
			caller, err := records.Caller(c)
			conns <- callerSeen{Caller: caller, err: err}
		})
		cmd := exec.Command(program, dst)
		cmd.Env = []string{"REDIRECT_TEST_HELPER=connect"}
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cg.Fd()), Credential: &syscall.Credential{Uid: 1234, Gid: 1234}}
		near.do(func() { check(t, cmd.Run()) }) // its input is empty: it exits at once
		close(exited)
		got := <-conns
		l.Close()
		if got.err != nil || got.Tuple != tuple || got.Dst.String() != dst || got.PID != cmd.Process.Pid || got.UID != 1234 || got.RealUID != 1234 ||
			got.CgroupID != id || got.Socket.UID != 1234 || got.Socket.CgroupID != id || got.Exe.Ino != st.Ino || got.Command != "client" {
			t.Errorf("%s: %+v, %v; want process %d of %d in cgroup %d, %s", dst, got.Caller, got.err, cmd.Process.Pid, 1234, id, tuple)
		}
	}
}

func FuzzParseCaller(f *testing.F) {
	f.Add(make([]byte, recLen))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < recLen {
			return
		}
		if c, err := parseCaller(b); err == nil && (c.PID == 0 || c.Start == 0) {
			t.Errorf("%+v", c)
		}
	})
}

func BenchmarkCaller(b *testing.B) {
	c, err := OpenConnects(Config{OutboundPort: 1})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	var record [recLen]byte
	record[recTGID], record[recStart], record[recCgroup], record[recSockCgroup] = 1, 1, 1, 1
	raw, _ := l.(*net.TCPListener).SyscallConn()
	if cerr := raw.Control(func(fd uintptr) { err = c.maps.accepted.Put(int32(fd), record[:]) }); cerr != nil || err != nil {
		b.Fatal(err, cerr)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Caller(l.(*net.TCPListener)); err != nil {
			b.Fatal(err)
		}
	}
}

// A record is right where the port that the listener sees is not, and says itself
// that it must be compared.
func TestCallerWithARewrittenPort(t *testing.T) {
	near, _ := twoHosts(t)
	near.install(near.rules(config(BackendDefault)))
	records, ct := near.connects(DefaultOutboundPort), near.conntrack()
	type seen struct {
		caller    Caller
		tuple     Tuple
		fits      bool
		err, ctrr error
	}
	results := make(chan seen, 1)
	near.serve("127.0.0.1:15001", "", func(c *net.TCPConn) {
		var s seen
		s.caller, s.err = records.Caller(c)
		s.tuple, s.ctrr = ct.ClientTuple(c)
		s.fits = s.caller.Fits(c)
		results <- s
	})
	const src = "10.77.1.2:40001"
	for i, dst := range []string{"10.77.1.1:8080", "10.77.1.3:8080", "10.77.1.4:8080"} {
		c, err := near.dial(0, src, dst)
		check(t, err)
		defer c.Close()
		got := <-results
		want := Tuple{netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)}
		if got.err != nil || got.ctrr != nil || got.caller.Tuple != want || got.tuple != want || got.caller.PID != os.Getpid() {
			t.Errorf("%s: %+v", dst, got)
		}
		if got.fits != (i == 0) {
			t.Errorf("%s: fits: %v", dst, got.fits)
		}
	}
}
