package mtls

import (
	"encoding/binary"
	"net"
	"strings"
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
	recordHeader        = 5
	recordHandshake     = 22
	helloClient         = 1
	extensionALPN       = 16
	extensionServerName = 0
	maxPlaintext        = 1 << 14 // RFC 8446 section 5.1
	firstPeek           = 4096    // a ClientHello with X25519MLKEM768 is about 1,500, with a ticket 2,800
	stateCloseWait      = 8       // TCP_CLOSE_WAIT, include/net/tcp_states.h
	handshakeHeader     = 4
	helloFixed          = 2 + 32 // legacy_version, random
	alpnListOverhead    = 2
)

// Peek tells what kind of client is at the other end, and leaves every byte in the
// kernel. It waits for the first byte until quiet has passed, and for the rest
// of a ClientHello until deadline; a ClientHello still incomplete then is Other,
// since its sender is none of ours. At most 16 KiB are looked at.
func Peek(c *net.TCPConn, quiet, deadline time.Time) (Kind, error) {
	return peek(c, quiet, deadline, classify)
}

// PeekServerName returns the server that a client of TLS asks for (RFC 6066 section 3),
// in lower case; "" where it names none, speaks something else, or nothing in time. It
// waits and bounds as Peek does. The name is the client's word, and proves nothing.
func PeekServerName(c *net.TCPConn, quiet, deadline time.Time) (string, error) {
	name := ""
	_, err := peek(c, quiet, deadline, func(b []byte) (found bool, need int) {
		name, need = serverName(b)
		return name != "", need
	})
	return name, err
}

// peek is Peek for whatever look makes of the first bytes: found, or how many of them it
// needs, or none.
func peek(c *net.TCPConn, quiet, deadline time.Time, look func([]byte) (found bool, need int)) (Kind, error) {
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
			found, need := look(buf[:n])
			switch {
			case found:
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
	hello, need := clientHello(b)
	return hello != nil && offersALPN(hello), need
}

// serverName is the name at the start of a stream, and need as of classify.
func serverName(b []byte) (name string, need int) {
	hello, need := clientHello(b)
	if hello == nil {
		return "", need
	}
	return strings.ToLower(namedServer(hello)), 0
}

// clientHello is the body of a ClientHello at the start of a stream, or nil and how many
// bytes it takes to say more; 0: there is none, whatever follows.
func clientHello(b []byte) (hello []byte, need int) {
	if b[0] != recordHandshake {
		return nil, 0
	}
	if len(b) < recordHeader {
		return nil, recordHeader
	}
	size := int(binary.BigEndian.Uint16(b[3:]))
	if b[1] != 3 || size > maxPlaintext || size < handshakeHeader+helloFixed {
		return nil, 0
	}
	if len(b) < recordHeader+handshakeHeader {
		return nil, recordHeader + handshakeHeader
	}
	hello = b[recordHeader:]
	length := int(hello[1])<<16 | int(hello[2])<<8 | int(hello[3])
	// Our proxies send the ClientHello in one record; nobody else's matters.
	if hello[0] != helloClient || length > size-handshakeHeader {
		return nil, 0
	}
	if len(hello) < handshakeHeader+length {
		return nil, recordHeader + handshakeHeader + length
	}
	return hello[handshakeHeader : handshakeHeader+length], 0
}

// extension finds one in a whole ClientHello (RFC 8446 section 4.1.2); nil: it is not
// there.
func extension(b []byte, wanted uint16) []byte {
	var ok bool
	if len(b) < helloFixed {
		return nil
	}
	b = b[helloFixed:]
	if _, b, ok = vector(b, 1); !ok { // legacy_session_id
		return nil
	}
	if _, b, ok = vector(b, 2); !ok { // cipher_suites
		return nil
	}
	if _, b, ok = vector(b, 1); !ok { // legacy_compression_methods
		return nil
	}
	extensions, _, ok := vector(b, 2)
	for ok && len(extensions) >= 4 {
		kind := binary.BigEndian.Uint16(extensions)
		var data []byte
		if data, extensions, ok = vector(extensions[2:], 2); ok && kind == wanted {
			return data
		}
	}
	return nil
}

// offersALPN looks for ours among the protocols (RFC 7301).
func offersALPN(hello []byte) bool {
	names, _, ok := vector(extension(hello, extensionALPN), alpnListOverhead)
	for ok && len(names) > 0 {
		var name []byte
		if name, names, ok = vector(names, 1); ok && string(name) == ALPN {
			return true
		}
	}
	return false
}

// namedServer is the first host name of the extension; there may be no other.
func namedServer(hello []byte) string {
	names, _, ok := vector(extension(hello, extensionServerName), 2)
	if !ok || len(names) == 0 || names[0] != 0 { // host_name
		return ""
	}
	name, _, _ := vector(names[1:], 2)
	return string(name)
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
