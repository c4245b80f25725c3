package mtls

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"testing"

	"github.com/symbolon/symbolon/mtls/record"
)

// madeUp is a Stream and the Writer of its peer, with secrets made up.
func madeUp(t testing.TB, framed bool, out io.Writer) (*Stream, *record.Writer) {
	t.Helper()
	c := record.Config{
		Suite:      tls.TLS_AES_256_GCM_SHA384,
		ReadSecret: bytes.Repeat([]byte{1}, 48), WriteSecret: bytes.Repeat([]byte{2}, 48),
	}
	w, err := record.NewWriter(io.Discard, c)
	if err != nil {
		t.Fatal(err)
	}
	r, err := record.NewReader(nil, c, w)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Detach(io.Discard); err != nil {
		t.Fatal(err)
	}
	s := &Stream{r: r, w: w}
	if framed {
		s.frames = &frames{}
	}
	c.ReadSecret, c.WriteSecret = c.WriteSecret, c.ReadSecret
	peer, err := record.NewWriter(out, c)
	if err != nil {
		t.Fatal(err)
	}
	return s, peer
}

// unframe is the reference: what the frames of b hold, what stands behind their end,
// and io.EOF, ErrProtocol, or nil where b is not all.
func unframe(b []byte) (data, rest []byte, err error) {
	for len(b) >= lengthSize {
		n := int(binary.BigEndian.Uint32(b))
		switch b = b[lengthSize:]; {
		case n == 0:
			return data, b, io.EOF
		case n > maxFrame:
			return data, nil, ErrProtocol
		case n > len(b):
			return append(data, b...), nil, nil
		}
		data, b = append(data, b[:n]...), b[n:]
	}
	return data, nil, nil
}

// FuzzStreamOpen: frames that are cut anywhere, over records and reads, in any number
// of slices, give what a simple reader of the whole gives: the same bytes, the same
// end, and the same rest behind it.
func FuzzStreamOpen(f *testing.F) {
	f.Add([]byte{0, 0, 0, 2, 'h', 'i', 0, 0, 0, 0, 'x'}, []byte{1}, []byte{0}, true, uint8(1))
	f.Add([]byte{0, 0, 0, 1, 'a', 0, 0, 0, 1, 'b', 0, 0, 0, 0, 0, 0, 0, 0}, []byte{3, 7}, []byte{5, 1}, true, uint8(2))
	f.Add([]byte{0, 0x10, 0, 1, 'x'}, []byte{200}, []byte{255}, true, uint8(64))
	f.Add(bytes.Repeat([]byte{0, 0, 0, 1, 'z'}, 200), []byte{}, []byte{9}, true, uint8(3))
	f.Add(append([]byte{0, 0, 0x50, 0}, make([]byte, 0x5000)...), []byte{255, 255}, []byte{}, true, uint8(4))
	f.Add([]byte("no frames at all"), []byte{2}, []byte{1, 2, 3}, false, uint8(1))
	f.Fuzz(func(t *testing.T, plain, records, reads []byte, framed bool, slots uint8) {
		if len(plain) > 1<<18 {
			return
		}
		var sealed bytes.Buffer
		s, peer := madeUp(t, framed, &sealed)
		for i, left := 0, plain; len(left) > 0; i++ {
			n := len(left)
			if len(records) > 0 && i < 2000 {
				n = min(n, int(records[i%len(records)])*int(records[i%len(records)])+1)
			}
			if _, err := peer.Write(left[:n]); err != nil {
				t.Fatal(err)
			}
			if left = left[n:]; i%7 == 6 {
				if err := peer.SendKeyUpdate(i%2 == 0); err != nil {
					t.Fatal(err)
				}
			}
		}
		want, wantRest, wantErr := plain, []byte(nil), error(nil)
		if framed {
			want, wantRest, wantErr = unframe(plain)
		}

		var got, in []byte
		var end error
		stream := sealed.Bytes()
		for i := 0; end == nil && len(stream) > 0; i++ {
			n := len(stream)
			if len(reads) > 0 && i < 5000 {
				n = min(n, int(reads[i%len(reads)])*int(reads[i%len(reads)])+1)
			}
			in, stream = append(in, stream[:n]...), stream[n:]
			at := 0
			for end == nil {
				used, data, err := s.Open(in[at:], make([][]byte, 0, max(slots, 1)))
				for _, b := range data {
					if len(b) == 0 {
						t.Fatal("an empty slice")
					}
					got = append(got, b...)
				}
				at += used
				if end = err; used == 0 && len(data) == 0 {
					break
				}
			}
			in = bytes.Clone(in[at:])
			if len(in) > record.MaxRecord && end == nil {
				t.Fatalf("%d bytes are left over", len(in))
			}
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("read %d bytes, want %d, or others", len(got), len(want))
		}
		if wantErr == nil && end != nil || !errors.Is(end, wantErr) {
			t.Fatalf("ends with %v, want %v", end, wantErr)
		}
		if !errors.Is(end, io.EOF) {
			return
		}
		// What stands behind belongs to whatever follows on the tunnel.
		s.r.Attach(io.MultiReader(bytes.NewReader(stream)), s.plain, in)
		rest := make([]byte, len(wantRest))
		if _, err := io.ReadFull(s.r, rest); err != nil || !bytes.Equal(rest, wantRest) {
			t.Fatalf("behind the end: %d bytes, %v, or others", len(rest), err)
		}
		if n, err := s.r.Read(make([]byte, 1)); n != 0 || !errors.Is(err, ErrTruncated) {
			t.Fatalf("and then %d bytes, %v", n, err)
		}
	})
}
