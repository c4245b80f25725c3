package identity

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// MaxThreads bounds a process's threads for ExecWatch: each takes a descriptor.
	MaxThreads = 4096
	// maxThreadLists is how often the threads are listed, until there are no new ones.
	maxThreadLists = 8
	// inheritThread is perf_event_attr.inherit_thread (perf_event_open(2), Linux 5.13),
	// which x/sys lacks: threads inherit the event, children do not.
	inheritThread = unix.CBitFieldMaskBit35
)

// ExecWatch says beyond doubt whether a process has called execve since it was made.
// That the process runs the same file before and after does not: one that wants to be
// attested as another program can run that one meanwhile, and come back.
//
// It counts by the kernel's performance events: one for each thread, which starts to
// count at the thread's exec. Threads made later inherit it. Close it.
type ExecWatch struct {
	events map[int]int // descriptors, by thread
	limit  int
}

// Threads counts the process's threads. Errors: ErrEnded; one that names MaxThreads.
func (p *Pin) Threads() (int, error) {
	names, err := p.process.threads()
	if errors.Is(err, errGone) {
		err = ErrEnded
	}
	return len(names), err
}

// WatchExec begins to watch, with up to limit descriptors, of MaxThreads. Errors: ErrEnded;
// ErrChanged if there are more threads; the system's, if it does not allow performance
// events (CAP_PERFMON).
func (p *Pin) WatchExec(limit int) (*ExecWatch, error) {
	w := &ExecWatch{events: make(map[int]int), limit: min(limit, MaxThreads)}
	for range maxThreadLists {
		more, err := w.add(p.process)
		if err == nil && !more {
			return w, nil
		}
		if err != nil {
			w.Close()
			if errors.Is(err, errGone) {
				err = ErrEnded
			}
			return nil, err
		}
	}
	w.Close()
	return nil, fmt.Errorf("%w: it makes threads faster than they can be watched", ErrChanged)
}

// add opens events for the threads that have none, and tells whether there were any.
func (w *ExecWatch) add(p *process) (more bool, err error) {
	names, err := p.threads()
	if err != nil {
		return false, err
	}
	for _, name := range names {
		tid, err := strconv.Atoi(name)
		if err != nil {
			return false, err
		}
		if _, ok := w.events[tid]; ok {
			continue
		}
		if len(w.events) >= w.limit {
			return false, fmt.Errorf("%w: process %d has more than %d threads to be watched", ErrChanged, p.pid, w.limit)
		}
		fd, err := execEvent(tid)
		if errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			return false, fmt.Errorf("%w; the proxy needs CAP_PERFMON to see whether a process executes another program while it is attested",
				os.NewSyscallError("perf_event_open", err))
		}
		w.events[tid], more = fd, true
	}
	return more, nil
}

// threads are the names of the process's threads in /proc, at most MaxThreads of them.
func (p *process) threads() ([]string, error) {
	dir, err := unix.Openat(p.dir, "task", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, procError("openat", err)
	}
	f := os.NewFile(uintptr(dir), "task")
	defer f.Close()
	names, err := f.Readdirnames(MaxThreads + 1)
	if err != nil && len(names) == 0 {
		return nil, errGone
	}
	if len(names) > MaxThreads {
		return nil, fmt.Errorf("process %d has more than %d threads", p.pid, MaxThreads)
	}
	return names, nil
}

// execEvent counts nothing, and that only from the thread's next exec on.
func execEvent(tid int) (int, error) {
	a := unix.PerfEventAttr{
		Type: unix.PERF_TYPE_SOFTWARE, Config: unix.PERF_COUNT_SW_DUMMY,
		Read_format: unix.PERF_FORMAT_TOTAL_TIME_ENABLED,
		Bits: unix.PerfBitDisabled | unix.PerfBitEnableOnExec | unix.PerfBitInherit | inheritThread |
			unix.PerfBitExcludeKernel | unix.PerfBitExcludeHv,
	}
	a.Size = uint32(unsafe.Sizeof(a))
	return unix.PerfEventOpen(&a, tid, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
}

// Executed tells whether any thread has called execve since.
func (w *ExecWatch) Executed() (bool, error) {
	for _, fd := range w.events {
		var b [16]byte // value, time enabled in nanoseconds
		n, err := unix.Read(fd, b[:])
		if err != nil {
			return false, os.NewSyscallError("read", err)
		}
		if n != len(b) || binary.NativeEndian.Uint64(b[8:]) > 0 {
			return true, nil
		}
	}
	return false, nil
}

// Descriptors is how many it has open.
func (w *ExecWatch) Descriptors() int { return len(w.events) }

// Close ends the watch.
func (w *ExecWatch) Close() {
	for _, fd := range w.events {
		unix.Close(fd)
	}
	w.events = nil
}
