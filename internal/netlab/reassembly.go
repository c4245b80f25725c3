package netlab

import (
	"cmp"
	"net/netip"
	"slices"
)

// Stream is what one direction of a TCP connection carried, in order.
type Stream struct {
	Src, Dst netip.AddrPort
	Data     []byte
}

// reassembly puts TCP streams together. The zero value is ready.
type reassembly struct {
	current map[[2]netip.AddrPort]*direction
	all     []*direction
}

// direction collects the segments of one direction of one connection.
type direction struct {
	src, dst netip.AddrPort
	first    uint32 // sequence number of the SYN, or of the first segment seen
	syn      bool
	pieces   []piece
}

// piece is a segment's data, at its distance from direction.first. The distance
// is signed: a capture that begins amid a connection may see an older segment.
type piece struct {
	at   int32
	data []byte
}

// add takes a segment, in any order and any number of times: on "any", a packet
// is seen at each interface that it passes. The data is copied.
func (r *reassembly) add(s segment) {
	if r.current == nil {
		r.current = make(map[[2]netip.AddrPort]*direction)
	}
	key := [2]netip.AddrPort{s.src, s.dst}
	d := r.current[key]
	// A SYN with another number is a new connection between the same ports.
	if d == nil || s.syn && (!d.syn || d.first != s.seq) {
		d = &direction{src: s.src, dst: s.dst, first: s.seq, syn: s.syn}
		r.current[key] = d
		r.all = append(r.all, d)
	}
	if len(s.data) == 0 {
		return
	}
	seq := s.seq
	if s.syn {
		seq++ // the SYN itself takes one number (RFC 9293, 3.4)
	}
	d.pieces = append(d.pieces, piece{int32(seq - d.first), slices.Clone(s.data)})
}

// streams joins the pieces. Where some are missing, a new stream begins, so that
// bytes that never followed each other are not found together.
func (r *reassembly) streams() []Stream {
	var streams []Stream
	for _, d := range r.all {
		slices.SortStableFunc(d.pieces, func(a, b piece) int { return cmp.Compare(a.at, b.at) })
		var s *Stream
		var end int64
		for _, p := range d.pieces {
			at := int64(p.at)
			if s == nil || at > end {
				streams = append(streams, Stream{Src: d.src, Dst: d.dst})
				s, end = &streams[len(streams)-1], at
			}
			if have := end - at; have < int64(len(p.data)) {
				s.Data = append(s.Data, p.data[have:]...)
				end = at + int64(len(p.data))
			}
		}
	}
	return streams
}
