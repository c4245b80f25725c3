package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// ticks is USER_HZ: the unit of times in /proc/PID/stat, 100 a second on every
// architecture that Go runs on (proc_pid_stat(5)).
const ticks = 100

// process is what /proc/PID/stat says.
type process struct {
	parent int
	// own is its CPU time, in ticks, user and system; reaped that of its children
	// that have ended and of theirs.
	own, reaped uint64
}

// snapshot is every process of the machine.
type snapshot map[int]process

// processes takes a snapshot. Processes that end meanwhile are left out.
func processes() (snapshot, error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	s := make(snapshot, len(files))
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		pid, p, err := parseStat(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		s[pid] = p
	}
	return s, nil
}

// parseStat reads /proc/PID/stat. The name in it may hold spaces and parentheses.
func parseStat(text []byte) (pid int, p process, err error) {
	open, end := bytes.IndexByte(text, '('), bytes.LastIndexByte(text, ')')
	if open < 0 || end < open {
		return 0, p, fmt.Errorf("not a stat line: %q", text)
	}
	if pid, err = strconv.Atoi(strings.TrimSpace(string(text[:open]))); err != nil {
		return 0, p, err
	}
	// What follows the name starts with field 3: ppid is 4, utime to cstime 14 to 17.
	fields := strings.Fields(string(text[end+1:]))
	if len(fields) < 15 {
		return 0, p, fmt.Errorf("not a stat line: %q", text)
	}
	number := func(field int) (n uint64) {
		if err == nil {
			n, err = strconv.ParseUint(fields[field-3], 10, 64)
		}
		return n
	}
	p.parent = int(number(4))
	p.own, p.reaped = number(14)+number(15), number(16)+number(17)
	return pid, p, err
}

// tree returns a process and its descendants.
func (s snapshot) tree(root int) []int {
	pids := []int{root}
	for i := 0; i < len(pids); i++ {
		for pid, p := range s {
			if p.parent == pids[i] {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// cpu is what a process and its descendants, dead ones included, have used, in
// seconds.
func (s snapshot) cpu(root int) float64 {
	total := uint64(0)
	for _, pid := range s.tree(root) {
		total += s[pid].own + s[pid].reaped
	}
	return float64(total) / ticks
}

// others is what all processes have used that do not descend from the given one. It
// grows steadily: what dies is counted by its parent.
func (s snapshot) others(than int) float64 {
	total := uint64(0)
	mine := make(map[int]bool)
	for _, pid := range s.tree(than) {
		mine[pid] = true
	}
	for pid, p := range s {
		if !mine[pid] {
			total += p.own + p.reaped
		}
	}
	return float64(total) / ticks
}

// steal is the CPU time that the hypervisor gave to others while this machine could
// have used it, in seconds of all cores; 0 where /proc/stat does not say.
func steal() float64 {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	// cpu user nice system idle iowait irq softirq steal ...
	line, _, _ := strings.Cut(string(text), "\n")
	fields := strings.Fields(line)
	if len(fields) < 9 {
		return 0
	}
	n, err := strconv.ParseFloat(fields[8], 64)
	if err != nil {
		return 0
	}
	return n / ticks
}

// footprint is the resident memory, in KB, and the open descriptors of a process and
// its descendants.
func (s snapshot) footprint(root int) (kb, fds float64, err error) {
	for _, pid := range s.tree(root) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			return 0, 0, err
		}
		rss, err := parseRss(string(text))
		if err != nil {
			return 0, 0, err
		}
		open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			return 0, 0, err
		}
		kb, fds = kb+rss, fds+float64(len(open))
	}
	return kb, fds, nil
}

// parseRss finds "Rss:     1234 kB".
func parseRss(text string) (float64, error) {
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, "Rss:"); ok {
			return strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 64)
		}
	}
	return 0, fmt.Errorf("no Rss in %q", text)
}
