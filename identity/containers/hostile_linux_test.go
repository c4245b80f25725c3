package containers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/symbolon/symbolon/identity"
)

var (
	asked   = strings.Repeat("ab", 32)
	other   = strings.Repeat("cd", 32)
	hex     = strings.Repeat("12", 32)
	digestN = func(n int) string { return fmt.Sprintf("sha256:%064x", n) }
)

// listenAt is a Unix socket at a short path.
func listenAt(t *testing.T) net.Listener {
	t.Helper()
	dir, err := os.MkdirTemp("", "sl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// serveDocker answers every question by one function.
func serveDocker(t *testing.T, h http.HandlerFunc) docker {
	t.Helper()
	l := listenAt(t)
	s := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	return docker{Socket{Docker, l.Addr().String()}}
}

// say answers as Docker does, /containers/ by one text and /images/ by another.
func say(container, image string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/images/") {
			_, _ = io.WriteString(w, image)
			return
		}
		_, _ = io.WriteString(w, container)
	}
}

func dockerSays(id, image string, pid int) string {
	return fmt.Sprintf(`{"Id":%q,"Name":"/web","Image":%q,"Config":{"Image":"web:1"},"State":{"Pid":%d}}`, id, image, pid)
}

func TestDockerAnswers(t *testing.T) {
	good := dockerSays(asked, "sha256:"+hex, 7)
	endless := func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, `{"Id":"`)
		junk := strings.Repeat("a", 1<<16)
		for r.Context().Err() == nil {
			if _, err := io.WriteString(w, junk); err != nil {
				return
			}
		}
	}
	for name, c := range map[string]struct {
		handler http.HandlerFunc
		err     error
	}{
		"a good one":               {say(good, `{"Id":"sha256:`+hex+`"}`), nil},
		"an image that is gone":    {say(dockerSays(asked, "", 7), `{}`), nil},
		"another container":        {say(dockerSays(other, "sha256:"+hex, 7), `{"Id":"sha256:`+hex+`"}`), errMalformed},
		"a container's short name": {say(dockerSays(asked[:12], "sha256:"+hex, 7), `{}`), errMalformed},
		"another image":            {say(good, `{"Id":"sha256:`+other+`"}`), errMalformed},
		"no process":               {say(dockerSays(asked, "sha256:"+hex, 0), `{}`), errNotYet},
		"a process below none":     {say(dockerSays(asked, "sha256:"+hex, -1), `{}`), errNotYet},
		"no such container":        {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) }, errUnknown},
		"an error":                 {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }, errMalformed},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://198.51.100.1/", http.StatusFound)
		}, errMalformed},
		"no JSON":           {say("<html>", ""), errMalformed},
		"an endless answer": {endless, errMalformed},
		"called compressed, which is not unpacked": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			say(good, `{"Id":"sha256:`+hex+`"}`)(w, r)
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			is, err := serveDocker(t, c.handler).ask(ctx, asked)
			if !errors.Is(err, c.err) || err == nil && is.pid != 7 {
				t.Errorf("%+v, %v; want %v", is, err, c.err)
			}
		})
	}
	t.Run("an endless header", func(t *testing.T) {
		l := listenAt(t)
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			for _, err = io.WriteString(c, "HTTP/1.1 200 OK\r\n"); err == nil; {
				_, err = io.WriteString(c, "X-A: "+strings.Repeat("a", 1000)+"\r\n")
			}
		}()
		if is, err := (docker{Socket{Docker, l.Addr().String()}}).ask(t.Context(), asked); err == nil {
			t.Errorf("%+v", is)
		}
	})
}

// fakeCRI is a runtime that says what a test wants, by the real protocol.
type fakeCRI struct {
	runtimev1.UnimplementedRuntimeServiceServer
	runtimev1.UnimplementedImageServiceServer
	status       func() (*runtimev1.ContainerStatusResponse, error)
	sandbox, ref string
}

func (f *fakeCRI) ContainerStatus(context.Context, *runtimev1.ContainerStatusRequest) (*runtimev1.ContainerStatusResponse, error) {
	return f.status()
}

func (f *fakeCRI) Version(context.Context, *runtimev1.VersionRequest) (*runtimev1.VersionResponse, error) {
	return &runtimev1.VersionResponse{RuntimeName: "fake"}, nil
}

func (f *fakeCRI) PodSandboxStatus(context.Context, *runtimev1.PodSandboxStatusRequest) (*runtimev1.PodSandboxStatusResponse, error) {
	return &runtimev1.PodSandboxStatusResponse{Status: &runtimev1.PodSandboxStatus{Id: f.sandbox, Metadata: &runtimev1.PodSandboxMetadata{Namespace: "prod", Name: "web-1"}}}, nil
}

func (f *fakeCRI) ImageStatus(context.Context, *runtimev1.ImageStatusRequest) (*runtimev1.ImageStatusResponse, error) {
	return &runtimev1.ImageStatusResponse{Image: &runtimev1.Image{Id: f.ref, RepoDigests: []string{"web@" + digestN(1)}}}, nil
}

func serveCRI(t *testing.T, f *fakeCRI) cri {
	t.Helper()
	l := listenAt(t)
	s := grpc.NewServer(grpc.MaxSendMsgSize(64 << 20))
	runtimev1.RegisterRuntimeServiceServer(s, f)
	runtimev1.RegisterImageServiceServer(s, f)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	return cri{Socket{CRI, l.Addr().String()}}
}

func criSays(id, info string) func() (*runtimev1.ContainerStatusResponse, error) {
	return func() (*runtimev1.ContainerStatusResponse, error) {
		return &runtimev1.ContainerStatusResponse{
			Status: &runtimev1.ContainerStatus{Id: id, Metadata: &runtimev1.ContainerMetadata{Name: "web"}, Image: &runtimev1.ImageSpec{Image: "web:1"}, ImageRef: "sha256:" + hex},
			Info:   map[string]string{"info": info},
		}, nil
	}
}

func TestCRIAnswers(t *testing.T) {
	good := fmt.Sprintf(`{"pid":7,"sandboxID":%q}`, other)
	ref := "sha256:" + hex
	for name, c := range map[string]struct {
		fake *fakeCRI
		err  error // nil: some other one
		ok   bool
	}{
		"a good one":         {&fakeCRI{status: criSays(asked, good), sandbox: other, ref: ref}, nil, true},
		"another container":  {&fakeCRI{status: criSays(other, good), sandbox: other, ref: ref}, errMalformed, false},
		"another pod":        {&fakeCRI{status: criSays(asked, good), sandbox: asked, ref: ref}, errMalformed, false},
		"another image":      {&fakeCRI{status: criSays(asked, good), sandbox: other, ref: "sha256:" + other}, errMalformed, false},
		"no process":         {&fakeCRI{status: criSays(asked, `{}`)}, errNotYet, false},
		"nothing verbose":    {&fakeCRI{status: criSays(asked, ``)}, errMalformed, false},
		"a process of words": {&fakeCRI{status: criSays(asked, `{"pid":"7"}`)}, errMalformed, false},
		"a giant answer":     {&fakeCRI{status: criSays(asked, good+strings.Repeat(" ", 4*maxAnswer)), sandbox: other, ref: ref}, nil, false},
		"no such container": {&fakeCRI{status: func() (*runtimev1.ContainerStatusResponse, error) {
			return nil, status.Error(codes.NotFound, "no")
		}}, errUnknown, false},
		"another service": {&fakeCRI{status: func() (*runtimev1.ContainerStatusResponse, error) {
			return nil, status.Error(codes.Unimplemented, "no")
		}}, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			is, err := serveCRI(t, c.fake).ask(ctx, asked)
			if (err == nil) != c.ok || c.err != nil && !errors.Is(err, c.err) {
				t.Fatalf("%+v, %v; want %v", is, err, c.err)
			}
			want := &container{pid: 7, name: "web", runtime: "fake", image: "web:1", imageID: ref, repoDigests: []string{"web@" + digestN(1)}, namespace: "prod", pod: "web-1"}
			if c.ok && !slices.Equal(is.attributes(), want.attributes()) {
				t.Errorf("%v, want %v", is.attributes(), want.attributes())
			}
		})
	}
}

// A runtime that drips its answer, and one that says nothing, hold up nobody for long,
// nor another runtime's containers.
func TestSlowRuntimes(t *testing.T) {
	var drips atomic.Int64
	drip := serveDocker(t, func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			drips.Add(1)
			_, _ = io.WriteString(w, " ")
			w.(http.Flusher).Flush()
			select {
			case <-r.Context().Done():
			case <-time.After(10 * time.Millisecond):
			}
		}
	})
	mute := listenAt(t)
	pid := sleepIn(t, "docker", asked)
	a := ask(t, drip.socket.String(), "cri:"+mute.Addr().String())
	expect(t, a.workload(t, pid), nothing)
	if drips.Load() == 0 {
		t.Error("it was not asked")
	}
	expect(t, a.workload(t, pid), map[string]string{"container.id": asked, "image.digest": ""})
	for _, socket := range []string{drip.socket.String(), "cri:" + mute.Addr().String()} {
		for deadline := time.Now().Add(30 * time.Second); a.status(t, socket).State == Unasked && time.Now().Before(deadline); {
			time.Sleep(20 * time.Millisecond)
		}
		a.is(t, socket, Unreachable, "")
	}

	n := 0
	if _, err := fmt.Sscan(pid, &n); err != nil {
		t.Fatal(err)
	}
	quick := serveDocker(t, say(dockerSays(asked, "sha256:"+hex, n), `{"Id":"sha256:`+hex+`","RepoDigests":["web@`+digestN(1)+`"]}`))
	b := ask(t, drip.socket.String(), "cri:"+mute.Addr().String(), quick.socket.String())
	expect(t, b.eventually(t, b.workload(t, pid), "image.digest", digestN(1)), map[string]string{"container.runtime": "docker"})
}

// A runtime that names any other process, be it one that runs or has ended.
func TestAnotherProcess(t *testing.T) {
	pid := sleepIn(t, "docker", asked)
	elsewhere := sleepIn(t, "docker", other)
	for name, n := range map[string]string{"another container's": elsewhere, "one of the host": fmt.Sprint(os.Getpid()), "systemd": "1", "nobody": "4194305"} {
		var p int
		if _, err := fmt.Sscan(n, &p); err != nil {
			t.Fatal(err)
		}
		d := serveDocker(t, say(dockerSays(asked, "sha256:"+hex, p), `{"Id":"sha256:`+hex+`","RepoDigests":["web@`+digestN(1)+`"]}`))
		t.Run(name, func(t *testing.T) { expect(t, ask(t, d.socket.String()).workload(t, pid), nothing) })
	}
}

// The socket of a user's own runtime: that could say anything.
func TestSomebodyElsesSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	listened := make(chan error)
	go func() {
		runtime.LockOSThread() // it is nobody's for good: not unlocked, so it ends
		const nobody = 65534
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
			listened <- errno
			return
		}
		listened <- syscall.Listen(fd, 5)
	}()
	if err := <-listened; err != nil {
		t.Fatal(err)
	}
	s := Socket{Docker, path}
	if _, err := s.dial(t.Context()); !errors.Is(err, ErrNotRoot) {
		t.Fatalf("%v", err)
	}
	if _, err := (docker{s}).ask(t.Context(), asked); !errors.Is(err, ErrNotRoot) {
		t.Errorf("docker: %v", err)
	}
	if _, err := (cri{s}).ask(t.Context(), asked); !errors.Is(err, ErrNotRoot) {
		t.Errorf("cri: %v", err)
	}
	a := ask(t, s.String())
	expect(t, a.workload(t, sleepIn(t, "docker", asked)), nothing)
	a.is(t, s.String(), Unreachable, "")
	if why := a.status(t, s.String()).Why; !strings.Contains(why, "not root's") {
		t.Errorf("unreachable by %q", why)
	}
}

func TestAttributesAreBounded(t *testing.T) {
	c := container{
		name: "a\x1b[31m", runtime: strings.Repeat("r", maxValue+1), image: "web:1", imageID: hex, namespace: "\xff", pod: "web-1",
	}
	for n := range 100 {
		c.repoDigests = append(c.repoDigests, "web@"+digestN(n), "web@sha256:short", "web")
	}
	got := c.attributes()
	want := identity.NewAttributes(map[string][]string{
		"image.name": {"web:1"}, "image.id": {"sha256:" + hex}, "k8s.pod": {"web-1"},
		"image.digest": {digestN(0), digestN(1), digestN(2), digestN(3), digestN(4), digestN(5), digestN(6), digestN(7)},
	})
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestParseSocket(t *testing.T) {
	for _, text := range Defaults() {
		if s, err := ParseSocket(text); err != nil || s.String() != text {
			t.Errorf("%s: %v, %v", text, s, err)
		}
	}
	for _, text := range []string{"", "/run/docker.sock", "docker:", "docker:docker.sock", "tcp:/run/a", "cri:/" + strings.Repeat("a", maxSocketPath)} {
		if s, err := ParseSocket(text); err == nil {
			t.Errorf("%q: %v", text, s)
		}
	}
}
