package record

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// noise is the same pseudo-random stream for the same seed.
func noise(seed byte, n int) []byte {
	var key [32]byte
	key[0] = seed
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(key).Read(b)
	return b
}

// exchange sends up and down at the same time, in writes of odd sizes, and ends
// both directions.
func exchange(t *testing.T, client, server stream, size int) {
	t.Helper()
	up, down := noise(1, size), noise(2, size)
	send := func(w stream, b []byte) error {
		for step := 1; len(b) > 0; step = step*3%200_001 + 1 {
			n, err := w.Write(b[:min(step, len(b))])
			if err != nil {
				return fmt.Errorf("write: %w", err)
			}
			b = b[n:]
		}
		return w.CloseWrite()
	}
	receive := func(r io.Reader, want []byte) error {
		h := sha256.New()
		n, err := io.Copy(h, r)
		if err != nil {
			return fmt.Errorf("read after %d bytes: %w", n, err)
		}
		if sum := sha256.Sum256(want); !bytes.Equal(sum[:], h.Sum(nil)) {
			return fmt.Errorf("%d bytes received are not the %d sent", n, len(want))
		}
		return nil
	}
	side := func(s stream, out, in []byte) error {
		sent := make(chan error, 1)
		go func() { sent <- send(s, out) }()
		return errors.Join(receive(s, in), <-sent)
	}
	both(t, func() error { return side(client, up, down) }, func() error { return side(server, down, up) })
}

// TestTransfer: 50 MB each way at once, this package at one end or both and
// crypto/tls at the other, both suites.
func TestTransfer(t *testing.T) {
	size := 50 << 20
	if testing.Short() {
		size = 2 << 20
	}
	for _, id := range []uint16{tls.TLS_AES_256_GCM_SHA384, tls.TLS_AES_128_GCM_SHA256} {
		for _, own := range []string{"client", "server", "both"} {
			t.Run(tls.CipherSuiteName(id)+"/"+own, func(t *testing.T) {
				useSuite(id)
				defer useSuite(tls.TLS_AES_256_GCM_SHA384)
				a, b := newParties().handshake(t)
				var client, server stream = a.tls, b.tls
				if own != "server" {
					client = a.take(t)
				}
				if own != "client" {
					server = b.take(t)
				}
				exchange(t, client, server, size)
			})
		}
	}
}

// TestTakeOver: messages under crypto/tls before the takeover are counted, session
// tickets too, whether the handshake was full, resumed, or had a second ClientHello.
func TestTakeOver(t *testing.T) {
	for name, test := range map[string]struct {
		change    func(*parties)
		resumed   bool
		handshake int
	}{
		"full": {handshake: 1},
		"no tickets": {change: func(p *parties) {
			p.server.SessionTicketsDisabled = true
		}, handshake: 1},
		"resumed": {change: func(p *parties) {
			p.client.ClientSessionCache = tls.NewLRUClientSessionCache(1)
		}, resumed: true, handshake: 2},
		"hello retry": {change: func(p *parties) {
			p.client.CurvePreferences = []tls.CurveID{tls.X25519, tls.CurveP256}
			p.server.CurvePreferences = []tls.CurveID{tls.CurveP256}
		}, handshake: 1},
		"server asks for no certificate": {change: func(p *parties) {
			p.server.ClientAuth = tls.NoClientCert // the ticket comes in the server's first flight
		}, handshake: 1},
	} {
		for _, messages := range []int{0, 3} {
			t.Run(fmt.Sprintf("%s/%d messages", name, messages), func(t *testing.T) {
				p := newParties()
				if test.change != nil {
					test.change(p)
				}
				for i := range test.handshake {
					a, b := p.handshake(t)
					if got, want := a.tls.ConnectionState().DidResume, test.resumed && i > 0; got != want {
						t.Fatalf("resumed: %v, want %v", got, want)
					}
					rounds := messages
					if i < test.handshake-1 {
						rounds = 1 // the client must read its ticket before the next
					}
					buf := make([]byte, 100)
					for range rounds {
						both(t, func() error { _, err := a.tls.Write([]byte("open")); return err },
							func() error { _, err := b.tls.Read(buf); return err })
						both(t, func() error { _, err := b.tls.Write([]byte("verdict")); return err },
							func() error { _, err := a.tls.Read(buf); return err }) // and the ticket
					}
					exchange(t, a.take(t), b.take(t), 100_000)
				}
				if n := p.clientLog.Len() + p.serverLog.Len(); n != 0 {
					t.Errorf("%d handshakes still followed", n)
				}
			})
		}
	}
}

// TestPendingPlaintext: what crypto/tls has decrypted, and its reader has not read,
// comes out of the Reader first; what it has not, stays in the kernel for it.
func TestPendingPlaintext(t *testing.T) {
	a, b := newParties().handshake(t)
	for _, s := range []string{"verdict, and more in the same record", " and another"} {
		if _, err := b.tls.Write([]byte(s)); err != nil {
			t.Fatal(err)
		}
	}
	head := make([]byte, 7)
	if _, err := io.ReadFull(a.tls, head); err != nil {
		t.Fatal(err)
	}
	client, server := a.take(t), b.take(t)
	if _, err := server.Write([]byte("!")); err != nil {
		t.Fatal(err)
	}
	if err := server.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	if _, err := client.WriteTo(&got); err != nil {
		t.Fatal(err)
	}
	if want := ", and more in the same record and another!"; got.String() != want {
		t.Errorf("read %q, want %q", got.String(), want)
	}
	if _, err := a.tls.Read(head); !errors.Is(err, ErrTaken) {
		t.Errorf("crypto/tls reads on: %v", err)
	}
	if _, err := a.tls.Write(head); !errors.Is(err, ErrTaken) {
		t.Errorf("crypto/tls writes on: %v", err)
	}
}

// TestEarlyWriter: a client sends under its own records while crypto/tls still
// waits for the server's first message.
func TestEarlyWriter(t *testing.T) {
	a, b := newParties().handshake(t)
	if _, err := a.tls.Write([]byte("open ")); err != nil {
		t.Fatal(err)
	}
	w, err := a.tap.TakeWriter()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("early")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 10)
	if _, err := io.ReadFull(b.tls, buf); err != nil || string(buf) != "open early" {
		t.Fatalf("server read %q, %v", buf, err)
	}
	if _, err := b.tls.Write([]byte("verdict")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(a.tls, buf[:7]); err != nil {
		t.Fatal(err)
	}
	r, err := a.tap.TakeReader(a.tls, w)
	if err != nil {
		t.Fatal(err)
	}
	exchange(t, &Conn{Reader: r, Writer: w}, b.take(t), 100_000)
}

// TestCloseNotifyBeforeTake: the peer has ended its direction already.
func TestCloseNotifyBeforeTake(t *testing.T) {
	a, b := newParties().handshake(t)
	if _, err := b.tls.Write([]byte("all")); err != nil {
		t.Fatal(err)
	}
	if err := b.tls.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 3)
	if _, err := io.ReadFull(a.tls, buf); err != nil {
		t.Fatal(err)
	}
	if _, err := a.tls.Read(buf); err != io.EOF { //nolint:errorlint // exactly this
		t.Fatalf("crypto/tls: %v", err)
	}
	c := a.take(t)
	if _, err := c.Next(); err != io.EOF { //nolint:errorlint // exactly this
		t.Errorf("error %v, want io.EOF", err)
	}
	if _, err := c.Write([]byte("ok")); err != nil {
		t.Errorf("the other direction: %v", err)
	}
}

// TestHalfClose: one direction ends, the other goes on, whichever ends first.
func TestHalfClose(t *testing.T) {
	for _, first := range []string{"client", "server"} {
		t.Run(first, func(t *testing.T) {
			x, y, _, _ := ownPair(t)
			if first == "server" {
				x, y = y, x
			}
			if err := x.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if err := x.CloseWrite(); err != nil {
				t.Errorf("again: %v", err)
			}
			if _, err := x.Write([]byte("x")); !errors.Is(err, ErrClosed) {
				t.Errorf("write after CloseWrite: %v", err)
			}
			if _, err := y.Next(); err != io.EOF { //nolint:errorlint // exactly this
				t.Fatalf("the other end: %v, want io.EOF", err)
			}
			want := noise(3, 300_000)
			var got bytes.Buffer
			both(t, func() error {
				if _, err := y.Write(want); err != nil {
					return err
				}
				return y.CloseWrite()
			}, func() error { _, err := x.WriteTo(&got); return err })
			if !bytes.Equal(got.Bytes(), want) {
				t.Errorf("%d bytes arrived, want %d", got.Len(), len(want))
			}
		})
	}
}

// TestFINAndRST without close_notify are errors, each its own.
func TestFINAndRST(t *testing.T) {
	for name, test := range map[string]struct {
		end  func(*net.TCPConn) error
		want error
	}{
		"fin": {func(c *net.TCPConn) error { return c.CloseWrite() }, ErrTruncated},
		"rst": {func(c *net.TCPConn) error { return errors.Join(c.SetLinger(0), c.Close()) }, syscall.ECONNRESET},
	} {
		t.Run(name, func(t *testing.T) {
			x, _, _, b := ownPair(t)
			if err := test.end(b); err != nil {
				t.Fatal(err)
			}
			_, err := x.Next()
			if !errors.Is(err, test.want) || errors.Is(err, io.EOF) {
				t.Errorf("error %v, want %v", err, test.want)
			}
			if _, again := x.Next(); again != err { //nolint:errorlint // the same error
				t.Errorf("then %v", again)
			}
		})
	}
}

// TestReadDeadline: a deadline in the middle of a record loses nothing.
func TestReadDeadline(t *testing.T) {
	client, _, a, b := linked(t, nil)
	p := newState(t, secretOf(1))
	record := sealed(t, p, typeApplicationData, []byte("whole"), 0)
	for _, part := range [][]byte{record[:3], record[3:20], nil} {
		if _, err := b.Write(part); err != nil {
			t.Fatal(err)
		}
		if err := a.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Next(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("error %v, want a timeout", err)
		}
	}
	if err := a.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Write(record[20:]); err != nil {
		t.Fatal(err)
	}
	if got, err := client.Next(); err != nil || string(got) != "whole" {
		t.Errorf("read %q, %v", got, err)
	}
}

// TestStockPeerNoticesTampering: crypto/tls gets our alert, and we get its.
func TestStockPeerNoticesTampering(t *testing.T) {
	t.Run("ours", func(t *testing.T) {
		a, b := newParties().handshake(t)
		c := a.take(t)
		if _, err := b.tcp.Write(header(typeApplicationData, 0x0303, 60)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Next(); err == nil {
			t.Fatal("no error")
		}
		var remote *net.OpError
		_, err := b.tls.Read(make([]byte, 1))
		if !errors.As(err, &remote) || remote.Op != "remote error" {
			t.Errorf("crypto/tls: %v, want our alert", err)
		}
	})
	t.Run("theirs", func(t *testing.T) {
		a, b := newParties().handshake(t)
		c := a.take(t)
		if _, err := a.tcp.Write(header(typeApplicationData, 0x0303, 60)); err != nil {
			t.Fatal(err)
		}
		if _, err := b.tls.Read(make([]byte, 1)); err == nil {
			t.Fatal("no error")
		}
		var alert *AlertError
		if _, err := c.Next(); !errors.As(err, &alert) || alert.Alert != AlertBadRecordMAC {
			t.Errorf("error %v, want the peer's bad_record_mac", err)
		}
	})
}
