package loop

import (
	"errors"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The descriptors here never block, so the scheduler need not hear of reads and
// writes: entering and leaving a system call its way costs more than many of them
// take, and it would give the processor away during the longer ones.

func read(fd int, b []byte) (int, error) {
	return call(unix.SYS_RECVFROM, fd, unsafe.Pointer(unsafe.SliceData(b)), len(b), 0)
}

func write(fd int, b []byte) (int, error) {
	return call(unix.SYS_SENDTO, fd, unsafe.Pointer(unsafe.SliceData(b)), len(b), unix.MSG_NOSIGNAL)
}

// peek tells whether there is anything to read, be it the end.
func peek(fd int) (int, error) {
	var b [1]byte
	return call(unix.SYS_RECVFROM, fd, unsafe.Pointer(&b), len(b), unix.MSG_PEEK)
}

func readv(fd int, v []unix.Iovec) (int, error) {
	return call(unix.SYS_READV, fd, unsafe.Pointer(unsafe.SliceData(v)), len(v), 0)
}

func writev(fd int, v []unix.Iovec) (int, error) {
	return call(unix.SYS_WRITEV, fd, unsafe.Pointer(unsafe.SliceData(v)), len(v), 0)
}

// call is a system call on n bytes or slices at p, again where a signal interrupted
// it. readv(2) and writev(2) have no flags, and do not look.
func call(trap uintptr, fd int, p unsafe.Pointer, n, flags int) (int, error) {
	for {
		r, _, errno := unix.RawSyscall6(trap, uintptr(fd), uintptr(p), uintptr(n), uintptr(flags), 0, 0)
		if errno != unix.EINTR {
			return result(r, errno)
		}
	}
}

func result(n uintptr, errno unix.Errno) (int, error) {
	switch errno {
	case 0:
		return int(n), nil
	case unix.EAGAIN:
		return 0, errAgain
	}
	return 0, errno
}

// errAgain: not now. It is made once: an Errno in an error is an allocation.
var errAgain = errors.New("not ready")

// splice moves up to n bytes within the kernel. 0 and no error: the end of the
// stream, or something that splice(2) does not move.
func splice(from, to, n int) (int, error) {
	for {
		r, _, errno := unix.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n),
			unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if errno != unix.EINTR {
			return result(r, errno)
		}
	}
}

// waiting is how poll waits for events.
type waiting int

const (
	dont    waiting = iota // look only
	soon                   // wait a moment, without the scheduler's knowledge
	long                   // wait until it is time to look who rests, and let the scheduler have the processor
	forever                // wait, and let the scheduler have the processor
)

// moment is how long soon is, in milliseconds.
const moment = 4

// poll waits for events.
func poll(fd int, events []unix.EpollEvent, w waiting) (int, error) {
	p := unsafe.Pointer(unsafe.SliceData(events))
	var n uintptr
	var errno unix.Errno
	switch w {
	case forever:
		n, _, errno = unix.Syscall6(unix.SYS_EPOLL_PWAIT, uintptr(fd), uintptr(p), uintptr(len(events)), ^uintptr(0), 0, 0)
	case long:
		n, _, errno = unix.Syscall6(unix.SYS_EPOLL_PWAIT, uintptr(fd), uintptr(p), uintptr(len(events)), uintptr(restEvery/time.Millisecond), 0, 0)
	case soon:
		n, _, errno = unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(fd), uintptr(p), uintptr(len(events)), moment, 0, 0)
	default:
		n, _, errno = unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(fd), uintptr(p), uintptr(len(events)), 0, 0, 0)
	}
	switch errno {
	case 0:
		return int(n), nil
	case unix.EINTR:
		return 0, nil
	}
	return 0, errno
}
