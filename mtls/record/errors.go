package record

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
)

var (
	// ErrTruncated: the stream ended without close_notify: what was read may not be
	// all that was sent (RFC 8446 section 6.1). It is an io.ErrUnexpectedEOF.
	ErrTruncated = fmt.Errorf("stream ended without close_notify: %w", io.ErrUnexpectedEOF)
	// ErrClosed: a write after CloseWrite.
	ErrClosed = errors.New("write after close_notify")
	// ErrReleased: the half was released.
	ErrReleased = errors.New("record layer released")
	// ErrSequence: the sequence number would wrap (RFC 8446 section 5.3).
	ErrSequence = errors.New("record sequence number exhausted")
	// ErrSuite: the cipher suite is not AES-GCM of TLS 1.3.
	ErrSuite = errors.New("unsupported cipher suite")
	// ErrFIPS: the process runs in FIPS 140 mode.
	ErrFIPS = errors.New("own record layer is off in fips 140 mode")
	// ErrConfig: a Config that cannot be meant.
	ErrConfig = errors.New("invalid record layer configuration")
	// ErrNoSecrets: the traffic secrets of this connection are not known for certain.
	// Nothing has been taken: crypto/tls may go on.
	ErrNoSecrets = errors.New("traffic secrets not known")
	// ErrTaken: this direction belongs to a Reader or Writer now.
	ErrTaken = errors.New("direction taken over by the record layer")
)

// Alert is an AlertDescription of RFC 8446 section 6.
type Alert uint8

// Those that this package sends.
const (
	AlertCloseNotify       Alert = 0
	AlertUnexpectedMessage Alert = 10
	AlertBadRecordMAC      Alert = 20
	AlertRecordOverflow    Alert = 22
	AlertIllegalParameter  Alert = 47
	AlertDecodeError       Alert = 50
	AlertProtocolVersion   Alert = 70
	AlertInternalError     Alert = 80
	alertUserCanceled      Alert = 90
)

func (a Alert) String() string { return tls.AlertError(a).Error() }

// AlertError is a fatal alert that the peer sent.
type AlertError struct{ Alert Alert }

func (e *AlertError) Error() string { return "peer sent alert: " + e.Alert.String() }

// ProtocolError is what the peer did against the protocol. Alert is what it was
// told, as far as it still listened.
type ProtocolError struct {
	Alert  Alert
	Reason string
}

func (e *ProtocolError) Error() string { return e.Reason + " (" + e.Alert.String() + ")" }
