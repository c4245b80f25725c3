package redirect

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// fastOpenQueue bounds a listener's connections whose SYN brought data and whose
	// client has not confirmed its address by an ACK; beyond, TCP is as without Fast Open.
	fastOpenQueue = 256

	fastOpenSysctl = "net.ipv4.tcp_fastopen"
	fastOpenClient = 1
	fastOpenServer = 2
)

// beginFast lets the first bytes on fd leave with the SYN, where a cookie of the server's is
// known; where not, the SYN asks for one and carries nothing. With a cookie, connect does
// nothing, and whether there is a connection is told by the first read.
func beginFast(fd int) error {
	err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOPROTOOPT) {
		return nil // the namespace forbids it, or the kernel is old: plain TCP
	}
	return fastOpenError(err)
}

// AcceptFastOpen has l take data from SYNs, once the network namespace allows it (see
// FastOpenMissing), or take none: a listener may come from a process that was set otherwise.
func AcceptFastOpen(l *net.TCPListener, on bool) error {
	queue := 0
	if on {
		queue = fastOpenQueue
	}
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_FASTOPEN, queue) })
	return errors.Join(cerr, fastOpenError(err))
}

func fastOpenError(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("tcp fast open: %w", os.NewSyscallError("setsockopt", err))
}

// FastOpenMissing says what keeps the thread's network namespace from TCP Fast Open in
// both directions, and what to do about it; "": nothing.
func FastOpenMissing() string {
	b, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(fastOpenSysctl, ".", "/"))
	if err != nil {
		return "the kernel's setting cannot be read: " + err.Error()
	}
	is, err := strconv.ParseUint(strings.TrimSpace(string(b)), 0, 32)
	if err != nil {
		return "the kernel's setting cannot be read: " + err.Error()
	}
	var lacks []string
	if is&fastOpenClient == 0 {
		lacks = append(lacks, "send data in a SYN")
	}
	if is&fastOpenServer == 0 {
		lacks = append(lacks, "take data from one")
	}
	if len(lacks) == 0 {
		return ""
	}
	return fmt.Sprintf("%s is %d, so that this host does not %s; set it to %d",
		fastOpenSysctl, is, strings.Join(lacks, ", nor "), is|fastOpenClient|fastOpenServer)
}
