package containers

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/internal/containerlab"
)

var sleeper = containerlab.Image{Name: "example.org/sleeper:1", Programs: []string{"/bin/sleep"}, Entrypoint: []string{"/bin/sleep", "3600"}}

// asking is a resolver that asks the runtimes at sockets, as the proxy does.
type asking struct {
	*identity.Resolver
	book    *Containers
	changes atomic.Int64
}

func ask(t *testing.T, sockets ...string) *asking {
	t.Helper()
	r, err := identity.NewResolver()
	if err != nil {
		t.Fatal(err)
	}
	a := &asking{Resolver: r}
	a.book = book(t, a, sockets...)
	a.SetContainers(a.book)
	return a
}

// status is what is said of the runtime at a socket.
func (a *asking) status(t *testing.T, socket string) Status {
	t.Helper()
	for _, s := range a.book.Status() {
		if s.Socket == socket {
			return s
		}
	}
	t.Fatalf("%s is not in the status", socket)
	return Status{}
}

func (a *asking) is(t *testing.T, socket string, state State, name string) {
	t.Helper()
	s := a.status(t, socket)
	if s.State != state || s.Name != name || (s.Why == "") != (state == Unasked || state == Reachable) || s.Asked.IsZero() != (state == Unasked) {
		t.Errorf("%+v, want %s, named %q", s, state, name)
	}
}

func book(t *testing.T, a *asking, sockets ...string) *Containers {
	t.Helper()
	var parsed []Socket
	for _, text := range sockets {
		s, err := ParseSocket(text)
		if err != nil {
			t.Fatal(err)
		}
		parsed = append(parsed, s)
	}
	c := New(Options{Sockets: parsed, Changed: func() { a.changes.Add(1) }, recheck: time.Second})
	t.Cleanup(c.Close)
	return c
}

// workload is whose a process is.
func (a *asking) workload(t *testing.T, pid string) *identity.Workload {
	t.Helper()
	n, err := strconv.Atoi(pid)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	w, err := a.Process(ctx, n)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func expect(t *testing.T, w *identity.Workload, want map[string]string) {
	t.Helper()
	for key, value := range want {
		if got := w.Attributes.Get(key); got != value {
			t.Errorf("%s: %q, want %q", key, got, value)
		}
	}
}

// eventually waits until the workload is as it should be by now.
func (a *asking) eventually(t *testing.T, w *identity.Workload, key, value string) *identity.Workload {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		now := a.Refresh(w)
		if now.Attributes.Get(key) == value {
			return now
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %q, want %q", key, now.Attributes.Get(key), value)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// nothing is what is known of a container that no runtime has spoken of.
var nothing = map[string]string{"image.digest": "", "image.id": "", "image.name": "", "container.name": "", "container.runtime": ""}

func TestPodman(t *testing.T) {
	p := containerlab.NewPodman(t)
	p.Load(sleeper)
	run := func(name string) (id, pid string) {
		id = p.Must(p.RunArgs("--detach", "--name", name, "--label", "app=admin", sleeper.Name)...)
		return id, p.Must(p.Args("inspect", "--format", "{{.State.Pid}}", id)...)
	}
	p.Serve()
	webID, web := run("web")
	socket := "docker:" + p.Socket()
	a := ask(t, "docker:/run/no-such.sock", socket)
	a.is(t, socket, Unasked, "")

	// On a busy machine the answer may come after the workload.
	w := a.eventually(t, a.workload(t, web), "container.name", "web")
	about := map[string]string{
		"container.id": webID, "container.name": "web", "container.runtime": "podman", "image.name": sleeper.Name, "image.digest": p.Digest(sleeper.Name),
		"image.id": "sha256:" + p.Must(p.Args("image", "inspect", "--format", "{{.Id}}", sleeper.Name)...), "app": "", "os.user": "",
	}
	expect(t, w, about)
	a.is(t, socket, Reachable, "podman")
	a.is(t, "docker:/run/no-such.sock", Absent, "")
	if again := a.workload(t, web); again.Key != w.Key || again != a.workload(t, web) {
		t.Error("the same container is another workload")
	}

	t.Run("a container's own word", func(t *testing.T) {
		for key := range w.Attributes.Keys() {
			source, _, dotted := strings.Cut(key, ".")
			if !dotted || source == "container" && strings.Contains(key, "label") {
				t.Errorf("%s: whoever starts a container names it so", key)
			}
		}
	})
	t.Run("per process", func(t *testing.T) { // as with identity.source: spire
		r, err := identity.NewProcessResolver()
		if err != nil {
			t.Fatal(err)
		}
		b := &asking{Resolver: r}
		b.SetContainers(book(t, b, "docker:"+p.Socket()))
		expect(t, b.eventually(t, b.workload(t, web), "container.name", "web"), about)
	})
	t.Run("another cgroup of that name", func(t *testing.T) {
		pid := sleepIn(t, "docker", webID)
		v := a.workload(t, pid)
		expect(t, v, nothing)
		expect(t, v, map[string]string{"container.id": webID, "proc.cgroup": "/docker/" + webID})
		expect(t, a.workload(t, web), about)
	})
	t.Run("another cgroup, with the real one away", func(t *testing.T) {
		// Asked for as that other container only: nothing is taken over from the real one.
		b := ask(t, "docker:"+p.Socket())
		expect(t, b.workload(t, sleepIn(t, "docker", webID)), nothing)
	})
	t.Run("renamed", func(t *testing.T) {
		before := a.changes.Load()
		p.Must(p.Args("rename", "web", "web2")...)
		a.eventually(t, w, "container.name", "web2")
		if a.changes.Load() == before {
			t.Error("nobody heard")
		}
		p.Must(p.Args("rename", "web2", "web")...)
		a.eventually(t, w, "container.name", "web")
	})
	t.Run("the service is away", func(t *testing.T) {
		p.Stop()
		_, late := run("late")
		l := a.workload(t, late)
		expect(t, l, nothing)
		a.is(t, socket, Absent, "podman")
		expect(t, a.workload(t, web), about) // what is known stays
		before := a.changes.Load()
		p.Serve()
		a.eventually(t, l, "container.name", "late")
		expect(t, a.workload(t, late), map[string]string{"image.digest": about["image.digest"]})
		if a.changes.Load() == before {
			t.Error("nobody heard")
		}
	})
	t.Run("the service hangs", func(t *testing.T) {
		_, mute := run("mute")
		p.Signal(syscall.SIGSTOP)
		began := time.Now()
		m := a.workload(t, mute)
		if took := time.Since(began); took > 10*firstWait {
			t.Errorf("a connection waited for %v", took)
		}
		expect(t, m, nothing)
		expect(t, a.workload(t, web), about)
		p.Signal(syscall.SIGCONT)
		a.eventually(t, m, "container.name", "mute")
		a.is(t, socket, Reachable, "podman")
	})
	t.Run("removed", func(t *testing.T) {
		p.Must(p.Args("rm", "--force", "--time", "0", "web")...)
		a.eventually(t, w, "image.digest", "")
	})
}

// removeCgroup waits for the kernel, which lets go of ended processes a little later.
func removeCgroup(t *testing.T, dir string) {
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := syscall.Rmdir(dir)
		if err == nil || errors.Is(err, syscall.ENOENT) {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("cgroup %s stays: %v", dir, err)
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// sleepIn starts a process in a new cgroup of any name, and returns its number.
func sleepIn(t *testing.T, parts ...string) (pid string) {
	t.Helper()
	mount := "/sys/fs/cgroup"
	if _, err := os.Stat(mount + "/unified/cgroup.procs"); err == nil {
		mount += "/unified"
	}
	dir := mount
	for _, part := range parts {
		dir = filepath.Join(dir, part)
		if err := os.Mkdir(dir, 0o755); err == nil {
			made := dir
			t.Cleanup(func() { removeCgroup(t, made) })
		} else if !os.IsExist(err) {
			t.Fatal(err)
		}
	}
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c := exec.Command("/bin/sleep", "3600")
	c.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(f.Fd()), Pdeathsig: syscall.SIGKILL}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Process.Kill()
		_ = c.Wait()
	})
	return strconv.Itoa(c.Process.Pid)
}
