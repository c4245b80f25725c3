package handover

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Next is a process that was started to take over.
type Next struct {
	Control *Control

	cmd   *exec.Cmd
	ended chan struct{} // closed when err is set
	err   error
	once  sync.Once
}

// Spawn starts program with the arguments, environment and standard descriptors of
// this process, and passes it files under their names. They stay the caller's.
func Spawn(program string, files []*os.File) (*Next, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), controlName), os.NewFile(uintptr(pair[1]), controlName)
	defer ours.Close()
	defer theirs.Close()
	c, err := newControl(ours)
	if err != nil {
		return nil, err
	}
	n := &Next{Control: c, ended: make(chan struct{})}
	n.cmd = exec.Command(program, os.Args[1:]...)
	n.cmd.Args[0] = os.Args[0]
	n.cmd.Stdin, n.cmd.Stdout, n.cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	n.cmd.ExtraFiles = append(append([]*os.File(nil), files...), theirs)
	var names []string
	for _, f := range n.cmd.ExtraFiles {
		names = append(names, f.Name())
	}
	n.cmd.Env = append(os.Environ(),
		"LISTEN_FDS="+strconv.Itoa(len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"),
		parentEnv+"="+strconv.Itoa(os.Getpid()))
	if err := n.cmd.Start(); err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("start the next process: %w", err)
	}
	go func() {
		n.err = n.cmd.Wait()
		close(n.ended)
	}()
	return n, nil
}

// PID is its process number.
func (n *Next) PID() int { return n.cmd.Process.Pid }

// Ended is closed when the process has ended; Err then says how.
func (n *Next) Ended() <-chan struct{} { return n.ended }

// Err is how the process ended, after Ended; it is never nil then.
func (n *Next) Err() error {
	if n.err == nil {
		return errors.New("it ended by itself")
	}
	return n.err
}

// Kill ends the process, and returns when it is gone.
func (n *Next) Kill() {
	n.once.Do(func() {
		_ = n.cmd.Process.Kill() // may have ended
		<-n.ended
		_ = n.Control.Close()
	})
}
