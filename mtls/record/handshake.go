package record

import "fmt"

// Handshake messages, RFC 8446 section 4.
const (
	messageNewSessionTicket = 4
	messageKeyUpdate        = 24

	messageHeader = 4
	keyUpdateSize = messageHeader + 1
	// maxTicket is what crypto/tls takes, bytes.
	maxTicket = 1 << 16
)

// message is the handshake message under way. Messages may span records and share
// one (RFC 8446 section 5.1); of none is more kept than this.
type message struct {
	head [keyUpdateSize]byte
	have int // of head
	skip int // bytes of a ticket still to come
}

func (m *message) started() bool { return m.have > 0 || m.skip > 0 }

// handshake takes a record of post-handshake messages, RFC 8446 section 4.6.
func (r *Reader) handshake(b []byte) error {
	if len(b) == 0 {
		return r.fail(AlertUnexpectedMessage, "empty handshake record")
	}
	m := &r.message
	for len(b) > 0 {
		if m.skip > 0 {
			n := min(m.skip, len(b))
			m.skip, b = m.skip-n, b[n:]
			continue
		}
		want := messageHeader
		if m.have >= messageHeader {
			want = keyUpdateSize
		}
		n := copy(m.head[m.have:want], b)
		m.have, b = m.have+n, b[n:]
		var err error
		switch m.have {
		case messageHeader:
			err = r.messageBegins()
		case keyUpdateSize:
			m.have = 0
			err = r.keyUpdate(m.head[messageHeader], len(b) > 0)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// messageBegins judges a message by its header.
func (r *Reader) messageBegins() error {
	m := &r.message
	length := int(m.head[1])<<16 | int(m.head[2])<<8 | int(m.head[3])
	switch kind := m.head[0]; {
	case kind == messageKeyUpdate && length != keyUpdateSize-messageHeader:
		return r.fail(AlertDecodeError, fmt.Sprintf("key update of %d bytes", length))
	case kind == messageKeyUpdate:
		return nil // its byte is still to come
	case kind == messageNewSessionTicket && r.client && length > maxTicket:
		return r.fail(AlertDecodeError, fmt.Sprintf("session ticket of %d bytes", length))
	case kind == messageNewSessionTicket && r.client:
		// Of no use here: it belongs into crypto/tls's session cache, which takes none
		// from outside. A ticket that came before the takeover is in it.
		m.have, m.skip = 0, length
		return nil
	default:
		return r.fail(AlertUnexpectedMessage, fmt.Sprintf("handshake message of type %d", kind))
	}
}

// keyUpdate moves to the peer's next key, RFC 8446 section 4.6.3. The answer to a
// request goes out with our next application data, which the section allows, so that
// a reader never waits for a writer.
func (r *Reader) keyUpdate(request byte, more bool) error {
	switch {
	case request > 1:
		return r.fail(AlertIllegalParameter, fmt.Sprintf("key update request %d", request))
	case more:
		// Section 5.1: a message must not follow in a record of the old key.
		return r.fail(AlertUnexpectedMessage, "key update is not the end of its record")
	}
	if err := r.state.update(); err != nil {
		return r.abort(AlertInternalError, err)
	}
	if request == 1 {
		r.writer.answer.Store(true)
	}
	return nil
}

// appendKeyUpdate is the message.
func appendKeyUpdate(b []byte, request bool) []byte {
	b = append(b, messageKeyUpdate, 0, 0, 1, 0)
	if request {
		b[len(b)-1] = 1
	}
	return b
}
