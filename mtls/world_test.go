package mtls

import (
	"context"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

const (
	encrypted     = symbolonv1.Protection_PROTECTION_ENCRYPTED
	authenticated = symbolonv1.Protection_PROTECTION_AUTHENTICATED
)

var somewhere = netip.MustParseAddrPort("10.0.0.9:5432")

// pair is two ends of a TCP connection on loopback.
func pair(t testing.TB) (client, server *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return pairAt(t, l)
}

// pairAt is pair by way of l: sessions are kept by destination.
func pairAt(t testing.TB, l *net.TCPListener) (client, server *net.TCPConn) {
	t.Helper()
	c, err := net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	return c, s
}

// tunnelAt is an encrypted tunnel by way of l, as far as it comes.
func tunnelAt(t *testing.T, l *net.TCPListener, web, db *Endpoint) (client *Conn, server accepted, err error) {
	t.Helper()
	ctx := timeout(t)
	c, s := pairAt(t, l)
	ch := accept(ctx, s, db, &symbolonv1.Verdict{Accept: true, Protection: encrypted})
	client, err = Dial(ctx, c, web, asking(encrypted))
	if err == nil {
		_, err = client.ReadVerdict(ctx)
	}
	return client, <-ch, err
}

func timeout(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

type accepted struct {
	conn *Conn
	open *symbolonv1.Open
	err  error
}

// accept runs the server's half, and answers with verdict if there is one.
func accept(ctx context.Context, tcp *net.TCPConn, e *Endpoint, verdict *symbolonv1.Verdict) <-chan accepted {
	ch := make(chan accepted, 1)
	go func() {
		var a accepted
		a.conn, a.open, a.err = Accept(ctx, tcp, e)
		if a.err == nil && verdict != nil {
			if verdict.GetAccept() {
				a.err = a.conn.Grant(ctx, verdict)
			} else {
				a.conn.Refuse(verdict)
			}
		}
		ch <- a
	}()
	return ch
}

func asking(p symbolonv1.Protection) func(*Peer) (*symbolonv1.Open, error) {
	return func(*Peer) (*symbolonv1.Open, error) { return NewOpen(NewFlowID(), somewhere, p, 7), nil }
}

// tunnel is an accepted one.
func tunnel(t testing.TB, client, server *Endpoint, ask, grant symbolonv1.Protection) (*Conn, *Conn) {
	t.Helper()
	ctx := timeout(t)
	c, s := pair(t)
	ch := accept(ctx, s, server, &symbolonv1.Verdict{Accept: true, Protection: grant})
	a, err := Dial(ctx, c, client, asking(ask))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.ReadVerdict(ctx); err != nil {
		t.Fatal(err)
	}
	b := <-ch
	if b.err != nil {
		t.Fatal(b.err)
	}
	return a, b.conn
}

func endpoints(t testing.TB) (web, db *Endpoint) {
	ca := newAuthority(t, "acme.example")
	web = NewEndpoint(ca.workload("/prod/web", map[string][]string{"app": {"web"}}), Options{})
	db = NewEndpoint(ca.workload("/prod/db", map[string][]string{"app": {"db"}}), Options{})
	return web, db
}

// talk sends both ways, then half-closes both ways.
func talk(t testing.TB, a, b *Conn) {
	t.Helper()
	question, answer := strings.Repeat("question ", 9000), strings.Repeat("answer ", 9000)
	go func() {
		io.WriteString(a, question)
		a.CloseWrite()
	}()
	got, err := io.ReadAll(b)
	if err != nil || string(got) != question {
		t.Fatalf("server read %d bytes, %v; want %d", len(got), err, len(question))
	}
	go func() {
		io.WriteString(b, answer)
		b.CloseWrite()
	}()
	got, err = io.ReadAll(a)
	if err != nil || string(got) != answer {
		t.Fatalf("client read %d bytes, %v; want %d", len(got), err, len(answer))
	}
}
