package netlab_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/symbolon/symbolon/internal/netlab"
)

// crashEnv makes the test binary build a world, say so, and wait to be killed.
const crashEnv = "NETLAB_TEST_CRASH"

func TestMain(m *testing.M) {
	if os.Getenv(crashEnv) != "" {
		if err := crash(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// crash builds a world with a daemon and a plain process in it, prints the
// world's id and the processes, and never comes back.
func crash() error {
	w, err := netlab.New(netlab.Options{})
	if err != nil {
		return err
	}
	if _, err := w.MemoryDir(); err != nil {
		return err
	}
	n := w.TwoHosts()
	d, err := n.Server.Start(context.Background(), netlab.Service{
		Unit:    "orphan.service",
		Command: []string{"sh", "-c", "sleep 1000 & sleep 1000"},
	})
	if err != nil {
		return err
	}
	c := n.Client.Command(context.Background(), "sleep", "1000")
	if err := c.Start(); err != nil {
		return err
	}
	fmt.Println(w.ID(), d.Pid, c.Process.Pid)
	select {}
}

// traces lists the names that a world left.
func traces(t *testing.T, id string) []string {
	t.Helper()
	var found []string
	for _, dir := range []string{"/run/netns", "/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/dev/shm", os.TempDir()} {
		names, err := filepath.Glob(filepath.Join(dir, id+"*"))
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, names...)
	}
	return found
}

// running reports whether a process runs; a zombie does not.
func running(pid int) bool {
	stat, err := os.ReadFile(filepath.Join("/proc", itoa(pid), "stat"))
	if err != nil {
		return false
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(after, "Z")
}

func TestNewSweepsACrashedWorldAndNoOther(t *testing.T) {
	other := netlab.Test(t)
	sibling := other.Host("a")
	survivor, err := sibling.Start(t.Context(), netlab.Service{Unit: "survivor.service", Command: []string{"sleep", "1000"}})
	if err != nil {
		t.Fatal(err)
	}

	crashing := exec.Command("/proc/self/exe")
	crashing.Env = append(os.Environ(), crashEnv+"=1")
	crashing.Stderr = os.Stderr
	stdout, err := crashing.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := crashing.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("the crashing process ended by itself: %v, %v", err, crashing.Wait())
	}
	fields := strings.Fields(line)
	id := fields[0]
	// Looked at before the crash: afterwards, the New of any other test process on
	// this machine may be the one that sweeps.
	if n := len(traces(t, id)); n < 5 {
		t.Errorf("the world has %d names, want its three namespaces and its two directories at least", n)
	}
	for _, f := range fields[1:] {
		if pid, _ := strconv.Atoi(f); !running(pid) {
			t.Errorf("process %d of the world is not running", pid)
		}
	}
	if err := crashing.Process.Signal(syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	if err := crashing.Wait(); err == nil {
		t.Error("the crashing process ended by itself")
	}

	netlab.Test(t) // sweeps
	if left := traces(t, id); len(left) > 0 {
		t.Errorf("after the sweep there is %v", left)
	}
	for _, f := range fields[1:] {
		if pid, _ := strconv.Atoi(f); running(pid) {
			t.Errorf("process %d of the crashed world still runs", pid)
		}
	}
	if survivor.Ended() {
		t.Error("the sweep ended a process of a living world")
	}
	if _, err := sibling.Output(t.Context(), "true"); err != nil {
		t.Errorf("the sweep broke a living world: %v", err)
	}
}

func TestCloseRemovesEverything(t *testing.T) {
	netlab.Require(t)
	w, err := netlab.New(netlab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if dir, err := w.MemoryDir(); err != nil {
		t.Fatal(err)
	} else if err := os.WriteFile(filepath.Join(dir, "key"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n := w.TwoHosts()
	lan := w.Switch("lan")
	lan.Attach(n.Client, "192.0.2.1/24")
	// A daemon whose child changes its process group, and a command nobody waits for.
	d, err := n.Server.Start(t.Context(), netlab.Service{
		Unit:    "family.service",
		Command: []string{"sh", "-c", "setsid sleep 1000 & echo $!; wait"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for d.Log() == "" {
		time.Sleep(5 * time.Millisecond)
	}
	child, err := strconv.Atoi(strings.TrimSpace(d.Log()))
	if err != nil {
		t.Fatal(err)
	}
	forgotten := n.Client.Command(context.Background(), "sleep", "1000")
	forgotten.Unit = "forgotten.service"
	if err := forgotten.Start(); err != nil {
		t.Fatal(err)
	}
	if len(traces(t, w.ID())) < 6 {
		t.Errorf("a living world has only %v", traces(t, w.ID()))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for _, pid := range []int{d.Pid, child, forgotten.Process.Pid} {
		if running(pid) {
			t.Errorf("process %d still runs", pid)
		}
	}
	if err := forgotten.Wait(); err == nil {
		t.Error("the forgotten command ended well")
	}
	if left := traces(t, w.ID()); len(left) > 0 {
		t.Errorf("after Close there is %v", left)
	}
	if err := w.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if err := n.Client.Do(func() error { return nil }); err == nil {
		t.Error("a closed world's host can be entered")
	}
}

func TestWorldsLiveSideBySide(t *testing.T) {
	for i := range 4 {
		t.Run(itoa(i), func(t *testing.T) {
			t.Parallel()
			w := netlab.Test(t)
			n := w.TwoHosts() // the same names and addresses in each
			whoami(t, n.Server, ":7")
			if got := ask(t, n.Client, "10.2.0.2:7"); got != "10.1.0.2" {
				t.Errorf("server saw %s", got)
			}
		})
	}
}
