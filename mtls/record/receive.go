package record

import "io"

// Batch is the application data of one or more records, as many as have arrived:
// it waits for the first, and reads no more for the others. The slices are valid
// until the next call of any method; the caller may change them and what they hold.
// Errors as Next, after the data that came before them has been handed out.
func (r *Reader) Batch() ([][]byte, error) {
	b, err := r.Next()
	if err != nil {
		return nil, err
	}
	if r.buf == nil {
		return [][]byte{b}, nil // Pending: once in a connection's life
	}
	out := append(r.buf.slices[:0], b)
	for len(out) < cap(out) {
		b, err := r.next(false)
		if err != nil || len(b) == 0 {
			break // an error is kept for the next call
		}
		out = append(out, b)
	}
	return out, nil
}

// ReceiveTo waits for application data and writes all that has arrived to dst: read,
// decryption in place, and one writev(2) where dst has that. io.EOF: the peer has
// sent close_notify. n is what dst took.
func (r *Reader) ReceiveTo(dst io.Writer) (n int, err error) {
	batch, err := r.Batch()
	if err != nil {
		return 0, err
	}
	if len(batch) == 1 {
		n, err = dst.Write(batch[0])
	} else {
		r.pending = batch
		var m int64
		m, err = r.pending.WriteTo(dst)
		n = int(m)
		r.pending = nil
	}
	r.reclaim()
	return n, err
}

// WriteTo writes all application data to dst, until close_notify.
func (r *Reader) WriteTo(dst io.Writer) (n int64, err error) {
	for {
		k, err := r.ReceiveTo(dst)
		n += int64(k)
		if err != nil {
			return n, notEOF(err)
		}
	}
}
