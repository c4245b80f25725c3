package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/symbolon/symbolon/internal/netlab"
)

// demoTools are what 'make demo' installs first.
var demoTools = []string{"curl", "psql", "nginx", "initdb", "haproxy", "iptables", "ipset", "tcpdump", "tshark"}

// What the demo promises to show. It computes each ✓ and fails where one does not
// hold; here it is that none was lost.
var demoShows = []string{
	`(?m)^1\. Without Symbolon$`,
	`✓ "TOP-SECRET-[0-9a-f]{12}" is in the capture, in the clear`,
	`✓ client, server and backend enforce generation \d+`,
	`(?m)^ +from +spiffe://acme\.example/acme/prod/report  \{app=report env=prod\}  10\.1\.0\.2:\d+$`,
	`(?m)^ +protection +encrypted: TLS 1\.3, TLS_AES_256_GCM_SHA384, key exchange X25519MLKEM768$`,
	`✓ both proxies recorded it: report to web, allowed by /acme/prod/report-reads-web, encrypted`,
	`✓ both proxies recorded it: analyst to db, allowed by /acme/prod/analyst-queries-db, encrypted`,
	`✓ denied by /acme/reports-never-touch-databases, and no byte passed`,
	`✓ explain, which asks without connecting, says the same`,
	`✓ the same program on the same host, but as user nobody it has no labels`,
	`✓ the addresses differ: 10\.1\.0\.2 here, the balancer's 10\.3\.0\.1 there`,
	`✓ identity and flow id are the same at both ends`,
	`denied, reason peer-unprotected`,
	`✓ nginx's \d+ bytes are in a TLS record of \d+; HAProxy forwarded that very record`,
	`✓ tshark agrees: [2-9] handshakes`,
	`✓ searched for and found nowhere: TOP-SECRET-[0-9a-f]{12}, .*SELECT.*spiffe://.*app=web`,
	`✓ the controller has 2 records of the connection through NAT and balancer`,
}

func demo(t *testing.T, stdout, stderr *bytes.Buffer) *exec.Cmd {
	t.Helper()
	netlab.Require(t, demoTools...)
	bin := os.Getenv("SYMBOLON_BIN")
	if bin == "" {
		bin = "../bin"
	}
	path := filepath.Join(bin, "symbolon-demo")
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("'make test' builds it first: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	c := exec.CommandContext(ctx, path)
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) } // it cleans up
	c.WaitDelay = time.Minute
	c.Stdout, c.Stderr = stdout, stderr
	return c
}

func TestDemo(t *testing.T) {
	var stdout, stderr bytes.Buffer
	c := demo(t, &stdout, &stderr)
	if err := c.Run(); err != nil {
		t.Fatalf("%v\n%s\n%s", err, stdout.String(), stderr.String())
	}
	for _, line := range demoShows {
		if !regexp.MustCompile(line).MatchString(stdout.String()) {
			t.Errorf("it does not show %s", line)
		}
	}
	if strings.Contains(stdout.String(), "\x1b") {
		t.Error("colours, though this is no terminal")
	}
	if t.Failed() {
		t.Log(stdout.String())
	}
	noDemoLeft(t, c.Process.Pid)
}

// An interrupt in the middle leaves nothing behind, either.
func TestDemoInterrupted(t *testing.T) {
	var stdout, stderr bytes.Buffer
	c := demo(t, &stdout, &stderr)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c.Stdout = w
	err = c.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	// Interrupted while the hosts join: rules, keys and daemons are half made.
	seen := make([]byte, 4096)
	for !strings.Contains(stdout.String(), "Each host joins") {
		n, err := r.Read(seen)
		if err != nil {
			t.Fatalf("it ended before the hosts joined: %v\n%s\n%s", err, stdout.String(), stderr.String())
		}
		stdout.Write(seen[:n])
	}
	if err := c.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_, _ = stdout.ReadFrom(r)
	exit := (*exec.ExitError)(nil)
	if err := c.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 130 {
		t.Errorf("%v, want exit code 130\n%s", err, stderr.String())
	}
	if got := stderr.String(); got != "symbolon-demo: interrupted\n" {
		t.Errorf("it says %q", got)
	}
	noDemoLeft(t, c.Process.Pid)
}

// noDemoLeft looks for what a world is called by: sl-<pid>-...
func noDemoLeft(t *testing.T, pid int) {
	t.Helper()
	world := fmt.Sprintf("sl-%d-", pid)
	for _, dir := range []string{"/run/netns/", os.TempDir() + "/", "/sys/fs/cgroup/", "/sys/fs/cgroup/unified/"} {
		left, err := filepath.Glob(dir + world + "*")
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range left {
			t.Errorf("left behind: %s", path)
		}
	}
	// The hosts' keys are in the kernel's keyring, under the path of a socket.
	if keys, err := os.ReadFile("/proc/keys"); err == nil && strings.Contains(string(keys), world) {
		t.Errorf("keys left behind:\n%s", keys)
	}
}
