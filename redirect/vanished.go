package redirect

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultPeerTimeout is how long a peer may leave what it was sent unanswered. It is
// what DefaultKeepAlive needs to find a peer gone that is owed nothing, so that a
// vanished peer is found in the same time whether bytes are on their way to it or not.
// The kernel by itself takes a quarter of an hour for the former.
const DefaultPeerTimeout = 2 * time.Minute

// WatchVanished ends this process's TCP connections with peers that have vanished
// without a word while bytes were on their way to them, until ctx ends; they fail with
// ETIMEDOUT. A peer has vanished if it has acknowledged nothing for limit, neither
// bytes nor the kernel's questions for room; the connection ends when the kernel next
// tries to send, so after twice limit and a bit at the latest.
//
// TCP_USER_TIMEOUT alone, set on every socket, would do the like, but would also end a
// connection whose peer is alive and merely does not read: a pager at its prompt, a
// debugger, a paused consumer. So it is set only on sockets whose peer does not answer.
//
// failed hears of attempts that did not work.
func (d *Diag) WatchVanished(ctx context.Context, limit time.Duration, failed func(error)) {
	tick := time.NewTicker(max(limit/4, time.Millisecond))
	defer tick.Stop()
	suspects := map[uint64]bool{} // by cookie
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := d.endVanished(limit, suspects); err != nil {
				failed(err)
			}
		}
	}
}

// unansweredTries is after how many repetitions a socket is looked at. The kernel
// begins again at 0 with every answer.
const unansweredTries = 2

// endVanished looks at every socket once. suspects are those that have the option.
func (d *Diag) endVanished(limit time.Duration, suspects map[uint64]bool) error {
	inodes := map[uint64]uint64{} // cookie by inode
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if err := d.open(family, func(s SocketOwner, queued uint32, tries uint8) {
			// A suspect is looked at in any case: it may have answered.
			if s.Inode != 0 && (queued > 0 && tries >= unansweredTries || suspects[s.Cookie]) {
				inodes[s.Inode] = s.Cookie
			}
		}); err != nil {
			return fmt.Errorf("look for vanished peers: %w", err)
		}
	}
	if len(inodes) == 0 {
		clear(suspects)
		return nil
	}
	still := map[uint64]bool{}
	err := ownSocketsOf(inodes, func(fd int, cookie uint64) error {
		info, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO)
		if err != nil {
			return os.NewSyscallError("getsockopt TCP_INFO", err)
		}
		gone := time.Duration(info.Last_ack_recv)*time.Millisecond >= limit
		if gone {
			still[cookie] = true
		}
		if gone == suspects[cookie] {
			return nil
		}
		value := 0
		if gone {
			value = int(limit.Milliseconds())
		}
		return os.NewSyscallError("setsockopt TCP_USER_TIMEOUT", unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_USER_TIMEOUT, value))
	})
	clear(suspects)
	for cookie := range still {
		suspects[cookie] = true
	}
	if err != nil {
		return fmt.Errorf("look for vanished peers: %w", err)
	}
	return nil
}

// ownSocketsOf finds this process's descriptors of the sockets with the given inodes.
// A descriptor may be closed at any moment, and its number be another socket's: use
// is called only if the cookie is the right one.
func ownSocketsOf(inodes map[uint64]uint64, use func(fd int, cookie uint64) error) error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		link, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil {
			continue // closed meanwhile
		}
		number, ok := strings.CutPrefix(link, "socket:[")
		if !ok {
			continue
		}
		inode, _ := strconv.ParseUint(strings.TrimSuffix(number, "]"), 10, 64)
		cookie, ok := inodes[inode]
		if !ok {
			continue
		}
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if now, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE); err == nil && now == cookie {
			errs = append(errs, use(fd, cookie))
		}
	}
	return errors.Join(errs...)
}

// withData are the states in which a socket may have bytes on their way, as a mask
// (net/tcp_states.h): established, FIN_WAIT1, CLOSE_WAIT, LAST_ACK, CLOSING.
const withData = 1<<1 | 1<<4 | 1<<8 | 1<<9 | 1<<11

// open lists the sockets of a family that may have bytes on their way: how many have
// not been acknowledged, and how often the last were repeated in vain.
func (d *Diag) open(family uint8, each func(s SocketOwner, queued uint32, tries uint8)) error {
	d.nl.mu.Lock()
	ns := d.nl.ns
	d.nl.mu.Unlock()
	if ns < 0 {
		return os.ErrClosed
	}
	nl, err := openNetlink(unix.NETLINK_SOCK_DIAG, ns)
	if err != nil {
		return err
	}
	defer func() { _ = nl.close() }()
	var request [nlHeaderLen + diagRequestLen]byte
	binary.NativeEndian.PutUint32(request[0:], uint32(len(request)))
	binary.NativeEndian.PutUint16(request[4:], sockDiagByFamily)
	binary.NativeEndian.PutUint16(request[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	r := request[nlHeaderLen:]
	r[0], r[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(r[4:], withData)
	if err := unix.Sendto(nl.fd, request[:], 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("netlink send", err)
	}
	buffer := make([]byte, 64<<10)
	for {
		var n int
		if err := retryEINTR(func() (err error) {
			n, _, err = unix.Recvfrom(nl.fd, buffer, 0)
			return err
		}); err != nil {
			return os.NewSyscallError("netlink receive", err)
		}
		if done, err := dumped(buffer[:n], each); done || err != nil {
			return err
		}
	}
}

// dumped reads the sockets in one datagram of a dump.
func dumped(b []byte, each func(s SocketOwner, queued uint32, tries uint8)) (done bool, err error) {
	for len(b) >= nlHeaderLen {
		length := int(binary.NativeEndian.Uint32(b))
		if length < nlHeaderLen || length > len(b) {
			return false, errShortMessage
		}
		payload := b[nlHeaderLen:length]
		switch binary.NativeEndian.Uint16(b[4:]) {
		case unix.NLMSG_DONE:
			return true, nil
		case unix.NLMSG_ERROR:
			if len(payload) < 4 {
				return false, errShortMessage
			}
			return false, unix.Errno(-int32(binary.NativeEndian.Uint32(payload)))
		case sockDiagByFamily:
			f, err := parseDiag(payload)
			if err != nil {
				return false, err
			}
			each(f.owner, binary.NativeEndian.Uint32(payload[60:]), payload[3]) // idiag_wqueue, idiag_retrans
		}
		b = b[min(len(b), (length+3)&^3):]
	}
	return false, nil
}
