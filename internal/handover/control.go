package handover

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// Message is what the two processes of a change say to each other.
type Message byte

const (
	// Ready (new to old): everything is prepared; the new one could accept.
	Ready Message = 1 + iota
	// Go (old to new): accept, and speak to the controller: the old one does not any
	// more.
	Go
	// Policy (both ways) carries a generation of policy: from the old one before Go,
	// one newer than the snapshot's; from the new one as long as the old one drains,
	// so that what policy denies is cut there, too.
	Policy
	// Reissue (new to old): names or claims may have changed; ask for new SVIDs.
	Reissue
)

const (
	messageHeader = 5 // kind, length (big endian)
	// writeTimeout is for a reader that does nothing else.
	writeTimeout = 10 * time.Second
)

// Control is a stream of messages between the old process and the new one. One
// goroutine may receive while others send. Close it.
type Control struct {
	conn net.Conn
	mu   sync.Mutex // of senders
}

// newControl makes one of a socket; f stays the caller's.
func newControl(f *os.File) (*Control, error) {
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("handover: %w", err)
	}
	return &Control{conn: c}, nil
}

// Send says one thing. A peer that has gone is an error, and so is one that does not
// read.
func (c *Control) Send(m Message, payload []byte) error {
	if len(payload) > MaxSnapshot {
		return fmt.Errorf("handover: a message of %d bytes, at most %d", len(payload), MaxSnapshot)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	header := binary.BigEndian.AppendUint32([]byte{byte(m)}, uint32(len(payload)))
	// At once: the other one may act on the last byte, and be gone before one more write.
	if _, err := (&net.Buffers{header, payload}).WriteTo(c.conn); err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	return nil
}

// Receive waits for the next message, until deadline if there is one. io.EOF: the
// other one has closed, or has gone.
func (c *Control) Receive(deadline time.Time) (Message, []byte, error) {
	if err := c.conn.SetReadDeadline(deadline); err != nil {
		return 0, nil, fmt.Errorf("handover: %w", err)
	}
	var header [messageHeader]byte
	if _, err := io.ReadFull(c.conn, header[:]); err != nil {
		return 0, nil, fmt.Errorf("handover: %w", err)
	}
	n := binary.BigEndian.Uint32(header[1:])
	if n > MaxSnapshot {
		return 0, nil, fmt.Errorf("handover: a message of %d bytes, at most %d", n, MaxSnapshot)
	}
	payload := make([]byte, n)
	if _, err := io.ReadFull(c.conn, payload); err != nil {
		return 0, nil, fmt.Errorf("handover: %w", err)
	}
	return Message(header[0]), payload, nil
}

// Close ends both directions; whoever waits in Receive returns.
func (c *Control) Close() error { return c.conn.Close() }
