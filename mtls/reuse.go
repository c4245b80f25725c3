package mtls

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"golang.org/x/sys/unix"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls/record"
)

// A tunnel whose data phase is framed can be reused: when both directions have
// ended by an empty frame, TLS is where it was before Open, and another connection
// of the same workload to the same destination can go on it. Each is an Open and a
// Verdict of its own, judged afresh.

const (
	// maxFrame bounds a frame; a longer one is a protocol error.
	maxFrame = 1 << 20
	// controlFrame marks the length of a control message.
	controlFrame = 1 << 31
	// frameBuffer is what one write is framed in: with its length, two full records.
	frameBuffer = 32 << 10
)

// frames is the framing of one data phase. One goroutine reads, one writes.
type frames struct {
	left      int  // bytes still to come of the frame being read
	readEnd   bool // the peer's empty frame came
	headBytes [lengthSize]byte
	have      int // of headBytes

	renewable bool   // control messages may come
	control   bool   // the frame being read is one
	message   []byte // what has come of it
	told      func(m []byte) error

	// mu guards the writing of whole frames where crypto/tls has the tunnel: control
	// messages are not sent by whoever sends data.
	mu       sync.Mutex
	writeEnd bool // our empty frame went
}

var frameBuffers = sync.Pool{New: func() any { return new([frameBuffer]byte) }}

// MaxFrameData is how much one frame carries that fills its records exactly: whoever
// writes so much at a time wastes none.
const MaxFrameData = frameBuffer - lengthSize

func (c *Conn) startFrames(o *symbolonv1.Open) {
	c.kept, c.frames = false, nil
	c.asked, c.renewable = o.GetRenewable(), false
	if o.GetFramed() {
		c.frames = &frames{}
	}
}

// Framed tells whether the data phase is.
func (c *Conn) Framed() bool { return c.frames != nil }

// Reusable tells whether the tunnel can serve another connection now: the verdict
// allowed it, and both directions have ended cleanly. Neither half may be in use.
func (c *Conn) Reusable() bool {
	return c.kept && c.frames != nil && c.frames.readEnd && c.frames.writeEnd
}

func (f *frames) read(t io.Reader, p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for f.left == 0 {
		if f.readEnd {
			return 0, io.EOF
		}
		if _, err := io.ReadFull(t, f.headBytes[:]); err != nil {
			return 0, unframed(err)
		}
		if err := f.begin(); err != nil {
			return 0, err
		}
		if f.control {
			m := make([]byte, f.left)
			if _, err := io.ReadFull(t, m); err != nil {
				return 0, unframed(err)
			}
			if _, err := f.gather(m); err != nil {
				return 0, err
			}
		}
	}
	n, err := t.Read(p[:min(len(p), f.left)])
	f.left -= n
	return n, unframed(err)
}

// begin starts the frame whose length has been read.
func (f *frames) begin() error {
	n := binary.BigEndian.Uint32(f.headBytes[:])
	if n&controlFrame != 0 {
		n &^= controlFrame
		if !f.renewable || f.told == nil || n == 0 || n > MaxControl {
			return fmt.Errorf("%w: a control message of %d bytes", ErrProtocol, n)
		}
		f.left, f.control = int(n), true
		return nil
	}
	if n > maxFrame {
		return fmt.Errorf("%w: a frame of %d bytes", ErrProtocol, n)
	}
	f.left, f.readEnd = int(n), n == 0
	return nil
}

// gather takes what b has of a control message, and tells of one that is whole.
func (f *frames) gather(b []byte) (rest []byte, err error) {
	n := min(f.left, len(b))
	f.left -= n
	f.message = append(f.message, b[:n]...)
	if f.left == 0 {
		m := f.message
		f.message, f.control = nil, false
		err = f.told(m)
	}
	return b[n:], err
}

// appendFrame appends the frame of application data.
func appendFrame(b, data []byte) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(data))), data...)
}

// appendControl appends m's frame.
func appendControl(b, m []byte) []byte {
	return append(binary.BigEndian.AppendUint32(b, controlFrame|uint32(len(m))), m...)
}

func (f *frames) sendControl(t writer, m []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.writeEnd {
		return errEnded
	}
	_, err := t.Write(appendControl(make([]byte, 0, lengthSize+len(m)), m))
	return err
}

// unframed: an end of TLS is no end of a framed direction.
func unframed(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return ErrTruncated
	}
	return err
}

func (f *frames) write(t writer, p []byte) (written int, err error) {
	out := frameBuffers.Get().(*[frameBuffer]byte)
	defer frameBuffers.Put(out)
	for len(p) > 0 {
		n := copy(out[lengthSize:], p)
		binary.BigEndian.PutUint32(out[:], uint32(n))
		if err := f.writeFrame(t, out[:lengthSize+n]); err != nil {
			return written, err
		}
		p, written = p[n:], written+n
	}
	return written, nil
}

func (f *frames) writeFrame(t writer, b []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.writeEnd {
		return net.ErrClosed
	}
	_, err := t.Write(b)
	return err
}

func (f *frames) end(t writer) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.writeEnd {
		return nil
	}
	f.writeEnd = true
	_, err := t.Write(make([]byte, lengthSize))
	return err
}

// Reopen sends the Open of another connection on a Reusable tunnel; ReadVerdict
// follows. On error the tunnel is of no more use, and nothing has reached an
// application: the caller dials anew.
func (c *Conn) Reopen(ctx context.Context, open *symbolonv1.Open) error {
	stop := deadline(ctx, c.wire.Socket.SetDeadline)
	defer stop()
	return c.sendOpen(open, nil)
}

// NextOpen waits for another connection on a Reusable tunnel, as Accept waits for
// the first. io.EOF: none came before ctx ended or the client went, as it may; the
// tunnel is closed. Other errors are *DeniedError, as Accept's.
func (c *Conn) NextOpen(ctx context.Context) (*symbolonv1.Open, error) {
	stop := deadline(ctx, c.wire.Socket.SetDeadline)
	open, err := c.readOpen()
	stop()
	if err == nil {
		err = checkAgain(open)
	}
	switch {
	case err == nil:
		return open, nil
	case isBadOpen(err):
		return nil, c.RefuseOpen(err)
	}
	_ = c.Close()
	return nil, io.EOF
}

// Idle tells whether nothing has arrived on a tunnel that waits for its next use,
// not even an end: a byte now could only be a protocol error, an end means that the
// peer does not wait any more.
func (c *Conn) Idle() bool {
	if r, ok := c.in.(*record.Reader); ok && r.Buffered() > 0 {
		return false
	}
	raw, err := c.wire.SyscallConn()
	if err != nil {
		return false
	}
	idle := false
	err = raw.Control(func(fd uintptr) {
		var b [1]byte
		_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		idle = err == unix.EAGAIN
	})
	return err == nil && idle
}
