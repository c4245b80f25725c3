package redirect

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func init() { helpers["proxy"] = actAsProxy }

// actAsProxy does what its standard arguments say, in the cgroup and namespace it
// was started in, as one process with one Rules.
func actAsProxy() {
	fail := func(err error) {
		if err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
	}
	ctx := context.Background()
	r, err := NewRules(config(Backend(os.Args[1])))
	fail(err)
	for _, step := range os.Args[2:] {
		verb, args, _ := strings.Cut(step, " ")
		switch verb {
		case "install":
			fail(r.Install(ctx))
		case "repair":
			fail(r.Repair(ctx))
		case "verify":
			drift, err := r.Verify(ctx)
			fail(err)
			fmt.Printf("%d drifts\n", len(drift))
		case "warnings":
			fmt.Println(strings.Join(r.Warnings(), "\n"))
		case "enter":
			fail(os.WriteFile(filepath.Join(args, "cgroup.procs"), []byte("0"), 0))
		case "dial":
			words := strings.Fields(args) // mark, destination, and perhaps the source
			m, err := strconv.ParseInt(words[0], 0, 32)
			fail(err)
			d := Dialer(int(m), DefaultKeepAlive)
			if len(words) > 2 {
				d.LocalAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(words[2]))
			}
			d.Timeout = 10 * time.Second
			c, err := d.Dial("tcp", words[1])
			if errors.Is(err, unix.ECONNREFUSED) {
				fmt.Println("refused")
				continue
			}
			fail(err)
			b := make([]byte, 256)
			n, err := c.Read(b)
			fail(err)
			fmt.Println(string(b[:n]))
			if len(words) > 2 { // let it be reset: see obey
				_, err := c.Write([]byte("r"))
				fail(err)
				_, err = c.Read(b)
				fmt.Println(errors.Is(err, unix.ECONNRESET))
			}
			c.Close()
		}
	}
}

// proxyInCgroup runs actAsProxy in a cgroup from its first instruction, as systemd
// starts a service, and returns what it printed.
func (n netNS) proxyInCgroup(dir string, b Backend, steps ...string) string {
	n.t.Helper()
	fd := must(n.t)(unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0))
	defer unix.Close(fd)
	cmd := exec.Command(os.Args[0], append([]string{string(b)}, steps...)...)
	cmd.Env = append(os.Environ(), "REDIRECT_TEST_HELPER=proxy")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: fd}
	var out []byte
	var err error
	n.do(func() { out, err = cmd.CombinedOutput() })
	if err != nil {
		n.t.Fatalf("%q: %v\n%s", steps, err, out)
	}
	return string(out)
}

func sibling(t *testing.T, dir, name string) string {
	t.Helper()
	other := filepath.Join(filepath.Dir(dir), name)
	check(t, os.Mkdir(other, 0o755))
	t.Cleanup(func() { removeCgroup(t, other) })
	return other
}

// removeCgroup waits for the kernel, to which a process that has just been waited
// for may still be in its cgroup.
func removeCgroup(t *testing.T, dir string) {
	t.Helper()
	eventually(t, "removal of "+dir, func() bool { return os.Remove(dir) == nil })
}

// CAP_NET_RAW, which containers have, is enough to set the proxy's mark. Without the
// proxy's cgroup it opens nothing.
func TestForgedMarkDoesNotBypass(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		far.serve("[::]:8080", "far app", nil)
		near.serve("[::]:8080", "near app", nil)
		proxyIn(t, near)
		dir, _ := newCgroup(t)
		if got := near.proxyInCgroup(dir, b, "install", "warnings", "verify"); got != "\n0 drifts\n" {
			t.Fatalf("install, warnings, verify: %q", got)
		}
		other := sibling(t, dir, "container.scope")
		var dials, want, forged []string
		for _, leg := range []struct {
			mark        int
			to, reaches string
		}{
			{MarkTunnel, "10.77.1.1:8080", "far app"},
			{MarkTunnel, "[fd77:1::1]:8080", "far app"},
			{MarkTunnel, "[fe80::b%eth0]:8080", "far app"},
			{MarkTunnel, "10.77.1.2:8080", "inbound 10.77.1.2:8080"},
			{MarkTunnel, "[::1]:8080", "inbound [::1]:8080"},
			{MarkApp, "127.0.0.1:8080", "near app"},
			{MarkApp, "[fd77:1::2]:8080", "near app"},
			{MarkControl, "10.77.1.1:8080", "far app"},
			{MarkControl, "10.77.1.2:8080", "near app"},
		} {
			dials, want = append(dials, fmt.Sprintf("dial %#x %s", leg.mark, leg.to)), append(want, leg.reaches)
			caught := "outbound " + leg.to
			if strings.HasPrefix(leg.to, "[fe80") {
				caught = "refused"
			}
			forged = append(forged, caught)
			near.mustReach(caught, leg.mark, leg.to) // from the test's own cgroup
		}
		for cgroup, want := range map[string][]string{dir: want, other: forged} {
			got := strings.Split(strings.TrimSpace(near.proxyInCgroup(cgroup, b, dials...)), "\n")
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%q from %s:\n%s", dials, cgroup, diff)
			}
		}
		// The guard by itself stops a forged mark too.
		near.sh("iptables-" + string(b) + " -t nat -F SYMBOLON_OUT; ip6tables-" + string(b) + " -t nat -F SYMBOLON_OUT")
		for _, to := range []string{"10.77.1.1:8080", "[fd77:1::1]:8080", "127.0.0.1:8080", "[fe80::b%eth0]:8080"} {
			near.mustReach("refused", MarkApp, to)
		}
	})
}

// A match holds the cgroup that had the path when it was loaded. What systemd makes
// anew for a restarted unit is another one: Verify says so, Install mends it.
func TestCgroupMadeAnewIsDrift(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		far.serve("[::]:8080", "far app", nil)
		proxyIn(t, near)
		dir, _ := newCgroup(t)
		const dial = "dial 0x4d0001 10.77.1.1:8080"
		near.proxyInCgroup(dir, b, "install")
		if got := near.proxyInCgroup(dir, b, "verify"); got != "0 drifts\n" {
			t.Errorf("the next process in the same cgroup: %q", got)
		}
		removeCgroup(t, dir)
		check(t, os.Mkdir(dir, 0o755))
		// All rules with the match: three of SYMBOLON_OUT and one of SYMBOLON_GOUT, for
		// either family.
		got := near.proxyInCgroup(dir, b, "verify", dial, "install", "verify", dial)
		if want := "8 drifts\noutbound 10.77.1.1:8080\n0 drifts\nfar app\n"; got != want {
			t.Errorf("in the cgroup made anew: %q, want %q", got, want)
		}
	})
}

// A proxy that is moved to another cgroup while it runs is told by Verify, and the
// next Repair follows it.
func TestMovedProxyIsDrift(t *testing.T) {
	near, far := twoHosts(t)
	far.serve("[::]:8080", "far app", nil)
	proxyIn(t, near)
	dir, _ := newCgroup(t)
	other := sibling(t, dir, `it's "other" \x2d.service`)
	const dial = "dial 0x4d0001 10.77.1.1:8080"
	got := near.proxyInCgroup(dir, BackendDefault, "install", "verify", "enter "+other, "verify", "verify", "repair", "verify", dial)
	if want := "0 drifts\n8 drifts\n8 drifts\n0 drifts\nfar app\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// Where the cgroup says nothing, the mark must do, and the operator is told.
func TestRootCgroupIsToldByMarkAndWarns(t *testing.T) {
	near, far := twoHosts(t)
	far.serve("[::]:8080", "far app", nil)
	c, err := OpenCgroups()
	check(t, err)
	defer c.Close()
	got := near.proxyInCgroup(c.mount, BackendDefault, "install", "warnings", "verify", "dial 0x4d0001 10.77.1.1:8080")
	for _, part := range []string{"root cgroup", "CAP_NET_RAW", "run it as a service", "\n0 drifts\nfar app\n"} {
		if !strings.Contains(got, part) {
			t.Errorf("%q lacks %q", got, part)
		}
	}
}

// A namespace whose loopback interface is down yet is no obstacle.
func TestSocketCgroupWithLoopbackDown(t *testing.T) {
	n := newNS(t)
	n.sh("ip link set lo down")
	n.do(func() {
		list, err := os.ReadFile("/proc/self/cgroup")
		check(t, err)
		path, ok := cgroup2Path(string(list))
		id, err := newSocketCgroup()
		check(t, err)
		if got, err := cgroupPath(id); err != nil || !ok || got != path {
			t.Errorf("cgroup %d is %q, %v; want %q", id, got, err, path)
		}
	})
}

func TestCgroup2Path(t *testing.T) {
	type answer struct {
		Path string
		OK   bool
	}
	for list, want := range map[string]answer{
		"":                                 {},
		"4:memory:/a\n1:name=systemd:/b\n": {},
		"0::/system.slice/symbolon-proxy.service\n": {"/system.slice/symbolon-proxy.service", true},
		"9:name=systemd:/a\n0::/b c\n":              {"/b c", true},
		"10::/a\n":                                  {},
		"0::/":                                      {"/", true},
		"1:x0::/a:/\n0::/b:0::/c\n":                 {"/b:0::/c", true},
	} {
		var got answer
		if got.Path, got.OK = cgroup2Path(list); !cmp.Equal(got, want) {
			t.Errorf("%q: %+v, want %+v", list, got, want)
		}
	}
}
