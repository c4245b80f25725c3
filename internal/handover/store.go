package handover

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNoStore: this process was not started by a manager that it could talk to.
var ErrNoStore = errors.New("no service manager")

// Store is the service manager's side of a process: what it is told, and the
// descriptors that it keeps. The zero Store has no manager; its methods return
// ErrNoStore. Safe for concurrent use.
type Store struct{ socket string }

// ManagerStore is that of the manager that started this process (NOTIFY_SOCKET).
func ManagerStore() Store { return Store{os.Getenv("NOTIFY_SOCKET")} }

// Available tells whether there is a manager. Whether it keeps descriptors, it does
// not say: a unit without FileDescriptorStoreMax= closes what it gets.
func (s Store) Available() bool { return s.socket != "" }

// Notify tells the manager assignments of sd_notify(3), such as "READY=1".
func (s Store) Notify(assignments ...string) error { return s.send(assignments) }

// Put adds a descriptor under a name: 1 to 255 printable characters, no colon. It
// stays the caller's, too. The manager adds none that it has already.
func (s Store) Put(name string, fd int) error {
	// A listener is not readable in the sense of FDPOLL, and a memory file cannot be
	// polled: the manager shall not watch them.
	return s.send([]string{"FDSTORE=1", "FDNAME=" + name, "FDPOLL=0"}, fd)
}

// Remove closes all that the manager keeps under name.
func (s Store) Remove(name string) error {
	return s.send([]string{"FDSTOREREMOVE=1", "FDNAME=" + name})
}

func (s Store) send(assignments []string, fds ...int) error {
	if s.socket == "" {
		return ErrNoStore
	}
	// Not package net: it sends no descriptors over a connected datagram socket.
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("service manager: %w", os.NewSyscallError("socket", err))
	}
	defer unix.Close(fd)
	// A manager that does not read must not hold up the proxy for long.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: sendTimeout}); err != nil {
		return fmt.Errorf("service manager: %w", os.NewSyscallError("setsockopt SO_SNDTIMEO", err))
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	// A name that begins with @ is an abstract one, for x/sys as for systemd.
	err = unix.Sendmsg(fd, []byte(strings.Join(assignments, "\n")), rights, &unix.SockaddrUnix{Name: s.socket}, 0)
	if err != nil {
		return fmt.Errorf("service manager at %s: %w", s.socket, os.NewSyscallError("sendmsg", err))
	}
	return nil
}

// sendTimeout is in seconds.
const sendTimeout = 5
