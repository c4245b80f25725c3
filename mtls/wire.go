package mtls

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/symbolon/symbolon/mtls/record"
)

// wire is what crypto/tls reads from and writes to. It adds two things to the
// socket. An end of the stream becomes ErrTruncated: crypto/tls would report a FIN
// at a record boundary as a clean end. And until loosen is called, a read never
// goes beyond the TLS record under way, so that bytes which follow the Verdict in
// the clear are still in the kernel when the relay takes over.
//
// With the own record layer all of that is its Tap's, which also counts the records. It
// reads ahead, as long as the peer has nothing to send that is not TLS: see precise.
type wire struct {
	Socket
	tap    *record.Tap // nil: crypto/tls keeps the connection
	loose  bool
	header [recordHeader]byte
	have   int // bytes of header seen
	left   int // bytes of the record's body still to come
}

func (w *wire) Read(p []byte) (int, error) {
	if w.tap != nil {
		return w.tap.Read(p)
	}
	if w.loose {
		n, err := w.Socket.Read(p)
		return n, truncated(err)
	}
	if len(p) == 0 {
		return 0, nil
	}
	if w.have < recordHeader {
		n, err := w.Socket.Read(p[:min(len(p), recordHeader-w.have)])
		copy(w.header[w.have:], p[:n])
		if w.have += n; w.have == recordHeader {
			w.left = int(binary.BigEndian.Uint16(w.header[3:]))
			w.skipEmpty()
		}
		return n, truncated(err)
	}
	n, err := w.Socket.Read(p[:min(len(p), w.left)])
	w.left -= n
	w.skipEmpty()
	return n, truncated(err)
}

func (w *wire) skipEmpty() {
	if w.left == 0 {
		w.have = 0
	}
}

func (w *wire) Write(p []byte) (int, error) {
	if w.tap != nil {
		return w.tap.Write(p)
	}
	return w.Socket.Write(p)
}

// SetWriteDeadline does nothing. crypto/tls calls it around close_notify, to give up
// after five seconds: a peer that reads slowly would lose the end of its stream to
// a reset. Who needs a deadline sets it on the socket.
func (w *wire) SetWriteDeadline(time.Time) error { return nil }

// loosen lets reads take all there is: the stream stays in TLS.
// It is called between reads, by the reader.
func (w *wire) loosen() {
	if w.tap != nil {
		w.tap.Loosen()
	} else {
		w.loose = w.have == 0
	}
}

// precise ends reading ahead, where bytes in the clear follow. A server calls it before
// its Verdict, a client has told the Tap before its Open. Errors: ErrProtocol, something
// has come already, and was not in the clear.
func (w *wire) precise() error {
	if w.tap == nil {
		return nil
	}
	w.tap.Precise()
	if n := w.tap.Ahead(); n > 0 {
		return fmt.Errorf("%w: %d bytes came before their time", ErrProtocol, n)
	}
	return nil
}

// uncork sends what a client's Tap has kept back: its Finished goes with its Open.
func (w *wire) uncork() error {
	if w.tap == nil {
		return nil
	}
	return w.tap.Uncork()
}

func truncated(err error) error {
	if errors.Is(err, io.EOF) {
		return ErrTruncated
	}
	return err
}
