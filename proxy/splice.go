package proxy

import (
	"errors"
	"net"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// splicePipe is how much one splice(2) may move, bytes; a smaller pipe moves less.
const splicePipe = 256 << 10

// splice moves bytes from src to dst within the kernel, until there is something
// that splice(2) does not move: the end of the stream, or urgent data. A read tells
// which. io.Copy would take the one for the other, or wait behind urgent data for
// ever.
func splice(dst, src *net.TCPConn, count *atomic.Uint64) error {
	from, err := src.SyscallConn()
	if err != nil {
		return err
	}
	to, err := dst.SyscallConn()
	if err != nil {
		return err
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil // out of descriptors: the caller copies
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	_, _ = unix.FcntlInt(uintptr(pipe[1]), unix.F_SETPIPE_SZ, splicePipe) // or the default
	for {
		n, err := fill(pipe[1], from)
		if n == 0 || err != nil {
			return err
		}
		if err := drain(to, pipe[0], n, count); err != nil {
			return err
		}
	}
}

// fill waits for bytes of from's and moves them into the pipe. 0: what is next
// cannot be moved.
func fill(pipe int, from syscall.RawConn) (n int64, err error) {
	var failed error
	err = from.Read(func(fd uintptr) bool {
		for {
			n, failed = unix.Splice(int(fd), nil, pipe, nil, splicePipe, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
			switch {
			case errors.Is(failed, unix.EINTR):
				continue
			case errors.Is(failed, unix.EAGAIN):
				n, failed = 0, nil
				return readable(int(fd))
			}
			return true
		}
	})
	return n, errors.Join(err, failed)
}

// readable tells whether there is anything to read, be it urgent.
func readable(fd int) bool {
	var b [1]byte
	_, _, err := unix.Recvfrom(fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)
}

// drain moves n bytes from the pipe to to.
func drain(to syscall.RawConn, pipe int, n int64, count *atomic.Uint64) error {
	var failed error
	err := to.Write(func(fd uintptr) bool {
		for n > 0 {
			moved, err := unix.Splice(pipe, nil, int(fd), nil, int(n), unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
			switch {
			case errors.Is(err, unix.EINTR):
			case errors.Is(err, unix.EAGAIN):
				return false
			case err != nil:
				failed = err
				return true
			default:
				n -= moved
				count.Add(uint64(moved))
			}
		}
		return true
	})
	return errors.Join(err, failed)
}
