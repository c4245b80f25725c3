package containerlab

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/symbolon/symbolon/internal/netlab"
)

// Podman is one that shares nothing with the machine's.
type Podman struct {
	t       testing.TB
	dir     string
	service service
}

// NewPodman needs root and the programs, or the test fails. Its service
// does not run yet.
func NewPodman(t testing.TB) *Podman {
	t.Helper()
	netlab.Require(t, "podman", "runc", "ldd")
	hold(t)
	dir, err := os.MkdirTemp("/run", "sl-podman-") // short, for sockets' paths
	if err != nil {
		t.Fatal(err)
	}
	p := &Podman{t: t, dir: dir}
	t.Cleanup(p.close)
	return p
}

// Args are those of the program that make it this one, before the others.
func (p *Podman) Args(args ...string) []string {
	return append([]string{
		"--root", p.dir + "/root", "--runroot", p.dir + "/run", "--tmpdir", p.dir + "/tmp", "--storage-driver", "vfs",
		// Without systemd; crun takes no machine that has both versions of cgroups.
		"--cgroup-manager", "cgroupfs", "--events-backend", "none", "--runtime", "runc",
	}, args...)
}

// RunArgs are those that start a container, before its own options and its image. The
// limits are its own, since raising the default ones takes a right that root may lack.
func (p *Podman) RunArgs(args ...string) []string {
	return p.Args(append([]string{"run", "--network", "host", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"}, args...)...)
}

// Must runs the program in the machine's own namespace, and returns what it says.
func (p *Podman) Must(args ...string) string {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), waitFor)
	defer cancel()
	var errs strings.Builder
	c := exec.CommandContext(ctx, "podman", args...)
	c.Stderr = &errs
	out, err := c.Output()
	if err != nil {
		p.t.Fatalf("podman %s: %v\n%s%s", strings.Join(args, " "), err, out, errs.String())
	}
	return strings.TrimSpace(string(out))
}

// Load makes an image.
func (p *Podman) Load(i Image) {
	p.t.Helper()
	file := filepath.Join(p.dir, "image.tar")
	if err := i.archive(file); err != nil {
		p.t.Fatal(err)
	}
	defer os.Remove(file)
	p.Must(p.Args("load", "--quiet", "--input", file)...)
}

// Digest is the image's, by Podman's own tongue.
func (p *Podman) Digest(image string) string {
	p.t.Helper()
	return p.Must(p.Args("image", "inspect", "--format", "{{.Digest}}", image)...)
}

// Socket is where the service listens, while it runs.
func (p *Podman) Socket() string { return p.dir + "/p.sock" }

// Serve starts the service.
func (p *Podman) Serve() {
	p.t.Helper()
	p.service.start(p.t, exec.Command("podman", p.Args("system", "service", "--time", "0", "unix://"+p.Socket())...))
	await(p.t, "podman's service", func() error { _, err := os.Stat(p.Socket()); return err })
}

// Stop ends the service. Containers stay as they are.
func (p *Podman) Stop() { p.service.stop(p.Socket()) }

// Signal is for the service: SIGSTOP, SIGCONT.
func (p *Podman) Signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.service.running.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

func (p *Podman) close() {
	p.Stop()
	ctx, cancel := context.WithTimeout(context.Background(), waitFor)
	defer cancel()
	if out, err := exec.CommandContext(ctx, "podman", p.Args("rm", "--all", "--force", "--time", "0")...).CombinedOutput(); err != nil {
		p.t.Errorf("containers stay: %v\n%s", err, out)
	}
	leave(p.t, p.dir)
}
