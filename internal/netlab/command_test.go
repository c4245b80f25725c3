package netlab_test

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/symbolon/symbolon/internal/netlab"
)

func itoa(n int) string { return strconv.Itoa(n) }

func TestCommandRunsInTheHostsNetworkOnly(t *testing.T) {
	w := netlab.Test(t)
	h := w.Host("a")
	script := "readlink /proc/self/ns/net /proc/self/ns/mnt; ls -di /sys/fs/cgroup"
	here, err := w.Host("b").Command(t.Context(), "sh", "-c", script).Output()
	if err != nil {
		t.Fatal(err)
	}
	there, err := h.Output(t.Context(), "sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	a, b := strings.Fields(string(here)), strings.Fields(there)
	if a[0] == b[0] {
		t.Error("two hosts share a network namespace")
	}
	mnt, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	if b[1] != mnt {
		t.Errorf("mount namespace %s, want the machine's %s", b[1], mnt)
	}
	var st syscall.Stat_t
	if err := syscall.Stat("/sys/fs/cgroup", &st); err != nil {
		t.Fatal(err)
	}
	if want := strconv.FormatUint(st.Ino, 10); b[2] != want {
		t.Errorf("/sys/fs/cgroup is inode %s, want the machine's %s", b[2], want)
	}
}

func TestCommandHasItsCgroupFromTheStart(t *testing.T) {
	w := netlab.Test(t)
	h := w.Host("a")
	cmd := h.Command(t.Context(), "cat", "/proc/self/cgroup")
	cmd.Unit = "cat.service"
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if !w.HasCgroups() {
		t.Log("no cgroup v2 on this machine")
		return
	}
	if want := "/" + w.ID() + "/a/cat.service"; h.Cgroup("cat.service") != want {
		t.Errorf("Cgroup is %q, want %q", h.Cgroup("cat.service"), want)
	}
	if !strings.Contains("\n"+string(out), "\n0::"+h.Cgroup("cat.service")+"\n") {
		t.Errorf("cgroups\n%swant 0::%s", out, h.Cgroup("cat.service"))
	}
	cmd = h.Command(t.Context(), "true")
	cmd.Unit = "../../escape"
	if err := cmd.Run(); err == nil {
		t.Error("a unit name with slashes was taken")
	}
}

func TestCommandRunsAsAnotherUser(t *testing.T) {
	w := netlab.Test(t)
	h := w.Host("a")
	for user, want := range map[string]string{
		"":            "0:0",
		"nobody":      "65534:65534",
		"12345:54321": "12345:54321",
	} {
		cmd := h.Command(t.Context(), "sh", "-c", `echo "$(id -u):$(id -g)"`)
		cmd.User = user
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("user %q: %v", user, err)
		}
		if got := strings.TrimSpace(string(out)); got != want {
			t.Errorf("user %q runs as %s, want %s", user, got, want)
		}
	}
	cmd := h.Command(t.Context(), "true")
	cmd.User = "no-such-user"
	if err := cmd.Run(); err == nil {
		t.Error("an unknown user was taken")
	}
}

func TestRunTellsOutputAndExitCode(t *testing.T) {
	w := netlab.Test(t)
	h := w.Host("a")
	r, err := h.Run(t.Context(), "sh", "-c", "echo out; echo err >&2; exit 3")
	if want := (netlab.Result{Stdout: "out\n", Stderr: "err\n", ExitCode: 3}); err != nil || r != want {
		t.Errorf("got %+v, %v, want %+v", r, err, want)
	}
	if _, err := h.Output(t.Context(), "sh", "-c", "echo why >&2; exit 3"); err == nil || !strings.Contains(err.Error(), "why") {
		t.Errorf("Output's error does not tell why: %v", err)
	}
	if _, err := h.Run(t.Context(), "no-such-program"); err == nil || !strings.Contains(err.Error(), "apt-get install no-such-program") {
		t.Errorf("missing program: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if r, err := h.Run(ctx, "sleep", "1000"); err == nil {
		t.Errorf("a program that was killed at the deadline gave %+v and no error", r)
	}
}

func TestSysctlStaysInTheNamespace(t *testing.T) {
	const path = "/proc/sys/net/ipv4/tcp_migrate_req"
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	w := netlab.Test(t)
	h := w.Host("a")
	h.Sysctl("net.ipv4.tcp_migrate_req", "1")
	out, err := h.Output(t.Context(), "cat", path)
	if err != nil || strings.TrimSpace(out) != "1" {
		t.Errorf("host has %q, %v", out, err)
	}
	after, err := os.ReadFile(path)
	if err != nil || string(after) != string(before) {
		t.Errorf("the machine's value went from %q to %q, %v", before, after, err)
	}
}

func TestBuildingCallsKeepTheFirstFailure(t *testing.T) {
	netlab.Require(t)
	w, err := netlab.New(netlab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}()
	a := w.Host("a")
	a.Sysctl("kernel.hostname", "x") // the machine's, not a namespace's
	first := w.Err()
	if first == nil || !strings.Contains(first.Error(), "kernel.hostname") {
		t.Fatalf("Err is %v", first)
	}
	b := w.Host("b")
	w.Link(a, b, []string{"10.0.0.1/24"}, []string{"10.0.0.2/24"})
	b.DefaultRoute("10.0.0.1")
	w.Switch("lan").Attach(a)
	if !errors.Is(w.Err(), first) {
		t.Errorf("Err became %v", w.Err())
	}
	if _, err := b.Run(t.Context(), "true"); err == nil {
		t.Error("a broken world runs programs")
	}
	if _, err := b.Listen("tcp", ":0"); err == nil {
		t.Error("a broken world opens sockets")
	}
}

func TestNamesAreNotResolved(t *testing.T) {
	w := netlab.Test(t)
	h := w.Host("a")
	if _, err := h.Dial(t.Context(), "tcp", "localhost:80"); err == nil || !strings.Contains(err.Error(), "numeric") {
		t.Errorf("Dial by name: %v", err)
	}
}
