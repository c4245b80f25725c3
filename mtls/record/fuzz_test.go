package record

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"
)

// crumbs is a connection whose reads bring as many bytes as the script says.
type crumbs struct {
	memory
	stream []byte
	script []byte
	at     int
}

func (c *crumbs) Read(p []byte) (int, error) {
	if len(c.stream) == 0 {
		return 0, io.EOF
	}
	n := len(c.stream)
	if len(c.script) > 0 {
		n = int(c.script[c.at%len(c.script)])*257 + 1
		c.at++
	}
	n = copy(p, c.stream[:min(n, len(c.stream))])
	c.stream = c.stream[n:]
	return n, nil
}

// FuzzRead: arbitrary bytes between, in front of and instead of authentic records
// never panic, never take more memory than a buffer, and never come out: what is
// read is a prefix of what the peer sent.
//
// script's bytes are operations in pairs (what, how much) that build the stream;
// reads cut it as reads says.
func FuzzRead(f *testing.F) {
	f.Add([]byte{0, 5, 1, 3, 2, 9, 3, 0, 4, 1}, []byte("garbage"), []byte{0}, true)
	f.Add([]byte{0, 5}, []byte{23, 3, 3, 0, 20}, []byte{}, false)
	f.Add([]byte{4, 0, 0, 200, 5, 3, 0, 1, 6, 0}, []byte{24, 0, 0, 1, 1}, []byte{7, 255}, true)
	f.Add([]byte{7, 22, 0, 1}, []byte{4, 0, 0, 3, 1, 2, 3}, []byte{1}, true)
	f.Add([]byte{7, 21, 0, 1}, []byte{1, 90}, []byte{1}, true)
	f.Add([]byte{8, 40, 0, 1, 8, 3}, []byte{1, 90}, []byte{200}, false)
	f.Fuzz(func(t *testing.T, script, garbage, reads []byte, client bool) {
		p := newState(t, secretOf(1))
		var stream, sent, last []byte
		for i := 0; i+1 < len(script) && i < 60; i += 2 {
			k := int(script[i+1])
			add := func(contentType byte, content []byte, padding int) {
				last = sealed(t, p, contentType, content, padding)
				stream = append(stream, last...)
			}
			switch script[i] % 9 {
			case 0: // data
				content := bytes.Repeat([]byte{byte(i)}, k*k%(maxPlaintext+1))
				add(typeApplicationData, content, 0)
				sent = append(sent, content...)
			case 1: // padded data
				add(typeApplicationData, []byte{byte(k)}, k)
				sent = append(sent, byte(k))
			case 2: // garbage
				stream = append(stream, garbage...)
			case 3: // a record again
				stream = append(stream, last...)
			case 4: // key update
				add(typeHandshake, handshakeMessage(messageKeyUpdate, []byte{byte(k & 1)}), 0)
				if err := p.update(); err != nil {
					t.Fatal(err)
				}
			case 5: // a record of the wrong key
				stream = append(stream, sealed(t, newState(t, secretOf(9)), typeApplicationData, garbage[:min(len(garbage), 1000)], k)...)
			case 6: // a bit flipped
				if len(last) > 0 && len(stream) > 0 {
					stream[max(0, len(stream)-1-k%len(last))] ^= 1 << (k % 8)
				}
			case 7: // authentic, of any content type
				if k == typeApplicationData || k == 0 {
					continue // 0 is padding: the content's last byte would be the type
				}
				add(byte(k), garbage[:min(len(garbage), maxPlaintext)], k)
			case 8: // cut off
				stream = stream[:max(0, len(stream)-k)]
			}
		}
		whole := bytes.Clone(stream)
		c := &crumbs{stream: stream, script: reads}
		conn, err := New(c, Config{
			Client: client, Suite: tls.TLS_AES_256_GCM_SHA384, ReadSecret: secretOf(1), WriteSecret: secretOf(2),
		})
		if err != nil {
			t.Fatal(err)
		}
		var got []byte
		for {
			b, err := conn.Next()
			if err != nil {
				if len(b) > 0 {
					t.Fatalf("%d bytes with error %v", len(b), err)
				}
				if again, second := conn.Next(); len(again) > 0 || second != err { //nolint:errorlint // the same
					t.Fatalf("after %v: %d bytes, %v", err, len(again), second)
				}
				if err != io.EOF && !errors.Is(err, ErrTruncated) { //nolint:errorlint // exactly this
					var protocol *ProtocolError
					var alert *AlertError
					if !errors.As(err, &protocol) && !errors.As(err, &alert) {
						t.Fatalf("untyped error %v", err)
					}
				}
				break
			}
			if len(b) == 0 || len(b) > maxPlaintext {
				t.Fatalf("%d bytes", len(b))
			}
			if conn.buf != nil && len(conn.buf.data) > largeSize {
				t.Fatalf("buffer of %d bytes", len(conn.buf.data))
			}
			got = append(got, b...)
		}
		if conn.buf != nil {
			t.Fatal("buffer held after the end")
		}
		if !bytes.HasPrefix(sent, got) {
			t.Fatalf("read %d bytes that are not a prefix of the %d sent (stream of %d)", len(got), len(sent), len(whole))
		}
	})
}

// FuzzRoundTrip: what is written in any pieces, with key updates anywhere and any
// limit, is read in any pieces, by every way of reading.
func FuzzRoundTrip(f *testing.F) {
	f.Add([]byte("hello"), []byte{3, 0, 255}, []byte{0}, uint16(2), uint8(0))
	f.Add(bytes.Repeat([]byte("x"), 40000), []byte{255, 0, 1}, []byte{200, 3}, uint16(5), uint8(1))
	f.Add([]byte{}, []byte{}, []byte{}, uint16(0), uint8(2))
	f.Fuzz(func(t *testing.T, data, writes, reads []byte, limit uint16, way uint8) {
		if len(data) > 1<<20 || len(writes) > 1000 {
			return
		}
		out := &memory{}
		config := Config{Suite: tls.TLS_AES_256_GCM_SHA384, WriteSecret: secretOf(1), ReadSecret: secretOf(1)}
		if limit != 0 {
			config.Limit = uint64(limit) + 1
		}
		w, err := NewWriter(out, config)
		if err != nil {
			t.Fatal(err)
		}
		rest := data
		for i, k := range writes {
			if k == 0 && i%16 < 8 { // no more in a row than a reader takes
				if err := w.SendKeyUpdate(i%2 == 0); err != nil {
					t.Fatal(err)
				}
			}
			n := min(len(rest), int(k)*int(k)*3+1)
			if m, err := w.Write(rest[:n]); err != nil || m != n {
				t.Fatalf("wrote %d of %d: %v", m, n, err)
			}
			rest = rest[n:]
			if n == 0 {
				break
			}
		}
		if _, err := w.ReadFrom(bytes.NewReader(rest)); err != nil {
			t.Fatal(err)
		}
		if err := w.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		c := &crumbs{stream: out.out.Bytes(), script: reads}
		r, err := NewReader(c, config, w)
		if err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		switch way % 3 {
		case 0:
			_, err = r.WriteTo(&got)
		case 1:
			_, err = io.CopyBuffer(&got, struct{ io.Reader }{r}, make([]byte, 7+len(data)/100))
		case 2:
			for err == nil {
				var b []byte
				b, err = r.Next()
				got.Write(b)
			}
			if err == io.EOF { //nolint:errorlint // exactly this
				err = nil
			}
		}
		if err != nil || !bytes.Equal(got.Bytes(), data) {
			t.Fatalf("read %d of %d bytes: %v", got.Len(), len(data), err)
		}
	})
}

// FuzzTap: whatever bytes pass during a handshake, in whatever pieces, the Tap
// passes them on unchanged, not a byte beyond a record at a time, reads none ahead once it
// is told, follows at most one handshake, and forgets it.
func FuzzTap(f *testing.F) {
	hello := append([]byte{typeHandshake, 3, 1, 0, 80, helloClient, 0, 0, 76, 3, 3}, make([]byte, 74)...)
	f.Add(hello, []byte{0}, []byte("ab"))
	f.Add(append(hello, header(typeApplicationData, 0x0303, 40)...), []byte{3, 1}, hello)
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), []byte{}, []byte{})
	f.Fuzz(func(t *testing.T, stream, reads, written []byte) {
		k := NewKeyLog(0)
		c := &crumbs{stream: bytes.Clone(stream), script: reads}
		tap := NewTap(wireOf{crumbs: c}, k)
		var got []byte
		for i, buf := 0, make([]byte, 700); ; i++ {
			if i == 3 {
				tap.Precise()
			}
			left, ahead := len(c.stream), tap.Ahead()
			n, err := tap.Read(buf)
			if n+tap.Ahead()-ahead != left-len(c.stream) {
				t.Fatalf("read %d bytes, handed on %d, ahead %d and then %d", left-len(c.stream), n, ahead, tap.Ahead())
			}
			if i >= 3 && tap.Ahead() > ahead {
				t.Fatalf("read on from %d to %d bytes ahead", ahead, tap.Ahead())
			}
			got = append(got, buf[:n]...)
			if err != nil {
				if !errors.Is(err, ErrTruncated) {
					t.Fatal(err)
				}
				break
			}
			// Records are walked from the start: no read may span the end of one.
			for at := 0; at+headerSize <= len(got); {
				at += headerSize + int(got[at+3])<<8 + int(got[at+4])
				if from := len(got) - n; from < at && at < len(got) && n > 0 {
					t.Fatalf("a read of bytes %d to %d, over the end of a record at %d", from, len(got), at)
				}
			}
			if i%3 == 0 && len(written) > 0 {
				m := min(len(written), i+1)
				if _, err := tap.Write(written[:m]); err != nil {
					t.Fatal(err)
				}
				written = written[m:]
			}
		}
		if !bytes.Equal(got, stream) {
			t.Fatal("bytes changed")
		}
		if n := k.Len(); n > 1 {
			t.Fatalf("%d followed", n)
		}
		tap.Release()
		if n := k.Len(); n != 0 {
			t.Fatalf("%d followed after Release", n)
		}
	})
}

// wireOf is a net.Conn for a Tap, of which it uses Read and Write.
type wireOf struct {
	net.Conn
	crumbs *crumbs
}

func (w wireOf) Read(p []byte) (int, error)  { return w.crumbs.Read(p) }
func (w wireOf) Write(p []byte) (int, error) { return w.crumbs.Write(p) }
