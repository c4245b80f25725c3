package netlab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// startTimeout bounds a daemon's start if the caller's context does not.
	startTimeout = 60 * time.Second
	// stopTimeout is how long a daemon may take to end before it is killed, if its
	// service does not say.
	stopTimeout = 5 * time.Second
)

// Service describes a daemon, much as a systemd unit does. It must stay in the
// foreground.
type Service struct {
	// Unit names the daemon, its log and its cgroup: "nginx.service".
	Unit string
	// Command is the program and its arguments.
	Command []string
	// User as in Cmd.
	User string
	// Env is the environment in the form of os.Environ; nil means our own.
	Env []string
	// Dir is the working directory; empty means the machine's root directory.
	Dir string
	// Ports are the TCP ports that must listen before Start returns.
	Ports []uint16
	// Ready, if set, is called again and again after the ports listen until it
	// returns nil. Its context ends when the start has taken too long.
	Ready func(context.Context) error
	// Stop is the signal that ends the daemon in order; 0 means SIGTERM.
	Stop syscall.Signal
	// StopTimeout is how long the daemon may take to end before Stop kills it; 0
	// means 5 s.
	StopTimeout time.Duration
	// SysProcAttr as in exec.Cmd; credentials and cgroup come from User and Unit.
	SysProcAttr *syscall.SysProcAttr
}

// Daemon is a running service. It is stopped when the world is closed.
type Daemon struct {
	Host *Host
	Unit string
	Pid  int
	// LogPath is the file that has its standard output and error, those of earlier
	// runs of the unit included.
	LogPath string

	cmd  *Cmd
	stop syscall.Signal
	wait time.Duration // from the stop signal to SIGKILL
	once sync.Once
	done chan struct{} // closed when the process is reaped and err is set
	err  error
}

// Start starts a daemon and waits until it listens and is ready. If it ends
// before, or ctx ends (60 s if it has no deadline), it is stopped, and the error
// carries the end of its log. The daemon outlives ctx.
func (h *Host) Start(ctx context.Context, s Service) (*Daemon, error) {
	d, err := h.start(ctx, s)
	if err != nil {
		return nil, fmt.Errorf("netlab: start %s on %s: %w", s.Unit, h.name, err)
	}
	return d, nil
}

func (h *Host) start(ctx context.Context, s Service) (*Daemon, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, startTimeout)
		defer cancel()
	}
	if err := h.world.Err(); err != nil {
		return nil, err
	}
	if len(s.Command) == 0 || s.Unit == "" || s.Unit != filepath.Base(s.Unit) {
		return nil, fmt.Errorf("service needs a command and a unit name: %q, %q", s.Command, s.Unit)
	}
	if other := h.daemon(s.Unit); other != nil {
		return nil, fmt.Errorf("unit is running already: process %d", other.Pid)
	}
	d, err := h.launch(s)
	if err != nil {
		return nil, err
	}
	if err := d.await(ctx, s); err != nil {
		log := d.Log()
		if len(log) > logTail {
			log = "..." + log[len(log)-logTail:]
		}
		return nil, errors.Join(fmt.Errorf("%w; its log:\n%s", err, strings.TrimSpace(log)), d.Stop())
	}
	return d, nil
}

// launch starts the process and the goroutine that reaps it.
func (h *Host) launch(s Service) (*Daemon, error) {
	dir, err := h.world.mkdir(h.name)
	if err != nil {
		return nil, err
	}
	d := &Daemon{
		Host:    h,
		Unit:    s.Unit,
		LogPath: filepath.Join(dir, s.Unit+".log"),
		stop:    s.Stop,
		wait:    s.StopTimeout,
		done:    make(chan struct{}),
	}
	if d.stop == 0 {
		d.stop = syscall.SIGTERM
	}
	if d.wait == 0 {
		d.wait = stopTimeout
	}
	log, err := os.OpenFile(d.LogPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	d.cmd = h.Command(context.Background(), s.Command[0], s.Command[1:]...)
	d.cmd.Unit, d.cmd.User, d.cmd.Env = s.Unit, s.User, s.Env
	attr := syscall.SysProcAttr{}
	if s.SysProcAttr != nil {
		attr = *s.SysProcAttr
	}
	// A Ctrl-C at the terminal is for us, who then stop the daemon in order.
	attr.Setpgid = true
	d.cmd.SysProcAttr = &attr
	d.cmd.Stdout, d.cmd.Stderr = log, log
	if d.cmd.Dir = s.Dir; d.cmd.Dir == "" {
		d.cmd.Dir = "/"
	}
	if err := d.cmd.start(); err != nil {
		return nil, err
	}
	d.Pid = d.cmd.Process.Pid
	go func() {
		defer close(d.done)
		d.err = d.cmd.Wait()
	}()
	h.world.mu.Lock()
	h.world.running = append(h.world.running, d)
	h.world.mu.Unlock()
	return d, nil
}

// await returns when the daemon listens and is ready.
func (d *Daemon) await(ctx context.Context, s Service) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-d.done:
			cancel(fmt.Errorf("ended before it was ready: %v", d.cmd.ProcessState))
		case <-ctx.Done():
		}
	}()
	for _, port := range s.Ports {
		if err := d.Host.WaitListen(ctx, "tcp", port); err != nil {
			return err
		}
	}
	if s.Ready == nil {
		return nil
	}
	for {
		err := s.Ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not ready: %w: %w", context.Cause(ctx), err)
		case <-time.After(pollInterval):
		}
	}
}

// daemon returns the running daemon of that unit, nil if there is none.
func (h *Host) daemon(unit string) *Daemon {
	h.world.mu.Lock()
	defer h.world.mu.Unlock()
	for _, d := range h.world.running {
		if d.Host == h && d.Unit == unit && !d.Ended() {
			return d
		}
	}
	return nil
}

// Done is closed when the daemon's main process has ended.
func (d *Daemon) Done() <-chan struct{} { return d.done }

// Ended reports whether the daemon's main process has ended.
func (d *Daemon) Ended() bool {
	select {
	case <-d.done:
		return true
	default:
		return false
	}
}

// Signal sends a signal to the daemon's main process.
func (d *Daemon) Signal(sig syscall.Signal) error { return d.cmd.Process.Signal(sig) }

// Stop ends the daemon with its stop signal, kills it if that takes longer than
// its StopTimeout, and removes its cgroup with all that is still in it, as systemd does. Its
// error says that it had to be killed, or ended with another exit code than 0
// (ending by the stop signal itself is in order). Stopping twice is harmless.
func (d *Daemon) Stop() (err error) {
	d.once.Do(func() {
		_ = d.Signal(d.stop) // may have ended already
		select {
		case <-d.done:
			if d.err != nil && !d.endedBy(d.stop) {
				err = fmt.Errorf("netlab: %s on %s: %w", d.Unit, d.Host.name, d.err)
			}
		case <-time.After(d.wait):
			err = fmt.Errorf("netlab: %s on %s: killed, it did not end within %v of %v", d.Unit, d.Host.name, d.wait, d.stop)
		}
		err = errors.Join(err, d.end())
	})
	return err
}

// endedBy reports whether the signal ended the daemon.
func (d *Daemon) endedBy(sig syscall.Signal) bool {
	status, ok := d.cmd.ProcessState.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == sig
}

// Kill kills the daemon's main process (SIGKILL), as a crash would, waits for it
// to be gone, and removes its cgroup with all that is still in it, as systemd does.
func (d *Daemon) Kill() (err error) {
	d.once.Do(func() { err = d.end() })
	return err
}

func (d *Daemon) end() error {
	_ = d.cmd.Process.Kill() // may have ended already
	<-d.done
	if d.Host.world.cgroups == nil {
		return nil
	}
	return removeCgroup(d.Host.cgroupDir(d.Unit))
}

// Log returns what the daemon wrote so far; an unreadable log reads as its error.
func (d *Daemon) Log() string {
	b, err := os.ReadFile(d.LogPath)
	if err != nil {
		return err.Error()
	}
	return string(b)
}
