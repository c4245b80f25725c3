package record

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"testing"
)

// sizes of the data in the records of a peer, bytes.
var sizes = []int{1, 17, 300, 5, 1000, 0}

// wholeBefore is how much data the records hold that end at or before a byte.
func wholeBefore(parts [][]byte, at int) (data int) {
	end := 0
	for i, r := range parts {
		if end += len(r); end > at {
			break
		}
		data += sizes[i]
	}
	return data
}

// records are some of a peer's: data of several sizes, then close_notify.
func records(t testing.TB) (stream [][]byte, plain []byte) {
	t.Helper()
	p := newState(t, secretOf(1))
	for i, n := range sizes[:len(sizes)-1] {
		content := bytes.Repeat([]byte{byte('a' + i)}, n)
		plain = append(plain, content...)
		stream = append(stream, sealed(t, p, typeApplicationData, content, i*3))
	}
	return append(stream, sealed(t, p, typeAlert, []byte{alertWarning, 0}, 0)), plain
}

// TestTruncation: wherever the stream stops, the data before it is handed out, and
// the end is an error; only close_notify makes io.EOF.
func TestTruncation(t *testing.T) {
	parts, plain := records(t)
	stream := bytes.Join(parts, nil)
	for n := range len(stream) {
		c, m := receiver(t, stream[:n])
		got, err := io.ReadAll(c.Reader)
		if !errors.Is(err, ErrTruncated) || !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
			t.Fatalf("%d of %d bytes: error %v, want ErrTruncated", n, len(stream), err)
		}
		if want := wholeBefore(parts, n); len(got) != want || !bytes.HasPrefix(plain, got) {
			t.Fatalf("%d of %d bytes: read %d bytes, want %d", n, len(stream), len(got), want)
		}
		if sent := alertIn(t, m); sent != -1 {
			t.Fatalf("alert %d sent to a peer that is gone", sent)
		}
	}
	c, _ := receiver(t, stream)
	if got, err := io.ReadAll(c.Reader); err != nil || !bytes.Equal(got, plain) {
		t.Fatalf("whole stream: %d bytes, %v", len(got), err)
	}
}

// TestBitFlips: every bit of every byte is authenticated. Records before the
// changed one are handed out, it and those behind it are not.
func TestBitFlips(t *testing.T) {
	parts, plain := records(t)
	stream := bytes.Join(parts, nil)
	for at := range stream {
		for bit := range 8 {
			changed := bytes.Clone(stream)
			changed[at] ^= 1 << bit
			c, _ := receiver(t, changed)
			got, err := io.ReadAll(c.Reader)
			// A length that grew may wait for bytes that never come.
			var protocol *ProtocolError
			if !errors.As(err, &protocol) && !errors.Is(err, ErrTruncated) {
				t.Fatalf("byte %d bit %d: error %v", at, bit, err)
			}
			before := wholeBefore(parts, at)
			if len(got) != before || !bytes.HasPrefix(plain, got) {
				t.Fatalf("byte %d bit %d: read %d bytes, want the %d before it", at, bit, len(got), before)
			}
		}
	}
}

// TestOrder: a record that is missing, comes twice, or too early or late, does not
// authenticate.
func TestOrder(t *testing.T) {
	parts, plain := records(t)
	for i := range parts {
		for name, order := range map[string][][]byte{
			"missing":  append(append([][]byte{}, parts[:i]...), parts[min(i+1, len(parts)):]...),
			"repeated": append(append(append([][]byte{}, parts[:i+1]...), parts[i]), parts[i+1:]...),
			"swapped":  swapped(parts, i),
		} {
			if i == len(parts)-1 && name != "swapped" {
				continue // a missing close_notify is a truncation; behind it nothing is read
			}
			t.Run(fmt.Sprintf("%s %d", name, i), func(t *testing.T) {
				c, m := receiver(t, bytes.Join(order, nil))
				got, err := io.ReadAll(c.Reader)
				var protocol *ProtocolError
				if !errors.As(err, &protocol) || protocol.Alert != AlertBadRecordMAC {
					t.Errorf("error %v, want bad_record_mac", err)
				}
				good := i
				if name == "repeated" {
					good = i + 1
				}
				if name == "swapped" && i == len(parts)-1 {
					good = 0
				}
				want := 0
				for _, n := range sizes[:good] {
					want += n
				}
				if len(got) != want || !bytes.HasPrefix(plain, got) {
					t.Errorf("read %d bytes, want %d", len(got), want)
				}
				if sent := alertIn(t, m); sent != int(AlertBadRecordMAC) {
					t.Errorf("alert %d sent", sent)
				}
			})
		}
	}
}

// swapped exchanges record i with the one behind it, the last with the first.
func swapped(parts [][]byte, i int) [][]byte {
	out := append([][]byte{}, parts...)
	j := (i + 1) % len(parts)
	out[i], out[j] = out[j], out[i]
	return out
}
