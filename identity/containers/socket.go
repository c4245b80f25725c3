package containers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// The protocols that runtimes speak.
const (
	// Docker is the Docker Engine API: Docker's, and Podman's compatible service.
	Docker = "docker"
	// CRI is Kubernetes' runtime.v1: containerd's, CRI-O's.
	CRI = "cri"
)

// maxSocketPath is what fits into sockaddr_un (unix(7)), bytes.
const maxSocketPath = 107

// Defaults are where distributions have the runtimes' sockets.
func Defaults() []string {
	return []string{
		"docker:/run/docker.sock", "docker:/run/podman/podman.sock",
		"cri:/run/containerd/containerd.sock", "cri:/run/crio/crio.sock", "cri:/run/k3s/containerd/containerd.sock",
	}
}

// Socket is where a runtime listens, and what it speaks.
type Socket struct{ Protocol, Path string }

func (s Socket) String() string { return s.Protocol + ":" + s.Path }

// ParseSocket reads protocol:path, such as "docker:/run/docker.sock".
func ParseSocket(text string) (Socket, error) {
	protocol, path, _ := strings.Cut(text, ":")
	s := Socket{protocol, path}
	if !slices.Contains([]string{Docker, CRI}, s.Protocol) || !filepath.IsAbs(s.Path) || len(s.Path) > maxSocketPath {
		return Socket{}, fmt.Errorf("%q is not %s: or %s: and an absolute path of at most %d bytes; such as %s",
			text, Docker, CRI, maxSocketPath, Defaults()[0])
	}
	return s, nil
}

// ErrNotRoot: a process of somebody else's listens. Whoever has the runtime could give
// any container any image.
var ErrNotRoot = errors.New("the socket is not root's")

// dial connects to the socket, if root listens there.
func (s Socket) dial(ctx context.Context) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", s.Path)
	if err != nil {
		return nil, err
	}
	uid, err := listener(conn.(*net.UnixConn))
	if err == nil && uid != 0 {
		err = fmt.Errorf("%w: user %d listens at %s", ErrNotRoot, uid, s.Path)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// listener is the user who called listen(2) at the other end (SO_PEERCRED, unix(7)).
func listener(c *net.UnixConn) (uid uint32, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var got error
	if err := raw.Control(func(fd uintptr) { cred, got = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if got != nil {
		return 0, os.NewSyscallError("getsockopt", got)
	}
	return cred.Uid, nil
}
