package record

import (
	"fmt"
	"io"
)

// A caller that does its own I/O, such as an event loop, uses a Reader and a Writer
// without their connections: Detach both, then Open what was read and Seal what is to
// be written, both in place, and Attach when goroutines shall use them again. All
// calls are then made by one goroutine at a time.

// The layout of a buffer for Seal: room for a KeyUpdate, then slots of a record each.
// The plaintext of slot i stands at SlotsAt + i*SlotStride, SlotData bytes; of the
// last one there may be less. Full records are contiguous.
const (
	SlotsAt    = keyUpdateRecord + headerSize
	SlotData   = maxPlaintext
	SlotStride = slotSize
	// MaxSlots is how many records Seal makes at a time.
	MaxSlots = 16
	// MaxRecord is the size of the longest record, bytes.
	MaxRecord = maxRecord
)

// SealBuffer is the size of a buffer of n slots, bytes.
func SealBuffer(n int) int { return keyUpdateRecord + n*SlotStride }

// Detach gives up what has been read and not handed out: application data first,
// then bytes of records. They are copies.
func (r *Reader) Detach() (plain, sealed []byte) {
	plain = append(plain, r.plain...)
	r.plain = nil
	if r.buf != nil {
		sealed = append(sealed, r.buf.data[r.start:r.end]...)
		r.start = r.end
	}
	r.reclaim()
	r.conn, r.raw = nil, nil
	return plain, sealed
}

// Attach makes conn the Reader's connection, behind what was read of it already and
// not handed out, which is copied.
func (r *Reader) Attach(conn io.Reader, plain, sealed []byte) {
	r.conn, r.raw = conn, rawConn(conn)
	if r.plain = nil; len(plain) > 0 {
		r.plain = append(r.plain, plain...)
	}
	if len(sealed) > 0 {
		if r.buf = getBuffer(len(sealed)); len(sealed) > len(r.buf.data) {
			putBuffer(r.buf)
			r.buf = &buffer{data: make([]byte, len(sealed))}
		}
		r.start, r.end = 0, copy(r.buf.data, sealed)
	}
}

// Open decrypts the record at the start of b, in place. size is the record's; 0: it
// is not all there. data, a part of b, may be nothing: a record with another purpose.
// Errors as Next, but for those of a connection; they are final.
func (r *Reader) Open(b []byte) (data []byte, size int, err error) {
	if r.err != nil {
		return nil, 0, r.err
	}
	if len(b) < headerSize {
		return nil, 0, nil
	}
	size, err = r.header(b)
	if err != nil || len(b) < size {
		return nil, 0, err
	}
	data, err = r.process(b[:size])
	return data, size, err
}

// Detach makes alerts the connection, which is written to for them only, and must
// not wait. Errors: ErrConfig where the limit of a key is less than two batches.
func (w *Writer) Detach(alerts io.Writer) error {
	if err := w.lock(); err != nil {
		return err
	}
	defer w.unlock()
	if w.limit < 2*MaxSlots {
		return fmt.Errorf("%w: limit of %d records", ErrConfig, w.limit)
	}
	w.conn, w.raw = alerts, nil
	return nil
}

// Attach makes conn the Writer's connection again.
func (w *Writer) Attach(conn io.Writer) error {
	if err := w.lock(); err != nil {
		return err
	}
	defer w.unlock()
	w.conn, w.raw = conn, rawConn(conn)
	return nil
}

// Seal encrypts the n bytes that stand in buf's slots, where they are, and returns
// the records, a part of buf, for the caller to write. A KeyUpdate that is due goes
// before them.
func (w *Writer) Seal(buf []byte, n int) ([]byte, error) {
	if err := w.lock(); err != nil {
		return nil, err
	}
	defer w.unlock()
	start := keyUpdateRecord
	records := uint64(n+maxPlaintext-1) / maxPlaintext
	if w.answer.Load() && w.answer.Swap(false) || w.state.sequence+records >= w.limit {
		if _, err := w.sealKeyUpdate(buf, false); err != nil {
			return nil, w.broken(err)
		}
		start = 0
	}
	end := keyUpdateRecord
	for ; n > 0; n -= min(n, maxPlaintext) {
		k, err := w.state.seal(buf[end:], typeApplicationData, min(n, maxPlaintext))
		if err != nil {
			return nil, w.broken(err)
		}
		end += k
	}
	return buf[start:end], nil
}

// SealEnd is the record of close_notify, in buf, after which nothing can be sealed.
func (w *Writer) SealEnd(buf []byte) ([]byte, error) {
	if err := w.lock(); err != nil {
		return nil, err
	}
	defer w.unlock()
	k, err := w.sealAlert(buf, AlertCloseNotify)
	if err != nil {
		return nil, w.broken(err)
	}
	w.closed = true
	w.state.wipe()
	return buf[:k], nil
}

// Rest drops memory that the next record makes again, if none has come since the last
// call. It tells whether there is any left.
func (r *Reader) Rest() (warm bool) { return r.state.rest() }

// Rest is Reader's, of records sent.
func (w *Writer) Rest() (warm bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state.rest()
}
