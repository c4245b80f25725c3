package proxy

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"syscall"
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls"
)

// A hand-over that fails closes both sides, and is never among the live connections,
// where somebody else might cut it at the same time.
func TestFailedHandOver(t *testing.T) {
	for _, which := range []string{"near", "far"} {
		app, near := pair(t)
		far, peer := pair(t)
		other := app
		if which == "near" {
			near.Close()
			other = peer
		} else {
			far.Close()
		}
		p := &Proxy{now: time.Now}
		x := &conn{p: p, rec: &symbolonv1.FlowRecord{}, release: func() {}}
		l := &live{}
		err := x.open(&relay{near: &socket{TCPConn: near}, plain: &socket{TCPConn: far}, started: time.Now()}, l)
		if err == nil || errors.Is(err, errRelaying) {
			t.Fatalf("%s is closed, and the relay begins: %v", which, err)
		}
		if l.cut != nil || p.table.size() != 0 {
			t.Errorf("%s: the connection that did not come about is among the live ones", which)
		}
		_ = other.SetReadDeadline(time.Now().Add(patience))
		if _, err := other.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, io.EOF) {
			t.Errorf("%s: the other side reads %v", which, err)
		}
	}
}

// An urgent byte in front of all others is read early like any other.
func TestUrgentByteSpokenEarly(t *testing.T) {
	ca := newAuthority(t, "acme.example")
	web := mtls.NewEndpoint(ca.workload("/prod/web", nil), mtls.Options{})
	db := mtls.NewEndpoint(ca.workload("/prod/db", nil), mtls.Options{})
	app, near := pair(t)
	a, b := pair(t)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	server := make(chan *mtls.Conn, 1)
	go func() {
		c, _, err := mtls.Accept(ctx, b, db)
		if err == nil {
			err = c.Grant(ctx, &symbolonv1.Verdict{Protection: encrypted})
		}
		if err != nil {
			t.Error(err)
		}
		server <- c
	}()
	urgent(t, app, "!")
	_, _ = io.WriteString(app, "AB")
	r := &relay{near: &socket{TCPConn: near}, started: time.Now()}
	_, err := mtls.DialEarly(ctx, a, web, func(*mtls.Peer) (*symbolonv1.Open, error) {
		open := mtls.NewOpen(mtls.NewFlowID(), netip.MustParseAddrPort("10.0.0.9:5432"), encrypted, 1)
		open.Framed = true
		return open, nil
	}, func() (said []byte, err error) {
		b := make([]byte, maxEarly)
		eventually(t, "something was said early", func() bool {
			said, err = r.say(b, true)
			return err != nil || r.early > 0
		})
		return said, err
	})
	if err != nil {
		t.Fatal(err)
	}
	c := <-server
	if c == nil {
		t.FailNow()
	}
	_ = b.SetReadDeadline(time.Now().Add(patience))
	got := make([]byte, 1)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "!" {
		t.Errorf("the first byte is %q, %v; want the urgent one", got, err)
	}
}
