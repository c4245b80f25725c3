package handover

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

const (
	// controlName is the descriptor that only a process started by Spawn has.
	controlName = "handover"
	// parentEnv tells such a process who started it. It knows its own number only
	// after the fork, so it writes LISTEN_PID itself.
	parentEnv = "SYMBOLON_HANDOVER_PARENT"
)

// Inherited are the descriptors that came with the start of the process, by name.
type Inherited struct {
	// Control leads to the process that started this one by Spawn; nil: no process
	// did.
	Control *Control

	files map[string][]*os.File
}

// Inherit takes what was passed to this process. It must come before anything that
// opens descriptors or starts programs, and works once: the environment is cleaned.
func Inherit() (*Inherited, error) {
	parent, ours := os.LookupEnv(parentEnv)
	if ours {
		_ = os.Unsetenv(parentEnv)
		if parent != strconv.Itoa(os.Getppid()) {
			return nil, fmt.Errorf("%s names process %s, but %d started this one", parentEnv, parent, os.Getppid())
		}
		if err := os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid())); err != nil {
			return nil, err
		}
	}
	in := &Inherited{files: make(map[string][]*os.File)}
	for _, f := range activation.Files(true) {
		in.files[f.Name()] = append(in.files[f.Name()], f)
	}
	if !ours {
		return in, nil
	}
	f := in.Take(controlName)
	if f == nil {
		in.Close()
		return nil, errors.New("the process that started this one passed no socket to speak over")
	}
	defer f.Close()
	c, err := newControl(f)
	if err != nil {
		in.Close()
		return nil, err
	}
	in.Control = c
	return in, nil
}

// Take gives one descriptor of that name to the caller, who closes it; nil: there is
// none.
func (in *Inherited) Take(name string) *os.File {
	all := in.files[name]
	if len(all) == 0 {
		return nil
	}
	in.files[name] = all[1:]
	if len(all) == 1 {
		delete(in.files, name)
	}
	return all[0]
}

// TakeListener gives the listener of that name; nil: there is none. One that does
// not listen on TCP on exactly that address is an error, and closed. Options of the
// socket are as they were set when it was made, but not those that Go sets on
// accepted connections (net.ListenConfig.KeepAliveConfig).
func (in *Inherited) TakeListener(name, address string) (*net.TCPListener, error) {
	f := in.Take(name)
	if f == nil {
		return nil, nil
	}
	defer f.Close() // FileListener has its own
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("inherited %s: %w", name, err)
	}
	tcp, ok := l.(*net.TCPListener)
	if !ok || tcp.Addr().String() != address {
		_ = l.Close()
		return nil, fmt.Errorf("inherited %s: it is %s %s, want tcp %s", name, l.Addr().Network(), l.Addr(), address)
	}
	// FileListener takes a connection for a listener.
	var listens int
	if err := control(tcp, func(fd int) (err error) {
		listens, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
		return err
	}); err != nil || listens == 0 {
		_ = l.Close()
		return nil, fmt.Errorf("inherited %s: the socket does not listen (%w)", name, err)
	}
	return tcp, nil
}

// Names are those of the descriptors that were not taken.
func (in *Inherited) Names() []string {
	var names []string
	for name := range in.files {
		names = append(names, name)
	}
	return names
}

// Close closes what was not taken.
func (in *Inherited) Close() {
	for _, all := range in.files {
		for _, f := range all {
			_ = f.Close()
		}
	}
	clear(in.files)
}

// File is a listener's descriptor once more, to be passed on, under a name. The
// caller closes it. Unlike net.TCPListener.File's, its use leaves the listener as it
// is: the two share their mode, and one that blocks could not be closed while it
// accepts.
func File(l *net.TCPListener, name string) (*os.File, error) {
	var f *os.File
	err := control(l, func(fd int) error {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("fcntl", err)
		}
		f = os.NewFile(uintptr(dup), name)
		return nil
	})
	return f, err
}

// PutListener keeps a listener in the store.
func (s Store) PutListener(name string, l *net.TCPListener) error {
	if !s.Available() {
		return ErrNoStore
	}
	return control(l, func(fd int) error { return s.Put(name, fd) })
}

func control(l *net.TCPListener, f func(fd int) error) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}
