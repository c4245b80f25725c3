package mtls

import (
	"bytes"
	"errors"
	"io"
	"strings"
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

// TestNobodyIsAskedForEarlyBytes where they would go to nobody, or stand in no frame.
func TestNobodyIsAskedForEarlyBytes(t *testing.T) {
	ca := newAuthority(t, "acme.example")
	web := NewEndpoint(ca.workload("/prod/web", nil), Options{})
	db, host := NewEndpoint(ca.workload("/prod/db", nil), Options{}), NewEndpoint(ca.host("h1"), Options{})
	refused := errors.New("not this peer")
	never := func() ([]byte, error) { t.Error("asked"); return nil, nil }
	for name, test := range map[string]struct {
		web, db   *Endpoint
		authorize func(*Peer) (*symbolonv1.Open, error)
		want      error
	}{
		"a host":         {web, host, framing(authenticated), nil},
		"without frames": {web, db, asking(encrypted), nil},
		"not authorized": {web, db, func(*Peer) (*symbolonv1.Open, error) { return nil, refused }, refused},
		"crypto/tls's":   {NewEndpoint(web.credential, Options{StockTLS: true}), db, framing(encrypted), nil},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := timeout(t)
			c, s := pair(t)
			accept(ctx, s, test.db, nil)
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

// TestEarlyBytesWithinOpen: without encryption they are shown to the server, within the
// Open's bound; who accepts takes them, and reads them before what follows in the clear, or
// inside TLS where the verdict asks for that.
func TestEarlyBytesWithinOpen(t *testing.T) {
	web, db := endpoints(t)
	stock := NewEndpoint(web.credential, Options{StockTLS: true})
	stockDB := NewEndpoint(db.credential, Options{StockTLS: true})
	said := bytes.Repeat([]byte("0123456789"), 2000)
	for name, test := range map[string]struct {
		web, db     *Endpoint
		token, want int
		grants      symbolonv1.Protection
	}{
		"a few":              {web, db, 0, 100, authenticated},
		"more than fit":      {web, db, 0, MaxEarly, authenticated},
		"beside a token":     {web, db, 12 << 10, 4000, authenticated},
		"no room":            {web, db, MaxMessage - 40, 0, authenticated},
		"encrypted after":    {web, db, 0, 100, encrypted},
		"stock client":       {stock, db, 0, 100, authenticated},
		"stock server":       {web, stockDB, 0, 100, authenticated},
		"stock, encrypted":   {stock, stockDB, 0, 100, encrypted},
		"nothing to be said": {web, db, 0, 0, authenticated},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := timeout(t)
			c, s := pair(t)
			ch := accept(ctx, s, test.db, &symbolonv1.Verdict{Accept: true, Protection: test.grants})
			a, err := DialEarly(ctx, c, test.web, func(p *Peer) (*symbolonv1.Open, error) {
				open, err := asking(authenticated)(p)
				open.Token = strings.Repeat("x", test.token)
				return open, err
			}, func() ([]byte, error) {
				if test.want < 4000 && test.token == 0 {
					return said[:test.want], nil
				}
				return said, nil
			})
			if err != nil {
				t.Fatal(err)
			}
			v, err := a.ReadVerdict(ctx)
			b := <-ch
			if err := errors.Join(err, b.err); err != nil {
				t.Fatal(err)
			}
			n := int(v.GetEarly())
			if n < test.want || test.token == 0 && n != test.want || test.want == 0 && n != 0 {
				t.Errorf("%d bytes were taken, want %d", n, test.want)
			}
			if _, err := io.WriteString(a, "more"); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, n+4)
			_ = s.SetReadDeadline(time.Now().Add(10 * time.Second))
			if _, err := io.ReadFull(b.conn, got); err != nil || string(got) != string(said[:n])+"more" {
				t.Errorf("%d bytes arrived, %v", len(got), err)
			}
			talk(t, a, b.conn)
		})
	}
}

// TestVerdictTakesWhatWasNotShown: who takes more early bytes than there were, or any from a
// client that has shown none, would make that one leave out bytes nobody has.
func TestVerdictTakesWhatWasNotShown(t *testing.T) {
	web, db := endpoints(t)
	for name, test := range map[string]struct {
		open  func(*Peer) (*symbolonv1.Open, error)
		says  string
		takes uint32
	}{
		"one too many":   {asking(authenticated), "hello", 6},
		"a whole number": {asking(authenticated), "hello", 1<<32 - 1},
		"of nothing":     {asking(authenticated), "", 1},
		"of a frame":     {framing(encrypted), "hello", 5},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := timeout(t)
			c, s := pair(t)
			go func() {
				b, open, err := Accept(ctx, s, db)
				if err == nil {
					_ = writeMessage(b.out, &symbolonv1.Verdict{Accept: true, Protection: open.GetProtection(), Early: test.takes})
				}
			}()
			a, err := DialEarly(ctx, c, web, test.open, func() ([]byte, error) { return []byte(test.says), nil })
			if err != nil {
				t.Fatal(err)
			}
			if _, err := a.ReadVerdict(ctx); ReasonOf(err) != symbolonv1.Reason_REASON_PROTOCOL || !strings.Contains(err.Error(), "early bytes") {
				t.Errorf("%v, want a protocol error", err)
			}
			if _, err := a.Write([]byte("x")); err == nil {
				t.Error("the tunnel is still open")
			}
		})
	}
}

// TestRefusedEarlyBytesAreNobodys.
func TestRefusedEarlyBytesAreNobodys(t *testing.T) {
	web, db := endpoints(t)
	ctx := timeout(t)
	c, s := pair(t)
	ch := accept(ctx, s, db, &symbolonv1.Verdict{Reason: symbolonv1.Reason_REASON_POLICY})
	a, err := DialEarly(ctx, c, web, asking(authenticated), func() ([]byte, error) { return []byte("secret"), nil })
	if err != nil {
		t.Fatal(err)
	}
	if v, err := a.ReadVerdict(ctx); ReasonOf(err) != symbolonv1.Reason_REASON_PEER_REFUSED || v.GetEarly() != 0 {
		t.Errorf("%v, %v, want a refusal that takes nothing", v, err)
	}
	a.Close()
	b := <-ch
	if n, err := b.conn.Read(make([]byte, 10)); n != 0 || err == nil || len(b.conn.TakeEarly()) > 0 {
		t.Errorf("%d bytes can be read of a refused connection, %v", n, err)
	}
}
