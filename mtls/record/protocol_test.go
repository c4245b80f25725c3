package record

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// receiver reads stream as a client, from a peer with secretOf(1); its own side is
// kept in the memory.
func receiver(t testing.TB, stream []byte) (*Conn, *memory) {
	t.Helper()
	m := &memory{in: bytes.NewReader(stream)}
	c, err := New(m, Config{
		Client: true, Suite: tls.TLS_AES_256_GCM_SHA384, ReadSecret: secretOf(1), WriteSecret: secretOf(2),
	})
	if err != nil {
		t.Fatal(err)
	}
	return c, m
}

// alertIn decrypts the one alert that was sent; -1: nothing was.
func alertIn(t testing.TB, m *memory) int {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.out.Len() == 0 {
		return -1
	}
	inner, err := newState(t, secretOf(2)).open(nil, m.out.Bytes())
	if err != nil {
		t.Fatalf("what was sent is not one record: %v", err)
	}
	if len(inner) != alertSize+typeSize || inner[0] != alertFatal || inner[2] != typeAlert {
		t.Fatalf("sent %x, want a fatal alert", inner)
	}
	return int(inner[1])
}

// header is a record of zeros with a header made by hand.
func header(contentType byte, version uint16, length int) []byte {
	b := make([]byte, headerSize+length)
	b[0] = contentType
	binary.BigEndian.PutUint16(b[1:], version)
	binary.BigEndian.PutUint16(b[3:], uint16(length))
	return b
}

func handshakeMessage(kind byte, body []byte) []byte {
	n := len(body)
	return append([]byte{kind, byte(n >> 16), byte(n >> 8), byte(n)}, body...)
}

// TestPeerMisbehaves: what the peer does wrong ends the connection with the alert
// that RFC 8446 has for it, after the data before it, and before the data behind.
func TestPeerMisbehaves(t *testing.T) {
	ticket := handshakeMessage(messageNewSessionTicket, make([]byte, 200))
	update := handshakeMessage(messageKeyUpdate, []byte{0})
	type record struct {
		contentType byte
		content     []byte
		padding     int
	}
	one := func(contentType byte, content []byte) []record { return []record{{contentType, content, 0}} }
	tests := map[string]struct {
		records []record
		raw     []byte
		alert   Alert
	}{
		"change_cipher_spec":            {raw: append(header(20, 0x0303, 0), 1), alert: AlertUnexpectedMessage},
		"alert in the clear":            {raw: header(typeAlert, 0x0303, 2), alert: AlertUnexpectedMessage},
		"no tls":                        {raw: []byte("GET / HTTP/1.1\r\n\r\n"), alert: AlertUnexpectedMessage},
		"record version 1.0":            {raw: header(typeApplicationData, 0x0301, 100), alert: AlertProtocolVersion},
		"giant record":                  {raw: header(typeApplicationData, 0x0303, maxCiphertext+1)[:headerSize], alert: AlertRecordOverflow},
		"largest length":                {raw: header(typeApplicationData, 0x0303, math.MaxUint16)[:headerSize], alert: AlertRecordOverflow},
		"empty record":                  {raw: header(typeApplicationData, 0x0303, 0), alert: AlertBadRecordMAC},
		"record without room for a tag": {raw: header(typeApplicationData, 0x0303, tagSize), alert: AlertBadRecordMAC},
		"zeros":                         {raw: header(typeApplicationData, 0x0303, 100), alert: AlertBadRecordMAC},
		"plaintext of 2^14+1":           {records: one(typeApplicationData, make([]byte, maxPlaintext+1)), alert: AlertRecordOverflow},
		"padding beyond 2^14":           {records: []record{{typeApplicationData, []byte{1}, maxPlaintext}}, alert: AlertRecordOverflow},
		"nothing but padding":           {records: []record{{0, nil, 50}}, alert: AlertUnexpectedMessage},
		"no content type":               {records: one(0, nil), alert: AlertUnexpectedMessage},
		"change_cipher_spec inside":     {records: one(20, []byte{1}), alert: AlertUnexpectedMessage},
		"unknown content type":          {records: one(99, []byte{1}), alert: AlertUnexpectedMessage},
		"empty handshake record":        {records: one(typeHandshake, nil), alert: AlertUnexpectedMessage},
		"empty alert record":            {records: one(typeAlert, nil), alert: AlertUnexpectedMessage},
		"half an alert":                 {records: one(typeAlert, []byte{alertFatal}), alert: AlertDecodeError},
		"two alerts":                    {records: one(typeAlert, []byte{1, 90, 1, 0}), alert: AlertDecodeError},
		"client hello":                  {records: one(typeHandshake, handshakeMessage(helloClient, make([]byte, 100))), alert: AlertUnexpectedMessage},
		"certificate request":           {records: one(typeHandshake, handshakeMessage(13, []byte{0, 0, 0})), alert: AlertUnexpectedMessage},
		"finished":                      {records: one(typeHandshake, handshakeMessage(20, make([]byte, 48))), alert: AlertUnexpectedMessage},
		"key update of two bytes":       {records: one(typeHandshake, handshakeMessage(messageKeyUpdate, []byte{0, 0})), alert: AlertDecodeError},
		"empty key update":              {records: one(typeHandshake, handshakeMessage(messageKeyUpdate, nil)), alert: AlertDecodeError},
		"key update request 2":          {records: one(typeHandshake, handshakeMessage(messageKeyUpdate, []byte{2})), alert: AlertIllegalParameter},
		"message behind key update":     {records: one(typeHandshake, append(bytes.Clone(update), ticket...)), alert: AlertUnexpectedMessage},
		"huge ticket":                   {records: one(typeHandshake, []byte{messageNewSessionTicket, 0xff, 0xff, 0xff}), alert: AlertDecodeError},
		"data inside a message": {
			records: []record{{typeHandshake, ticket[:10], 0}, {typeApplicationData, []byte("x"), 0}}, alert: AlertUnexpectedMessage,
		},
		"data inside a message's header": {
			records: []record{{typeHandshake, ticket[:2], 0}, {typeApplicationData, []byte("x"), 0}}, alert: AlertUnexpectedMessage,
		},
		"close_notify inside a message": {
			records: []record{{typeHandshake, ticket[:10], 0}, {typeAlert, []byte{1, 0}, 0}}, alert: AlertUnexpectedMessage,
		},
		"too many empty records": {records: slices.Repeat(one(typeApplicationData, nil), maxUseless+1), alert: AlertUnexpectedMessage},
		"too many tickets":       {records: slices.Repeat(one(typeHandshake, ticket), maxUseless+1), alert: AlertUnexpectedMessage},
		"too many cancellations": {records: slices.Repeat(one(typeAlert, []byte{1, 90}), maxUseless+1), alert: AlertUnexpectedMessage},
		"a message in crumbs": {
			records: append(one(typeHandshake, ticket[:6]), slices.Repeat(one(typeHandshake, []byte{0}), maxUseless)...),
			alert:   AlertUnexpectedMessage,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			p := newState(t, secretOf(1))
			stream := sealed(t, p, typeApplicationData, []byte("before"), 0)
			for _, r := range test.records {
				stream = append(stream, sealed(t, p, r.contentType, r.content, r.padding)...)
			}
			stream = append(stream, test.raw...)
			stream = append(stream, sealed(t, p, typeApplicationData, []byte("behind"), 0)...)
			c, m := receiver(t, stream)
			got, err := io.ReadAll(c.Reader)
			if string(got) != "before" {
				t.Errorf("read %q, want what came before", got)
			}
			var protocol *ProtocolError
			if !errors.As(err, &protocol) || protocol.Alert != test.alert {
				t.Errorf("error %v, want %v", err, test.alert)
			}
			if sent := alertIn(t, m); sent != int(test.alert) {
				t.Errorf("alert %d sent, want %v", sent, test.alert)
			}
			if _, again := c.Next(); again != err { //nolint:errorlint // the same error
				t.Errorf("then error %v", again)
			}
			if _, werr := c.Write([]byte("x")); werr != err { //nolint:errorlint // the same error
				t.Errorf("a write then: %v, want the reader's error", werr)
			}
		})
	}
}

// TestPeerBehavesOddly: what RFC 8446 allows, however unusual.
func TestPeerBehavesOddly(t *testing.T) {
	ticket := handshakeMessage(messageNewSessionTicket, make([]byte, 40000))
	p := newState(t, secretOf(1))
	var stream []byte
	add := func(contentType byte, content []byte, padding int) {
		stream = append(stream, sealed(t, p, contentType, content, padding)...)
	}
	add(typeHandshake, ticket[:1], 0) // a message over four records, padded
	add(typeHandshake, ticket[1:5], 100)
	add(typeHandshake, ticket[5:5+maxPlaintext], 0)
	add(typeHandshake, ticket[5+maxPlaintext:5+2*maxPlaintext], 0)
	rest := ticket[5+2*maxPlaintext:]
	add(typeHandshake, append(bytes.Clone(rest), handshakeMessage(messageNewSessionTicket, make([]byte, 50))...), 0)
	add(typeApplicationData, []byte("a"), maxPlaintext-1) // as much padding as there may be
	for range maxUseless {
		add(typeApplicationData, nil, 10)
	}
	add(typeApplicationData, []byte("b\x00\x00"), 3) // zeros of its own
	add(typeAlert, []byte{alertWarning, byte(alertUserCanceled)}, 0)
	update := handshakeMessage(messageKeyUpdate, []byte{1})
	for i := range update { // a key update byte by byte, last in its record
		add(typeHandshake, update[i:i+1], 0)
	}
	if err := p.update(); err != nil {
		t.Fatal(err)
	}
	full := bytes.Repeat([]byte("c"), maxPlaintext)
	add(typeApplicationData, full, 0)
	add(typeAlert, []byte{alertFatal, byte(AlertCloseNotify)}, 0) // the level means nothing
	stream = append(stream, "data behind close_notify is ignored"...)

	c, m := receiver(t, stream)
	got, err := io.ReadAll(c.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff("a"+"b\x00\x00"+string(full), string(got)); diff != "" {
		t.Errorf("data (-want +got):\n%s", diff)
	}
	// Requested, so our next data comes under our next key, behind a key update.
	if _, err := c.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	own := newState(t, secretOf(2))
	want := sealed(t, own, typeHandshake, handshakeMessage(messageKeyUpdate, []byte{0}), 0)
	if err := own.update(); err != nil {
		t.Fatal(err)
	}
	want = append(want, sealed(t, own, typeApplicationData, []byte("answer"), 0)...)
	if diff := cmp.Diff(want, m.out.Bytes()); diff != "" {
		t.Errorf("answer (-want +got):\n%s", diff)
	}
}

// TestAlerts: a fatal alert from the peer is reported as such, and nothing is sent
// after it.
func TestAlerts(t *testing.T) {
	for _, a := range []Alert{AlertBadRecordMAC, AlertInternalError, AlertUnexpectedMessage, 46, 255} {
		t.Run(a.String(), func(t *testing.T) {
			p := newState(t, secretOf(1))
			stream := sealed(t, p, typeApplicationData, []byte("before"), 0)
			stream = append(stream, sealed(t, p, typeAlert, []byte{alertFatal, byte(a)}, 0)...)
			c, m := receiver(t, stream)
			got, err := io.ReadAll(c.Reader)
			var alert *AlertError
			if string(got) != "before" || !errors.As(err, &alert) || alert.Alert != a {
				t.Errorf("read %q, error %v", got, err)
			}
			if _, werr := c.Write([]byte("x")); !errors.As(werr, &alert) {
				t.Errorf("a write then: %v", werr)
			}
			if err := c.CloseWrite(); !errors.As(err, &alert) {
				t.Errorf("CloseWrite then: %v", err)
			}
			if sent := alertIn(t, m); sent != -1 {
				t.Errorf("alert %d sent after a fatal alert", sent)
			}
		})
	}
}

// TestSequenceExhausted: neither direction wraps its sequence number (RFC 8446
// section 5.3), which would use a nonce twice.
func TestSequenceExhausted(t *testing.T) {
	m := &memory{in: bytes.NewReader(header(typeApplicationData, 0x0303, 100))}
	c, err := New(m, Config{
		Suite: tls.TLS_AES_256_GCM_SHA384, ReadSecret: secretOf(1), WriteSecret: secretOf(2),
		ReadSequence: math.MaxUint64, WriteSequence: math.MaxUint64,
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, ErrSequence) {
		t.Errorf("write: %v, want ErrSequence", err)
	}
	if m.out.Len() > 0 {
		t.Errorf("%d bytes written", m.out.Len())
	}
	if _, err := c.Next(); !errors.Is(err, ErrSequence) {
		t.Errorf("read: %v, want ErrSequence", err)
	}
}

func TestConfigRefused(t *testing.T) {
	good := func() Config {
		return Config{Suite: tls.TLS_AES_256_GCM_SHA384, ReadSecret: secretOf(1), WriteSecret: secretOf(2)}
	}
	for name, test := range map[string]struct {
		change func(*Config)
		want   error
	}{
		"chacha":          {func(c *Config) { c.Suite = tls.TLS_CHACHA20_POLY1305_SHA256 }, ErrSuite},
		"no suite":        {func(c *Config) { c.Suite = 0 }, ErrSuite},
		"short secret":    {func(c *Config) { c.ReadSecret = c.ReadSecret[:32] }, ErrConfig},
		"no write secret": {func(c *Config) { c.WriteSecret = nil }, ErrConfig},
		"limit 1":         {func(c *Config) { c.Limit = 1 }, ErrConfig},
		"limit too high":  {func(c *Config) { c.Limit = DefaultLimit + 1 }, ErrConfig},
	} {
		t.Run(name, func(t *testing.T) {
			c := good()
			test.change(&c)
			if _, err := New(&memory{}, c); !errors.Is(err, test.want) {
				t.Errorf("error %v, want %v", err, test.want)
			}
		})
	}
	if _, err := New(&memory{}, good()); err != nil {
		t.Errorf("the good one: %v", err)
	}
}

// TestRelease: both halves refuse to work, and the secrets are gone.
func TestRelease(t *testing.T) {
	c, m := receiver(t, nil)
	readSecret, writeSecret := c.Reader.state.secret, c.Writer.state.secret
	c.Release()
	if _, err := c.Next(); !errors.Is(err, ErrReleased) {
		t.Errorf("read: %v", err)
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, ErrReleased) {
		t.Errorf("write: %v", err)
	}
	if m.out.Len() > 0 {
		t.Errorf("%d bytes written", m.out.Len())
	}
	zero := make([]byte, 48)
	if !bytes.Equal(readSecret, zero) || !bytes.Equal(writeSecret, zero) {
		t.Error("secrets not wiped")
	}
}
