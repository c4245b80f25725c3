package netlab

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// pollInterval is the pause between looks at something that gives no notice.
	pollInterval = 5 * time.Millisecond
	// killTimeout bounds the wait for killed processes to be gone.
	killTimeout = 10 * time.Second
)

// processesIn lists the processes, but our own, whose network namespace is one
// of the given. Dead ones that nobody reaped yet have none, and are not listed.
func processesIn(namespaces map[inode]bool) ([]int, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err == nil && pid != os.Getpid() && inNetns(pid, namespaces) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

func inNetns(pid int, namespaces map[inode]bool) bool {
	ns, err := inodeOf(fmt.Sprintf("/proc/%d/ns/net", pid))
	return err == nil && namespaces[ns]
}

// kill sends SIGKILL to the process if mine still says yes once the process is
// pinned by a pidfd: between listing and killing, a pid may be another's.
func kill(pid int, mine func() bool) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pidfd of process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if !mine() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	return nil
}

// killAll kills every process in the namespaces, but our own, and waits until
// they are gone. It repeats: a process may fork while it is being killed.
func killAll(namespaces map[inode]bool) error {
	if len(namespaces) == 0 {
		return nil
	}
	deadline := time.Now().Add(killTimeout)
	for {
		pids, err := processesIn(namespaces)
		if err != nil || len(pids) == 0 {
			return err
		}
		for _, pid := range pids {
			if err := kill(pid, func() bool { return inNetns(pid, namespaces) }); err != nil {
				return err
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes survive SIGKILL: %s", describe(pids))
		}
		time.Sleep(pollInterval)
	}
}

// describe names processes for an error.
func describe(pids []int) string {
	var s []string
	for _, pid := range pids {
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		s = append(s, fmt.Sprintf("%d (%s)", pid, strings.TrimSpace(string(comm))))
	}
	return strings.Join(s, ", ")
}
