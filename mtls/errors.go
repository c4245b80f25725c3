package mtls

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls/record"
)

var (
	// ErrTruncated: the TCP stream ended inside TLS, without close_notify.
	ErrTruncated = record.ErrTruncated
	// ErrProtocol: the peer's TLS is not symbolon/1 as we insist on it.
	ErrProtocol = errors.New("tunnel protocol violated")
	// ErrOpenMalformed: the Open or Verdict does not parse, or a field is wrong.
	ErrOpenMalformed = errors.New("malformed message")
	// ErrOpenTooLarge: the length in front of a message exceeds MaxMessage.
	ErrOpenTooLarge = errors.New("message too large")
	// ErrVersion: no message version in common.
	ErrVersion = errors.New("unsupported message version")
)

// DeniedError is an error with the reason that goes into record and verdict.
type DeniedError struct {
	Reason symbolonv1.Reason
	// Peer is the peer's own reason, where Reason is PEER_REFUSED.
	Peer symbolonv1.Reason
	// Policy is the peer's deciding policy, where it told.
	Policy string
	Err    error
}

func (e *DeniedError) Error() string {
	if e.Err == nil {
		return e.Reason.String()
	}
	return e.Err.Error()
}

func (e *DeniedError) Unwrap() error { return e.Err }

// handshakeError gives a failed handshake its reason. clientSide: this side made
// the connection, so a peer that speaks no TLS has no proxy in front of it.
func handshakeError(err error, clientSide bool) error {
	reason := symbolonv1.Reason_REASON_HANDSHAKE_FAILED
	var (
		denied  *DeniedError
		alert   *net.OpError
		timeout interface{ Timeout() bool }
	)
	switch {
	case errors.As(err, &denied):
		reason = denied.Reason
	case errors.Is(err, identity.ErrNoBundle):
		reason = symbolonv1.Reason_REASON_WRONG_TRUST_DOMAIN
	case errors.Is(err, identity.ErrExpired):
		reason = symbolonv1.Reason_REASON_SVID_EXPIRED
	case errors.Is(err, identity.ErrMalformedClaims):
		reason = symbolonv1.Reason_REASON_CLAIMS_MALFORMED
	case errors.Is(err, identity.ErrMalformedSVID):
		reason = symbolonv1.Reason_REASON_SVID_MALFORMED
	case errors.Is(err, identity.ErrNotWorkload):
		reason = symbolonv1.Reason_REASON_NOT_A_WORKLOAD
	case errors.Is(err, identity.ErrNameConstrained):
		reason = symbolonv1.Reason_REASON_NAME_CONSTRAINED
	case errors.Is(err, identity.ErrNotCA):
		reason = symbolonv1.Reason_REASON_NOT_A_CA
	case errors.Is(err, identity.ErrUntrusted):
		reason = symbolonv1.Reason_REASON_PEER_UNVERIFIED
	case clientSide && noTunnel(err):
		reason = symbolonv1.Reason_REASON_PEER_UNPROTECTED
	case errors.Is(err, ErrProtocol):
		reason = symbolonv1.Reason_REASON_PROTOCOL
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded),
		errors.As(err, &timeout) && timeout.Timeout():
		reason = symbolonv1.Reason_REASON_HANDSHAKE_TIMEOUT
	case errors.As(err, &alert) && alert.Op == "remote error":
		// A TLS alert: the other side speaks TLS, and refused us.
		reason = symbolonv1.Reason_REASON_PEER_REFUSED
	}
	return &DeniedError{Reason: reason, Err: fmt.Errorf("handshake: %w", err)}
}

// noTunnel: whoever answered is no proxy of ours: it closed, reset, answered
// something that is not TLS, or TLS without our ALPN. Nor does a proxy send an
// alert before the client's Finished, which ends the client's handshake.
func noTunnel(err error) bool {
	var (
		header tls.RecordHeaderError // the first bytes are not a TLS record
		alert  *net.OpError
	)
	return errors.Is(err, ErrProtocol) || errors.As(err, &alert) && alert.Op == "remote error" ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, ErrTruncated) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		errors.As(err, &header)
}

// ReasonOf finds the reason in err's chain; INTERNAL where there is none.
func ReasonOf(err error) symbolonv1.Reason {
	var d *DeniedError
	if errors.As(err, &d) {
		return d.Reason
	}
	return NetworkReason(err)
}

// NetworkReason translates what ended the data phase: mostly what the kernel said.
func NetworkReason(err error) symbolonv1.Reason {
	var (
		timeout  interface{ Timeout() bool }
		protocol *record.ProtocolError
		alert    *record.AlertError
	)
	switch {
	case errors.As(err, &protocol), errors.As(err, &alert):
		return symbolonv1.Reason_REASON_PROTOCOL
	case errors.Is(err, syscall.ECONNREFUSED):
		return symbolonv1.Reason_REASON_REFUSED
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return symbolonv1.Reason_REASON_RESET
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH),
		errors.Is(err, syscall.EADDRNOTAVAIL), errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return symbolonv1.Reason_REASON_UNREACHABLE
	case errors.Is(err, syscall.ETIMEDOUT), errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return symbolonv1.Reason_REASON_TIMED_OUT
	case errors.Is(err, ErrTruncated):
		return symbolonv1.Reason_REASON_TRUNCATED
	case errors.Is(err, ErrProtocol):
		return symbolonv1.Reason_REASON_PROTOCOL
	}
	return symbolonv1.Reason_REASON_INTERNAL
}
