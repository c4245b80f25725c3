package mtls

import (
	"encoding/binary"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// Kind is what the first bytes of an inbound connection are.
type Kind uint8

const (
	// Silent: nothing arrived in time.
	Silent Kind = iota
	// Tunnel: a ClientHello that offers ALPN symbolon/1.
	Tunnel
	// Other: anything else: the client has no proxy.
	Other
	// Closed: the client ended its side, or the connection, before a byte.
	Closed
)

const (
	recordHeader     = 5
	recordHandshake  = 22
	helloClient      = 1
	extensionALPN    = 16
	maxPlaintext     = 1 << 14 // RFC 8446 section 5.1
	firstPeek        = 2048    // a ClientHello with X25519MLKEM768 is about 1,500
	stateCloseWait   = 8       // TCP_CLOSE_WAIT, include/net/tcp_states.h
	handshakeHeader  = 4
	helloFixed       = 2 + 32 // legacy_version, random
	alpnListOverhead = 2
)

// Peek tells what kind of client is at the other end, and leaves every byte in the
// kernel. It waits for the first byte until quiet has passed, and for the rest
// of a ClientHello until deadline; a ClientHello still incomplete then is Other,
// since its sender is none of ours. At most 16 KiB are looked at.
func Peek(c *net.TCPConn, quiet, deadline time.Time) (Kind, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return Closed, err
	}
	defer c.SetReadDeadline(time.Time{})
	if err := c.SetReadDeadline(quiet); err != nil {
		return Closed, err
	}
	var (
		kind    Kind
		started bool
		buf     = make([]byte, firstPeek)
		failure error
	)
	err = raw.Read(func(fd uintptr) bool {
		for {
			n, _, err := unix.Recvfrom(int(fd), buf, unix.MSG_PEEK|unix.MSG_DONTWAIT)
			switch {
			case err == unix.EINTR:
				continue
			case err == unix.EAGAIN:
				return false
			case err != nil:
				kind, failure = Closed, err
				return true
			case n == 0:
				kind = Closed
				return true
			}
			if !started {
				started = true
				// The poller takes the new deadline while this call is under way.
				if err := c.SetReadDeadline(deadline); err != nil {
					kind, failure = Closed, err
					return true
				}
			}
			tunnel, need := classify(buf[:n])
			switch {
			case tunnel:
				kind = Tunnel
				return true
			case need == 0:
				kind = Other
				return true
			case need > len(buf):
				buf = make([]byte, need) // at most one record: classify refuses more
				continue
			case clientDone(int(fd)):
				kind = Other // no more will come
				return true
			}
			return false // until the next segment
		}
	})
	switch {
	case failure != nil:
		return Closed, failure
	case err == nil:
		return kind, nil
	case isTimeout(err) && started:
		return Other, nil
	case isTimeout(err):
		return Silent, nil
	}
	return Closed, err
}

func isTimeout(err error) bool {
	t, ok := err.(interface{ Timeout() bool })
	return ok && t.Timeout()
}

// clientDone: the client's FIN has arrived. A peek cannot tell the end of the
// stream behind unread bytes.
func clientDone(fd int) bool {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	return err == nil && info.State == stateCloseWait
}

// classify looks at the start of a stream. need is how many bytes it must have
// before more can be said; 0: it is no tunnel, whatever follows.
func classify(b []byte) (tunnel bool, need int) {
	if b[0] != recordHandshake {
		return false, 0
	}
	if len(b) < recordHeader {
		return false, recordHeader
	}
	size := int(binary.BigEndian.Uint16(b[3:]))
	if b[1] != 3 || size > maxPlaintext || size < handshakeHeader+helloFixed {
		return false, 0
	}
	if len(b) < recordHeader+handshakeHeader {
		return false, recordHeader + handshakeHeader
	}
	hello := b[recordHeader:]
	length := int(hello[1])<<16 | int(hello[2])<<8 | int(hello[3])
	// Our proxies send the ClientHello in one record; nobody else's matters.
	if hello[0] != helloClient || length > size-handshakeHeader {
		return false, 0
	}
	if len(hello) < handshakeHeader+length {
		return false, recordHeader + handshakeHeader + length
	}
	return offersALPN(hello[handshakeHeader : handshakeHeader+length]), 0
}

// offersALPN walks a whole ClientHello (RFC 8446 section 4.1.2, RFC 7301).
func offersALPN(b []byte) bool {
	var ok bool
	if len(b) < helloFixed {
		return false
	}
	b = b[helloFixed:]
	if _, b, ok = vector(b, 1); !ok { // legacy_session_id
		return false
	}
	if _, b, ok = vector(b, 2); !ok { // cipher_suites
		return false
	}
	if _, b, ok = vector(b, 1); !ok { // legacy_compression_methods
		return false
	}
	extensions, _, ok := vector(b, 2)
	for ok && len(extensions) >= 4 {
		kind := binary.BigEndian.Uint16(extensions)
		var data []byte
		if data, extensions, ok = vector(extensions[2:], 2); !ok || kind != extensionALPN {
			continue
		}
		names, _, ok := vector(data, alpnListOverhead)
		for ok && len(names) > 0 {
			var name []byte
			if name, names, ok = vector(names, 1); ok && string(name) == ALPN {
				return true
			}
		}
		return false
	}
	return false
}

// vector splits a TLS vector with a length of size bytes off b.
func vector(b []byte, size int) (v, rest []byte, ok bool) {
	if len(b) < size {
		return nil, nil, false
	}
	n := 0
	for _, x := range b[:size] {
		n = n<<8 | int(x)
	}
	if b = b[size:]; len(b) < n {
		return nil, nil, false
	}
	return b[:n], b[n:], true
}
