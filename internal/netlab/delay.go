package netlab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A kernel without netem cannot delay packets. Here an nfnetlink queue holds them, and
// this process lets each go when its time has come: for a few thousand packets a second.

const (
	// delayQueue is the number of the queue, in each host's namespace.
	delayQueue = 20
	// delayed bounds the packets that are under way; more are dropped, as by a router.
	delayed = 8192
	// early is how long before a packet's time its host's thread is awake: to be woken up takes
	// up to a tenth of a millisecond on an idle machine, which each pass would add.
	early = 200 * time.Microsecond

	// Of linux/netfilter/nfnetlink_queue.h.
	nfqSubsystem                     = 3
	nfqPacket, nfqVerdict, nfqConfig = 0, 1, 2
	nfqaPacketHeader                 = 1
	nfqaVerdictHeader                = 2
	nfqaConfigCommand                = 1
	nfqaConfigParams                 = 2
	nfqaConfigLength                 = 3
	nfqaConfigMask                   = 4
	nfqaConfigFlags                  = 5
	nfqCommandBind                   = 1
	nfqCopyMeta                      = 1
	nfqFlagGSO                       = 1 << 2
	nfAccept                         = 1
	nfgenSize                        = 4
)

// Delay makes every IPv4 TCP packet that leaves the host by an interface take so much longer,
// until stop is called. It needs iptables.
func (h *Host) Delay(iface string, by time.Duration) (stop func() error, err error) {
	d := &delay{by: by}
	if err := h.Do(d.open); err != nil {
		return nil, fmt.Errorf("netlab: delay on %s: %w", h.name, err)
	}
	var running sync.WaitGroup
	running.Go(d.run)
	rule := []string{"POSTROUTING", "-o", iface, "-p", "tcp", "-j", "NFQUEUE", "--queue-num", strconv.Itoa(delayQueue)}
	err = h.iptables(4, append([]string{"-t", "mangle", "-A"}, rule...)...)
	end := func() error {
		_, werr := unix.Write(d.end, binary.NativeEndian.AppendUint64(nil, 1))
		running.Wait()
		return errors.Join(werr, unix.Close(d.end), unix.Close(d.queue)) // what is held is dropped with the queue
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("netlab: delay on %s: %w", h.name, err), end())
	}
	return func() error {
		err := h.iptables(4, append([]string{"-t", "mangle", "-D"}, rule...)...)
		time.Sleep(2 * by) // for those under way
		return errors.Join(err, end())
	}, nil
}

type heldPacket struct {
	id    uint32
	until time.Time
}

// delay is a bound queue.
type delay struct {
	by    time.Duration
	queue int // the netlink socket
	end   int // an eventfd
	held  []heldPacket
}

func (d *delay) open() (err error) {
	if d.end, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return err
	}
	if d.queue, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER); err != nil {
		_ = unix.Close(d.end)
		return err
	}
	err = unix.Bind(d.queue, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	be32 := func(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
	for _, a := range [][]byte{
		attr(nfqaConfigCommand, []byte{nfqCommandBind, 0, 0, unix.AF_INET}),
		attr(nfqaConfigParams, append(be32(0), nfqCopyMeta)),
		attr(nfqaConfigLength, be32(delayed)),
		append(attr(nfqaConfigMask, be32(nfqFlagGSO)), attr(nfqaConfigFlags, be32(nfqFlagGSO))...),
	} {
		if err == nil {
			err = configure(d.queue, a)
		}
	}
	if err != nil {
		_, _ = unix.Close(d.queue), unix.Close(d.end)
	}
	return err
}

// attr is a netlink attribute, padded.
func attr(kind uint16, data []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(data)))
	b = append(binary.NativeEndian.AppendUint16(b, kind), data...)
	return append(b, make([]byte, (4-len(b)%4)%4)...)
}

// queueMessage is one of nfnetlink_queue's.
func queueMessage(kind uint16, flags uint16, attrs []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+nfgenSize+len(attrs)))
	b = binary.NativeEndian.AppendUint16(b, nfqSubsystem<<8|kind)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|flags)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0) // sequence, port
	b = append(b, unix.AF_UNSPEC, 0)
	b = binary.BigEndian.AppendUint16(b, delayQueue)
	return append(b, attrs...)
}

func configure(fd int, attrs []byte) error {
	if err := unix.Sendto(fd, queueMessage(nfqConfig, unix.NLM_F_ACK, attrs), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	b := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, b, 0) // netlink answers before the request returns
	if err != nil {
		return err
	}
	if n < unix.NLMSG_HDRLEN+4 || binary.NativeEndian.Uint16(b[4:]) != unix.NLMSG_ERROR {
		return errors.New("nfnetlink queue: no acknowledgement")
	}
	if code := int32(binary.NativeEndian.Uint32(b[unix.NLMSG_HDRLEN:])); code != 0 {
		return fmt.Errorf("nfnetlink queue: %w", unix.Errno(-code))
	}
	return nil
}

// run holds and releases until end is written to. Its thread waits by itself, and looks at
// the clock for the last moment: the runtime's timers are late by up to a millisecond where it
// has nothing else to do, which six passes of a new tunnel would sum up.
func (d *delay) run() {
	runtime.LockOSThread() // and ends with it
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	for {
		var rest *unix.Timespec // forever
		if len(d.held) > 0 {
			t := unix.NsecToTimespec(max(0, int64(time.Until(d.held[0].until)-early)))
			rest = &t
		}
		fds := []unix.PollFd{{Fd: int32(d.queue), Events: unix.POLLIN}, {Fd: int32(d.end), Events: unix.POLLIN}}
		if _, err := unix.Ppoll(fds, rest, nil); err != nil && !errors.Is(err, unix.EINTR) || fds[1].Revents != 0 {
			return
		}
		if fds[0].Revents != 0 && !d.receive() {
			return
		}
		d.release()
	}
}

// receive notes when each packet that has come is to go. False: there will be no more.
func (d *delay) receive() bool {
	b := make([]byte, 64<<10)
	for {
		n, err := unix.Read(d.queue, b)
		switch {
		case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EINTR):
			continue // some were dropped
		case err != nil:
			return errors.Is(err, unix.EAGAIN)
		}
		until := time.Now().Add(d.by)
		for m := b[:n]; len(m) >= unix.NLMSG_HDRLEN; {
			size := int(binary.NativeEndian.Uint32(m))
			if size < unix.NLMSG_HDRLEN || size > len(m) {
				break
			}
			if id, ok := packetID(m[:size]); ok {
				d.held = append(d.held, heldPacket{id, until}) // the kernel's queue is bounded
			}
			m = m[min(len(m), (size+3)&^3):]
		}
	}
}

// packetID reads a packet's number.
func packetID(m []byte) (id uint32, ok bool) {
	if binary.NativeEndian.Uint16(m[4:]) != nfqSubsystem<<8|nfqPacket || len(m) < unix.NLMSG_HDRLEN+nfgenSize {
		return 0, false
	}
	for a := m[unix.NLMSG_HDRLEN+nfgenSize:]; len(a) >= 4; {
		size := int(binary.NativeEndian.Uint16(a))
		if size < 4 || size > len(a) {
			break
		}
		if binary.NativeEndian.Uint16(a[2:])&^(1<<15|1<<14) == nfqaPacketHeader && size >= 8 {
			return binary.BigEndian.Uint32(a[4:]), true
		}
		a = a[min(len(a), (size+3)&^3):]
	}
	return 0, false
}

// release lets packets go whose time has come, in the order in which they came.
func (d *delay) release() {
	due := 0
	for ; due < len(d.held) && time.Until(d.held[due].until) <= 0; due++ {
		verdict := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, nfAccept), d.held[due].id)
		_, _ = unix.Write(d.queue, queueMessage(nfqVerdict, 0, attr(nfqaVerdictHeader, verdict)))
	}
	d.held = d.held[due:]
}
