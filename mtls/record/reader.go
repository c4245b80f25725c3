package record

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
)

const (
	// maxUseless is how many records without application data may follow one
	// another; crypto/tls's number.
	maxUseless = 16

	alertSize    = 2
	alertWarning = 1
	alertFatal   = 2
)

// Reader is the receiving direction, for one goroutine.
type Reader struct {
	conn   io.Reader
	raw    syscall.RawConn // of conn, or nil
	read   func(fd uintptr) bool
	writer *Writer // told of endings and of the peer's key update requests
	client bool
	state  *protection

	buf        *buffer // nil while nothing is in it
	start, end int     // what in buf.data is still to be decrypted
	flowing    bool    // the last read brought much: use a large buffer
	got        int     // result of the read under way
	gotErr     error

	plain   []byte // decrypted, and not handed out; of buf, or Config.Pending
	pending net.Buffers
	useless int // records without application data since the last with
	message message
	err     error // final
}

// NewReader takes over the receiving direction of conn; the Write fields of c are
// not looked at. w is the other direction of the same connection, which sends this
// one's alerts. Errors: ErrSuite, ErrConfig, ErrFIPS.
func NewReader(conn io.Reader, c Config, w *Writer) (*Reader, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	if w == nil {
		return nil, fmt.Errorf("%w: a reader needs the writer of its connection", ErrConfig)
	}
	p, err := newProtection(c.Suite, c.ReadSecret, c.ReadSequence)
	if err != nil {
		return nil, err
	}
	r := &Reader{conn: conn, raw: rawConn(conn), writer: w, client: c.Client, state: p, plain: c.Pending}
	r.read = r.readFD
	return r, nil
}

// Read is io.Reader's. io.EOF is the peer's close_notify. A deadline that passes
// loses nothing: reading may go on after it.
func (r *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if len(r.plain) == 0 {
		b, err := r.Next()
		if err != nil {
			return 0, err
		}
		r.plain = b
	}
	n := copy(p, r.plain)
	if r.plain = r.plain[n:]; len(r.plain) == 0 {
		r.reclaim()
	}
	return n, nil
}

// Next is the application data of the next record, at most 2^14 bytes, never none.
// It is valid until the next call of any method. Errors: io.EOF, ErrTruncated,
// *AlertError, *ProtocolError, and the connection's.
func (r *Reader) Next() ([]byte, error) {
	r.reclaim()
	if b := r.plain; len(b) > 0 {
		r.plain = nil
		return b, nil
	}
	b, err := r.next(true)
	if err != nil {
		r.reclaim()
	}
	return b, err
}

// next decrypts until there is application data. Without wait it stops where it
// would have to read, with nothing.
func (r *Reader) next(wait bool) ([]byte, error) {
	for r.err == nil {
		size, err := r.complete()
		if err != nil {
			return nil, err
		}
		if size == 0 {
			if !wait {
				return nil, nil
			}
			if err := r.fill(); err != nil {
				return nil, err
			}
			continue
		}
		record := r.buf.data[r.start : r.start+size]
		r.start += size
		b, err := r.process(record)
		if err != nil {
			return nil, err
		}
		if len(b) > 0 {
			return b, nil
		}
	}
	return nil, r.err
}

// complete is the size of the first record in the buffer, 0 where more must be read.
func (r *Reader) complete() (int, error) {
	if r.end-r.start < headerSize {
		return 0, nil
	}
	size, err := r.header(r.buf.data[r.start:])
	if err != nil || r.end-r.start < size {
		return 0, err
	}
	return size, nil
}

// header checks the fields of a TLSCiphertext, RFC 8446 section 5.2, as early as
// they are there, and returns the record's size.
func (r *Reader) header(h []byte) (int, error) {
	length := int(binary.BigEndian.Uint16(h[3:]))
	switch {
	case h[0] != typeApplicationData:
		// change_cipher_spec included: it is tolerated during the handshake only.
		return 0, r.fail(AlertUnexpectedMessage, fmt.Sprintf("record of type %d outside encryption", h[0]))
	case binary.BigEndian.Uint16(h[1:]) != legacyVersion:
		return 0, r.fail(AlertProtocolVersion, fmt.Sprintf("record of version %#04x", h[1:3]))
	case length > maxCiphertext:
		return 0, r.fail(AlertRecordOverflow, fmt.Sprintf("record of %d bytes", length))
	case length < typeSize+tagSize:
		return 0, r.fail(AlertBadRecordMAC, fmt.Sprintf("record of %d bytes", length))
	}
	return headerSize + length, nil
}

// process opens a record in place. It returns application data, or nothing where
// the record had another purpose.
func (r *Reader) process(record []byte) ([]byte, error) {
	inner, err := r.state.open(record[headerSize:], record)
	switch {
	case errors.Is(err, ErrSequence):
		return nil, r.abort(AlertInternalError, err)
	case err != nil:
		return nil, r.fail(AlertBadRecordMAC, "record does not authenticate")
	case len(inner) > maxPlaintext+typeSize:
		return nil, r.fail(AlertRecordOverflow, fmt.Sprintf("plaintext of %d bytes", len(inner)-typeSize))
	}
	// The type is behind the content, and in front of zeros: section 5.4.
	last := len(inner) - 1
	for last >= 0 && inner[last] == 0 {
		last--
	}
	if last < 0 {
		return nil, r.fail(AlertUnexpectedMessage, "record without a content type")
	}
	content, contentType := inner[:last:last], inner[last]
	if r.message.started() && contentType != typeHandshake {
		return nil, r.fail(AlertUnexpectedMessage, "handshake message interrupted")
	}
	if contentType == typeApplicationData && len(content) > 0 {
		r.useless = 0
		return content, nil
	}
	if r.useless++; r.useless > maxUseless {
		return nil, r.fail(AlertUnexpectedMessage, "too many records without application data")
	}
	switch contentType {
	case typeApplicationData:
		return nil, nil
	case typeAlert:
		return nil, r.alert(content)
	case typeHandshake:
		return nil, r.handshake(content)
	}
	return nil, r.fail(AlertUnexpectedMessage, fmt.Sprintf("content of type %d", contentType))
}

// alert takes one alert, RFC 8446 section 6. Its level means nothing.
func (r *Reader) alert(b []byte) error {
	switch {
	case len(b) == 0:
		return r.fail(AlertUnexpectedMessage, "empty alert record")
	case len(b) != alertSize:
		return r.fail(AlertDecodeError, fmt.Sprintf("alert record of %d bytes", len(b)))
	}
	switch a := Alert(b[1]); a {
	case AlertCloseNotify:
		return r.finish(io.EOF)
	case alertUserCanceled:
		// Says nothing after the handshake; Java sends it before close_notify
		// (JDK-8323517), and section 6.1 lets it be ignored.
		return nil
	default:
		err := &AlertError{Alert: a}
		r.writer.end(err, AlertCloseNotify) // section 6.2: nothing is sent after a fatal alert
		return r.finish(err)
	}
}

// fail ends the connection over something the peer did.
func (r *Reader) fail(a Alert, reason string) error {
	return r.abort(a, &ProtocolError{Alert: a, Reason: reason})
}

func (r *Reader) abort(a Alert, err error) error {
	r.writer.end(err, a)
	return r.finish(err)
}

// finish makes err the answer to every further call. The buffer stays, for
// plaintext of it that Batch is about to hand out.
func (r *Reader) finish(err error) error {
	r.err = err
	r.state.wipe()
	r.start, r.end = 0, 0
	return err
}

// Buffered is how many bytes have been read and not handed out, opened or not.
func (r *Reader) Buffered() int { return len(r.plain) + r.end - r.start }

// Release forgets keys and buffer. Nobody may be reading.
func (r *Reader) Release() {
	if r.err == nil {
		_ = r.finish(ErrReleased)
	}
	r.plain = nil
	r.reclaim()
}

// reclaim gives up a buffer with nothing in it. Plaintext of it that the caller was
// given is gone then.
func (r *Reader) reclaim() {
	if r.buf != nil && len(r.plain) == 0 && r.start == r.end {
		putBuffer(r.buf)
		r.buf, r.start, r.end = nil, 0, 0
	}
}

// fill reads at least one byte behind r.end, without a buffer while it waits for
// the first of a record.
func (r *Reader) fill() error {
	r.got, r.gotErr = 0, nil
	if r.raw != nil {
		if err := r.raw.Read(r.read); err != nil {
			return r.readFailed(err)
		}
		if r.gotErr != nil {
			r.gotErr = r.opError(os.NewSyscallError("read", r.gotErr))
		} else if r.got == 0 {
			r.gotErr = io.EOF
		}
	} else {
		r.room()
		r.got, r.gotErr = r.conn.Read(r.buf.data[r.end:])
	}
	if r.got > 0 {
		r.flowing = r.got >= smallSize || r.got == len(r.buf.data)-r.end
		r.end += r.got
		return nil // what else the read said, it says again
	}
	if r.gotErr == nil {
		return nil
	}
	if errors.Is(r.gotErr, io.EOF) {
		r.gotErr = ErrTruncated
	}
	return r.readFailed(r.gotErr)
}

// readFD is one attempt to read.
func (r *Reader) readFD(fd uintptr) bool {
	r.room()
	n, err := ignoringEINTR(func() (int, error) { return syscall.Read(int(fd), r.buf.data[r.end:]) })
	if n > 0 {
		r.got = n
		return true
	}
	if err == syscall.EAGAIN { //nolint:errorlint // a bare Errno
		r.reclaim()
		return false
	}
	r.gotErr = err
	return true
}

// room makes space behind r.end, for the whole record where its header is there.
func (r *Reader) room() {
	have := r.end - r.start
	need := headerSize
	if have >= headerSize {
		need += int(binary.BigEndian.Uint16(r.buf.data[r.start+3:])) // header has checked it
	}
	if r.flowing {
		need = largeSize
	}
	switch {
	case r.buf == nil:
		r.buf = getBuffer(need)
	case need > len(r.buf.data):
		b := getBuffer(need)
		copy(b.data, r.buf.data[r.start:r.end])
		putBuffer(r.buf)
		r.buf = b
	case r.start > 0:
		copy(r.buf.data, r.buf.data[r.start:r.end])
	}
	r.start, r.end = 0, have
}

// readFailed: a timeout is no more than that.
func (r *Reader) readFailed(err error) error {
	var timeout interface{ Timeout() bool }
	if errors.As(err, &timeout) && timeout.Timeout() {
		r.reclaim()
		return err
	}
	_ = r.finish(err)
	r.reclaim()
	return err
}

func (r *Reader) opError(err error) error {
	if c, ok := r.conn.(net.Conn); ok {
		return &net.OpError{
			Op: "read", Net: c.LocalAddr().Network(), Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err,
		}
	}
	return err
}
