package mtls

import (
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"

	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls/record"
)

const (
	// ALPN names the protocol in the handshake.
	ALPN = "symbolon/1"
	// MessageVersion is Open.version.
	MessageVersion = 1
	// MaxMessage bounds Open and Verdict, in bytes without their length.
	MaxMessage = 16 << 10

	// MaxEarly bounds Open.early, in bytes.
	MaxEarly = 8 << 10

	lengthSize = 4
)

// FlowID is the name of one connection in the records of both sides.
type FlowID [16]byte

// NewFlowID is random.
func NewFlowID() (id FlowID) {
	rand.Read(id[:]) // never fails: crypto/rand crashes the program instead
	return id
}

func (id FlowID) String() string { return hex.EncodeToString(id[:]) }

// writeMessage sends m behind its length in one write.
func writeMessage(w io.Writer, m proto.Message) error {
	b, err := appendMessage(make([]byte, 0, 256), m)
	if err == nil {
		_, err = w.Write(b)
	}
	return err
}

// appendMessage appends m behind its length.
func appendMessage(b []byte, m proto.Message) ([]byte, error) {
	at := len(b)
	b, err := proto.MarshalOptions{}.MarshalAppend(append(b, make([]byte, lengthSize)...), m)
	if err != nil {
		return nil, err
	}
	n := len(b) - at - lengthSize
	if n > MaxMessage {
		return nil, fmt.Errorf("%w: %d bytes", ErrOpenTooLarge, n)
	}
	binary.BigEndian.PutUint32(b[at:], uint32(n))
	return b, nil
}

// readMessage reads one message, and not a byte behind it.
func readMessage(r io.Reader, m proto.Message) error {
	var head [lengthSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > MaxMessage {
		return fmt.Errorf("%w: %d bytes, at most %d", ErrOpenTooLarge, n, MaxMessage)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	return unmarshalMessage(b, m)
}

func unmarshalMessage(b []byte, m proto.Message) error {
	if err := proto.Unmarshal(b, m); err != nil {
		return fmt.Errorf("%w: %w", ErrOpenMalformed, err)
	}
	return nil
}

// NewOpen is the Open for a connection to destination.
func NewOpen(id FlowID, destination netip.AddrPort, protection symbolonv1.Protection, generation uint64) *symbolonv1.Open {
	return &symbolonv1.Open{
		Version:          MessageVersion,
		DestinationIp:    destination.Addr().Unmap().AsSlice(),
		DestinationPort:  uint32(destination.Port()),
		Protection:       protection,
		FlowId:           id[:],
		PolicyGeneration: generation,
	}
}

// checkOpen refuses what a well-meaning client never sends.
// Errors: ErrVersion, ErrOpenMalformed.
func checkOpen(o *symbolonv1.Open) error {
	if o.GetVersion() != MessageVersion {
		return fmt.Errorf("%w: %d, want %d", ErrVersion, o.GetVersion(), MessageVersion)
	}
	if _, ok := netip.AddrFromSlice(o.GetDestinationIp()); !ok {
		return fmt.Errorf("%w: destination address of %d bytes", ErrOpenMalformed, len(o.GetDestinationIp()))
	}
	if p := o.GetDestinationPort(); p == 0 || p > 65535 {
		return fmt.Errorf("%w: destination port %d", ErrOpenMalformed, p)
	}
	if len(o.GetFlowId()) != len(FlowID{}) {
		return fmt.Errorf("%w: flow id of %d bytes", ErrOpenMalformed, len(o.GetFlowId()))
	}
	if !validProtection(o.GetProtection()) {
		return fmt.Errorf("%w: protection %d", ErrOpenMalformed, o.GetProtection())
	}
	if o.GetFramed() && o.GetProtection() != symbolonv1.Protection_PROTECTION_ENCRYPTED {
		return fmt.Errorf("%w: frames without encryption", ErrOpenMalformed)
	}
	if n := len(o.GetEarly()); n > MaxEarly || n > 0 && (o.GetProtection() != symbolonv1.Protection_PROTECTION_AUTHENTICATED || len(o.GetRenews()) > 0) {
		return fmt.Errorf("%w: %d early bytes, at most %d, and only of a connection without encryption", ErrOpenMalformed, n, MaxEarly)
	}
	if n := len(o.GetRenews()); n != 0 && (n != len(Claim{}) || o.GetFramed() || o.GetRenewable()) {
		return fmt.Errorf("%w: a claim of %d bytes, or on a connection of its own", ErrOpenMalformed, n)
	}
	return nil
}

// maxEarly is how many early bytes o has room for beside its token.
func maxEarly(o *symbolonv1.Open) int {
	const field = 4 // tag and length
	return max(min(MaxEarly, MaxMessage-proto.Size(o)-field), 0)
}

func validProtection(p symbolonv1.Protection) bool {
	return p == symbolonv1.Protection_PROTECTION_AUTHENTICATED || p == symbolonv1.Protection_PROTECTION_ENCRYPTED
}

// messageReason is the reason for an Open or a Verdict that cannot be read.
func messageReason(err error) symbolonv1.Reason {
	var (
		header tls.RecordHeaderError // what came is no TLS
		alert  *net.OpError          // "local error": ours, over a record; "remote error": the peer's
		told   *record.AlertError    // the peer's, heard by the own record layer
	)
	switch {
	case errors.Is(err, ErrTruncated):
		return symbolonv1.Reason_REASON_TRUNCATED
	case errors.As(err, &told):
		return symbolonv1.Reason_REASON_PEER_REFUSED
	case errors.Is(err, ErrOpenTooLarge):
		return symbolonv1.Reason_REASON_OPEN_TOO_LARGE
	case errors.Is(err, ErrOpenMalformed):
		return symbolonv1.Reason_REASON_OPEN_MALFORMED
	case errors.Is(err, ErrVersion):
		return symbolonv1.Reason_REASON_VERSION
	case errors.Is(err, io.ErrUnexpectedEOF), errors.As(err, &header), errors.As(err, &alert) && alert.Op == "local error":
		return symbolonv1.Reason_REASON_PROTOCOL
	case errors.Is(err, io.EOF), errors.As(err, &alert) && alert.Op == "remote error":
		return symbolonv1.Reason_REASON_PEER_REFUSED
	}
	return NetworkReason(err)
}
