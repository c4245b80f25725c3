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
	"syscall"
	"testing"

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
	err = c.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
		return exit.ExitCode(), nil
	}
	return 0, err
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
