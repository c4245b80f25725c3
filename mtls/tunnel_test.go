package mtls

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func TestNegotiatedSuite(t *testing.T) {
	web, db := endpoints(t)
	a, b := tunnel(t, web, db, encrypted, encrypted)
	for _, c := range []*Conn{a, b} {
		want := Info{Version: "TLS 1.3", CipherSuite: "TLS_AES_256_GCM_SHA384", KeyExchange: "X25519MLKEM768"}
		if c.Info() != want {
			t.Errorf("negotiated %+v, want %+v", c.Info(), want)
		}
	}
	if a.Peer().ID.String() != "spiffe://acme.example/prod/db" || a.Peer().Attributes.Get("app") != "db" || a.Peer().Namespace != "/prod" {
		t.Errorf("the client sees %+v", a.Peer())
	}
	if b.Peer().Name != "web" || b.Peer().Attributes.Get("app") != "web" {
		t.Errorf("the server sees %+v", b.Peer())
	}
}

func TestProtectionIsTheStricterOfBoth(t *testing.T) {
	web, db := endpoints(t)
	for _, tc := range []struct{ ask, grant, want symbolonv1.Protection }{
		{encrypted, encrypted, encrypted},
		{encrypted, authenticated, encrypted},
		{authenticated, encrypted, encrypted},
		{authenticated, authenticated, authenticated},
	} {
		a, b := tunnel(t, web, db, tc.ask, tc.grant)
		if a.Protection() != tc.want || b.Protection() != tc.want {
			t.Errorf("asked %v, granted %v: client has %v, server %v, want %v", tc.ask, tc.grant, a.Protection(), b.Protection(), tc.want)
		}
		if raw := a.Raw() != nil; raw != (tc.want == authenticated) {
			t.Errorf("asked %v, granted %v: raw socket given: %v", tc.ask, tc.grant, raw)
		}
		talk(t, a, b)
	}
}

// Bytes that follow the verdict at once, in the clear, must not be swallowed by
// crypto/tls's read buffer.
func TestRawBytesRightBehindTheVerdict(t *testing.T) {
	web, db := endpoints(t)
	for range 20 {
		ctx := timeout(t)
		c, s := pair(t)
		greeted := make(chan error, 1)
		go func() {
			b, _, err := Accept(ctx, s, db)
			if err == nil {
				err = b.Grant(ctx, &symbolonv1.Verdict{Protection: authenticated})
			}
			if err == nil {
				_, err = io.WriteString(b.Raw(), "SSH-2.0-hello")
			}
			greeted <- err
		}()
		a, err := Dial(ctx, c, web, asking(authenticated))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond) // let both arrive in one read
		if _, err := a.ReadVerdict(ctx); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 13)
		if _, err := io.ReadFull(a.Raw(), buf); err != nil || string(buf) != "SSH-2.0-hello" {
			t.Fatalf("read %q, %v", buf, err)
		}
		if err := <-greeted; err != nil {
			t.Fatal(err)
		}
	}
}

func TestEarlyDataWaitsForTheVerdict(t *testing.T) {
	web, db := endpoints(t)
	ctx := timeout(t)
	c, s := pair(t)
	a, b := make(chan accepted, 1), (*Conn)(nil)
	go func() {
		conn, open, err := Accept(ctx, s, db)
		a <- accepted{conn, open, err}
	}()
	client, err := Dial(ctx, c, web, asking(encrypted))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(client, "early"); err != nil {
		t.Fatal(err)
	}
	got := <-a
	if got.err != nil {
		t.Fatal(got.err)
	}
	b = got.conn
	if err := b.Grant(ctx, &symbolonv1.Verdict{Protection: encrypted}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 5)
	if _, err := io.ReadFull(b, buf); err != nil || string(buf) != "early" {
		t.Fatalf("read %q, %v", buf, err)
	}
	if _, err := client.ReadVerdict(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestRefusalReachesTheClientOverEarlyData(t *testing.T) {
	web, db := endpoints(t)
	ctx := timeout(t)
	c, s := pair(t)
	refuse := accept(ctx, s, db, &symbolonv1.Verdict{Reason: symbolonv1.Reason_REASON_POLICY, Policy: "/prod/no"})
	a, err := Dial(ctx, c, web, asking(encrypted))
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(a, strings.Repeat("x", 60<<10))
	_, err = a.ReadVerdict(ctx)
	var d *DeniedError
	if !errors.As(err, &d) || d.Reason != symbolonv1.Reason_REASON_PEER_REFUSED || d.Peer != symbolonv1.Reason_REASON_POLICY || d.Policy != "/prod/no" {
		t.Fatalf("got %v (%+v)", err, d)
	}
	<-refuse
}

func TestTruncationIsNotAnEnd(t *testing.T) {
	web, db := endpoints(t)
	a, b := tunnel(t, web, db, encrypted, encrypted)
	io.WriteString(a, "half a mess")
	a.wire.Socket.CloseWrite() // a FIN at a record boundary, as an attacker would send
	got, err := io.ReadAll(b)
	if string(got) != "half a mess" || !errors.Is(err, ErrTruncated) {
		t.Fatalf("read %q, %v; want ErrTruncated", got, err)
	}
}

// What answers where there is no proxy.
func TestDestinationsWithoutAProxy(t *testing.T) {
	web, _ := endpoints(t)
	plainTLS := newAuthority(t, "web.example").workload("/x/y", nil)
	for _, tc := range []struct {
		name  string
		serve func(*net.TCPConn)
	}{
		{"speaks first", func(s *net.TCPConn) { io.WriteString(s, "SSH-2.0-OpenSSH_9.2p1\r\n"); io.Copy(io.Discard, s) }},
		{"closes", func(s *net.TCPConn) { s.Close() }},
		{"resets", func(s *net.TCPConn) { s.SetLinger(0); s.Close() }},
		{"answers HTTP", func(s *net.TCPConn) {
			s.Read(make([]byte, 1))
			io.WriteString(s, "HTTP/1.1 400 Bad Request\r\n\r\n")
			io.Copy(io.Discard, s)
		}},
		{"is an HTTPS server", func(s *net.TCPConn) {
			tls.Server(s, &tls.Config{Certificates: []tls.Certificate{*plainTLS.SVID.TLS}, NextProtos: []string{"h2"}}).Handshake()
			s.Close()
		}},
		{"is TLS without ALPN", func(s *net.TCPConn) {
			tls.Server(s, &tls.Config{Certificates: []tls.Certificate{*plainTLS.SVID.TLS}}).Handshake()
			io.Copy(io.Discard, s)
		}},
		{"is TLS 1.2", func(s *net.TCPConn) {
			tls.Server(s, &tls.Config{Certificates: []tls.Certificate{*plainTLS.SVID.TLS}, MaxVersion: tls.VersionTLS12}).Handshake()
			s.Close()
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, s := pair(t)
			done := make(chan struct{})
			go func() { defer close(done); tc.serve(s) }()
			_, err := Dial(timeout(t), c, web, asking(encrypted))
			if ReasonOf(err) != symbolonv1.Reason_REASON_PEER_UNPROTECTED {
				t.Errorf("got %v (%v), want peer-unprotected", ReasonOf(err), err)
			}
			<-done
		})
	}
	t.Run("says nothing", func(t *testing.T) {
		c, _ := pair(t)
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		defer cancel()
		if _, err := Dial(ctx, c, web, asking(encrypted)); ReasonOf(err) != symbolonv1.Reason_REASON_HANDSHAKE_TIMEOUT {
			t.Errorf("got %v, want a handshake timeout", err)
		}
	})
}

func TestResetIsPassedOn(t *testing.T) {
	web, db := endpoints(t)
	for _, p := range []symbolonv1.Protection{encrypted, authenticated} {
		a, b := tunnel(t, web, db, p, p)
		a.Reset()
		b.SetReadDeadline(time.Now().Add(5 * time.Second))
		_, err := b.Read(make([]byte, 1))
		if NetworkReason(err) != symbolonv1.Reason_REASON_RESET {
			t.Errorf("%v: read after the peer's reset: %v", p, err)
		}
	}
}
