package netlab

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
)

// The pcap file format (draft-ietf-opsawg-pcap): a header of 24 bytes, then each
// packet behind a header of 16.
const (
	pcapMagicMicro = 0xa1b2c3d4
	pcapMagicNano  = 0xa1b23c4d
	pcapMaxPacket  = 1 << 20 // bytes; tcpdump's default snapshot length is 256 KiB
)

// Link types (tcpdump.org/linktypes.html).
const (
	linkEthernet = 1
	linkCooked   = 113 // LINUX_SLL: 16 bytes, ethertype in the last two
	linkCooked2  = 276 // LINUX_SLL2: 20 bytes, ethertype in the first two
)

// Ethertypes and IP protocol numbers (IANA).
const (
	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
	protoTCP  = 6
)

// packet is one recorded frame. Its data is valid until the reader's callback
// returns.
type packet struct {
	link uint32
	data []byte
}

// readPcap calls f with each packet. A last packet cut short ends the file: it is
// being written.
func readPcap(r io.Reader, f func(packet)) error {
	br := bufio.NewReaderSize(r, 1<<20)
	var head [24]byte
	if _, err := io.ReadFull(br, head[:]); err != nil {
		return fmt.Errorf("pcap header: %w", err)
	}
	var order binary.ByteOrder = binary.LittleEndian
	if m := binary.BigEndian.Uint32(head[:]); m == pcapMagicMicro || m == pcapMagicNano {
		order = binary.BigEndian
	} else if m := order.Uint32(head[:]); m != pcapMagicMicro && m != pcapMagicNano {
		return fmt.Errorf("not a pcap file: magic %#x", m)
	}
	link := order.Uint32(head[20:]) & 0x0fffffff // the top bits are about the FCS
	var buf []byte
	for {
		var h [16]byte
		if _, err := io.ReadFull(br, h[:]); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		} else if err != nil {
			return err
		}
		n := order.Uint32(h[8:])
		if n > pcapMaxPacket {
			return fmt.Errorf("packet of %d bytes", n)
		}
		if uint32(cap(buf)) < n {
			buf = make([]byte, n)
		}
		buf = buf[:n]
		if _, err := io.ReadFull(br, buf); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		} else if err != nil {
			return err
		}
		f(packet{link, buf})
	}
}

// network strips the link's header.
func (p packet) network() (ethertype uint16, payload []byte, ok bool) {
	d := p.data
	switch {
	case p.link == linkEthernet && len(d) >= 14:
		return binary.BigEndian.Uint16(d[12:]), d[14:], true
	case p.link == linkCooked && len(d) >= 16:
		return binary.BigEndian.Uint16(d[14:]), d[16:], true
	case p.link == linkCooked2 && len(d) >= 20:
		return binary.BigEndian.Uint16(d), d[20:], true
	}
	return 0, nil, false
}

func (p packet) isIP() bool {
	t, _, ok := p.network()
	return ok && (t == etherIPv4 || t == etherIPv6)
}

// segment is a TCP segment.
type segment struct {
	src, dst netip.AddrPort
	seq      uint32
	syn      bool
	data     []byte
}

// tcp returns the packet's TCP segment, if it is one and unfragmented (the stacks
// of a world send TCP with DF).
func (p packet) tcp() (s segment, ok bool) {
	ethertype, d, ok := p.network()
	if !ok {
		return s, false
	}
	var src, dst netip.Addr
	switch ethertype {
	case etherIPv4:
		src, dst, d, ok = ipv4TCP(d)
	case etherIPv6:
		src, dst, d, ok = ipv6TCP(d)
	default:
		return s, false
	}
	if !ok || len(d) < 20 {
		return s, false
	}
	offset := int(d[12]>>4) * 4
	if offset < 20 || offset > len(d) {
		return s, false
	}
	return segment{
		src:  netip.AddrPortFrom(src, binary.BigEndian.Uint16(d)),
		dst:  netip.AddrPortFrom(dst, binary.BigEndian.Uint16(d[2:])),
		seq:  binary.BigEndian.Uint32(d[4:]),
		syn:  d[13]&0x02 != 0,
		data: d[offset:],
	}, true
}

func ipv4TCP(d []byte) (src, dst netip.Addr, payload []byte, ok bool) {
	if len(d) < 20 || d[0]>>4 != 4 || d[9] != protoTCP {
		return
	}
	header, total := int(d[0]&15)*4, int(binary.BigEndian.Uint16(d[2:]))
	if header < 20 || total < header || total > len(d) || binary.BigEndian.Uint16(d[6:])&0x3fff != 0 {
		return
	}
	return netip.AddrFrom4([4]byte(d[12:16])), netip.AddrFrom4([4]byte(d[16:20])), d[header:total], true
}

func ipv6TCP(d []byte) (src, dst netip.Addr, payload []byte, ok bool) {
	// No extension headers: the stacks of a world send none with TCP.
	if len(d) < 40 || d[0]>>4 != 6 || d[6] != protoTCP {
		return
	}
	total := 40 + int(binary.BigEndian.Uint16(d[4:]))
	if total > len(d) {
		return
	}
	return netip.AddrFrom16([16]byte(d[8:24])), netip.AddrFrom16([16]byte(d[24:40])), d[40:total], true
}
