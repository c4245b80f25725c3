package record

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
)

const (
	helloClient = 1
	// helloRandom is where a ClientHello has its random: behind the headers of record
	// and message, and legacy_version (RFC 8446 section 4.1.2).
	helloRandom = headerSize + messageHeader + 2
	// maxHeld is how much a Tap keeps back, bytes: a client's certificates and the record
	// that follows.
	maxHeld = 64 << 10
)

// Tap is the net.Conn between crypto/tls and a socket whose data phase this package
// may take over. It learns the client random from the wire, counts records, and
// never gives crypto/tls more than the record under way, so that whatever follows the
// takeover is its own. What it has itself read beyond that goes to the Reader; where bytes
// in the clear may follow, Precise keeps them in the kernel. The end of the stream is
// ErrTruncated: crypto/tls would take a FIN between two records for a clean end.
//
// As net.Conn it may be read by one goroutine and written by another. The other
// methods are for whoever orders these two.
type Tap struct {
	net.Conn
	keys *KeyLog

	in, out     framing
	ahead       *buffer // what was read from the socket, and is not crypto/tls's yet; nil: nothing
	start, end  int     // of it
	precise     bool    // nothing is read ahead any more
	corked      bool
	held        []byte // written while corked, and not on its way yet
	loose       bool
	hello       []byte // the stream's first bytes, until they hold the random
	helloRead   bool   // the ClientHello came from the peer: we are the server
	random      [randomSize]byte
	secrets     *secrets // nil: none expected
	established bool
	suite       uint16

	// state is a server's writing direction, from the moment that its secret is known.
	// It tells by trial which records of the handshake are under it.
	state *protection

	got, written uint64 // application traffic records since the handshake's end
	early        uint64 // those written during the handshake: the server's tickets
	inTaken      atomic.Bool
	outTaken     atomic.Bool
}

// NewTap puts a Tap on conn, the *net.TCPConn itself, before the handshake's first
// byte. Release must be called when it is not needed any more, Take or not.
func NewTap(conn net.Conn, keys *KeyLog) *Tap {
	return &Tap{Conn: conn, keys: keys, hello: make([]byte, 0, helloRandom+randomSize)}
}

// framing follows one direction's records.
type framing struct {
	head [headerSize]byte
	have int
	left int
}

// boundary: no record is under way.
func (f *framing) boundary() bool { return f.have == 0 }

// next is how many bytes belong to the header or body under way.
func (f *framing) next() int {
	if f.have < headerSize {
		return headerSize - f.have
	}
	return f.left
}

// advance takes at most next() bytes. began: p completed a header.
func (f *framing) advance(p []byte) (began bool) {
	if f.have < headerSize {
		f.have += copy(f.head[f.have:], p)
		if began = f.have == headerSize; began {
			f.left = int(binary.BigEndian.Uint16(f.head[3:]))
		}
	} else {
		f.left -= len(p)
	}
	if f.have == headerSize && f.left == 0 {
		f.have = 0
	}
	return began
}

// Read reads from the connection, at most to the end of the record.
func (t *Tap) Read(p []byte) (int, error) {
	if t.inTaken.Load() {
		return 0, errDrained{}
	}
	if len(p) == 0 {
		return 0, nil
	}
	if t.corked { // or it would wait for the answer to what it holds
		if err := t.flush(); err != nil {
			return 0, err
		}
	}
	if !t.loose {
		p = p[:min(len(p), t.in.next())]
	}
	n, err := t.read(p)
	if !t.loose && n > 0 {
		t.greet(p[:n], true)
		if t.in.advance(p[:n]) && t.in.head[0] == typeApplicationData && t.established {
			t.got++
		}
	}
	if errors.Is(err, io.EOF) {
		err = ErrTruncated
	}
	return n, err
}

// read is Conn's Read, by way of what was read ahead.
func (t *Tap) read(p []byte) (n int, err error) {
	if t.ahead == nil {
		if t.precise || t.loose {
			return t.Conn.Read(p)
		}
		b := getBuffer(smallSize)
		if n, err = t.Conn.Read(b.data); n <= 0 {
			putBuffer(b)
			return n, err
		}
		t.ahead, t.start, t.end = b, 0, n
	}
	n = copy(p, t.ahead.data[t.start:t.end])
	if t.start += n; t.start == t.end {
		t.dropAhead()
	}
	return n, err
}

func (t *Tap) dropAhead() {
	if t.ahead != nil {
		putBuffer(t.ahead)
		t.ahead, t.start, t.end = nil, 0, 0
	}
}

// Precise ends reading ahead: from now on what stands behind the record under way stays
// in the kernel. It must be called before the peer can have a reason to leave TLS.
func (t *Tap) Precise() { t.precise = true }

// Ahead is how many bytes have been read that crypto/tls has not been given.
func (t *Tap) Ahead() int { return t.end - t.start }

// Cork keeps what crypto/tls encrypts until Uncork, or until it reads: a client's Finished
// then leaves with what follows it. The ClientHello is not encrypted. One goroutine reads
// and writes meanwhile.
func (t *Tap) Cork() { t.corked = true }

// Uncork ends Cork, and sends what was kept. Errors: the connection's.
func (t *Tap) Uncork() error {
	if !t.corked {
		return nil // nor may anything be looked at: see Cork
	}
	t.corked = false
	return t.flush()
}

func (t *Tap) flush() error {
	b := t.held
	if t.held = nil; len(b) == 0 {
		return nil
	}
	_, err := t.Conn.Write(b)
	return err
}

// Write writes whole records, as crypto/tls has them.
func (t *Tap) Write(p []byte) (int, error) {
	if t.outTaken.Load() {
		// crypto/tls has an alert or a KeyUpdate answer: its sequence number is stale.
		return 0, ErrTaken
	}
	if !t.loose {
		t.greet(p, false)
		encrypted := t.count(p)
		if t.corked && (encrypted || len(t.held) > 0) {
			if t.held = append(t.held, p...); len(t.held) > maxHeld {
				return len(p), t.flush()
			}
			return len(p), nil
		}
	}
	return t.Conn.Write(p)
}

// greet looks for the ClientHello, which is the first record either way.
func (t *Tap) greet(p []byte, read bool) {
	if t.hello == nil {
		return
	}
	if len(t.hello) == 0 {
		t.helloRead = read
	} else if t.helloRead != read {
		t.hello = nil // an answer to half a ClientHello: none of ours
		return
	}
	t.hello = append(t.hello, p[:min(len(p), cap(t.hello)-len(t.hello))]...)
	if len(t.hello) < cap(t.hello) {
		return
	}
	h := t.hello
	t.hello = nil
	if h[0] == typeHandshake && h[headerSize] == helloClient &&
		int(binary.BigEndian.Uint16(h[3:])) >= len(h)-headerSize { // the random is in this record
		copy(t.random[:], h[helloRandom:])
		t.secrets = t.keys.expect(t.random)
	}
}

// count follows the records written. A client writes none under the application key
// before the handshake has returned; a server may, session tickets. They look like
// those under the handshake key, and crypto/tls writes the server's whole flight
// after it has changed keys; but only they authenticate under the application key.
//
// encrypted: there are such records in p, of either key.
func (t *Tap) count(p []byte) (encrypted bool) {
	if t.helloRead && !t.established && t.state == nil && t.secrets != nil {
		if _, server, ok := t.keys.get(t.secrets); ok {
			t.state = tryState(server)
		}
	}
	for len(p) > 0 {
		n := min(t.out.next(), len(p))
		whole := t.out.boundary() && len(p) >= headerSize &&
			len(p) >= headerSize+int(binary.BigEndian.Uint16(p[3:]))
		if t.out.advance(p[:n]) && t.out.head[0] == typeApplicationData {
			encrypted = true
			switch {
			case t.established:
				t.written++
			case t.state != nil && !whole:
				t.state = nil // cannot be tried: unknown from here on
			case t.state != nil && t.authenticates(p[:headerSize+t.out.left]):
				t.early++
			}
		}
		p = p[n:]
	}
	return encrypted
}

// tryState makes a server's protection. The suite is not known before the handshake
// ends, but the length of its hash is.
func tryState(secret []byte) *protection {
	for id, s := range suites {
		if s.hashSize == len(secret) {
			if p, err := newProtection(id, secret, 0); err == nil {
				return p
			}
		}
	}
	return nil
}

// authenticates tries a record as the next one under the application key.
func (t *Tap) authenticates(record []byte) bool {
	if len(record) < overhead || len(record) > maxRecord {
		return false
	}
	b := getBuffer(len(record))
	defer putBuffer(b)
	_, err := t.state.open(b.data, record)
	return err == nil
}

// Established must be called when the handshake has returned, before anything else
// is read or written. Errors: ErrNoSecrets; the connection is fine all the same.
func (t *Tap) Established(s tls.ConnectionState) error {
	if !s.HandshakeComplete || s.Version != tls.VersionTLS13 {
		return fmt.Errorf("%w: no TLS 1.3 handshake completed", ErrNoSecrets)
	}
	t.established, t.suite = true, s.CipherSuite
	if t.secrets == nil {
		return ErrNoSecrets
	}
	client, server, ok := t.keys.get(t.secrets)
	if !ok {
		return ErrNoSecrets
	}
	if t.state == nil && t.helloRead {
		return fmt.Errorf("%w: records of the handshake not counted", ErrNoSecrets)
	}
	if suites[t.suite] == nil || len(client) != suites[t.suite].hashSize || len(server) != len(client) {
		return fmt.Errorf("%w: %w: %s", ErrNoSecrets, ErrSuite, tls.CipherSuiteName(t.suite))
	}
	if t.written = t.early; t.state != nil {
		t.state.wipe()
		t.state = nil
	}
	return nil
}

// Loosen gives up the takeover: the stream stays with crypto/tls, whose reads may
// take all there is. Between reads, by the reader.
func (t *Tap) Loosen() {
	t.loose = t.in.boundary()
	t.Release()
}

// Release forgets the secrets.
func (t *Tap) Release() {
	if t.secrets != nil {
		t.keys.forget(t.random, t.secrets)
		t.secrets = nil
	}
	if t.state != nil {
		t.state.wipe()
		t.state = nil
	}
	t.hello = nil
}

// Take takes both directions over from c, which must not be used any more. Nobody
// may be reading or writing. Errors: ErrNoSecrets, ErrFIPS and nothing has changed;
// any other, and the connection is of no use.
func (t *Tap) Take(c *tls.Conn) (*Conn, error) {
	w, err := t.TakeWriter()
	if err != nil {
		return nil, err
	}
	r, err := t.TakeReader(c, w)
	if err != nil {
		return nil, err
	}
	return &Conn{Reader: r, Writer: w}, nil
}

// TakeWriter takes the writing direction alone, for a client that sends early while
// crypto/tls still waits for the server's first message. crypto/tls cannot answer a
// KeyUpdate from then on, nor send an alert: its writes fail with ErrTaken.
func (t *Tap) TakeWriter() (*Writer, error) {
	c, err := t.config()
	if err != nil {
		return nil, err
	}
	if err := t.Uncork(); err != nil {
		return nil, err
	}
	if !t.out.boundary() {
		return nil, fmt.Errorf("%w: a write stopped inside a record", ErrNoSecrets)
	}
	w, err := NewWriter(t.Conn, c)
	if err != nil {
		return nil, err
	}
	t.outTaken.Store(true)
	return w, nil
}

// TakeReader takes the reading direction, and with it what c has decrypted and not
// handed out. The secrets are forgotten. After an error, w is stopped.
func (t *Tap) TakeReader(c *tls.Conn, w *Writer) (_ *Reader, err error) {
	defer func() {
		if err != nil {
			w.Release()
		}
	}()
	config, err := t.config()
	if err != nil {
		return nil, err
	}
	if !t.in.boundary() {
		return nil, fmt.Errorf("%w: a read stopped inside a record", ErrNoSecrets)
	}
	t.inTaken.Store(true)
	ended := false
	b := getBuffer(largeSize)
	defer putBuffer(b)
	for {
		n, err := c.Read(b.data)
		config.Pending = append(config.Pending, b.data[:n]...) // at most one record's
		if errors.Is(err, errDrained{}) {
			break
		}
		if ended = errors.Is(err, io.EOF); ended {
			break // close_notify came already
		}
		if err != nil {
			return nil, err
		}
	}
	r, err := NewReader(t.Conn, config, w)
	if err != nil {
		return nil, err
	}
	if t.ahead != nil {
		r.buf, r.start, r.end = t.ahead, t.start, t.end
		t.ahead, t.start, t.end = nil, 0, 0
	}
	if ended {
		_ = r.finish(io.EOF)
	}
	t.Release()
	return r, nil
}

// config is where both directions stand; its secrets are the KeyLog's.
func (t *Tap) config() (Config, error) {
	if !t.established || t.secrets == nil {
		return Config{}, ErrNoSecrets
	}
	client, server, ok := t.keys.get(t.secrets)
	if !ok {
		return Config{}, ErrNoSecrets
	}
	c := Config{
		Client: !t.helloRead, Suite: t.suite,
		ReadSecret: server, WriteSecret: client,
		ReadSequence: t.got, WriteSequence: t.written,
	}
	if t.helloRead {
		c.ReadSecret, c.WriteSecret = client, server
	}
	return c, nil
}

// errDrained tells crypto/tls that there is nothing to read. It is temporary, so
// that crypto/tls does not keep it.
type errDrained struct{}

func (errDrained) Error() string   { return ErrTaken.Error() }
func (errDrained) Unwrap() error   { return ErrTaken }
func (errDrained) Timeout() bool   { return false }
func (errDrained) Temporary() bool { return true }
