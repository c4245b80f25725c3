package mtls

import (
	"errors"
	"io"
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func framing(p symbolonv1.Protection) func(*Peer) (*symbolonv1.Open, error) {
	return func(peer *Peer) (*symbolonv1.Open, error) {
		open, err := asking(p)(peer)
		open.Framed = p == encrypted
		return open, err
	}
}

// TestEarlyBytesGoAlongWithOpen, and are held back with it, in order with what follows.
func TestEarlyBytesGoAlongWithOpen(t *testing.T) {
	web, db := endpoints(t)
	for name, early := range map[string]int{"none": 0, "some": 100, "more than a record": 20_000} {
		t.Run(name, func(t *testing.T) {
			ctx := timeout(t)
			c, s := pair(t)
			ch := accept(ctx, s, db, nil)
			said := make([]byte, early)
			for i := range said {
				said[i] = byte(i)
			}
			asked := 0
			a, err := DialEarly(ctx, c, web, framing(encrypted), func() ([]byte, error) { asked++; return said, nil })
			if err != nil {
				t.Fatal(err)
			}
			if asked != 1 {
				t.Errorf("asked %d times", asked)
			}
			if _, err := a.Write([]byte("more")); err != nil {
				t.Fatal(err)
			}
			b := <-ch
			if b.err != nil {
				t.Fatal(b.err)
			}
			if err := b.conn.Grant(ctx, &symbolonv1.Verdict{Protection: encrypted}); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, early+4)
			if _, err := io.ReadFull(b.conn, got); err != nil || string(got) != string(said)+"more" {
				t.Errorf("%d bytes arrived, %v", len(got), err)
			}
			if _, err := a.ReadVerdict(ctx); err != nil {
				t.Fatal(err)
			}
			talk(t, a, b.conn)
		})
	}
}

// TestNobodyIsAskedForEarlyBytes where they would go in the clear, or to nobody.
func TestNobodyIsAskedForEarlyBytes(t *testing.T) {
	web, db := endpoints(t)
	refused := errors.New("not this peer")
	never := func() ([]byte, error) { t.Error("asked"); return nil, nil }
	for name, test := range map[string]struct {
		web       *Endpoint
		authorize func(*Peer) (*symbolonv1.Open, error)
		want      error
	}{
		"authenticated":  {web, framing(authenticated), nil},
		"without frames": {web, asking(encrypted), nil},
		"not authorized": {web, func(*Peer) (*symbolonv1.Open, error) { return nil, refused }, refused},
		"crypto/tls's":   {NewEndpoint(web.credential, Options{StockTLS: true}), framing(encrypted), nil},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := timeout(t)
			c, s := pair(t)
			accept(ctx, s, db, nil)
			if _, err := DialEarly(ctx, c, test.web, test.authorize, never); !errors.Is(err, test.want) {
				t.Errorf("%v, want %v", err, test.want)
			}
		})
	}
}

// TestEarlyFailureIsNoOpen: an application that has gone says nothing, and no Open leaves.
func TestEarlyFailureIsNoOpen(t *testing.T) {
	web, db := endpoints(t)
	ctx := timeout(t)
	c, s := pair(t)
	ch := accept(ctx, s, db, nil)
	if _, err := DialEarly(ctx, c, web, framing(encrypted), func() ([]byte, error) { return nil, io.ErrClosedPipe }); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("client: %v", err)
	}
	if a := <-ch; ReasonOf(a.err) != symbolonv1.Reason_REASON_PEER_REFUSED {
		t.Errorf("server: %v", a.err)
	}
}

// TestBytesBeforeTheirTime: a client whose Open asks to leave TLS, and who goes on inside it
// before the verdict, is refused: nothing that has been read ahead counts as the
// application's, or gets lost without a word.
func TestBytesBeforeTheirTime(t *testing.T) {
	web, db := endpoints(t)
	ctx := timeout(t)
	c, s := pair(t)
	ch := accept(ctx, s, db, &symbolonv1.Verdict{Accept: true, Protection: authenticated})
	a, err := handshake(ctx, c, true, web, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	open, _ := asking(authenticated)(nil)
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if err := writeMessage(a.out, open); err != nil {
		t.Fatal(err)
	}
	if _, err := a.tls.Write([]byte("GET / HTTP/1.1\r\n")); err != nil {
		t.Fatal(err)
	}
	if err := a.wire.uncork(); err != nil {
		t.Fatal(err)
	}
	if b := <-ch; ReasonOf(b.err) != symbolonv1.Reason_REASON_PROTOCOL {
		t.Errorf("server: %v", b.err)
	}
	if n, err := a.tls.Read(make([]byte, 100)); err == nil {
		t.Errorf("the client got %d bytes", n)
	}
}
