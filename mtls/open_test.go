package mtls

import (
	"context"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// A server that offers less protection than the client demanded is no server of ours.
func TestVerdictCannotDowngrade(t *testing.T) {
	web, db := endpoints(t)
	ctx := timeout(t)
	c, s := pair(t)
	go func() {
		b, _, err := Accept(ctx, s, db)
		if err == nil {
			writeMessage(b.out, &symbolonv1.Verdict{Accept: true, Protection: authenticated})
		}
	}()
	a, err := Dial(ctx, c, web, asking(encrypted))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.ReadVerdict(ctx); ReasonOf(err) != symbolonv1.Reason_REASON_PROTOCOL {
		t.Fatalf("got %v, want a protocol error", err)
	}
}

func TestBadOpens(t *testing.T) {
	web, db := endpoints(t)
	marshal := func(o *symbolonv1.Open) []byte {
		b, err := proto.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
	}
	with := func(change func(*symbolonv1.Open)) []byte {
		o := NewOpen(NewFlowID(), somewhere, encrypted, 1)
		change(o)
		return marshal(o)
	}
	for _, tc := range []struct {
		name  string
		bytes []byte
		want  symbolonv1.Reason
	}{
		{"not protobuf", []byte{0, 0, 0, 3, 0xff, 0xff, 0xff}, symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"too large", []byte{0, 0x40, 0, 1}, symbolonv1.Reason_REASON_OPEN_TOO_LARGE},
		{"gigantic", []byte{0xff, 0xff, 0xff, 0xff}, symbolonv1.Reason_REASON_OPEN_TOO_LARGE},
		{"empty", []byte{0, 0, 0, 0}, symbolonv1.Reason_REASON_VERSION},
		{"version 2", with(func(o *symbolonv1.Open) { o.Version = 2 }), symbolonv1.Reason_REASON_VERSION},
		{"no address", with(func(o *symbolonv1.Open) { o.DestinationIp = nil }), symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"port 0", with(func(o *symbolonv1.Open) { o.DestinationPort = 0 }), symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"port 65536", with(func(o *symbolonv1.Open) { o.DestinationPort = 65536 }), symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"no protection", with(func(o *symbolonv1.Open) { o.Protection = 0 }), symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"unknown protection", with(func(o *symbolonv1.Open) { o.Protection = 9 }), symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"early bytes with encryption", with(func(o *symbolonv1.Open) { o.Early = []byte("x") }), symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"too many early bytes", with(func(o *symbolonv1.Open) {
			o.Protection, o.Early = authenticated, make([]byte, MaxEarly+1)
		}), symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"early bytes of no connection", with(func(o *symbolonv1.Open) {
			o.Protection, o.Early, o.Renews = authenticated, []byte("x"), make([]byte, len(Claim{}))
		}), symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"short flow id", with(func(o *symbolonv1.Open) { o.FlowId = o.GetFlowId()[:3] }), symbolonv1.Reason_REASON_OPEN_MALFORMED},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := timeout(t)
			c, s := pair(t)
			ch := accept(ctx, s, db, nil)
			a, err := handshake(ctx, c, true, web, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			a.demanded = encrypted
			if _, err := a.out.Write(tc.bytes); err != nil {
				t.Fatal(err)
			}
			_, err = a.ReadVerdict(ctx)
			var d *DeniedError
			if !errors.As(err, &d) || d.Peer != tc.want {
				t.Errorf("the client hears %v (%+v), want %v", err, d, tc.want)
			}
			if b := <-ch; ReasonOf(b.err) != tc.want || b.conn.Peer().Name != "web" {
				t.Errorf("the server says %v, want %v", b.err, tc.want)
			}
		})
	}
}

func TestOpenCutShortTimesOut(t *testing.T) {
	web, db := endpoints(t)
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	c, s := pair(t)
	ch := accept(ctx, s, db, nil)
	a, err := handshake(timeout(t), c, true, web, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	a.out.Write([]byte{0, 0, 0, 40, 1, 2, 3})
	if b := <-ch; ReasonOf(b.err) != symbolonv1.Reason_REASON_HANDSHAKE_TIMEOUT {
		t.Errorf("got %v, want a handshake timeout", b.err)
	}
}
