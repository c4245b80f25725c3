package proxy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/internal/netlab"
	"github.com/symbolon/symbolon/redirect"
)

// The proxy dials, lists its addresses and loads rules in the namespace of its
// process. So the whole test process moves into the protected host: TestMain makes
// a world of two hosts and runs this binary again in one of them. The other has no
// proxy; what the tests open there, they open with inOther.
//
//	protected 10.1.0.2, fd00:1::2 -- 10.1.0.1, fd00:1::1 (and 10.1.0.3) other
const (
	protected4, protected6 = "10.1.0.2", "fd00:1::2"
	other4, other6         = "10.1.0.1", "fd00:1::1"
	// otherB is an address of the other host's that no External covers.
	otherB = "10.1.0.3"
)

// otherEnv holds the namespace of the other host, in the process that runs tests.
const otherEnv = "PROXY_TEST_OTHER_NETNS"

var otherNS int // a descriptor of the other host's namespace

func TestMain(m *testing.M) {
	ns := os.Getenv(otherEnv)
	if ns == "" {
		code, err := runInWorld()
		if err != nil {
			fmt.Fprintln(os.Stderr, "proxy:", err)
			code = 1
		}
		os.Exit(code)
	}
	if err := settle(ns); err != nil {
		fmt.Fprintln(os.Stderr, "proxy:", err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// runInWorld runs this binary's tests in the protected host.
func runInWorld() (code int, err error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("these tests make network namespaces: run them as root")
	}
	if missing := netlab.Missing("iptables", "ipset", "openssl", "nc"); len(missing) > 0 {
		return 1, fmt.Errorf("install %v", missing)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGQUIT)
	defer stop()
	w, err := netlab.New(netlab.Options{})
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	protected, other := w.Host("protected"), w.Host("other")
	w.Link(protected, other, []string{protected4 + "/24", protected6 + "/64"}, []string{other4 + "/24", otherB + "/24", other6 + "/64"})
	if err := w.Err(); err != nil {
		return 1, err
	}
	exe, err := os.Executable()
	if err != nil {
		return 1, err
	}
	if exe, err = filepath.EvalSymlinks(exe); err != nil {
		return 1, err
	}
	c := protected.Command(ctx, exe, os.Args[1:]...)
	c.Env = append(os.Environ(), otherEnv+"="+other.NetnsPath())
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	place, leave, err := ownCgroup()
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, leave()) }()
	if place != nil {
		c.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(place.Fd())}
	}
	err = c.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// ownCgroup makes a cgroup for the process that runs the tests, as a unit has one: what
// is known of a program without a cgroup has to be asked for again each time. nil: the
// machine has none to make.
func ownCgroup() (place *os.File, leave func() error, err error) {
	mount, err := cgroupMount()
	if err != nil {
		return nil, func() error { return nil }, nil //nolint:nilerr // it goes without
	}
	dir := filepath.Join(mount, fmt.Sprintf("sl-proxy-%d.service", os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, nil, err
	}
	leave = func() error {
		_ = place.Close()
		for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
			if err := os.Remove(dir); err == nil || time.Now().After(end) {
				return err
			}
		}
	}
	if place, err = os.Open(dir); err != nil {
		return nil, nil, errors.Join(err, os.Remove(dir))
	}
	return place, leave, nil
}

// cgroupMount is where cgroup v2 is.
func cgroupMount() (string, error) {
	all, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(all)) {
		before, after, _ := strings.Cut(line, " - ")
		if f := strings.Fields(before); strings.HasPrefix(after, "cgroup2 ") && f[3] == "/" {
			return f[4], nil
		}
	}
	return "", errors.New("cgroup v2 is not mounted")
}

// settle prepares the process that runs the tests: rules as on any protected host.
func settle(ns string) (err error) {
	if otherNS, err = unix.Open(ns, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("namespace of the other host: %w", err)
	}
	rules, err := redirect.NewRules(redirect.DefaultConfig())
	if err != nil {
		return err
	}
	return rules.Install(context.Background())
}

// inOther runs f in the other host's namespace; sockets and programs that f makes
// stay there. Goroutines do not.
func inOther(f func() error) error {
	done := make(chan error, 1)
	go func() {
		// Not unlocked on failure: the thread then ends with the goroutine.
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			done <- err
			return
		}
		defer unix.Close(home)
		if err := unix.Setns(otherNS, unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		err = f()
		if back := unix.Setns(home, unix.CLONE_NEWNET); back != nil {
			done <- errors.Join(err, back)
			return
		}
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}
