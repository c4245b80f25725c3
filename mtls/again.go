package mtls

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls/record"
)

// A tunnel that has served a connection can serve the next one without its socket
// coming back to the runtime: whoever has the descriptor carries the messages, too.
// What follows is Reopen, ReadVerdict, NextOpen and Grant without their I/O, on a Conn
// that is detached and Reusable.

// MessageBuffer is the size of a buffer in which SealOpen and SealVerdict seal, bytes.
const MessageBuffer = record.SlotsAt + 2*record.SlotStride

// Message decrypts what is at the start of in, in place, until a message is there, and
// gathers what is not all of one. n is how much of in is used up, m the message without
// its length: nil, there is none yet. Errors as Read's, and ErrOpenTooLarge; io.EOF is
// the end of the tunnel.
func (s *Stream) Message(in []byte) (n int, m []byte, err error) {
	for {
		if len(s.plain) == 0 {
			b, size, err := s.r.Open(in[n:])
			n += size
			if err != nil || size == 0 {
				return n, nil, err
			}
			s.plain = b
			continue
		}
		need := lengthSize
		if len(s.message) >= lengthSize {
			need += int(binary.BigEndian.Uint32(s.message))
		}
		k := min(need-len(s.message), len(s.plain))
		s.message = append(s.message, s.plain[:k]...)
		s.plain = s.plain[k:]
		if len(s.message) < lengthSize {
			continue
		}
		size := binary.BigEndian.Uint32(s.message)
		if size > MaxMessage {
			return n, nil, fmt.Errorf("%w: %d bytes, at most %d", ErrOpenTooLarge, size, MaxMessage)
		}
		if len(s.message) == lengthSize+int(size) {
			m, s.message = s.message[lengthSize:], nil
			s.plain = append([]byte(nil), s.plain...) // in is the caller's
			return n, m, nil
		}
	}
}

// sealMessage encrypts m behind its length, in buf.
func (s *Stream) sealMessage(buf []byte, m proto.Message) ([]byte, error) {
	b, err := appendMessage(make([]byte, 0, 256), m)
	if err != nil {
		return nil, err
	}
	return s.sealBytes(buf, b)
}

// sealBytes encrypts b, in as many of buf's slots as that needs.
func (s *Stream) sealBytes(buf, b []byte) ([]byte, error) {
	for i, left := 0, b; len(left) > 0; i++ {
		left = left[copy(buf[record.SlotsAt+i*record.SlotStride:][:record.SlotData], left):]
	}
	return s.w.Seal(buf, len(b))
}

// errNotDetached: a method for a tunnel whose socket is elsewhere was called on one
// that has it, or cannot be used again.
var errNotDetached = errors.New("the tunnel is not detached, or cannot serve again")

// SealOpen makes the Open of another connection, for the caller to write, in buf, of
// which it is a part. early is application data that goes along; how much of it does, in
// the same record, is returned too. TakeVerdict follows. On error the tunnel is of no
// more use.
func (c *Conn) SealOpen(buf []byte, open *symbolonv1.Open, early []byte) (_ []byte, along int, err error) {
	if c.stream == nil || !c.Reusable() {
		return nil, 0, errNotDetached
	}
	if err := checkAgain(open); err != nil {
		return nil, 0, err
	}
	c.demanded = open.GetProtection()
	c.startFrames(open)
	c.stream.frames = c.frames
	b, err := appendMessage(make([]byte, 0, 256), open)
	if err != nil {
		return nil, 0, err
	}
	if along = min(len(early), record.SlotData-len(b)-lengthSize); along > 0 {
		b = appendFrame(b, early[:along])
	}
	b, err = c.stream.sealBytes(buf, b)
	return b, max(along, 0), err
}

// TakeVerdict takes the server's half: m by Message, or the error that came in its
// place. Errors are ReadVerdict's.
func (c *Conn) TakeVerdict(m []byte, err error) (*symbolonv1.Verdict, error) {
	v := &symbolonv1.Verdict{}
	if err == nil {
		err = unmarshalMessage(m, v)
	}
	if err != nil {
		return nil, verdictError(err)
	}
	if err := c.checkVerdict(v); err != nil {
		return v, err
	}
	c.accepted(v)
	return v, nil
}

// TakeOpen takes the Open of another connection, m by Message, or the error that came in
// its place. io.EOF: the client has gone, as it may. ErrOpenMalformed, ErrOpenTooLarge,
// ErrVersion: after Attach, RefuseOpen tells the client. SealVerdict follows otherwise.
func (c *Conn) TakeOpen(m []byte, err error) (*symbolonv1.Open, error) {
	if c.stream == nil || !c.Reusable() {
		return nil, errNotDetached
	}
	open := &symbolonv1.Open{}
	if err == nil {
		err = unmarshalMessage(m, open)
	}
	if err == nil {
		err = checkOpen(open)
	}
	if err == nil {
		err = checkAgain(open)
	}
	switch {
	case isBadOpen(err):
		return nil, err
	case err != nil:
		return nil, io.EOF
	}
	c.demanded = open.GetProtection()
	c.startFrames(open)
	c.stream.frames = c.frames
	return open, nil
}

// SealVerdict makes an accepting verdict as Grant's, for the caller to write, in buf,
// of which it is a part.
func (c *Conn) SealVerdict(buf []byte, v *symbolonv1.Verdict) ([]byte, error) {
	if c.stream == nil {
		return nil, errNotDetached
	}
	c.grant(v)
	b, err := c.stream.sealMessage(buf, v)
	if err != nil {
		return nil, err
	}
	c.kept = v.GetKeep()
	return b, nil
}

// checkAgain: the first connection's keys are in use, so the data phase can only be
// like it.
func checkAgain(open *symbolonv1.Open) error {
	if !open.GetFramed() || open.GetProtection() != symbolonv1.Protection_PROTECTION_ENCRYPTED {
		return fmt.Errorf("%w: an open that is not framed and encrypted, on a tunnel in use", ErrOpenMalformed)
	}
	return nil
}

// isBadOpen tells an Open that cannot be served from a tunnel that has ended.
func isBadOpen(err error) bool {
	return errors.Is(err, ErrOpenMalformed) || errors.Is(err, ErrOpenTooLarge) || errors.Is(err, ErrVersion)
}
