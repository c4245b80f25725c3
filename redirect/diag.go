package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

var (
	// ErrNoSocket means that no such socket is on this host now, or that nobody
	// listens.
	ErrNoSocket = errors.New("no such socket")
	// ErrReset means that a connection is over, and its addresses are free for others.
	ErrReset = errors.New("connection was reset")
)

// TCP states that matter here (net/tcp_states.h).
const (
	StateEstablished = 1
	StateSynSent     = 2
	StateFinWait2    = 5
	StateTimeWait    = 6
	StateClosed      = 7
	StateListen      = 10
)

// SocketOwner is what the kernel says of a TCP socket (struct inet_diag_msg).
type SocketOwner struct {
	UID      uint32 // of the process that made the socket
	Inode    uint64 // 0: no process holds it any more
	CgroupID uint64 // cgroup v2, where the socket was made; 0 if the kernel has none
	Cookie   uint64 // names the socket for as long as the machine runs
	State    uint8  // net/tcp_states.h
}

// Reliable says whether UID can be believed: of a socket that its process has
// closed only a remnant may be left (TIME_WAIT, or FIN_WAIT2 as a timewait
// mini-socket), which the kernel reports as root's. Remnants have no inode; a
// socket in FIN_WAIT2 that has one is merely half-closed, and still its process's.
// CgroupID stays true.
func (o SocketOwner) Reliable() bool { return o.Inode != 0 && o.State != StateTimeWait }

// Diag asks the kernel (SOCK_DIAG) whose a socket is: exactly the one with the
// given addresses, in a few microseconds, however many there are. It works in the
// network namespace it was opened in and needs no privilege. Safe for concurrent
// use.
type Diag struct{ nl *nlSocket }

// NewDiag opens a Diag in the calling thread's network namespace.
func NewDiag() (*Diag, error) { return NewDiagIn(-1) }

// NewDiagIn opens a Diag in the network namespace that nsFD refers to (a descriptor
// of /proc/PID/ns/net or /run/netns/NAME; the caller may close it). It keeps that
// namespace from going away until Close.
func NewDiagIn(nsFD int) (*Diag, error) {
	nl, err := openNetlink(unix.NETLINK_SOCK_DIAG, nsFD)
	if err != nil {
		return nil, fmt.Errorf("socket diagnosis: %w", err)
	}
	return &Diag{nl}, nil
}

// Close releases the socket and the namespace. Later calls fail with os.ErrClosed.
func (d *Diag) Close() error { return d.nl.close() }

// Owner is the owner of the connected socket whose own address is src and whose
// peer is dst, as its process sees them: for a redirected client, the Tuple that
// Conntrack gives. ErrNoSocket if it is gone, or not connected yet.
//
// A client that resets its connection frees its addresses; another program may use
// them at once. So the answer holds for an accepted connection only if that is
// StillOpen afterwards.
func (d *Diag) Owner(src, dst netip.AddrPort) (SocketOwner, error) {
	src, dst = plain(src), plain(dst)
	owner, err := d.lookup(src, dst, func(f socketFound) bool {
		// The kernel falls back to a listener on src when the connection is gone: that
		// may be somebody else's.
		return f.owner.State != StateListen && f.owner.State != StateSynSent && f.src == src && f.dst == dst
	})
	if err != nil {
		return SocketOwner{}, fmt.Errorf("owner of socket %s to %s: %w", src, dst, err)
	}
	return owner, nil
}

// StillOpen returns ErrReset if the connection has been reset. Until then no other
// connection can have its addresses: the kernel would have answered that with a
// challenge, and the other end this one with a reset.
func StillOpen(c syscall.Conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return fmt.Errorf("state of a connection: %w", err)
	}
	var info *unix.TCPInfo
	if cerr := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }); cerr != nil {
		err = cerr
	}
	switch {
	case err != nil:
		return fmt.Errorf("state of a connection: %w", err)
	case info.State == StateClosed:
		return ErrReset
	}
	return nil
}

// Listener is the owner of the listening socket that a connection from peer to
// origDst would reach without a proxy. ErrNoSocket if nobody listens.
func (d *Diag) Listener(origDst, peer netip.AddrPort) (SocketOwner, error) {
	origDst, peer = plain(origDst), plain(peer)
	listens := func(f socketFound) bool {
		return f.owner.State == StateListen && f.src.Port() == origDst.Port()
	}
	owner, err := d.lookup(origDst, peer, listens)
	if errors.Is(err, ErrNoSocket) {
		// A connection with exactly these addresses hides the listener (one that
		// outlived the rules' installation); from port 0 there can be none.
		owner, err = d.lookup(origDst, netip.AddrPortFrom(peer.Addr(), 0), listens)
	}
	if err != nil {
		return SocketOwner{}, fmt.Errorf("listener on %s: %w", origDst, err)
	}
	return owner, nil
}

// lookup asks for (src, dst), then, for IPv4, for the same as IPv4-mapped IPv6
// addresses, since a dual-stack socket may be filed under either.
func (d *Diag) lookup(src, dst netip.AddrPort, fits func(socketFound) bool) (SocketOwner, error) {
	if !src.IsValid() || !dst.IsValid() || src.Addr().Is4() != dst.Addr().Is4() {
		return SocketOwner{}, errors.New("addresses of two families, or none")
	}
	families := []uint8{unix.AF_INET6}
	if src.Addr().Is4() {
		families = []uint8{unix.AF_INET, unix.AF_INET6}
	}
	for _, family := range families {
		var found socketFound
		request := diagRequest(family, src, dst)
		err := d.nl.query(request[:], sockDiagByFamily, func(payload []byte) (err error) {
			found, err = parseDiag(payload)
			return err
		})
		switch {
		case errors.Is(err, unix.ENOENT):
		case err != nil:
			return SocketOwner{}, err
		case fits(found):
			return found.owner, nil
		}
	}
	return SocketOwner{}, ErrNoSocket
}

const (
	sockDiagByFamily = 20 // SOCK_DIAG_BY_FAMILY, linux/sock_diag.h
	diagRequestLen   = 56 // struct inet_diag_req_v2, linux/inet_diag.h
	diagMessageLen   = 72 // struct inet_diag_msg
	diagCgroupID     = 21 // INET_DIAG_CGROUP_ID
)

// diagRequest is an inet_diag_req_v2 for one socket: its own address is the
// request's source.
func diagRequest(family uint8, src, dst netip.AddrPort) (b [nlHeaderLen + diagRequestLen]byte) {
	binary.NativeEndian.PutUint16(b[4:], sockDiagByFamily)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST)
	r := b[nlHeaderLen:]
	r[0], r[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(r[4:], ^uint32(0)) // all states
	binary.BigEndian.PutUint16(r[8:], src.Port())
	binary.BigEndian.PutUint16(r[10:], dst.Port())
	if family == unix.AF_INET {
		copy(r[12:28], src.Addr().AsSlice())
		copy(r[28:44], dst.Addr().AsSlice())
	} else {
		s, d := src.Addr().As16(), dst.Addr().As16()
		copy(r[12:28], s[:])
		copy(r[28:44], d[:])
	}
	for i := 48; i < 56; i++ { // no cookie: whichever socket has the addresses
		r[i] = 0xff
	}
	return b
}

// socketFound is a parsed inet_diag_msg.
type socketFound struct {
	src, dst netip.AddrPort
	owner    SocketOwner
}

func parseDiag(b []byte) (socketFound, error) {
	if len(b) < diagMessageLen {
		return socketFound{}, errShortMessage
	}
	var src, dst netip.Addr
	switch b[0] {
	case unix.AF_INET:
		src, dst = netip.AddrFrom4([4]byte(b[8:12])), netip.AddrFrom4([4]byte(b[24:28]))
	case unix.AF_INET6:
		src, dst = netip.AddrFrom16([16]byte(b[8:24])).Unmap(), netip.AddrFrom16([16]byte(b[24:40])).Unmap()
	default:
		return socketFound{}, fmt.Errorf("netlink: socket of unknown family %d", b[0])
	}
	f := socketFound{
		src: netip.AddrPortFrom(src, binary.BigEndian.Uint16(b[4:])),
		dst: netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[6:])),
		owner: SocketOwner{
			State:  b[1],
			Cookie: uint64(binary.NativeEndian.Uint32(b[44:])) | uint64(binary.NativeEndian.Uint32(b[48:]))<<32,
			UID:    binary.NativeEndian.Uint32(b[64:]),
			Inode:  uint64(binary.NativeEndian.Uint32(b[68:])),
		},
	}
	for rest := b[diagMessageLen:]; len(rest) > 0; {
		kind, value, next, err := nextAttr(rest)
		if err != nil {
			return socketFound{}, err
		}
		if kind == diagCgroupID {
			if len(value) != 8 {
				return socketFound{}, errShortMessage
			}
			f.owner.CgroupID = binary.NativeEndian.Uint64(value)
		}
		rest = next
	}
	return f, nil
}
