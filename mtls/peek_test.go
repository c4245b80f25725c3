package mtls

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// hello is the first flight of a client.
func hello(t testing.TB, protos ...string) []byte {
	t.Helper()
	return firstFlight(t, &tls.Config{InsecureSkipVerify: true, NextProtos: protos, MinVersion: tls.VersionTLS13})
}

// helloFor is that of a client that asks for a name.
func helloFor(t testing.TB, name string) []byte {
	t.Helper()
	return firstFlight(t, &tls.Config{ServerName: name})
}

func firstFlight(t testing.TB, c *tls.Config) []byte {
	t.Helper()
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	go tls.Client(a, c).Handshake()
	buf := make([]byte, 8<<10)
	n, err := b.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return buf[:n]
}

func TestPeek(t *testing.T) {
	ours, https := hello(t, ALPN), hello(t, "h2", "http/1.1")
	if len(ours) < 1400 {
		t.Fatalf("a ClientHello of %d bytes does not span two segments; is X25519MLKEM768 still the default?", len(ours))
	}
	among := hello(t, "h2", ALPN)
	for _, tc := range []struct {
		name   string
		pieces [][]byte
		fin    bool
		want   Kind
	}{
		{"tunnel", [][]byte{ours}, false, Tunnel},
		{"tunnel in two segments", [][]byte{ours[:1448], ours[1448:]}, false, Tunnel},
		{"tunnel byte by byte at first", [][]byte{ours[:1], ours[1:3], ours[3:6], ours[6:9], ours[9:40], ours[40:]}, false, Tunnel},
		{"tunnel among other protocols", [][]byte{among}, false, Tunnel},
		{"https", [][]byte{https}, false, Other},
		{"no ALPN", [][]byte{hello(t)}, false, Other},
		{"http", [][]byte{[]byte("GET / HTTP/1.1\r\n")}, false, Other},
		{"one byte", [][]byte{{0x80}}, false, Other},
		{"postgres startup", [][]byte{{0, 0, 0, 8, 4, 0xd2, 0x16, 0x2f}}, false, Other},
		{"hello cut short, then silence", [][]byte{ours[:700]}, false, Other},
		{"hello cut short, then FIN", [][]byte{ours[:700]}, true, Other},
		{"record header only", [][]byte{ours[:5]}, false, Other},
		{"record too large", [][]byte{{22, 3, 1, 0x40, 1, 1, 0, 0}}, false, Other},
		{"alert record", [][]byte{{21, 3, 3, 0, 2, 1, 0}}, false, Other},
		{"silent", nil, false, Silent},
		{"closed", nil, true, Closed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			c, s := pair(t)
			sent := bytes.Join(tc.pieces, nil)
			go func() {
				for i, p := range tc.pieces {
					if i > 0 {
						time.Sleep(10 * time.Millisecond)
					}
					c.Write(p)
				}
				if tc.fin {
					c.CloseWrite()
				}
			}()
			kind, err := Peek(s, time.Now().Add(400*time.Millisecond), time.Now().Add(800*time.Millisecond))
			if err != nil || kind != tc.want {
				t.Fatalf("Peek = %v, %v; want %v", kind, err, tc.want)
			}
			if kind == Tunnel {
				// Every byte is still there.
				got := make([]byte, len(sent))
				if _, err := io.ReadFull(s, got); err != nil || !bytes.Equal(got, sent) {
					t.Errorf("bytes after Peek differ: %v", err)
				}
			}
		})
	}
}

func TestPeekServerName(t *testing.T) {
	asks := helloFor(t, "API.Pay.example.com")
	if len(asks) < 1400 {
		t.Fatalf("a ClientHello of %d bytes", len(asks))
	}
	long := helloFor(t, strings.Repeat("a.", 120)+"example.com")
	for _, tc := range []struct {
		name   string
		pieces [][]byte
		want   string
	}{
		{"a name", [][]byte{asks}, "api.pay.example.com"},
		{"in pieces", [][]byte{asks[:1], asks[1:9], asks[9:100], asks[100:]}, "api.pay.example.com"},
		{"a long one", [][]byte{long}, strings.Repeat("a.", 120) + "example.com"},
		{"none", [][]byte{hello(t)}, ""},
		{"cut short", [][]byte{asks[:len(asks)-1]}, ""},
		{"no TLS", [][]byte{[]byte("GET / HTTP/1.1\r\nHost: api.pay.example.com\r\n\r\n")}, ""},
		{"silent", nil, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			c, s := pair(t)
			go func() {
				for _, p := range tc.pieces {
					c.Write(p)
				}
			}()
			name, err := PeekServerName(s, time.Now().Add(400*time.Millisecond), time.Now().Add(800*time.Millisecond))
			if err != nil || name != tc.want {
				t.Fatalf("got %q, %v; want %q", name, err, tc.want)
			}
			if sent := bytes.Join(tc.pieces, nil); len(sent) > 0 {
				got := make([]byte, len(sent))
				if _, err := io.ReadFull(s, got); err != nil || !bytes.Equal(got, sent) {
					t.Errorf("bytes after the peek differ: %v", err)
				}
			}
		})
	}
}

func TestPeekReset(t *testing.T) {
	c, s := pair(t)
	c.SetLinger(0)
	c.Close()
	if kind, err := Peek(s, time.Now().Add(time.Second), time.Now().Add(time.Second)); kind != Closed {
		t.Errorf("Peek = %v, %v; want Closed", kind, err)
	}
}

func FuzzClassify(f *testing.F) {
	ours := hello(f, ALPN)
	f.Add(ours)
	f.Add(ours[:200])
	f.Add(hello(f, "h2"))
	f.Add([]byte("GET / HTTP/1.1\r\n"))
	f.Add(helloFor(f, "api.pay.example.com"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == 0 {
			return
		}
		tunnel, need := classify(b)
		if tunnel && need != 0 {
			t.Fatal("a tunnel that needs more")
		}
		if need != 0 && need <= len(b) {
			t.Fatalf("needs %d bytes and has %d", need, len(b))
		}
		if need > recordHeader+maxPlaintext {
			t.Fatalf("needs %d bytes", need)
		}
		if name, n := serverName(b); n != need || len(name) > 2*len(b) {
			t.Fatalf("the name %q, and needs %d bytes", name, n)
		}
	})
}

func FuzzReadMessage(f *testing.F) {
	f.Add([]byte{0, 0, 0, 2, 8, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		m := NewOpen(NewFlowID(), somewhere, encrypted, 1)
		if err := readMessage(r, m); err == nil {
			if checkOpen(m) == nil && len(m.GetFlowId()) != 16 {
				t.Fatal("a bad flow id passed")
			}
		}
	})
}
