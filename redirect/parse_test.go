package redirect

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// message wraps a payload in a netlink header.
func message(kind uint16, seq uint32, payload []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(nlHeaderLen+len(payload)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, 0)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = append(b, payload...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func TestFindAnswer(t *testing.T) {
	refusal := func(code int32) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(code)) }
	ours, other := message(20, 7, []byte("ours")), message(20, 6, []byte("other"))
	for _, c := range []struct {
		name    string
		in      []byte
		payload string
		refusal unix.Errno
		found   bool
		fails   bool
	}{
		{name: "answer", in: ours, payload: "ours", found: true},
		{name: "behind another's", in: append(bytes.Clone(other), ours...), payload: "ours", found: true},
		{name: "another's only", in: other},
		{name: "refusal", in: message(unix.NLMSG_ERROR, 7, refusal(-2)), refusal: unix.ENOENT, found: true},
		{name: "another's refusal", in: message(unix.NLMSG_ERROR, 6, refusal(-2))},
		{name: "acknowledgement", in: message(unix.NLMSG_ERROR, 7, refusal(0)), fails: true},
		{name: "senseless refusal", in: message(unix.NLMSG_ERROR, 7, refusal(-1<<31)), fails: true},
		{name: "refusal cut short", in: message(unix.NLMSG_ERROR, 7, nil), fails: true},
		{name: "cut short", in: ours[:10], fails: true},
		{name: "longer than it is", in: append([]byte{0xff}, ours[1:]...), fails: true},
		{name: "shorter than a header", in: append([]byte{3}, ours[1:]...), fails: true},
		{name: "nothing", in: nil},
	} {
		payload, refused, found, err := findAnswer(c.in, 7, 20)
		if string(payload) != c.payload || refused != c.refusal || found != c.found || (err != nil) != c.fails {
			t.Errorf("%s: %q, %v, %v, %v", c.name, payload, refused, found, err)
		}
	}
}

func TestConntrackRequestIsReadBack(t *testing.T) {
	for _, want := range []Tuple{
		{netip.MustParseAddrPort("127.0.0.1:15001"), netip.MustParseAddrPort("10.0.0.9:40000")},
		{netip.MustParseAddrPort("[::1]:15001"), netip.MustParseAddrPort("[fd00::9]:40000")},
	} {
		b := conntrackRequest(want)
		_, tuple, _, err := nextAttr(b[nlHeaderLen+nfHeaderLen:])
		check(t, err)
		if got, err := parseTuple(tuple); err != nil || got != want {
			t.Errorf("%v, %v; want %v", got, err, want)
		}
		// CTA_TUPLE_ZONE, in which nothing is nested.
		zoned := appendAttr(bytes.Clone(tuple), 3, []byte{0x4d, 0x00})
		if got, err := parseTuple(zoned); err != nil || got != want {
			t.Errorf("in a zone: %v, %v; want %v", got, err, want)
		}
	}
	udp := appendAttr(nil, ctaTupleProto, appendAttr(nil, ctaProtoNum, []byte{unix.IPPROTO_UDP}))
	if got, err := parseTuple(udp); !errors.Is(err, errShortMessage) {
		t.Errorf("half a tuple: %v, %v", got, err)
	}
}

// Whatever the kernel (or who pretends to be) sends: no panic, no read beyond the
// message, and nothing half-parsed without an error.
func FuzzNetlinkAnswer(f *testing.F) {
	src, dst := netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("10.0.0.2:2")
	diag := make([]byte, diagMessageLen)
	diag[0], diag[1] = unix.AF_INET, StateListen
	f.Add(message(sockDiagByFamily, 1, appendAttr(diag, diagCgroupID, make([]byte, 8))))
	f.Add(message(sockDiagByFamily, 1, appendAttr(diag, diagCgroupID, make([]byte, 7))))
	tuple := conntrackRequest(Tuple{src, dst})[nlHeaderLen+nfHeaderLen:]
	orig := bytes.Clone(tuple)
	binary.NativeEndian.PutUint16(orig[2:], ctaTupleOrig|unix.NLA_F_NESTED)
	f.Add(message(ctNew, 1, append(append(make([]byte, nfHeaderLen), orig...), tuple...)))
	f.Add(message(unix.NLMSG_ERROR, 1, []byte{0xfe, 0xff, 0xff, 0xff}))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, want := range []uint16{sockDiagByFamily, ctNew} {
			payload, refusal, found, err := findAnswer(b, 1, want)
			if (refusal != 0 || err != nil) && payload != nil {
				t.Error("a payload beside an error")
			}
			if !found || refusal != 0 {
				continue
			}
			if socket, err := parseDiag(payload); err == nil {
				if !socket.src.IsValid() || !socket.dst.IsValid() || len(payload) < diagMessageLen {
					t.Errorf("parsed %+v from %d bytes", socket, len(payload))
				}
			} else if socket != (socketFound{}) {
				t.Errorf("%+v beside error %v", socket, err)
			}
			if o, r, err := parseConntrack(payload); err == nil {
				for _, tuple := range []Tuple{o, r} {
					if !tuple.Src.IsValid() || !tuple.Dst.IsValid() {
						t.Errorf("parsed %v, %v", o, r)
					}
				}
			} else if o != (Tuple{}) || r != (Tuple{}) {
				t.Errorf("%v, %v beside error %v", o, r, err)
			}
		}
	})
}

// iptables-save's output is made by root's programs, with comments by anyone.
func FuzzSaved(f *testing.F) {
	f.Add("*nat\n:OUTPUT ACCEPT [0:0]\n:SYMBOLON_OUT - [0:0]\n-A OUTPUT -m comment --comment \"-j x\" -j SYMBOLON_OUT\n-A SYMBOLON_OUT -j RETURN\nCOMMIT\n")
	want := []chain{{chainOut, "OUTPUT", []string{"-j RETURN"}}}
	f.Fuzz(func(t *testing.T, out string) {
		saved := parseSaved(out)
		saved.drift("IPv4", "nat", want)
		for _, line := range saved.deleteJumps(chainOut) {
			if bytes.ContainsRune([]byte(line), '\n') || !bytes.HasPrefix([]byte(line), []byte("-D ")) {
				t.Errorf("line %q", line)
			}
		}
	})
}
