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
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func (n netNS) diag() *Diag {
	n.t.Helper()
	d, err := NewDiagIn(n.fd)
	check(n.t, err)
	n.t.Cleanup(func() { d.Close() })
	return d
}

func (n netNS) conntrack() *Conntrack {
	n.t.Helper()
	var c *Conntrack
	n.do(func() {
		var err error
		c, err = NewConntrack()
		check(n.t, err)
	})
	n.t.Cleanup(func() { c.Close() })
	return c
}

// inode is the truth about a socket of this process.
func inode(t *testing.T, c syscall.Conn) uint64 {
	t.Helper()
	raw, err := c.SyscallConn()
	check(t, err)
	var st unix.Stat_t
	check(t, raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) }))
	check(t, err)
	return st.Ino
}

func ends(t *testing.T, c net.Conn) (src, dst netip.AddrPort) {
	t.Helper()
	src, err := addrPort(c.LocalAddr())
	check(t, err)
	dst, err = addrPort(c.RemoteAddr())
	check(t, err)
	return src, dst
}

func TestOwnerOfConnectedSocket(t *testing.T) {
	n := newNS(t)
	n.serve("[::]:8080", "", nil)
	d := n.diag()
	dual := func(to string) *net.TCPConn { // an AF_INET6 socket that speaks IPv4
		var c net.Conn
		n.do(func() {
			fd := must(t)(unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
			a := netip.MustParseAddrPort(to)
			check(t, unix.Connect(fd, &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}))
			f := os.NewFile(uintptr(fd), "dual-stack")
			defer f.Close()
			var err error
			c, err = net.FileConn(f)
			check(t, err)
		})
		return c.(*net.TCPConn)
	}
	plainly := func(to string) *net.TCPConn {
		c, err := n.dial(0, "", to)
		check(t, err)
		return c
	}
	for name, c := range map[string]*net.TCPConn{
		"v4": plainly("127.0.0.1:8080"), "v6": plainly("[::1]:8080"), "v4 on a dual-stack socket": dual("127.0.0.1:8080"),
	} {
		src, dst := ends(t, c)
		owner, err := d.Owner(src, dst)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if owner.Inode != inode(t, c) || owner.State != StateEstablished || !owner.Reliable() || owner.UID != 0 || owner.Cookie == 0 {
			t.Errorf("%s: %+v, inode %d", name, owner, inode(t, c))
		}
		// The other end is another socket.
		if other, err := d.Owner(dst, src); err != nil || other.Inode == owner.Inode {
			t.Errorf("%s: other end %+v, %v", name, other, err)
		}
		mapped := func(a netip.AddrPort) netip.AddrPort {
			return netip.AddrPortFrom(netip.AddrFrom16(a.Addr().As16()), a.Port())
		}
		if same, err := d.Owner(mapped(src), mapped(dst)); err != nil || same != owner {
			t.Errorf("%s, asked in mapped form: %+v, %v", name, same, err)
		}
		check(t, c.SetLinger(0))
		c.Close()
		if got, err := d.Owner(src, dst); !errors.Is(err, ErrNoSocket) {
			t.Errorf("%s, after reset: %+v, %v", name, got, err)
		}
	}
}

// Two sockets with the same ports and other addresses are told apart.
func TestOwnerLooksAtAddresses(t *testing.T) {
	n := newNS(t)
	n.serve("0.0.0.0:8080", "", nil)
	d := n.diag()
	var conns []*net.TCPConn
	for _, pair := range [][2]string{{"127.0.0.1:40000", "127.0.0.1:8080"}, {"127.0.0.2:40000", "127.0.0.1:8080"}, {"127.0.0.1:40000", "127.0.0.3:8080"}} {
		c, err := n.dial(0, pair[0], pair[1])
		check(t, err)
		defer c.Close()
		conns = append(conns, c)
	}
	for _, c := range conns {
		src, dst := ends(t, c)
		if owner, err := d.Owner(src, dst); err != nil || owner.Inode != inode(t, c) {
			t.Errorf("%s to %s: %+v, %v; want inode %d", src, dst, owner, err, inode(t, c))
		}
	}
	if got, err := d.Owner(netip.MustParseAddrPort("127.0.0.2:40000"), netip.MustParseAddrPort("127.0.0.3:8080")); !errors.Is(err, ErrNoSocket) {
		t.Errorf("a tuple that nobody has: %+v, %v", got, err)
	}
}

// When a client is gone, a listener on its address must not be taken for it.
func TestOwnerIsNeverAListener(t *testing.T) {
	n := newNS(t)
	n.serve("127.0.0.1:40000", "", nil)
	got, err := n.diag().Owner(netip.MustParseAddrPort("127.0.0.1:40000"), netip.MustParseAddrPort("127.0.0.1:8080"))
	if !errors.Is(err, ErrNoSocket) {
		t.Errorf("%+v, %v", got, err)
	}
}

// A socket that its process has closed is found, but its uid is not to be believed.
func TestOwnerOfClosedSocketIsUnreliable(t *testing.T) {
	n := newNS(t)
	accepted := make(chan *net.TCPConn, 1)
	hold := make(chan bool)
	n.serve("127.0.0.1:8080", "", func(c *net.TCPConn) { accepted <- c; <-hold })
	defer close(hold)
	c, err := n.dial(0, "", "127.0.0.1:8080")
	check(t, err)
	<-accepted
	src, dst := ends(t, c)
	c.Close() // FIN goes out; the server does not answer with its own
	d := n.diag()
	eventually(t, "FIN_WAIT2", func() bool {
		owner, err := d.Owner(src, dst)
		if err == nil && owner.Reliable() {
			t.Fatalf("closed socket is reliable: %+v", owner)
		}
		return err == nil && owner.State == StateFinWait2
	})
}

func TestListener(t *testing.T) {
	n := newNS(t)
	mptcp, err := func() (l net.Listener, err error) { // as a Go program does by default
		n.do(func() { l, err = net.Listen("tcp", "127.0.0.1:8083") })
		return l, err
	}()
	check(t, err)
	defer mptcp.Close()
	listeners := map[string]net.Listener{
		"v4": n.serve("127.0.0.1:8080", "", nil), "v6": n.serve("[::1]:8081", "", nil),
		"dual": n.serve("[::]:8082", "", nil), "multipath TCP": mptcp,
	}
	d := n.diag()
	peer4, peer6 := netip.MustParseAddrPort("192.0.2.1:555"), netip.MustParseAddrPort("[2001:db8::1]:555")
	for _, c := range []struct {
		listener, dst string
		peer          netip.AddrPort
	}{
		{"v4", "127.0.0.1:8080", peer4}, {"v6", "[::1]:8081", peer6}, {"dual", "127.0.0.1:8082", peer4}, {"dual", "[::1]:8082", peer6},
		{"multipath TCP", "127.0.0.1:8083", peer4},
		{"", "127.0.0.1:8081", peer4}, {"", "[::1]:8080", peer6}, {"", "127.0.0.2:8080", peer4}, {"", "127.0.0.1:9", peer4},
	} {
		owner, err := d.Listener(netip.MustParseAddrPort(c.dst), c.peer)
		if c.listener == "" {
			if !errors.Is(err, ErrNoSocket) {
				t.Errorf("%s: %+v, %v", c.dst, owner, err)
			}
			continue
		}
		if err != nil || owner.State != StateListen || owner.Inode != inode(t, listeners[c.listener].(*net.TCPListener)) {
			t.Errorf("%s at %s: %+v, %v", c.listener, c.dst, owner, err)
		}
	}
	// A connection with the very same addresses does not hide the listener.
	conn, err := n.dial(0, "", "127.0.0.1:8080")
	check(t, err)
	defer conn.Close()
	src, dst := ends(t, conn)
	if owner, err := d.Listener(dst, src); err != nil || owner.State != StateListen {
		t.Errorf("beside a connection: %+v, %v", owner, err)
	}
	if owner, err := d.Listener(dst, peer6); err == nil {
		t.Errorf("two families: %+v", owner)
	}
}

func init() {
	// Connects to its argument, says from where, and waits for the end of its input.
	helpers["connect"] = func() {
		c, err := net.Dial("tcp", os.Args[1])
		if err != nil {
			panic(err)
		}
		fmt.Println(c.LocalAddr())
		_, _ = os.Stdin.Read(make([]byte, 1))
		c.Close()
	}
}

// The whole question, as the proxy puts it: a process of another user in a cgroup
// of its own connects, is redirected, and is recognized.
func TestRedirectedClientIsRecognized(t *testing.T) {
	near, _ := twoHosts(t)
	near.install(near.rules(config(BackendDefault)))
	ct, d := near.conntrack(), near.diag()
	dir, id := newCgroup(t)
	type seen struct {
		tuple Tuple
		owner SocketOwner
		err   error
	}
	for _, dst := range []string{"10.77.1.1:5432", "[fd77:1::1]:5432", "10.77.1.2:5432", "[::1]:5432"} {
		listen := "127.0.0.1:15001"
		if dst[0] == '[' {
			listen = "[::1]:15001"
		}
		results := make(chan seen, 1)
		l := near.serve(listen, "", func(c *net.TCPConn) {
			var s seen
			if s.tuple, s.err = ct.ClientTuple(c); s.err == nil {
				s.owner, s.err = d.Owner(s.tuple.Src, s.tuple.Dst)
			}
			results <- s
		})
		cg, err := os.Open(dir)
		check(t, err)
		// Not by its path: Go's build directory is closed to other users.
		cmd := exec.Command("/proc/self/exe", dst)
		self, err := os.Open("/proc/self/exe")
		check(t, err)
		cmd.Path, cmd.ExtraFiles = "/proc/self/fd/3", []*os.File{self}
		cmd.Env = []string{"REDIRECT_TEST_HELPER=connect"}
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cg.Fd()), Credential: &syscall.Credential{Uid: 1234, Gid: 1234}}
		cmd.Stderr = os.Stderr
		stdin, err := cmd.StdinPipe()
		check(t, err)
		var out strings.Builder
		cmd.Stdout = &out
		near.do(func() { check(t, cmd.Start()) })
		s := <-results
		cg.Close()
		self.Close()
		stdin.Close()
		check(t, cmd.Wait())
		l.Close()
		if s.err != nil || s.tuple.Dst.String() != dst || s.tuple.Src.String() != strings.TrimSpace(out.String()) {
			t.Errorf("%s: %v, %v; the client says %q", dst, s.tuple, s.err, out.String())
		}
		if s.owner.UID != 1234 || s.owner.CgroupID != id || !s.owner.Reliable() {
			t.Errorf("%s: owner %+v, want uid 1234 in cgroup %d", dst, s.owner, id)
		}
		if path, err := cgroupPath(s.owner.CgroupID); err != nil || !strings.HasSuffix(dir, path) || filepath.Base(path) != filepath.Base(dir) {
			t.Errorf("%s: cgroup %q, %v; want %s", dst, path, err, dir)
		}
	}
}

// The hazard of REDIRECT: connections from one client port to several destinations
// meet in one listener. The port that RemoteAddr then shows is made up; at worst it
// is another process's. ClientTuple knows better.
func TestRewrittenClientPort(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		near.install(near.rules(config(b)))
		ct, d := near.conntrack(), near.diag()
		var rewritten atomic.Int32
		type seen struct {
			Tuple
			err error
		}
		results := make(chan seen, 1)
		accept := func(c *net.TCPConn) {
			tuple, err := ct.ClientTuple(c)
			if _, remote := ends(t, c); remote != tuple.Src {
				rewritten.Add(1)
			}
			results <- seen{tuple, err}
		}
		near.serve("127.0.0.1:15001", "", accept)
		near.serve("[::1]:15001", "", accept)
		near.serve("[::]:15006", "", accept)
		for _, c := range []struct {
			name string
			from netNS
			src  string
			dsts []string
		}{
			{"outbound", near, "10.77.1.2:40001", []string{"10.77.1.1:8080", "10.77.1.3:8080", "10.77.1.4:8080"}},
			{"outbound v6", near, "[fd77:1::2]:40001", []string{"[fd77:1::1]:8080", "[fd77:1::3]:8080", "[fd77:1::4]:8080"}},
			{"inbound", far, "10.77.1.1:40002", []string{"10.77.1.2:81", "10.77.1.2:82", "10.77.1.2:83"}},
			{"inbound v6", far, "[fd77:1::1]:40002", []string{"[fd77:1::2]:81", "[fd77:1::2]:82", "[fd77:1::2]:83"}},
		} {
			rewritten.Store(0)
			for _, dst := range c.dsts {
				conn, err := c.from.dial(0, c.src, dst)
				check(t, err)
				defer conn.Close()
				got := <-results
				if want := (Tuple{netip.MustParseAddrPort(c.src), netip.MustParseAddrPort(dst)}); got.err != nil || got.Tuple != want {
					t.Errorf("%s: %v, %v; want %v", c.name, got.Tuple, got.err, want)
				}
				if c.from == near {
					if owner, err := d.Owner(got.Src, got.Dst); err != nil || owner.Inode != inode(t, conn) {
						t.Errorf("%s: owner %+v, %v; want inode %d", c.name, owner, err, inode(t, conn))
					}
				}
			}
			if n := rewritten.Load(); n != 2 {
				t.Errorf("%s: %d of 3 ports were rewritten: the hazard did not come about", c.name, n)
			}
		}
	})
}

func TestClientTupleOfDirectConnection(t *testing.T) {
	n := newNS(t)
	ct := n.conntrack()
	errs := make(chan error, 1)
	n.serve("127.0.0.1:15001", "", func(c *net.TCPConn) {
		_, err := ct.ClientTuple(c)
		errs <- err
	})
	for _, tracked := range []bool{false, true} {
		if tracked {
			n.sh("iptables -A INPUT -m conntrack --ctstate INVALID -j DROP") // turns conntrack on
		}
		c, err := n.dial(0, "", "127.0.0.1:15001")
		check(t, err)
		c.Close()
		if err := <-errs; !errors.Is(err, ErrNotRedirected) {
			t.Errorf("tracked %v: %v", tracked, err)
		}
	}
}

// Many ask at once; a socket that breaks is replaced, in its own namespace.
func TestDiagConcurrencyAndRecovery(t *testing.T) {
	n := newNS(t)
	n.serve("127.0.0.1:8080", "", nil)
	d := n.diag()
	var conns []*net.TCPConn
	for range 20 {
		c, err := n.dial(0, "", "127.0.0.1:8080")
		check(t, err)
		defer c.Close()
		conns = append(conns, c)
	}
	ask := func() {
		var wg sync.WaitGroup
		for _, c := range conns {
			wg.Go(func() {
				src, dst := ends(t, c)
				want := inode(t, c)
				for range 50 {
					if owner, err := d.Owner(src, dst); err != nil || owner.Inode != want {
						t.Errorf("%+v, %v; want inode %d", owner, err, want)
						return
					}
				}
			})
		}
		wg.Wait()
	}
	ask()
	// The descriptor now is something that no netlink message can be sent to.
	null := must(t)(unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0))
	check(t, unix.Dup3(null, d.nl.fd, unix.O_CLOEXEC))
	unix.Close(null)
	ask()
	check(t, d.Close())
	check(t, d.Close())
	if _, err := d.Owner(ends(t, conns[0])); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// A late answer to a question that was given up is not taken for the next one's.
func TestAnswersAreMatchedToQuestions(t *testing.T) {
	n := newNS(t)
	n.serve("127.0.0.1:8080", "", nil)
	d := n.diag()
	var conns []*net.TCPConn
	for range 2 {
		c, err := n.dial(0, "", "127.0.0.1:8080")
		check(t, err)
		defer c.Close()
		conns = append(conns, c)
	}
	src, dst := ends(t, conns[0])
	stale := diagRequest(unix.AF_INET, src, dst)
	stale[0] = byte(len(stale))
	stale[8] = 0xee // a sequence number that no query waits for
	check(t, unix.Sendto(d.nl.fd, stale[:], 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
	src, dst = ends(t, conns[1])
	if owner, err := d.Owner(src, dst); err != nil || owner.Inode != inode(t, conns[1]) {
		t.Errorf("%+v, %v; want inode %d", owner, err, inode(t, conns[1]))
	}
}

// Answers are the kernel's: what somebody else sends, whatever he may do, does not even
// arrive.
func TestNobodyElseAnswers(t *testing.T) {
	n := newNS(t)
	d := n.diag()
	forger := n.diag()
	answer := message(sockDiagByFamily, d.nl.seq+1, make([]byte, diagMessageLen))
	check(t, unix.Connect(forger.nl.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Pid: d.nl.port}))
	if _, err := unix.Write(forger.nl.fd, answer); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("the forged answer is sent: %v", err)
	}
	src := netip.MustParseAddrPort("127.0.0.1:1")
	if _, err := d.Owner(src, src); !errors.Is(err, ErrNoSocket) {
		t.Errorf("%v; nobody has that socket", err)
	}
}

func BenchmarkOwner(b *testing.B) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	d, err := NewDiag()
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	src, _ := addrPort(c.LocalAddr())
	dst, _ := addrPort(c.RemoteAddr())
	b.ReportAllocs()
	for b.Loop() {
		if _, err := d.Owner(src, dst); err != nil {
			b.Fatal(err)
		}
	}
}

// A client that has sent all it has to say and shut its direction down still owns its
// socket: half-close is not exit.
func TestOwnerOfAHalfClosedSocket(t *testing.T) {
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	d, err := NewDiag()
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	src, dst := ends(t, c)
	eventually(t, "FIN_WAIT2", func() bool {
		owner, err := d.Owner(src, dst)
		if err != nil || !owner.Reliable() || owner.Inode != inode(t, c) {
			t.Fatalf("owner = %+v, %v; want a reliable one", owner, err)
		}
		return owner.State == StateFinWait2
	})
}

// cgroupPath is OpenCgroups and Path in one, for single questions.
func cgroupPath(id uint64) (string, error) {
	c, err := OpenCgroups()
	if err != nil {
		return "", err
	}
	defer c.Close()
	return c.Path(id)
}
