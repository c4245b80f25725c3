package record

import (
	"crypto/fips140"
	"fmt"
	"io"
	"syscall"
)

// DefaultLimit is the number of records under one key, RFC 8446 section 5.5: AES-GCM
// is safe for 2^24.5 full-size records.
const DefaultLimit = 1 << 24

// Config is the state of a connection whose handshake is over.
type Config struct {
	// Client: this end is the client, to whom a server may send session tickets.
	Client bool
	// Suite is the cipher suite's number: TLS_AES_256_GCM_SHA384, or
	// TLS_AES_128_GCM_SHA256.
	Suite uint16
	// ReadSecret and WriteSecret are the application traffic secrets of this end's
	// two directions; they are copied.
	ReadSecret, WriteSecret []byte
	// ReadSequence and WriteSequence count the records already read and written under
	// these secrets, handshake messages after the handshake included.
	ReadSequence, WriteSequence uint64
	// Pending is application data that was read and decrypted already: the Reader
	// hands it out first.
	Pending []byte
	// Limit is how many records are written under one key, from 2 to DefaultLimit,
	// which 0 means.
	Limit uint64
}

// Conn is both directions. Read, Next, Batch, ReceiveTo and WriteTo are the
// reader's; Write, SendFrom, ReadFrom, CloseWrite and SendKeyUpdate the writer's.
// One goroutine may use each half.
type Conn struct {
	*Reader
	*Writer
}

// New takes conn over: the *net.TCPConn itself, since a wrapper that has its
// SyscallConn would be passed by. Whoever made conn closes it, sets its deadlines,
// and calls Release when both halves are at rest. Errors: ErrSuite, ErrConfig, ErrFIPS.
func New(conn io.ReadWriter, c Config) (*Conn, error) {
	w, err := NewWriter(conn, c)
	if err != nil {
		return nil, err
	}
	r, err := NewReader(conn, c, w)
	if err != nil {
		w.Release()
		return nil, err
	}
	return &Conn{Reader: r, Writer: w}, nil
}

// Release forgets keys and buffers of both halves. Nobody may be reading.
func (c *Conn) Release() {
	c.Reader.Release()
	c.Writer.Release()
}

func (c *Config) check() error {
	if fips140.Enabled() {
		return ErrFIPS
	}
	if c.Limit == 0 {
		c.Limit = DefaultLimit
	}
	if c.Limit < 2 || c.Limit > DefaultLimit {
		return fmt.Errorf("%w: limit of %d records", ErrConfig, c.Limit)
	}
	return nil
}

// rawConn is the descriptor behind conn, nil where it has none.
func rawConn(conn any) syscall.RawConn {
	if s, ok := conn.(syscall.Conn); ok {
		if raw, err := s.SyscallConn(); err == nil {
			return raw
		}
	}
	return nil
}
