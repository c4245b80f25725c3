package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The kernel answers the requests of this package within the send call, in
// microseconds. queryTimeout is for the case that something is badly wrong.
const queryTimeout = time.Second

// maxStrays is how many datagrams are looked at for an answer: late ones to questions that
// were given up may stand before it.
const maxStrays = 16

var (
	errShortMessage = errors.New("netlink message cut short")
	errNoAnswer     = errors.New("netlink: no answer from the kernel")
)

// nlSocket is a netlink socket that is kept, for single questions with single
// answers. It stays in the network namespace it was opened in, and replaces itself
// when it breaks. Safe for concurrent use: questions take turns.
type nlSocket struct {
	protocol int // NETLINK_*

	mu     sync.Mutex
	ns     int // descriptor of the network namespace; -1 when closed
	fd     int // -1 while broken
	port   uint32
	seq    uint32
	buffer [8192]byte // one answer; the kernel's are below 1 KiB
}

// openNetlink opens a socket in the network namespace nsFD (duplicated), or the
// calling thread's if that is negative.
func openNetlink(protocol, nsFD int) (*nlSocket, error) {
	s := &nlSocket{protocol: protocol, fd: -1}
	var err error
	if nsFD < 0 {
		s.ns, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	} else {
		s.ns, err = unix.FcntlInt(uintptr(nsFD), unix.F_DUPFD_CLOEXEC, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	if err := s.open(); err != nil {
		unix.Close(s.ns)
		return nil, err
	}
	return s, nil
}

func (s *nlSocket) open() error {
	return inNetNS(s.ns, func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, s.protocol)
		if err != nil {
			return os.NewSyscallError("socket AF_NETLINK", err)
		}
		timeout := unix.NsecToTimeval(queryTimeout.Nanoseconds())
		err = errors.Join(
			unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
			// To the kernel, and from nobody else: it refuses what others send here.
			unix.Connect(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout),
		)
		var self unix.Sockaddr
		if err == nil {
			self, err = unix.Getsockname(fd)
		}
		if err != nil {
			unix.Close(fd)
			return fmt.Errorf("netlink socket: %w", err)
		}
		if nl, ok := self.(*unix.SockaddrNetlink); ok {
			s.port = nl.Pid
		}
		s.fd = fd
		return nil
	})
}

// close makes every later query fail with os.ErrClosed.
func (s *nlSocket) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ns < 0 {
		return nil
	}
	s.drop()
	err := unix.Close(s.ns)
	s.ns = -1
	return err
}

func (s *nlSocket) drop() {
	if s.fd >= 0 {
		unix.Close(s.fd)
		s.fd = -1
	}
}

// query sends the message (header included; its length, sequence and port are
// filled in) and hands the answer's payload to read while it is valid. The
// kernel's refusal is a unix.Errno. A socket that fails is replaced, and the
// question asked once more.
func (s *nlSocket) query(msg []byte, want uint16, read func(payload []byte) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	for range 2 {
		if s.ns < 0 {
			return os.ErrClosed
		}
		if s.fd < 0 {
			if err = s.open(); err != nil {
				continue
			}
		}
		var payload []byte
		var refusal unix.Errno
		if payload, refusal, err = s.exchange(msg, want); err == nil {
			if refusal != 0 {
				return refusal
			}
			return read(payload)
		}
		s.drop()
	}
	return err
}

func (s *nlSocket) exchange(msg []byte, want uint16) (payload []byte, refusal unix.Errno, err error) {
	s.seq++
	binary.NativeEndian.PutUint32(msg[0:], uint32(len(msg)))
	binary.NativeEndian.PutUint32(msg[8:], s.seq)
	binary.NativeEndian.PutUint32(msg[12:], s.port)
	if _, err := untilDone(unix.Write, s.fd, msg); err != nil {
		return nil, 0, os.NewSyscallError("netlink send", err)
	}
	for range maxStrays {
		n, err := untilDone(unix.Read, s.fd, s.buffer[:])
		if err != nil {
			return nil, 0, os.NewSyscallError("netlink receive", err)
		}
		if n == len(s.buffer) { // there may have been more
			return nil, 0, errShortMessage
		}
		payload, refusal, found, err := findAnswer(s.buffer[:n], s.seq, want)
		if err != nil || found {
			return payload, refusal, err
		}
	}
	return nil, 0, errNoAnswer
}

const (
	nlHeaderLen = 16     // struct nlmsghdr, linux/netlink.h: length, type, flags, sequence, port
	nlaTypeMask = 0x3fff // NLA_TYPE_MASK: without the flags "nested" and "network order"
)

// findAnswer looks in one datagram for the answer to question seq: a message of
// type want, or the kernel's refusal. Messages to other questions (late answers to
// one that was given up) are skipped.
func findAnswer(b []byte, seq uint32, want uint16) (payload []byte, refusal unix.Errno, found bool, err error) {
	for len(b) > 0 {
		if len(b) < nlHeaderLen {
			return nil, 0, false, errShortMessage
		}
		length := int(binary.NativeEndian.Uint32(b))
		if length < nlHeaderLen || length > len(b) {
			return nil, 0, false, errShortMessage
		}
		payload := b[nlHeaderLen:length]
		kind := binary.NativeEndian.Uint16(b[4:])
		if binary.NativeEndian.Uint32(b[8:]) == seq {
			switch kind {
			case want:
				return payload, 0, true, nil
			case unix.NLMSG_ERROR:
				if len(payload) < 4 {
					return nil, 0, false, errShortMessage
				}
				// A negative errno; 0 would be an acknowledgement, which we never ask for.
				if code := int32(binary.NativeEndian.Uint32(payload)); code < 0 && code > -4096 {
					return nil, unix.Errno(-code), true, nil
				}
				return nil, 0, false, fmt.Errorf("netlink: acknowledgement in place of an answer")
			}
		}
		b = b[min(len(b), (length+3)&^3):]
	}
	return nil, 0, false, nil
}

// nextAttr splits the first attribute (struct nlattr: length, type) off b. The flag
// bits of the type are cleared.
func nextAttr(b []byte) (kind uint16, value, rest []byte, err error) {
	if len(b) < 4 {
		return 0, nil, nil, errShortMessage
	}
	length := int(binary.NativeEndian.Uint16(b))
	if length < 4 || length > len(b) {
		return 0, nil, nil, errShortMessage
	}
	kind = binary.NativeEndian.Uint16(b[2:]) & nlaTypeMask
	return kind, b[4:length], b[min(len(b), (length+3)&^3):], nil
}

// inNetNS runs do on a thread that is in the network namespace ns.
func inNetNS(ns int, do func() error) error {
	runtime.LockOSThread()
	current, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("network namespace: %w", err)
	}
	defer unix.Close(current)
	var want, have unix.Stat_t
	if err := errors.Join(unix.Fstat(ns, &want), unix.Fstat(current, &have)); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("network namespace: %w", err)
	}
	if want.Dev == have.Dev && want.Ino == have.Ino {
		defer runtime.UnlockOSThread()
		return do()
	}
	if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return os.NewSyscallError("setns", err)
	}
	err = do()
	if backErr := unix.Setns(current, unix.CLONE_NEWNET); backErr != nil {
		// The thread stays locked, and dies with its goroutine: nobody else may run in
		// the wrong namespace.
		return errors.Join(err, os.NewSyscallError("setns back", backErr))
	}
	runtime.UnlockOSThread()
	return err
}

// untilDone calls again what a signal has interrupted.
func untilDone(call func(int, []byte) (int, error), fd int, b []byte) (int, error) {
	for {
		if n, err := call(fd, b); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

func retryEINTR(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
