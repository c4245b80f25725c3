package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Tuple is a connection's two ends as its client made it, before any translation
// on this host.
type Tuple struct{ Src, Dst netip.AddrPort }

// String gives "src to dst".
func (t Tuple) String() string { return fmt.Sprintf("%s to %s", t.Src, t.Dst) }

// ErrNoConntrack means that the kernel has no record of a connection (any more).
var ErrNoConntrack = errors.New("connection unknown to conntrack")

// Conntrack asks the kernel's connection tracking (ctnetlink) what a redirected
// connection was before, in a few microseconds. It works in the network namespace
// it was opened in and needs CAP_NET_ADMIN. Safe for concurrent use.
type Conntrack struct {
	nl          *nlSocket
	transparent uint16 // the inbound listener's port, if TPROXY gives it connections
}

// NewConntrack opens a Conntrack in the calling thread's network namespace.
func NewConntrack() (*Conntrack, error) {
	nl, err := openNetlink(unix.NETLINK_NETFILTER, -1)
	if err != nil {
		return nil, fmt.Errorf("connection tracking: %w", err)
	}
	return &Conntrack{nl: nl}, nil
}

// Close releases the socket and the namespace. Later calls fail with os.ErrClosed.
func (c *Conntrack) Close() error { return c.nl.close() }

// ClientTuple tells, for a connection that one of our listeners accepted, its
// client's address as the client sees it, and the original destination, on which
// two independent sources agree. Where several connections from one client port
// are redirected to one listener, conn.RemoteAddr has another port than the client.
//
// ErrNotRedirected if the connection was made straight to the listener,
// ErrNoConntrack if its record is gone.
func (c *Conntrack) ClientTuple(conn Accepted) (Tuple, error) {
	if tuple, ok, err := c.untranslated(conn); ok || err != nil {
		return tuple, err
	}
	dst, err := OriginalDst(conn)
	if err != nil {
		return Tuple{}, err
	}
	local, err := addrPort(conn.LocalAddr())
	if err != nil {
		return Tuple{}, err
	}
	remote, err := addrPort(conn.RemoteAddr())
	if err != nil {
		return Tuple{}, err
	}
	tuple, err := c.original(Tuple{Src: local, Dst: remote})
	if err != nil {
		return Tuple{}, fmt.Errorf("client of the connection to %s: %w", dst, err)
	}
	if tuple.Dst != dst {
		return Tuple{}, fmt.Errorf("client of the connection to %s: conntrack says %s", dst, tuple)
	}
	return tuple, nil
}

// original finds the entry whose packets in the reply direction are reply's.
func (c *Conntrack) original(reply Tuple) (Tuple, error) {
	var orig, seen Tuple
	err := c.nl.query(conntrackRequest(reply), ctNew, func(payload []byte) (err error) {
		orig, seen, err = parseConntrack(payload)
		return err
	})
	switch {
	case errors.Is(err, unix.ENOENT):
		return Tuple{}, ErrNoConntrack
	case err != nil:
		return Tuple{}, fmt.Errorf("conntrack: %w", err)
	case seen != reply:
		// Found by its original direction: a connection that this end began.
		return Tuple{}, fmt.Errorf("%w: no reply %s", ErrNoConntrack, reply)
	}
	return orig, nil
}

// linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h
const (
	ctNew = 0x100 // NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_NEW
	ctGet = 0x101 // IPCTNL_MSG_CT_GET

	nfHeaderLen = 4 // struct nfgenmsg: family, version, resource

	ctaTupleOrig  = 1
	ctaTupleReply = 2

	ctaTupleIP    = 1
	ctaTupleProto = 2

	ctaIPv4Src, ctaIPv4Dst = 1, 2
	ctaIPv6Src, ctaIPv6Dst = 3, 4

	ctaProtoNum                  = 1
	ctaProtoSrcPort, ctaProtoDst = 2, 3
)

func conntrackRequest(reply Tuple) []byte {
	family, srcType, dstType := byte(unix.AF_INET), uint16(ctaIPv4Src), uint16(ctaIPv4Dst)
	if !reply.Src.Addr().Is4() {
		family, srcType, dstType = unix.AF_INET6, ctaIPv6Src, ctaIPv6Dst
	}
	port := func(p uint16) []byte { return binary.BigEndian.AppendUint16(nil, p) }
	ip := appendAttr(nil, srcType, reply.Src.Addr().AsSlice())
	ip = appendAttr(ip, dstType, reply.Dst.Addr().AsSlice())
	proto := appendAttr(nil, ctaProtoNum, []byte{unix.IPPROTO_TCP})
	proto = appendAttr(proto, ctaProtoSrcPort, port(reply.Src.Port()))
	proto = appendAttr(proto, ctaProtoDst, port(reply.Dst.Port()))
	tuple := appendAttr(nil, ctaTupleIP|unix.NLA_F_NESTED, ip)
	tuple = appendAttr(tuple, ctaTupleProto|unix.NLA_F_NESTED, proto)

	b := make([]byte, nlHeaderLen+nfHeaderLen, 128)
	binary.NativeEndian.PutUint16(b[4:], ctGet)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST)
	b[nlHeaderLen] = family
	return appendAttr(b, ctaTupleReply|unix.NLA_F_NESTED, tuple)
}

func appendAttr(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func parseConntrack(b []byte) (orig, reply Tuple, err error) {
	if len(b) < nfHeaderLen {
		return orig, reply, errShortMessage
	}
	for b = b[nfHeaderLen:]; len(b) > 0; {
		kind, value, rest, err := nextAttr(b)
		if err != nil {
			return Tuple{}, Tuple{}, err
		}
		switch kind {
		case ctaTupleOrig:
			orig, err = parseTuple(value)
		case ctaTupleReply:
			reply, err = parseTuple(value)
		}
		if err != nil {
			return Tuple{}, Tuple{}, err
		}
		b = rest
	}
	if !orig.Src.IsValid() || !reply.Src.IsValid() {
		return Tuple{}, Tuple{}, errShortMessage
	}
	return orig, reply, nil
}

// parseTuple reads CTA_TUPLE_*: addresses and ports of one direction, nested. Only
// a whole tuple of TCP is one.
func parseTuple(b []byte) (Tuple, error) {
	var src, dst netip.Addr
	var srcPort, dstPort, proto []byte
	for len(b) > 0 {
		part, inner, rest, err := nextAttr(b)
		if err != nil {
			return Tuple{}, err
		}
		if part != ctaTupleIP && part != ctaTupleProto {
			inner = nil // the zone: nothing is nested in it
		}
		for len(inner) > 0 {
			kind, value, next, err := nextAttr(inner)
			if err != nil {
				return Tuple{}, err
			}
			switch {
			case part == ctaTupleIP && (kind == ctaIPv4Src || kind == ctaIPv6Src):
				src, _ = netip.AddrFromSlice(value)
			case part == ctaTupleIP && (kind == ctaIPv4Dst || kind == ctaIPv6Dst):
				dst, _ = netip.AddrFromSlice(value)
			case part == ctaTupleProto && kind == ctaProtoNum:
				proto = value
			case part == ctaTupleProto && kind == ctaProtoSrcPort:
				srcPort = value
			case part == ctaTupleProto && kind == ctaProtoDst:
				dstPort = value
			}
			inner = next
		}
		b = rest
	}
	if !src.IsValid() || !dst.IsValid() || src.BitLen() != dst.BitLen() ||
		len(srcPort) != 2 || len(dstPort) != 2 || len(proto) != 1 || proto[0] != unix.IPPROTO_TCP {
		return Tuple{}, errShortMessage
	}
	return Tuple{
		Src: netip.AddrPortFrom(src.Unmap(), binary.BigEndian.Uint16(srcPort)),
		Dst: netip.AddrPortFrom(dst.Unmap(), binary.BigEndian.Uint16(dstPort)),
	}, nil
}
