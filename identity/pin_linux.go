package identity

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrChanged: the process was attested as something else than it is now: it has
// executed its program anew, or has other users or groups.
var ErrChanged = errors.New("the process has changed")

// Pin is a workload's process (Key.Process), held so that no other one can take its
// number unseen. Safe for concurrent use; Close it.
type Pin struct {
	workload *Workload
	pidfd    *os.File
	ended    chan struct{}
	done     chan struct{}

	process *process
	was     standing
}

// standing is what a process is attested by, as far as it can change.
type standing struct {
	exe    FileID
	owners string // users and groups
	image  string // where its program lies in memory, which exec changes
}

// PinProcess holds w's process, if it still is what w was made of. Errors: ErrEnded,
// and those of the system (too many descriptors).
func PinProcess(w *Workload) (*Pin, error) {
	k := w.Key
	if k.Process.PID <= 0 {
		return nil, errors.New("the workload is no single process")
	}
	fd, err := unix.PidfdOpen(k.Process.PID, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, ErrEnded
	}
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	p := &Pin{
		workload: w, pidfd: os.NewFile(uintptr(fd), "pidfd"),
		ended: make(chan struct{}), done: make(chan struct{}),
	}
	// Both are of one process, if it was alive at the end: the pidfd says that.
	p.process, err = openProcess("/proc", k.Process.PID)
	if err == nil {
		if p.was, err = p.read(); err == nil {
			err = p.alive()
		}
	}
	if err != nil {
		if p.process != nil {
			p.process.close()
		}
		p.pidfd.Close()
		if errors.Is(err, errGone) {
			err = ErrEnded
		}
		return nil, err
	}
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		p.process.close()
		p.pidfd.Close()
		return nil, err
	}
	go p.wait(raw)
	return p, nil
}

// wait sees the process's end. It blocks no thread: a pidfd can be polled.
func (p *Pin) wait(raw syscall.RawConn) {
	defer close(p.done)
	err := raw.Read(func(fd uintptr) bool { return exited(int(fd)) })
	if err == nil {
		close(p.ended)
	}
}

func exited(pidfd int) bool {
	poll := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(poll, 0)
		if !errors.Is(err, unix.EINTR) {
			return err != nil || n > 0
		}
	}
}

func (p *Pin) alive() error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	gone := true
	if err := raw.Control(func(fd uintptr) { gone = exited(int(fd)) }); err != nil {
		return err
	}
	if gone {
		return ErrEnded
	}
	return nil
}

// Ended is closed when the process has ended.
func (p *Pin) Ended() <-chan struct{} { return p.ended }

// Close lets go of the process. Ended may stay open for ever.
func (p *Pin) Close() {
	p.pidfd.Close()
	<-p.done
	p.process.close()
}

// Check tells whether the process still is what it was when it was pinned. Errors:
// ErrEnded, also if it is not the workload any more; ErrChanged; those of reading.
func (p *Pin) Check() error {
	now, err := p.read()
	if errors.Is(err, errGone) {
		err = ErrEnded
	}
	if err != nil {
		return err
	}
	if err := p.alive(); err != nil {
		return err
	}
	switch {
	case now.owners != p.was.owners:
		return fmt.Errorf("%w: it has other users or groups", ErrChanged)
	case now.image != p.was.image:
		return fmt.Errorf("%w: it has executed its program anew", ErrChanged)
	}
	return nil
}

// read returns the process's standing. ErrEnded: it is not the workload any more.
func (p *Pin) read() (standing, error) {
	k := p.workload.Key
	start, image, err := p.process.image()
	if err != nil {
		return standing{}, err
	}
	if start != k.Process.Start {
		return standing{}, ErrEnded
	}
	s := standing{image: image}
	if s.owners, err = p.process.owners(); err != nil {
		return standing{}, err
	}
	// The uid of a process that has ended reads as 0, its program not at all.
	euid, err := p.process.euid()
	if err != nil {
		return standing{}, err
	}
	if s.exe, err = p.process.exe(); err != nil {
		return standing{}, err
	}
	if s.exe != k.Exe {
		return standing{}, fmt.Errorf("%w: it runs another program", ErrEnded)
	}
	// In a container users are its image's, and no part of the key.
	if len(p.workload.Attributes.Of("proc.uid")) > 0 && euid != k.UID {
		return standing{}, fmt.Errorf("%w: it runs as another user", ErrEnded)
	}
	return s, nil
}

// image is when the process began, and where its program and its stack lie in memory:
// fields 22 and 26 to 28 of stat. With address space randomization, which a process
// can do without, these differ from one exec to the next.
func (p *process) image() (start uint64, image string, err error) {
	b, err := p.read("stat")
	if err != nil {
		return 0, "", err
	}
	i := bytes.LastIndexByte(b, ')')
	f := strings.Fields(string(b[i+1:]))
	if i < 0 || len(f) < 26 {
		return 0, "", fmt.Errorf("malformed stat of process %d", p.pid)
	}
	start, err = strconv.ParseUint(f[19], 10, 64)
	return start, strings.Join(f[23:26], " "), err
}

// owners are the lines of the process's status about users and groups.
func (p *process) owners() (string, error) {
	b, err := p.read("status")
	if err != nil {
		return "", err
	}
	var out strings.Builder
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, "Uid:") || strings.HasPrefix(line, "Gid:") || strings.HasPrefix(line, "Groups:") {
			out.WriteString(line)
		}
	}
	return out.String(), nil
}
