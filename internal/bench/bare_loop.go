package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	bareBuffer = 128 << 10 // read at once, bytes
	bareTurn   = 256 << 10 // one direction's, before others have theirs
	bareBatch  = 128       // events of one epoll_wait(2), and connections accepted at once
	bareMoment = 4         // how long a loop waits without the Go scheduler's knowledge, ms

	watchApp     = unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLET
	watchCarrier = watchApp | unix.EPOLLOUT
	eventEnds    = unix.EPOLLRDHUP | unix.EPOLLHUP | unix.EPOLLERR
)

// bareLoop is a thread of a side of system bare, with all that it accepts.
type bareLoop struct {
	epoll, listener int
	port            uint16 // in network byte order
	client          bool

	carriers []*carrier // by slot; an event's number is twice that, and 1 more for the application
	free     []int32    // slots
	idle     map[unix.RawSockaddrInet4][]*carrier
	ready    []*carrier // have more to do, of which no event will tell
	spare    []*carrier

	buf    [frameHeader + bareBuffer]byte
	events [bareBatch]unix.EpollEvent
}

// bareListener is an event's number.
const bareListener = -1

func newBareLoop(port uint16, client bool) (*bareLoop, error) {
	network := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, port))
	l := &bareLoop{port: network, client: client, idle: make(map[unix.RawSockaddrInet4][]*carrier)}
	var err error
	if l.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if l.listener, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	// The kernel deals connections out to the loops, and hands the options on to them.
	setOption(l.listener, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	setOption(l.listener, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	if err = unix.Bind(l.listener, &unix.SockaddrInet4{Port: int(port)}); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	if err = unix.Listen(l.listener, 4096); err != nil {
		return nil, os.NewSyscallError("listen", err)
	}
	if errno := l.watch(unix.EPOLL_CTL_ADD, l.listener, bareListener, unix.EPOLLIN); errno != 0 {
		return nil, os.NewSyscallError("epoll_ctl", errno)
	}
	return l, nil
}

// run serves until something is broken.
func (l *bareLoop) run() error {
	runtime.LockOSThread()
	busy := true
	for {
		timeout := bareMoment
		if len(l.ready) > 0 {
			timeout = 0
		} else if !busy {
			timeout = -1
		}
		n, errno := l.wait(timeout)
		if errno != 0 && errno != unix.EINTR {
			return fmt.Errorf("epoll_pwait: %w", errno)
		}
		busy = n > 0
		again := l.ready
		l.ready = l.spare[:0]
		for _, e := range l.events[:n] {
			if e.Fd == bareListener {
				l.accept()
			} else if c := l.carriers[e.Fd>>1]; c != nil {
				c.happened(e.Events, e.Fd&1 != 0)
			}
		}
		for _, c := range again {
			c.queued = false
			c.in()
			c.out()
		}
		l.spare = again
	}
}

// wait waits for events. The scheduler hears of it only where it is for long: it would take
// the processor away at each wait, and look for other work.
func (l *bareLoop) wait(timeout int) (int, unix.Errno) {
	p := unsafe.Pointer(&l.events)
	var n uintptr
	var errno unix.Errno
	if timeout < 0 {
		n, _, errno = unix.Syscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.epoll), uintptr(p), bareBatch, ^uintptr(0), 0, 0)
	} else {
		n, _, errno = unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.epoll), uintptr(p), bareBatch, uintptr(timeout), 0, 0)
	}
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// watch asks for events, or for more of them.
func (l *bareLoop) watch(op, fd int, number int32, events uint32) unix.Errno {
	e := unix.EpollEvent{Events: events, Fd: number}
	_, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(l.epoll), uintptr(op), uintptr(fd), uintptr(unsafe.Pointer(&e)), 0, 0)
	return errno
}

// accept takes what waits: the client's applications, or the client's carriers.
func (l *bareLoop) accept() {
	for range bareBatch {
		fd, errno := call(unix.SYS_ACCEPT4, l.listener, nil, 0, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if errno != 0 {
			return // the next event tells again, whatever it is
		}
		to, ok := originalDestination(fd)
		if !ok || to.Port == l.port {
			reset(fd) // nobody redirected it
			continue
		}
		if !l.client {
			l.add(fd, to)
			continue
		}
		if c := l.take(to); c != nil {
			c.begin(fd)
		} else {
			reset(fd)
		}
	}
}

// take returns a carrier to the given application: one that waits, or one on its way. nil:
// the kernel has none.
func (l *bareLoop) take(to unix.RawSockaddrInet4) *carrier {
	waiting := l.idle[to]
	for n := len(waiting) - 1; n >= 0; n-- {
		if c := waiting[n]; !c.dead {
			l.idle[to] = waiting[:n]
			return c
		}
	}
	l.idle[to] = waiting[:0]
	fd, errno := dial(to)
	if errno != 0 {
		return nil
	}
	return l.add(fd, to)
}

// add makes a carrier of a connection between the hosts; nil: it cannot be watched.
func (l *bareLoop) add(fd int, to unix.RawSockaddrInet4) *carrier {
	c := &carrier{l: l, fd: fd, app: -1, to: to}
	if n := len(l.free); n > 0 {
		c.slot, l.free = l.free[n-1], l.free[:n-1]
	} else {
		c.slot = int32(len(l.carriers))
		l.carriers = append(l.carriers, nil)
	}
	l.carriers[c.slot] = c
	if l.watch(unix.EPOLL_CTL_ADD, fd, c.slot<<1, watchCarrier) != 0 {
		c.abort()
		return nil
	}
	return c
}

// dial begins to connect to an application or to the other half, either of which hears the
// last ACK of the handshake with the first bytes.
func dial(to unix.RawSockaddrInet4) (fd int, errno unix.Errno) {
	s, _, errno := unix.RawSyscall(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if errno != 0 {
		return -1, errno
	}
	fd = int(s)
	setOption(fd, unix.SOL_SOCKET, unix.SO_MARK, bareMark)
	setOption(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	setOption(fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0)
	if _, errno = call(unix.SYS_CONNECT, fd, unsafe.Pointer(&to), int(unsafe.Sizeof(to)), 0); errno != 0 && errno != unix.EINPROGRESS {
		closeFD(fd)
		return -1, errno
	}
	return fd, 0
}

// originalDestination is where a connection was going before it was redirected.
func originalDestination(fd int) (to unix.RawSockaddrInet4, ok bool) {
	const soOriginalDst = 80 // linux/netfilter_ipv4.h
	n := uint32(unsafe.Sizeof(to))
	_, _, errno := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_IP, soOriginalDst, uintptr(unsafe.Pointer(&to)), uintptr(unsafe.Pointer(&n)), 0)
	return to, errno == 0
}

func setOption(fd, level, name int, value int32) {
	_, _, _ = unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name), uintptr(unsafe.Pointer(&value)), unsafe.Sizeof(value), 0)
}

// reset closes with a reset.
func reset(fd int) {
	linger := unix.Linger{Onoff: 1}
	_, _, _ = unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER, uintptr(unsafe.Pointer(&linger)), unsafe.Sizeof(linger), 0)
	closeFD(fd)
}

func closeFD(fd int) { _, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

// call is a system call on n bytes at p. None of these waits, so that the scheduler need not
// hear of them; what a signal interrupts is made again.
func call(trap uintptr, fd int, p unsafe.Pointer, n, flags int) (int, unix.Errno) {
	for {
		r, _, errno := unix.RawSyscall6(trap, uintptr(fd), uintptr(p), uintptr(n), uintptr(flags), 0, 0)
		if errno == 0 {
			return int(r), 0
		}
		if errno != unix.EINTR {
			return 0, errno
		}
	}
}

func receive(fd int, b []byte) (int, unix.Errno) {
	return call(unix.SYS_RECVFROM, fd, unsafe.Pointer(unsafe.SliceData(b)), len(b), 0)
}

func send(fd int, b []byte) (int, unix.Errno) {
	return call(unix.SYS_SENDTO, fd, unsafe.Pointer(unsafe.SliceData(b)), len(b), unix.MSG_NOSIGNAL)
}
