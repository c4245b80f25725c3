package mtls

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// A tunnel's handshake begins before anything is known of the other end of its TCP
// connection: what connect would have said comes with the handshake. With TCP Fast Open the
// ClientHello even goes with the SYN, which may arrive twice, or be sent again by somebody
// else. That has no effect: a ClientHello authorizes nobody. The Open follows the client's
// Finished, which answers the server's random, and there is no 0-RTT data.

// unconnected is what connect would have said where a handshake failed with err because
// there never was a connection; nil where there was. Only connecting can fail so within a
// handshake's time: a reset of an open connection is ECONNRESET, and ICMP does not end one.
func unconnected(tcp Socket, err error) error {
	var errno syscall.Errno
	if !errors.As(err, &errno) && unanswered(tcp) {
		var timeout interface{ Timeout() bool }
		if errors.As(err, &timeout) && timeout.Timeout() {
			return connectError(os.ErrDeadlineExceeded)
		}
		errno = failed(tcp) // the runtime's poller has seen that there is an error, and does not say which
	}
	switch errno {
	case syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ETIMEDOUT, syscall.EADDRNOTAVAIL, syscall.EACCES, syscall.EPERM:
		return connectError(errno)
	}
	return nil
}

func connectError(err error) error {
	return &DeniedError{Reason: NetworkReason(err), Err: fmt.Errorf("connecting: %w", err)}
}

// unanswered tells whether no answer to the SYN has come.
func unanswered(tcp Socket) bool {
	var info *unix.TCPInfo
	var err error
	return onSocket(tcp, func(fd int) { info, err = unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO) }) == nil &&
		err == nil && info.State == unix.BPF_TCP_SYN_SENT
}

// failed is a socket's pending error, 0 if there is none.
func failed(tcp Socket) syscall.Errno {
	var v int
	_ = onSocket(tcp, func(fd int) { v, _ = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR) })
	return syscall.Errno(v)
}

func onSocket(tcp Socket, f func(fd int)) error {
	raw, err := tcp.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { f(int(fd)) })
}
