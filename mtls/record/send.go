package record

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Source is a connection whose bytes a Writer sends: the application's. One
// goroutine may use it.
type Source struct {
	conn net.Conn
	raw  syscall.RawConn
	read func(fd uintptr) bool // method value, made once: no allocation per call

	buf *buffer
	n   int
	err error
}

// NewSource needs a connection with a file descriptor, as *net.TCPConn and
// *net.UnixConn have.
func NewSource(c interface {
	net.Conn
	syscall.Conn
}) (*Source, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &Source{conn: c, raw: raw}
	s.read = s.readSlots
	return s, nil
}

// fill waits until the source has bytes, without a buffer, and reads them to where
// they will be sealed. io.EOF: the source has ended.
func (s *Source) fill() error {
	s.n, s.err = 0, nil
	if err := s.raw.Read(s.read); err != nil {
		return err
	}
	switch {
	case s.err != nil:
		return &net.OpError{
			Op: "read", Net: s.conn.LocalAddr().Network(), Source: s.conn.LocalAddr(), Addr: s.conn.RemoteAddr(),
			Err: os.NewSyscallError("readv", s.err),
		}
	case s.n == 0:
		return io.EOF
	}
	return nil
}

// readSlots reads into the slots of a batch, leaving room for headers and tags.
func (s *Source) readSlots(fd uintptr) bool {
	b := large.Get().(*buffer)
	for i := range batchRecords {
		b.slices[i] = b.data[i*slotSize+headerSize:][:maxPlaintext]
	}
	s.n, s.err = ignoringEINTR(func() (int, error) { return unix.Readv(int(fd), b.slices[:batchRecords]) })
	if s.n > 0 {
		s.buf = b
		return true
	}
	large.Put(b)
	return !errors.Is(s.err, unix.EAGAIN)
}

// SendFrom waits for bytes of s, reads what is there, at most a batch of 64 KiB,
// and sends it: readv(2), encryption in place, write(2). io.EOF: s has ended, and
// nothing was sent. n is what was read and handed to the connection.
//
// Errors of s are *net.OpError with Op "read", or "raw-read" for a deadline that has
// passed or a connection closed.
func (w *Writer) SendFrom(s *Source) (n int, err error) {
	if err := s.fill(); err != nil {
		return 0, err
	}
	b, n := s.buf, s.n
	s.buf = nil
	defer putBuffer(b)
	if err := w.lock(); err != nil {
		return 0, err
	}
	defer w.unlock()
	start, end := 0, 0 // sealed, and not written yet
	for at := 0; at < n; at += maxPlaintext {
		if w.updateDue() {
			// There is no room between the slots; it is rare, and costs a write.
			if err := w.flush(b.data[start:end]); err != nil {
				return 0, err
			}
			start = end
			if err := w.sendKeyUpdate(false); err != nil {
				return 0, err
			}
		}
		k, err := w.state.seal(b.data[end:], typeApplicationData, min(n-at, maxPlaintext))
		if err != nil {
			return 0, w.broken(err)
		}
		end += k
	}
	if err := w.flush(b.data[start:end]); err != nil {
		return 0, err
	}
	return n, nil
}

func (w *Writer) flush(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	_, err := w.conn.Write(b)
	return w.broken(err)
}

// ReadFrom sends all that src has, until it ends. It does not send close_notify.
func (w *Writer) ReadFrom(src io.Reader) (n int64, err error) {
	if c, ok := src.(interface {
		net.Conn
		syscall.Conn
	}); ok {
		if s, err := NewSource(c); err == nil {
			return w.readFromSource(s)
		}
	}
	b := large.Get().(*buffer)
	defer large.Put(b)
	for {
		k, rerr := src.Read(b.data[:batchRecords*maxPlaintext])
		if k > 0 {
			k, err := w.Write(b.data[:k])
			n += int64(k)
			if err != nil {
				return n, err
			}
		}
		if rerr != nil {
			return n, notEOF(rerr)
		}
	}
}

func (w *Writer) readFromSource(s *Source) (n int64, err error) {
	for {
		k, err := w.SendFrom(s)
		n += int64(k)
		if err != nil {
			return n, notEOF(err)
		}
	}
}

// notEOF is for io.ReaderFrom and io.WriterTo, where the end is no error.
func notEOF(err error) error {
	if err == io.EOF { //nolint:errorlint // an EOF inside another error is one
		return nil
	}
	return err
}

// ignoringEINTR repeats a system call that a signal interrupted.
func ignoringEINTR(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if err != unix.EINTR { //nolint:errorlint // a bare Errno
			return n, err
		}
	}
}
