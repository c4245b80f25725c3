package redirect

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if run, ok := helpers[os.Getenv("REDIRECT_TEST_HELPER")]; ok {
		run()
		return
	}
	if os.Geteuid() != 0 {
		println("redirect: these tests change network namespaces of their own: run them as root")
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// helpers are what this test binary does when a test starts it as another process.
var helpers = map[string]func(){}

// netNS is a network namespace without a name: it goes with its last descriptor,
// also when the test process is killed.
type netNS struct {
	t  *testing.T
	fd int
}

func newNS(t *testing.T) netNS {
	t.Helper()
	runtime.LockOSThread()
	back := must(t)(unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0))
	defer unix.Close(back)
	check(t, unix.Unshare(unix.CLONE_NEWNET))
	fd := must(t)(unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0))
	check(t, unix.Setns(back, unix.CLONE_NEWNET)) // on failure the locked thread dies with the test
	runtime.UnlockOSThread()
	t.Cleanup(func() { unix.Close(fd) })
	n := netNS{t, fd}
	n.do(func() {
		lo, err := netlink.LinkByName("lo")
		check(t, err)
		check(t, netlink.LinkSetUp(lo))
	})
	return n
}

// do runs f, and what f starts, in the namespace. Any goroutine may call it.
func (n netNS) do(f func()) {
	n.t.Helper()
	if err := inNetNS(n.fd, func() error { f(); return nil }); err != nil {
		n.t.Error(err)
	}
}

// sh runs a shell command in the namespace and returns what it printed.
func (n netNS) sh(command string) string {
	n.t.Helper()
	var out []byte
	var err error
	n.do(func() { out, err = exec.Command("sh", "-ec", command).CombinedOutput() })
	if err != nil {
		n.t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}

func (n netNS) rules(cfg Config) *Rules {
	n.t.Helper()
	var r *Rules
	var err error
	n.do(func() { r, err = NewRules(cfg) })
	check(n.t, err)
	return r
}

func (n netNS) install(r *Rules) {
	n.t.Helper()
	n.do(func() { check(n.t, r.Install(context.Background())) })
}

func (n netNS) verify(r *Rules) (drift []string) {
	n.t.Helper()
	n.do(func() {
		var err error
		drift, err = r.Verify(context.Background())
		check(n.t, err)
	})
	return drift
}

// serve listens and answers every connection with greeting, then echoes.
// Each accepted connection is handed to seen, if there is one, before the greeting.
func (n netNS) serve(addr, greeting string, seen func(*net.TCPConn)) net.Listener {
	n.t.Helper()
	var l net.Listener
	n.do(func() {
		var err error
		l, err = ListenConfig(DefaultKeepAlive).Listen(context.Background(), "tcp", addr)
		check(n.t, err)
	})
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wg.Go(func() {
				defer func() {
					mu.Lock()
					delete(open, c)
					mu.Unlock()
					c.Close()
				}()
				if seen != nil {
					seen(c.(*net.TCPConn))
				}
				if _, err := io.WriteString(c, greeting); err == nil {
					_, _ = io.Copy(c, c) // ends when either side does
				}
			})
		}
	})
	n.t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return l
}

// dial connects from the namespace; mark 0 is an application's connection.
func (n netNS) dial(mark int, from, to string) (*net.TCPConn, error) {
	d := Dialer(mark, DefaultKeepAlive)
	d.Timeout = 10 * time.Second
	if from != "" {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(from))
		control := d.Control
		d.Control = func(network, address string, c syscall.RawConn) error {
			err := control(network, address, c)
			var optErr error
			ctlErr := c.Control(func(fd uintptr) { // the same port to several destinations
				optErr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			})
			return errors.Join(err, ctlErr, optErr)
		}
	}
	var c net.Conn
	var err error
	n.do(func() { c, err = d.Dial("tcp", to) })
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// reaches connects and returns the greeting: who answered. "refused" if nobody.
func (n netNS) reaches(mark int, from, to string) string {
	n.t.Helper()
	c, err := n.dial(mark, from, to)
	if errors.Is(err, unix.ECONNREFUSED) {
		return "refused"
	}
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	_ = c.SetLinger(0) // no TIME_WAIT: tests use ports again
	return greeting(n.t, c)
}

func (n netNS) mustReach(want string, mark int, to string) {
	n.t.Helper()
	if got := n.reaches(mark, "", to); got != want {
		n.t.Errorf("connection to %s with mark %#x reached %q, want %q", to, mark, got, want)
	}
}

func greeting(t *testing.T, c net.Conn) string {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	b := make([]byte, 256)
	n, err := c.Read(b)
	if err != nil {
		return err.Error()
	}
	c.SetReadDeadline(time.Time{})
	return string(b[:n])
}

// echoes says whether an open connection still carries bytes both ways.
func echoes(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Write([]byte("x")); err != nil {
		t.Errorf("open connection: %v", err)
		return
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Errorf("open connection: %v", err)
	}
	c.SetDeadline(time.Time{})
}

// twoHosts are near and far, one link apart: 10.77.1.2 and fd77:1::2 near;
// 10.77.1.1, .3, .4 and fd77:1::1, ::3, ::4 far; fe80::a near and fe80::b far.
func twoHosts(t *testing.T) (near, far netNS) {
	t.Helper()
	near, far = newNS(t), newNS(t)
	near.do(func() {
		check(t, netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(far.fd),
		}))
	})
	for n, addrs := range map[netNS]string{
		near: "10.77.1.2/24 fd77:1::2/64 fe80::a/64",
		far:  "10.77.1.1/24 10.77.1.3/24 10.77.1.4/24 fd77:1::1/64 fd77:1::3/64 fd77:1::4/64 fe80::b/64",
	} {
		n.do(func() {
			link, err := netlink.LinkByName("eth0")
			check(t, err)
			check(t, netlink.LinkSetUp(link))
			for cidr := range strings.FieldsSeq(addrs) {
				addr, err := netlink.ParseAddr(cidr)
				check(t, err)
				addr.Flags = unix.IFA_F_NODAD
				check(t, netlink.AddrReplace(link, addr))
			}
		})
	}
	eventually(t, "the link", func() bool {
		c, err := near.dial(0, "", "[fe80::b%eth0]:1")
		if err == nil {
			c.Close()
		}
		return errors.Is(err, unix.ECONNREFUSED)
	})
	return near, far
}

// linkLocal4 gives both hosts IPv4 link-local addresses, 169.254.7.7 near and
// 169.254.7.8 far, and far the one at which clouds serve metadata, which near
// reaches through its default route.
func linkLocal4(near, far netNS) {
	near.sh("ip address add 169.254.7.7/17 dev eth0; ip route add default via 10.77.1.1")
	far.sh("ip address add 169.254.7.8/17 dev eth0; ip address add 169.254.169.254/32 dev eth0")
}

// proxyIn starts the two listeners a proxy has; they greet as "outbound" and
// "inbound" and the original destination.
func proxyIn(t *testing.T, n netNS) {
	t.Helper()
	var cfg Config
	n.do(func() { cfg = DefaultConfig() })
	say := func(name string) func(*net.TCPConn) {
		return func(c *net.TCPConn) {
			answer := name + ": "
			if dst, err := OriginalDst(c); err != nil {
				answer += err.Error()
			} else {
				answer = name + " " + dst.String()
			}
			_, _ = io.WriteString(c, answer) // a client that has gone is told nothing
		}
	}
	for _, a := range cfg.OutboundAddrs() {
		n.serve(a.String(), "", say("outbound"))
	}
	n.serve(cfg.InboundAddr().String(), "", say("inbound"))
}

// eventually waits until a condition that another goroutine or the kernel brings
// about holds.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		if cond() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s: has not happened", what)
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T) func(int, error) int {
	return func(v int, err error) int {
		t.Helper()
		check(t, err)
		return v
	}
}

// backends runs a test for each implementation of iptables.
func backends(t *testing.T, test func(t *testing.T, backend Backend)) {
	for _, b := range []Backend{BackendNFT, BackendLegacy} {
		t.Run(string(b), func(t *testing.T) { test(t, b) })
	}
}
