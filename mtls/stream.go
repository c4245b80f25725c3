package mtls

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls/record"
)

// Stream is the data phase of a tunnel for a caller that does its own I/O on the
// descriptor: what was read is opened, what is to be written is sealed, in place.
// One goroutine at a time may use it.
type Stream struct {
	r      *record.Reader
	w      *record.Writer
	frames *frames // nil: the data phase is not framed
	plain  []byte  // opened, and not handed out yet
	// message is the beginning of one, between two data phases.
	message []byte
}

// ErrNotDetachable: crypto/tls has the data phase, and needs a net.Conn.
var ErrNotDetachable = errors.New("the data phase belongs to crypto/tls")

// Rest drops what an idle stream does not need, if neither direction has had a record
// since the last call: its ciphers, which the next record makes again. It tells whether
// there is something left to drop.
func (s *Stream) Rest() (warm bool) {
	warm = s.r.Rest()
	return s.w.Rest() || warm
}

// Detach takes the tunnel's socket away from c, as a descriptor that the runtime's
// poller does not know, for the caller to read, write and close. stream is what is on
// it, nil where the data phase is not encrypted; sealed is what was read of it
// already. alerts is written to, where the caller can do so at once, when the peer
// breaks the protocol. Until Attach, nothing but Peer, Info, Protection, Framed,
// Reusable, TakeEarly and Attach, and what again.go has, may be called on c, and Close and Reset
// do nothing.
//
// Errors: ErrNotDetachable and nothing has changed; any other, and c is of no use.
func (c *Conn) Detach(alerts io.Writer) (fd int, stream *Stream, sealed []byte, err error) {
	if c.protection != symbolonv1.Protection_PROTECTION_ENCRYPTED {
		fd, err = detachConn(c.wire.Socket)
		c.wire, c.tls, c.in, c.out = detached, nil, nil, nil
		return fd, nil, nil, err
	}
	r, ok := c.in.(*record.Reader)
	w, ok2 := c.out.(*record.Writer)
	if !ok || !ok2 {
		return -1, nil, nil, ErrNotDetachable
	}
	if err := w.Detach(alerts); err != nil {
		return -1, nil, nil, err
	}
	stream = &Stream{r: r, w: w, frames: c.frames}
	stream.plain, sealed = r.Detach()
	if fd, err = detachConn(c.wire.Socket); err != nil {
		stream.Release()
		return -1, nil, nil, err
	}
	c.wire, c.tls, c.stream = detached, nil, stream
	return fd, stream, sealed, nil
}

// Attach gives c its socket back, after s has ended cleanly on both sides, with what
// was read and not opened. c owns fd from here on, and is of no use after an error.
func (c *Conn) Attach(fd int, s *Stream, sealed []byte) error {
	f := newFileConn(fd, nil)
	c.wire, c.stream = &wire{Socket: f}, nil
	s.r.Attach(f, s.plain, sealed)
	err := f.SetDeadline(time.Time{}) // an error where the poller would not have it
	if err == nil {
		err = s.w.Attach(f)
	}
	if err != nil {
		_ = f.Close()
		c.kept = false // whoever asks: there is no next connection on it
		s.Release()
	}
	return err
}

// detached stands in for the wire of a Conn whose socket is elsewhere: every call is
// an error.
var detached = &wire{Socket: &net.TCPConn{}}

// Detachable tells whether Detach can take the data phase.
func (c *Conn) Detachable() bool {
	_, own := c.out.(*record.Writer)
	return own || c.protection == symbolonv1.Protection_PROTECTION_AUTHENTICATED
}

// Kept tells whether the verdict allows another connection on the tunnel after this
// one.
func (c *Conn) Kept() bool { return c.kept && c.frames != nil }

// DetachTCP turns c into a descriptor that the runtime's poller does not know. c is
// closed.
func DetachTCP(c *net.TCPConn) (fd int, err error) { return detachConn(c) }

func detachConn(c Socket) (fd int, err error) {
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(cerr, err); err != nil {
		return -1, fmt.Errorf("detaching a socket: %w", err)
	}
	return fd, nil
}

// AttachTCP turns a descriptor into a TCPConn, which owns it. On error it is closed.
func AttachTCP(fd int) (*net.TCPConn, error) {
	f := os.NewFile(uintptr(fd), "tunnel")
	defer f.Close() // FileConn has its own
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// Open decrypts what is at the start of in, in place, and appends application data,
// as far as data has capacity, which must be at least one. n is how much of in is
// used up. It is called again with the rest of in until it neither uses nor appends
// anything; the data is valid until in changes. io.EOF: the peer's clean end, maybe
// behind data; what is left of in belongs to whatever follows on the tunnel.
// Other errors as Read's.
func (s *Stream) Open(in []byte, data [][]byte) (n int, _ [][]byte, err error) {
	if s.frames != nil && s.frames.readEnd {
		return 0, data, io.EOF // what stands behind is no frame
	}
	for len(data) < cap(data) {
		if len(s.plain) == 0 {
			b, size, err := s.r.Open(in[n:])
			n += size
			if err != nil {
				if s.frames != nil {
					err = unframed(err)
				}
				return n, data, err
			}
			if size == 0 {
				return n, data, nil
			}
			s.plain = b
			continue
		}
		if s.frames == nil {
			data = append(data, s.plain)
			s.plain = nil
			continue
		}
		b, rest, err := s.frames.open(s.plain)
		s.plain = rest
		if len(b) > 0 {
			data = append(data, b)
		}
		if errors.Is(err, io.EOF) {
			s.plain = append([]byte(nil), rest...) // in is the caller's
		}
		if err != nil {
			return n, data, err
		}
	}
	return n, data, nil
}

// Buffered tells whether Open has something to hand out without more of in.
func (s *Stream) Buffered() bool { return len(s.plain) > 0 }

// Lead is how many bytes in front of the first slot's application data the caller
// leaves free for a frame's length.
func (s *Stream) Lead() int {
	if s.frames != nil {
		return lengthSize
	}
	return 0
}

// Seal encrypts n bytes of application data that stand in buf's slots (record.Slots
// says how), behind Lead free ones, in place, and returns what is to be written.
func (s *Stream) Seal(buf []byte, n int) ([]byte, error) {
	if s.frames != nil {
		binary.BigEndian.PutUint32(buf[record.SlotsAt:], uint32(n))
	}
	return s.w.Seal(buf, n+s.Lead())
}

// End is what tells the peer that this direction has ended, in buf.
func (s *Stream) End(buf []byte) ([]byte, error) {
	if s.frames == nil {
		return s.w.SealEnd(buf)
	}
	s.frames.writeEnd = true
	clear(buf[record.SlotsAt:][:lengthSize])
	return s.w.Seal(buf, lengthSize)
}

// Close is close_notify, in buf: on a tunnel that waits it tells the peer that no Open is
// taken any more, and none was since the last that was granted. Nothing can be sealed
// afterwards.
func (s *Stream) Close(buf []byte) ([]byte, error) { return s.w.SealEnd(buf) }

// Release forgets the keys.
func (s *Stream) Release() {
	s.r.Release()
	s.w.Release()
}

// open takes bytes of the frame at the start of b. io.EOF: it was the last one's.
func (f *frames) open(b []byte) (data, rest []byte, err error) {
	if f.left == 0 {
		n := copy(f.headBytes[f.have:], b)
		if f.have += n; f.have < lengthSize {
			return nil, nil, nil
		}
		f.have, b = 0, b[n:]
		if err := f.begin(); err != nil || f.readEnd {
			if err == nil {
				err = io.EOF
			}
			return nil, b, err
		}
	}
	if f.control {
		rest, err = f.gather(b)
		return nil, rest, err
	}
	n := min(f.left, len(b))
	f.left -= n
	return b[:n:n], b[n:], nil
}
