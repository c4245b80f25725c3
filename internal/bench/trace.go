package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/symbolon/symbolon/internal/netlab"
)

// attachTime is what perf and strace get to attach before the window begins.
const attachTime = 500 * time.Millisecond

// traceTools are the programs that -trace runs, by what it is given.
var traceTools = map[string]string{"perf": "perf", "stat": "perf", "strace": "strace"}

// counted is what the kernel counts for -trace stat, which costs a per cent or two, sees
// every thread, and so is for comparing builds.
var counted = []string{
	"raw_syscalls:sys_enter", "context-switches", "sched:sched_wakeup",
	"syscalls:sys_enter_epoll_pwait", "syscalls:sys_enter_epoll_wait", "syscalls:sys_enter_epoll_ctl", "syscalls:sys_enter_futex",
	"syscalls:sys_enter_nanosleep", "syscalls:sys_enter_sched_yield", "syscalls:sys_enter_splice",
	"syscalls:sys_enter_recvfrom", "syscalls:sys_enter_sendto", "syscalls:sys_enter_recvmsg", "syscalls:sys_enter_sendmsg",
	"syscalls:sys_enter_read", "syscalls:sys_enter_write", "syscalls:sys_enter_readv", "syscalls:sys_enter_writev",
}

// trace is perf or strace at both proxies of a pair. A nil trace does nothing.
type trace struct {
	running []*exec.Cmd
	then    []*exec.Cmd       // run when the recording has ended
	files   []*os.File        // they write
	counts  map[string]string // strace's tables, by side
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
	program, err := netlab.Tool(traceTools[o.trace])
	if err != nil {
		return nil, err
	}
	t := &trace{counts: make(map[string]string)}
	for side, daemon := range map[string]*netlab.Daemon{"client": p.clientSide, "server": p.serverSide} {
		file := filepath.Join(o.traceDir, fmt.Sprintf("%s-%s-%s.%s", p.name, w.name, side, o.trace))
		now, err := processes()
		if err != nil {
			return nil, errors.Join(err, t.stop(loaded{}, io.Discard))
		}
		var pids []string
		for _, pid := range now.tree(daemon.Pid) {
			pids = append(pids, fmt.Sprint(pid))
		}
		pid := strings.Join(pids, ",")
		var c *exec.Cmd
		switch o.trace {
		case "perf":
			c = exec.Command(program, "record", "-q", "-g", "-F", "499", "-o", file, "-p", pid)
			report := exec.Command(program, "report", "-i", file, "--stdio", "--children", "-g", "none", "--sort", "symbol", "--percent-limit", "0.5")
			t.then = append(t.then, report)
			text, err := os.Create(file + ".txt")
			if err != nil {
				return nil, errors.Join(err, t.stop(loaded{}, io.Discard))
			}
			t.files = append(t.files, text)
			report.Stdout = text
		case "stat":
			c = exec.Command(program, "stat", "-x", ",", "-o", file, "-e", strings.Join(counted, ","), "-p", pid)
			t.counts[p.name+", "+side] = file
		default:
			// Not -f: a child that the proxy starts by vfork, such as iptables, and strace
			// can wait for each other. New threads are not counted.
			c = exec.Command(program, "-c", "-o", file, "-p", strings.Join(threads(pids), ","))
			t.counts[p.name+", "+side] = file
		}
		if err := c.Start(); err != nil {
			return nil, errors.Join(err, t.stop(loaded{}, io.Discard))
		}
		t.running = append(t.running, c)
	}
	time.Sleep(attachTime)
	return t, nil
}

// threads are those of the given processes.
func threads(pids []string) []string {
	var all []string
	for _, pid := range pids {
		tasks, err := os.ReadDir(filepath.Join("/proc", pid, "task"))
		if err != nil {
			continue // it has ended
		}
		for _, t := range tasks {
			all = append(all, t.Name())
		}
	}
	return all
}

// stop ends the recording and says what it needs the load for: system calls by unit
// of work. The tools end with the signal that told them to.
func (t *trace) stop(work loaded, say io.Writer) error {
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
	for side, file := range t.counts {
		text, err := os.ReadFile(file)
		errs = append(errs, err)
		fmt.Fprintf(say, "\n  %s: %s\n", side, callsPerUnit(string(text), work))
	}
	return errors.Join(errs...)
}

// mostCalls is how many system calls are named.
const mostCalls = 12

// count is how often something happened.
type count struct {
	name string
	n    float64
}

// countOf reads a line of a table, of strace -c:
//
//	% time, seconds, usecs/call, calls, errors (or nothing), syscall
//
// or of perf stat -x ,: value, unit, event and more.
func countOf(line string) (c count, ok bool) {
	n := ""
	if f := strings.Split(line, ","); len(f) > 2 {
		n, c.name = f[0], f[2][strings.LastIndex(f[2], ":")+1:]
	} else if f := strings.Fields(line); len(f) > 4 {
		n, c.name = f[3], f[len(f)-1]
	}
	var err error
	c.n, err = strconv.ParseFloat(n, 64)
	return c, err == nil
}

// callsPerUnit reads a table: the most frequent calls for each request, or for each GB.
func callsPerUnit(text string, work loaded) string {
	units, unit := float64(work.Requests), "request"
	if work.Requests == 0 {
		units, unit = float64(work.Bytes)/1e9, "GB"
	}
	var all []count
	total := 0.0
	for line := range strings.Lines(text) {
		c, ok := countOf(line)
		switch {
		case !ok || c.n == 0:
		case c.name == "total" || c.name == "sys_enter": // strace's, perf's
			total = c.n
		default:
			c.name = strings.TrimPrefix(c.name, "sys_enter_")
			all = append(all, c)
		}
	}
	slices.SortFunc(all, func(a, b count) int { return cmp.Or(cmp.Compare(b.n, a.n), strings.Compare(a.name, b.name)) })
	said := fmt.Sprintf("%.4g system calls a %s:", total/units, unit)
	for _, c := range all[:min(len(all), mostCalls)] {
		said += fmt.Sprintf(" %s %.3g", c.name, c.n/units)
	}
	return said
}
