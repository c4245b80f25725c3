package record

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"testing"
)

// TestRecordLimit: a shortened limit forces a KeyUpdate every so many records, in
// the middle of writes, and no key seals more than that.
func TestRecordLimit(t *testing.T) {
	for _, limit := range []uint64{2, 3, 4, 5, 100} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			client, server, _, _ := linked(t, func(c *Config) { c.Limit = limit })
			first := bytes.Clone(client.Writer.state.secret)
			exchange(t, client, server, 3<<20)
			if bytes.Equal(first, client.Writer.state.secret) {
				t.Error("key not changed")
			}
		})
	}
	t.Run("counted", func(t *testing.T) {
		m := &memory{}
		w, err := NewWriter(m, Config{Suite: 0x1302, WriteSecret: secretOf(1), Limit: 5})
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if _, err := w.Write(make([]byte, 3*maxPlaintext)); err != nil {
				t.Fatal(err)
			}
		}
		// 4 of data and 1 key update a key: d d d | d U d d | d d U d.
		var kinds []byte
		p, b := newState(t, secretOf(1)), m.out.Bytes()
		for len(b) > 0 {
			n := headerSize + int(b[3])<<8 + int(b[4])
			inner, err := p.open(nil, b[:n])
			if err != nil {
				t.Fatalf("record %d: %v", len(kinds), err)
			}
			b = b[n:]
			if inner[len(inner)-1] == typeHandshake {
				kinds = append(kinds, 'U')
				if err := p.update(); err != nil {
					t.Fatal(err)
				}
			} else {
				kinds = append(kinds, 'd')
			}
		}
		if got, want := string(kinds), "ddddUddddUd"; got != want {
			t.Errorf("records %s, want %s", got, want)
		}
	})
}

// TestRecordLimitAgainstStock: crypto/tls follows our key updates.
func TestRecordLimitAgainstStock(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			a, b := newParties().handshake(t)
			if side == "client" {
				c := a.take(t)
				c.limit = 10
				exchange(t, c, b.tls, 3<<20)
				return
			}
			c := b.take(t)
			c.limit = 10
			exchange(t, a.tls, c, 3<<20)
		})
	}
}

// TestSendFromLimit: the path without copies obeys the limit too.
func TestSendFromLimit(t *testing.T) {
	client, server, _, _ := linked(t, func(c *Config) { c.Limit = 3 })
	near, far := tcpPair(t)
	want := noise(4, 3<<20)
	go func() {
		_, _ = far.Write(want)
		far.CloseWrite()
	}()
	var got bytes.Buffer
	both(t, func() error {
		if _, err := client.ReadFrom(near); err != nil {
			return err
		}
		return client.CloseWrite()
	}, func() error { _, err := server.WriteTo(&got); return err })
	if !bytes.Equal(got.Bytes(), want) {
		t.Errorf("%d bytes arrived, want %d", got.Len(), len(want))
	}
}

// updating is a connection that changes its key every so many writes.
type updating struct {
	*Conn
	on, request bool
	writes      int
	last        []byte // the write secret at the end
}

func (u *updating) Write(p []byte) (int, error) {
	if u.writes++; u.on && u.writes%5 == 0 {
		if err := u.SendKeyUpdate(u.request); err != nil {
			return 0, err
		}
	}
	return u.Conn.Write(p)
}

func (u *updating) CloseWrite() error {
	u.last = bytes.Clone(u.Writer.state.secret)
	return u.Conn.CloseWrite()
}

// TestKeyUpdateMidStream: key updates from either side and from both at once, with
// and without request, while data flows both ways.
func TestKeyUpdateMidStream(t *testing.T) {
	for name, test := range map[string]struct{ client, server, request bool }{
		"nobody":          {},
		"client":          {client: true},
		"server":          {server: true},
		"both":            {client: true, server: true},
		"client requests": {client: true, request: true},
		"server requests": {server: true, request: true},
		"both request":    {client: true, server: true, request: true},
	} {
		t.Run(name, func(t *testing.T) {
			a, b, _, _ := ownPair(t)
			client := &updating{Conn: a, on: test.client, request: test.request}
			server := &updating{Conn: b, on: test.server, request: test.request}
			before := [][]byte{bytes.Clone(a.Writer.state.secret), bytes.Clone(b.Writer.state.secret)}
			exchange(t, client, server, 20<<20)
			for i, u := range []*updating{client, server} {
				if got, want := !bytes.Equal(before[i], u.last), u.on || test.request; got != want {
					t.Errorf("side %d changed its key: %v, want %v", i, got, want)
				}
			}
		})
	}
}

// TestKeyUpdateDoesNotDeadlock: both sides write without reading until nothing goes
// any more, each with a request for the other's key update in front. A reader that
// had to answer at once would wait for its writer, and the writer for the peer's
// reader, for ever.
func TestKeyUpdateDoesNotDeadlock(t *testing.T) {
	client, server, _, _ := ownPair(t)
	fill := func(c *Conn, done chan<- error) {
		if err := c.SendKeyUpdate(true); err != nil {
			done <- err
			return
		}
		_, err := c.Write(make([]byte, 32<<20)) // more than all the buffers between
		done <- errors.Join(err, c.CloseWrite())
	}
	wrote := make(chan error, 2)
	go fill(client, wrote)
	go fill(server, wrote)
	both(t, func() error { _, err := client.WriteTo(io.Discard); return err },
		func() error { _, err := server.WriteTo(io.Discard); return err })
	for range 2 {
		if err := <-wrote; err != nil {
			t.Error(err)
		}
	}
}

// TestAlertWhileWriterIsStuck: a reader that must send an alert does not wait for a
// writer that the peer keeps waiting; the alert follows what is under way.
func TestAlertWhileWriterIsStuck(t *testing.T) {
	client, server, a, b := linked(t, nil)
	wrote := make(chan error, 1)
	go func() {
		_, err := client.Write(make([]byte, 32<<20))
		wrote <- err
	}()
	for client.mu.TryLock() { // until the writer has begun
		client.mu.Unlock()
	}
	if _, err := b.Write(header(typeApplicationData, 0x0303, 60)); err != nil {
		t.Fatal(err)
	}
	var protocol *ProtocolError
	if _, err := client.Next(); !errors.As(err, &protocol) {
		t.Fatalf("error %v", err)
	}
	n, err := server.WriteTo(io.Discard)
	var alert *AlertError
	if !errors.As(err, &alert) || alert.Alert != AlertBadRecordMAC {
		t.Errorf("the peer read %d bytes and got %v, want our alert", n, err)
	}
	if err := <-wrote; err == nil && n != 32<<20 {
		t.Errorf("a write of %d bytes succeeded, and %d arrived", 32<<20, n)
	}
	_ = a
}

// TestOneAnswer: however often the peer asked for our key update while we were
// silent, it gets one (RFC 8446 section 4.6.3), and data after that is plain data.
func TestOneAnswer(t *testing.T) {
	p := newState(t, secretOf(1))
	var stream []byte
	for range 3 {
		stream = append(stream, sealed(t, p, typeHandshake, handshakeMessage(messageKeyUpdate, []byte{1}), 0)...)
		if err := p.update(); err != nil {
			t.Fatal(err)
		}
	}
	stream = append(stream, sealed(t, p, typeApplicationData, []byte("now answer"), 0)...)
	c, m := receiver(t, stream)
	if got, err := c.Next(); err != nil || string(got) != "now answer" {
		t.Fatalf("read %q, %v", got, err)
	}
	if m.out.Len() > 0 {
		t.Errorf("%d bytes sent by a silent writer", m.out.Len())
	}
	own := newState(t, secretOf(2))
	want := sealed(t, own, typeHandshake, handshakeMessage(messageKeyUpdate, []byte{0}), 0)
	if err := own.update(); err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"one", "two"} {
		if _, err := c.Write([]byte(s)); err != nil {
			t.Fatal(err)
		}
		want = append(want, sealed(t, own, typeApplicationData, []byte(s), 0)...)
	}
	if !bytes.Equal(m.out.Bytes(), want) {
		t.Errorf("sent %x, want %x", m.out.Bytes(), want)
	}
}
