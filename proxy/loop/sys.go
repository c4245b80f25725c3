package loop

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The descriptors here never block, so the scheduler need not hear of reads and
// writes: entering and leaving a system call its way costs more than many of them
// take, and it would give the processor away during the longer ones.

func read(fd int, b []byte) (int, error) {
	return raw(unix.SYS_READ, fd, unsafe.Pointer(unsafe.SliceData(b)), len(b))
}

func write(fd int, b []byte) (int, error) {
	return raw(unix.SYS_WRITE, fd, unsafe.Pointer(unsafe.SliceData(b)), len(b))
}

func readv(fd int, v []unix.Iovec) (int, error) {
	return raw(unix.SYS_READV, fd, unsafe.Pointer(unsafe.SliceData(v)), len(v))
}

func writev(fd int, v []unix.Iovec) (int, error) {
	return raw(unix.SYS_WRITEV, fd, unsafe.Pointer(unsafe.SliceData(v)), len(v))
}

// raw is a call that does not block, again where a signal interrupted it.
func raw(call uintptr, fd int, p unsafe.Pointer, n int) (int, error) {
	for {
		r, _, errno := unix.RawSyscall(call, uintptr(fd), uintptr(p), uintptr(n))
		switch errno {
		case 0:
			return int(r), nil
		case unix.EINTR:
		case unix.EAGAIN:
			return 0, errAgain
		default:
			return 0, errno
		}
	}
}

// errAgain: not now. It is made once: an Errno in an error is an allocation.
var errAgain = errors.New("not ready")

// splice moves up to n bytes within the kernel. 0 and no error: the end of the
// stream, or something that splice(2) does not move.
func splice(from, to, n int) (int, error) {
	for {
		r, _, errno := unix.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n),
			unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		switch errno {
		case 0:
			return int(r), nil
		case unix.EINTR:
		case unix.EAGAIN:
			return 0, errAgain
		default:
			return 0, errno
		}
	}
}

// peek tells whether there is anything to read, be it the end.
func peek(fd int) (int, error) {
	var b [1]byte
	for {
		r, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&b)), 1, unix.MSG_PEEK|unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			return int(r), nil
		case unix.EINTR:
		case unix.EAGAIN:
			return 0, errAgain
		default:
			return 0, errno
		}
	}
}

// poll waits for events. block: as long as it takes, out of the scheduler's sight;
// else not at all.
func poll(fd int, events []unix.EpollEvent, block bool) (int, error) {
	p := unsafe.Pointer(unsafe.SliceData(events))
	var n uintptr
	var errno unix.Errno
	if block {
		const forever = ^uintptr(0)
		n, _, errno = unix.Syscall6(unix.SYS_EPOLL_PWAIT, uintptr(fd), uintptr(p), uintptr(len(events)), forever, 0, 0)
	} else {
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
