package record

import (
	"io"
	"sync"
	"sync/atomic"
	"syscall"
)

// keyUpdateRecord is the size of a KeyUpdate's record, bytes.
const keyUpdateRecord = keyUpdateSize + overhead

// Writer is the sending direction. Its methods may be called by any goroutine; the
// order of concurrent writes is not defined.
type Writer struct {
	conn  io.Writer
	raw   syscall.RawConn // of conn, or nil
	limit uint64

	mu     sync.Mutex
	state  *protection
	closed bool  // close_notify was sent
	err    error // the stream is broken off

	// answer: the peer wants our KeyUpdate, before our next application data.
	answer atomic.Bool
	// ending is set once, by whichever half finds that the connection is over.
	ending atomic.Pointer[ending]
}

// ending is why nothing more is written, and the alert to send first, unless it is
// AlertCloseNotify.
type ending struct {
	err   error
	alert Alert
}

// NewWriter takes over the sending direction of conn; the Read fields of c are not
// looked at. Errors: ErrSuite, ErrConfig, ErrFIPS.
func NewWriter(conn io.Writer, c Config) (*Writer, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	p, err := newProtection(c.Suite, c.WriteSecret, c.WriteSequence)
	if err != nil {
		return nil, err
	}
	return &Writer{conn: conn, raw: rawConn(conn), limit: c.Limit, state: p}, nil
}

// lock begins a write. On error the lock is not held.
func (w *Writer) lock() error {
	w.mu.Lock()
	err := w.err
	if e := w.ending.Load(); e != nil {
		err = e.err
	}
	if err == nil && w.closed {
		err = ErrClosed
	}
	if err != nil {
		w.unlock()
	}
	return err
}

// unlock ends a write, and does what the reader left to whoever held the lock.
func (w *Writer) unlock() {
	w.mu.Unlock()
	if w.ending.Load() != nil {
		w.settle()
	}
}

// Write sends p in records of at most 2^14 bytes, several in one write(2). An error
// is final: part of a record may be on its way. n counts the bytes whose records
// left completely.
func (w *Writer) Write(p []byte) (n int, err error) {
	if err := w.lock(); err != nil {
		return 0, err
	}
	defer w.unlock()
	b := getBuffer(len(p) + overhead + keyUpdateRecord)
	defer putBuffer(b)
	for n < len(p) {
		size, taken, err := w.pack(b.data, p[n:])
		if err == nil {
			_, err = w.conn.Write(b.data[:size])
		}
		if err != nil {
			return n, w.broken(err)
		}
		n += taken
	}
	return n, nil
}

// pack seals as much of p into out as goes in.
func (w *Writer) pack(out, p []byte) (size, taken int, err error) {
	for taken < len(p) {
		n := min(len(p)-taken, maxPlaintext)
		if len(out)-size < n+overhead+keyUpdateRecord {
			break
		}
		if w.updateDue() {
			k, err := w.sealKeyUpdate(out[size:], false)
			if err != nil {
				return 0, 0, err
			}
			size += k
		}
		copy(out[size+headerSize:], p[taken:taken+n])
		k, err := w.state.seal(out[size:], typeApplicationData, n)
		if err != nil {
			return 0, 0, err
		}
		size += k
		taken += n
	}
	return size, taken, nil
}

// updateDue: a KeyUpdate comes before the next application data, because the peer
// asked (RFC 8446 section 4.6.3; several requests want one answer), or because the
// last record that the key is good for is the KeyUpdate's own.
func (w *Writer) updateDue() bool {
	return w.answer.Load() && w.answer.Swap(false) || w.state.sequence >= w.limit-1
}

// sealKeyUpdate puts a KeyUpdate into slot and moves to the next key.
func (w *Writer) sealKeyUpdate(slot []byte, request bool) (int, error) {
	appendKeyUpdate(slot[headerSize:headerSize], request)
	k, err := w.state.seal(slot, typeHandshake, keyUpdateSize)
	if err != nil {
		return 0, err
	}
	return k, w.state.update()
}

// SendKeyUpdate changes this direction's key at once, and with request asks the
// peer to change its own.
func (w *Writer) SendKeyUpdate(request bool) error {
	if err := w.lock(); err != nil {
		return err
	}
	defer w.unlock()
	if !request {
		w.answer.Store(false) // this is the answer; one that requests is none
	}
	return w.sendKeyUpdate(request)
}

// sendKeyUpdate needs the lock.
func (w *Writer) sendKeyUpdate(request bool) error {
	b := getBuffer(keyUpdateRecord)
	defer putBuffer(b)
	k, err := w.sealKeyUpdate(b.data, request)
	if err == nil {
		_, err = w.conn.Write(b.data[:k])
	}
	return w.broken(err)
}

// CloseWrite ends this direction with close_notify, RFC 8446 section 6.1, and leaves
// the other open, and the TCP connection too. A second call does nothing.
func (w *Writer) CloseWrite() error {
	if err := w.lock(); err == ErrClosed { //nolint:errorlint // lock returns it unwrapped
		return nil
	} else if err != nil {
		return err
	}
	defer w.unlock()
	b := getBuffer(alertSize + overhead)
	defer putBuffer(b)
	k, err := w.sealAlert(b.data, AlertCloseNotify)
	if err == nil {
		_, err = w.conn.Write(b.data[:k])
	}
	if err != nil {
		return w.broken(err)
	}
	w.closed = true
	w.state.wipe()
	return nil
}

// Release forgets the keys; a write after it is ErrReleased, if not an error that
// came before. A write under way may finish first.
func (w *Writer) Release() { w.end(ErrReleased, AlertCloseNotify) }

// end stops the writer for good, with an alert where it is not AlertCloseNotify. It
// does not wait for a write under way, which would let a peer that does not read
// hold up our reader too.
func (w *Writer) end(err error, alert Alert) {
	w.ending.CompareAndSwap(nil, &ending{err: err, alert: alert})
	w.settle()
}

// settle carries out the ending, unless somebody holds the lock, who does it then.
func (w *Writer) settle() {
	if !w.mu.TryLock() {
		return
	}
	defer w.mu.Unlock()
	e := w.ending.Load()
	if w.err != nil || w.closed {
		// Mid-record, or the peer was told that nothing follows.
		w.state.wipe()
		return
	}
	w.err = e.err
	if e.alert != AlertCloseNotify {
		var b [alertSize + overhead]byte
		if k, err := w.sealAlert(b[:], e.alert); err == nil {
			w.tryWrite(b[:k])
		}
	}
	w.state.wipe()
}

// tryWrite writes b, on a descriptor only what needs no waiting.
func (w *Writer) tryWrite(b []byte) {
	if w.raw == nil {
		_, _ = w.conn.Write(b)
		return
	}
	_ = w.raw.Write(func(fd uintptr) bool {
		_, _ = ignoringEINTR(func() (int, error) { return syscall.Write(int(fd), b) })
		return true
	})
}

func (w *Writer) sealAlert(slot []byte, a Alert) (int, error) {
	level := byte(alertFatal)
	if a == AlertCloseNotify {
		level = alertWarning
	}
	slot[headerSize], slot[headerSize+1] = level, byte(a)
	return w.state.seal(slot, typeAlert, alertSize)
}

// broken keeps the first error of the stream.
func (w *Writer) broken(err error) error {
	if err != nil && w.err == nil {
		w.err = err
		w.state.wipe()
	}
	return err
}
