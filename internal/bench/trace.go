package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/symbolon/symbolon/internal/netlab"
)

// attachTime is what perf and strace get to attach before the window begins.
const attachTime = 500 * time.Millisecond

// trace is perf or strace at both proxies of a pair. A nil trace does nothing.
type trace struct {
	running []*exec.Cmd
	then    []*exec.Cmd // run when the recording has ended
	files   []*os.File  // they write
}

// startTrace attaches what the options ask for. Files are named by system, workload
// and side, and are the last round's.
func startTrace(o *options, p *pair, w workload) (*trace, error) {
	if o.trace == "" || p.clientSide == nil {
		return nil, nil
	}
	if err := os.MkdirAll(o.traceDir, 0o755); err != nil {
		return nil, err
	}
	program, err := netlab.Tool(o.trace)
	if err != nil {
		return nil, err
	}
	t := &trace{}
	for side, daemon := range map[string]*netlab.Daemon{"client": p.clientSide, "server": p.serverSide} {
		file := filepath.Join(o.traceDir, fmt.Sprintf("%s-%s-%s.%s", p.name, w.name, side, o.trace))
		now, err := processes()
		if err != nil {
			return nil, errors.Join(err, t.stop())
		}
		var pids []string
		for _, pid := range now.tree(daemon.Pid) {
			pids = append(pids, fmt.Sprint(pid))
		}
		pid := strings.Join(pids, ",")
		var c *exec.Cmd
		if o.trace == "perf" {
			c = exec.Command(program, "record", "-q", "-g", "-F", "499", "-o", file, "-p", pid)
			report := exec.Command(program, "report", "-i", file, "--stdio", "--children", "-g", "none", "--sort", "symbol", "--percent-limit", "0.5")
			t.then = append(t.then, report)
			text, err := os.Create(file + ".txt")
			if err != nil {
				return nil, errors.Join(err, t.stop())
			}
			t.files = append(t.files, text)
			report.Stdout = text
		} else {
			c = exec.Command(program, "-c", "-f", "-o", file, "-p", pid)
		}
		if err := c.Start(); err != nil {
			return nil, errors.Join(err, t.stop())
		}
		t.running = append(t.running, c)
	}
	time.Sleep(attachTime)
	return t, nil
}

// stop ends the recording. The tools end with the signal that told them to.
func (t *trace) stop() error {
	if t == nil {
		return nil
	}
	var errs []error
	for _, c := range t.running {
		errs = append(errs, c.Process.Signal(syscall.SIGINT))
	}
	for _, c := range t.running {
		_ = c.Wait()
	}
	for _, c := range t.then {
		errs = append(errs, c.Run())
	}
	for _, f := range t.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}
