package netlab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// leakGrace is how long descriptors may take to close after Close: HTTP
// transports and runtime finalizers close theirs in the background.
const leakGrace = 3 * time.Second

// netnsCookie returns the kernel's number for the thread's network namespace,
// which each of its sockets carries; 0 before Linux 5.14.
func netnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if errors.Is(err, unix.ENOPROTOOPT) {
		return 0, nil
	}
	return cookie, err
}

// awaitNoLeaks returns what is left of a closed world after a grace period.
func (w *World) awaitNoLeaks() []string {
	deadline := time.Now().Add(w.grace)
	for {
		leaks := w.leaks()
		if len(leaks) == 0 || time.Now().After(deadline) {
			return leaks
		}
		time.Sleep(pollInterval)
	}
}

// leaks lists what is left of a closed world: names, processes, and threads and
// descriptors of our own, which keep a namespace alive without a name.
func (w *World) leaks() []string {
	var leaks []string
	found := func(format string, args ...any) { leaks = append(leaks, fmt.Sprintf(format, args...)) }

	dirs := []string{netnsDir, memoryDir, filepath.Dir(w.dir)}
	if w.cgroups != nil {
		dirs = append(dirs, w.cgroups.root)
	}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			found("%v", err)
		}
		for _, e := range entries {
			if id, _, ok := parseName(e.Name()); ok && id == w.id {
				found("%s", filepath.Join(dir, e.Name()))
			}
		}
	}

	namespaces := make(map[inode]bool)
	cookies := make(map[uint64]string)
	for _, h := range w.hosts {
		namespaces[h.inode] = true
		if h.cookie != 0 {
			cookies[h.cookie] = h.name
		}
	}
	pids, err := processesIn(namespaces)
	if err != nil {
		found("%v", err)
	}
	if len(pids) > 0 {
		found("processes %s", describe(pids))
	}
	threads, _ := filepath.Glob("/proc/self/task/*/ns/net")
	for _, path := range threads {
		if ns, err := inodeOf(path); err == nil && namespaces[ns] {
			found("thread of this process in a host: %s", path)
		}
	}
	return append(leaks, descriptorLeaks(namespaces, cookies)...)
}

// descriptorLeaks lists our own descriptors of the namespaces or of sockets in them.
func descriptorLeaks(namespaces map[inode]bool, cookies map[uint64]string) []string {
	var leaks []string
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return []string{err.Error()}
	}
	for _, e := range entries {
		path := "/proc/self/fd/" + e.Name()
		target, err := os.Readlink(path)
		if err != nil {
			continue // the descriptor of this very listing
		}
		switch {
		case strings.HasPrefix(target, "net:["):
			if ns, err := inodeOf(path); err == nil && namespaces[ns] {
				leaks = append(leaks, fmt.Sprintf("descriptor %s of a host's namespace", e.Name()))
			}
		case strings.HasPrefix(target, "socket:["):
			fd, err := strconv.Atoi(e.Name())
			if err != nil {
				continue
			}
			cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
			if err != nil {
				continue
			}
			if host, ok := cookies[cookie]; ok {
				leaks = append(leaks, fmt.Sprintf("open socket %s in host %s (%s)", e.Name(), host, endpoints(fd)))
			}
		}
	}
	return leaks
}

// endpoints describes a socket for whoever has to find where it was opened.
func endpoints(fd int) string {
	local, _ := unix.Getsockname(fd)
	peer, _ := unix.Getpeername(fd)
	return fmt.Sprintf("local %s, peer %s", endpoint(local), endpoint(peer))
}

func endpoint(sa unix.Sockaddr) string {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return fmt.Sprintf("%d.%d.%d.%d:%d", a.Addr[0], a.Addr[1], a.Addr[2], a.Addr[3], a.Port)
	case *unix.SockaddrInet6:
		return fmt.Sprintf("[%x]:%d", a.Addr, a.Port)
	default:
		return "none"
	}
}
