package main

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
)

// Record types (RFC 8446, 5.1). In TLS 1.3 everything after the hellos is
// "application data" on the outside.
const (
	recordChangeCipher = 20
	recordAlert        = 21
	recordHandshake    = 22
	recordData         = 23

	recordHeader = 5           // type, version, length
	recordMax    = 1<<14 + 256 // bytes of ciphertext (RFC 8446, 5.2)
	frameLength  = 4           // bytes before each piece of data in a tunnel
	recordExtra  = 1 + 16      // bytes that encryption adds: inner type, AES-GCM's tag
)

// tally counts the TLS records of one direction of a connection.
type tally struct {
	records   int
	encrypted [][]byte // with their headers
}

// carrying returns the last encrypted record that holds so many bytes of data, nil
// if there is none.
func (t tally) carrying(size int) []byte {
	for _, r := range slices.Backward(t.encrypted) {
		if len(r) == recordHeader+size+recordExtra {
			return r
		}
	}
	return nil
}

// tallyRecords reads a stream that must be TLS records from its first byte to its
// last; only the last record may be cut short.
func tallyRecords(stream []byte) (t tally, err error) {
	for at := 0; at < len(stream); {
		rest := stream[at:]
		if len(rest) < recordHeader {
			return t, nil
		}
		kind, version, size := rest[0], binary.BigEndian.Uint16(rest[1:]), int(binary.BigEndian.Uint16(rest[3:]))
		if kind < recordChangeCipher || kind > recordData || version>>8 != 3 || size > recordMax {
			return t, fmt.Errorf("byte %d is not the beginning of a TLS record: % x", at, rest[:recordHeader])
		}
		t.records++
		end := min(recordHeader+size, len(rest))
		if kind == recordData {
			t.encrypted = append(t.encrypted, rest[:end])
		}
		at += end
	}
	return t, nil
}

// dump is the classic dump of the first lines, 16 bytes each.
func dump(b []byte, lines int) string {
	text := strings.TrimRight(hex.Dump(b[:min(len(b), 16*lines)]), "\n")
	if len(b) > 16*lines {
		text += fmt.Sprintf("\n... and %d bytes more", len(b)-16*lines)
	}
	return text
}
