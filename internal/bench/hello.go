package main

import (
	"encoding/binary"

	"github.com/symbolon/symbolon/internal/netlab"
)

const (
	recordHandshake  = 22
	helloServer      = 2
	extensionPSK     = 41 // pre_shared_key, RFC 8446 section 4.2.11
	beforeSessionID  = 5 + 4 + 2 + 32
	suiteCompression = 2 + 1
)

// handshakes counts the TLS handshakes in captured streams, and how many of them
// resumed a session: in TLS 1.3 the ServerHello says so, in the clear.
func handshakes(streams []netlab.Stream) (all, resumed int) {
	for _, s := range streams {
		is, psk := serverHello(s.Data)
		if is {
			all++
		}
		if psk {
			resumed++
		}
	}
	return all, resumed
}

// serverHello tells whether a stream begins with one, and whether it picks a
// pre-shared key.
func serverHello(b []byte) (is, psk bool) {
	if len(b) < beforeSessionID+1 || b[0] != recordHandshake || b[5] != helloServer {
		return false, false
	}
	b = b[beforeSessionID:]
	skip := 1 + int(b[0]) + suiteCompression
	if len(b) < skip+2 {
		return true, false
	}
	n := int(binary.BigEndian.Uint16(b[skip:]))
	b = b[skip+2:]
	b = b[:min(n, len(b))]
	for len(b) >= 4 {
		if binary.BigEndian.Uint16(b) == extensionPSK {
			return true, true
		}
		b = b[min(len(b), 4+int(binary.BigEndian.Uint16(b[2:]))):]
	}
	return true, false
}
