package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"syscall"
)

// Cmd is an exec.Cmd that starts in a host. Only the network namespace is
// entered: files and /sys/fs/cgroup stay the machine's ("ip netns exec" would
// remount /sys and hide the cgroups). Set the fields before Start.
type Cmd struct {
	*exec.Cmd
	// Unit names a cgroup of the host, such as "nginx.service"; the program is in
	// it from its first instruction. Empty, or on a machine without cgroup v2, it
	// runs in the calling process's cgroup.
	Unit string
	// User runs the program as a user of the machine, by name, with that user's
	// groups; or by number, "uid:gid", with no other groups. Empty means root.
	User string

	host *Host
	err  error
}

// Command returns a command that is killed when ctx is done, as
// exec.CommandContext's is, and in any case when the world is closed.
func (h *Host) Command(ctx context.Context, name string, args ...string) *Cmd {
	path, err := Tool(name)
	if err != nil {
		path = name
	}
	c := exec.CommandContext(ctx, path, args...)
	c.WaitDelay = stopTimeout // a child of the killed program may hold its output open
	return &Cmd{Cmd: c, host: h, err: err}
}

// Start starts the program in the host.
func (c *Cmd) Start() error {
	if err := c.start(); err != nil {
		return fmt.Errorf("netlab: start %s on %s: %w", c.Args[0], c.host.name, err)
	}
	return nil
}

func (c *Cmd) start() error {
	if c.err != nil {
		return c.err
	}
	attr := syscall.SysProcAttr{}
	if c.SysProcAttr != nil {
		attr = *c.SysProcAttr
	}
	if c.User != "" {
		cred, err := credential(c.User)
		if err != nil {
			return err
		}
		attr.Credential = cred
	}
	if c.Unit != "" && c.host.world.cgroups != nil {
		dir, err := c.host.openCgroup(c.Unit)
		if err != nil {
			return err
		}
		defer dir.Close()
		attr.UseCgroupFD, attr.CgroupFD = true, int(dir.Fd())
	}
	c.SysProcAttr = &attr
	// The child inherits the namespace of the thread that forks it.
	return c.host.Do(c.Cmd.Start)
}

// Run starts the program and waits for it.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output runs the program and returns its standard output. A failure's error
// carries what it wrote to standard error.
func (c *Cmd) Output() ([]byte, error) {
	var stdout, stderr bytes.Buffer
	if c.Stdout != nil {
		return nil, errors.New("netlab: Stdout already set")
	}
	c.Stdout = &stdout
	if c.Stderr == nil {
		c.Stderr = &stderr
	}
	err := c.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = fmt.Errorf("netlab: %s on %s: %w: %s", strings.Join(c.Args, " "), c.host.name, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.Bytes(), err
}

// CombinedOutput runs the program and returns its output and errors, mixed.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	var both bytes.Buffer
	if c.Stdout != nil || c.Stderr != nil {
		return nil, errors.New("netlab: Stdout or Stderr already set")
	}
	c.Stdout, c.Stderr = &both, &both
	err := c.Run()
	return both.Bytes(), err
}

// Result is what a finished program leaves.
type Result struct {
	Stdout, Stderr string
	ExitCode       int // -1 if a signal ended it
}

// Run runs a program in the host to its end. An exit code other than 0 is no
// error; not being able to start it, or the end of ctx, is.
func (h *Host) Run(ctx context.Context, name string, args ...string) (Result, error) {
	return h.Command(ctx, name, args...).Result()
}

// Result runs the program to its end, as Host.Run does.
func (c *Cmd) Result() (Result, error) {
	var stdout, stderr bytes.Buffer
	c.Stdout, c.Stderr = &stdout, &stderr
	err := c.Run()
	r := Result{Stdout: stdout.String(), Stderr: stderr.String(), ExitCode: -1}
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
		err = nil
	}
	if err == nil {
		r.ExitCode = c.ProcessState.ExitCode()
	}
	return r, err
}

// Output runs a program in the host and returns its standard output. An exit code
// other than 0 is an error, which carries what it wrote to standard error.
func (h *Host) Output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := h.Command(ctx, name, args...).Output()
	return string(out), err
}

// credential looks a user up: by name, or "uid:gid".
func credential(name string) (*syscall.Credential, error) {
	if uid, gid, ok := strings.Cut(name, ":"); ok {
		return parseCredential(uid, gid)
	}
	u, err := user.Lookup(name)
	if err != nil {
		return nil, err
	}
	cred, err := parseCredential(u.Uid, u.Gid)
	if err != nil {
		return nil, err
	}
	groups, err := u.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("groups of user %s: %w", name, err)
	}
	for _, g := range groups {
		id, err := strconv.ParseUint(g, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("groups of user %s: %w", name, err)
		}
		cred.Groups = append(cred.Groups, uint32(id))
	}
	return cred, nil
}

func parseCredential(uid, gid string) (*syscall.Credential, error) {
	u, err := strconv.ParseUint(uid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("uid: %w", err)
	}
	g, err := strconv.ParseUint(gid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("gid: %w", err)
	}
	return &syscall.Credential{Uid: uint32(u), Gid: uint32(g)}, nil
}
