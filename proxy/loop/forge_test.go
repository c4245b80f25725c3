package loop

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls"
)

// forger is a client of the relay's tunnel that has the keys and no manners:
// crypto/tls, whose records a test may hold back, cut and change.
type forger struct {
	*tls.Conn
	wire *held
}

// held is a socket whose writes are kept where holding is set.
type held struct {
	*net.TCPConn
	holding bool
	kept    bytes.Buffer
}

func (h *held) Write(b []byte) (int, error) {
	if h.holding {
		return h.kept.Write(b)
	}
	return h.TCPConn.Write(b)
}

// SetWriteDeadline does nothing: crypto/tls sets one in the past behind its
// close_notify, and a test goes on writing.
func (h *held) SetWriteDeadline(time.Time) error { return nil }

// seal is b in records, which are not sent.
func (f *forger) seal(t testing.TB, b []byte) []byte {
	t.Helper()
	f.wire.holding = true
	_, err := f.Write(b)
	f.wire.holding = false
	if err != nil {
		t.Fatal(err)
	}
	defer f.wire.kept.Reset()
	return bytes.Clone(f.wire.kept.Bytes())
}

// closeNotify is the record of it, which is not sent.
func (f *forger) closeNotify(t testing.TB) []byte {
	t.Helper()
	f.wire.holding = true
	err := f.CloseWrite()
	f.wire.holding = false
	if err != nil {
		t.Fatal(err)
	}
	return f.wire.kept.Bytes()
}

func (f *forger) Reset() error { return reset(f.wire.TCPConn) }

// send writes bytes as they are.
func (f *forger) send(t testing.TB, b []byte) {
	t.Helper()
	if _, err := f.wire.TCPConn.Write(b); err != nil {
		t.Fatal(err)
	}
}

// frame is data on a framed tunnel; nothing ends the direction.
func frame(b []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
}

func openMessage(t testing.TB, framed bool) []byte {
	t.Helper()
	o := mtls.NewOpen(mtls.NewFlowID(), netip.MustParseAddrPort("10.0.0.9:5432"), encrypted, 1)
	o.Framed = framed
	b, err := proto.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return frame(b)
}

// forged is a tunnel of the server's with a forger at the other end. early is sent
// with the Open.
func forged(t testing.TB, framed bool, early []byte) (*mtls.Conn, *forger) {
	t.Helper()
	own, remote := tcpPair(t, 0)
	deadline := time.Now().Add(patience)
	_ = remote.SetDeadline(deadline)
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	type result struct {
		conn *mtls.Conn
		err  error
	}
	ch := make(chan result, 1)
	go func() {
		c, _, err := mtls.Accept(ctx, own, server())
		if err == nil {
			err = c.Grant(ctx, &symbolonv1.Verdict{Protection: encrypted, Keep: framed})
		}
		ch <- result{c, err}
	}()
	f := &forger{wire: &held{TCPConn: remote}}
	f.Conn = tls.Client(f.wire, &tls.Config{
		Certificates: []tls.Certificate{*credentials()[0].SVID.TLS}, NextProtos: []string{mtls.ALPN},
		MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, // who the server is does not matter here
	})
	if err := f.HandshakeContext(ctx); err != nil {
		t.Fatal(err)
	}
	f.send(t, f.seal(t, append(openMessage(t, framed), early...)))
	f.verdict(t)
	r := <-ch
	if r.err != nil {
		t.Fatal(r.err)
	}
	return r.conn, f
}

// verdict reads one that accepts.
func (f *forger) verdict(t testing.TB) {
	t.Helper()
	v := &symbolonv1.Verdict{}
	if err := proto.Unmarshal(f.frame(t), v); err != nil || !v.GetAccept() {
		t.Fatalf("verdict %v, %v", v, err)
	}
}

// frame reads one.
func (f *forger) frame(t testing.TB) []byte {
	t.Helper()
	var head [4]byte
	if _, err := io.ReadFull(f, head[:]); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, binary.BigEndian.Uint32(head[:]))
	if _, err := io.ReadFull(f, b); err != nil {
		t.Fatal(err)
	}
	return b
}

// forgedLink is a link to a forger.
func forgedLink(t testing.TB, framed bool) (*link, *forger) {
	t.Helper()
	c, f := forged(t, framed, nil)
	l := newLinkTo(t, c, framed)
	l.peer = f
	return l, f
}

// newLinkTo is a link whose far side is c.
func newLinkTo(t testing.TB, c *mtls.Conn, keep bool) *link {
	t.Helper()
	l := &link{tunnel: c, done: make(chan ending, 2)}
	app, near := tcpPair(t, 0)
	l.app = wire{app}
	_ = app.SetDeadline(time.Now().Add(patience))
	var err error
	if l.near.FD, err = mtls.DetachTCP(near); err != nil {
		t.Fatal(err)
	}
	l.far.Alerts, l.far.Keep = &Alerts{}, keep
	if l.far.FD, l.far.Stream, l.far.Sealed, err = c.Detach(l.far.Alerts); err != nil {
		t.Fatal(err)
	}
	l.relay = New(l.near, l.far, func(err error, k *Tunnel) { l.done <- ending{err, k} })
	return l
}
