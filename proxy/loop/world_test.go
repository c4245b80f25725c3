package loop

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls"
)

// patience is how long a test waits for what must happen.
const patience = 60 * time.Second

const encrypted = symbolonv1.Protection_PROTECTION_ENCRYPTED

// conn is what is at a relay's outer ends.
type conn interface {
	io.Reader
	io.Writer
	CloseWrite() error
	Close() error
	Reset() error
	SetReadDeadline(time.Time) error
}

// wire is plain TCP as conn.
type wire struct{ *net.TCPConn }

func (w wire) Reset() error { return reset(w.TCPConn) }

func reset(c *net.TCPConn) error {
	_ = c.SetLinger(0)
	return c.Close()
}

// kind is what is on a relay's far side.
type kind struct {
	tunnel, framed bool
	// client: the relay's end of the tunnel is the client's.
	client bool
	// stock: crypto/tls is at the tunnel's other end.
	stock bool
	// keep: the tunnel is handed back after a clean end.
	keep bool
	// buffers is the size of each socket's send buffer, bytes, and an eighth of its
	// receive buffer, which would bring TCP's timers into play; 0: the kernel's choice.
	buffers int
}

var kinds = map[string]kind{
	"plain":               {},
	"tunnel":              {tunnel: true},
	"framed":              {tunnel: true, framed: true},
	"client's tunnel":     {tunnel: true, client: true},
	"client's framed":     {tunnel: true, client: true, framed: true},
	"framed, kept":        {tunnel: true, framed: true, keep: true},
	"tunnel, crypto/tls":  {tunnel: true, stock: true},
	"framed, crypto/tls":  {tunnel: true, framed: true, stock: true},
	"tunnel, tiny":        {tunnel: true, buffers: 4 << 10},
	"framed, tiny":        {tunnel: true, framed: true, buffers: 4 << 10},
	"plain, tiny buffers": {buffers: 4 << 10},
}

func each(t *testing.T, test func(*testing.T, kind)) {
	for name, k := range kinds {
		t.Run(name, func(t *testing.T) { test(t, k) })
	}
}

// ending is what done was called with.
type ending struct {
	err  error
	kept *Tunnel
}

// link is an application and a peer with a relay between them, which has not begun.
type link struct {
	app    wire
	peer   conn
	remote *net.TCPConn // peer's socket
	tunnel *mtls.Conn   // the relay's own end, detached; nil: plain
	near   Side
	far    Side
	relay  *Relay
	done   chan ending
}

func newLink(t testing.TB, k kind) *link {
	t.Helper()
	l := &link{done: make(chan ending, 2)} // room for a call too many
	app, near := tcpPair(t, k.buffers)
	far, remote := tcpPair(t, k.buffers)
	l.app, l.remote = wire{app}, remote
	var err error
	if l.near.FD, err = mtls.DetachTCP(near); err != nil {
		t.Fatal(err)
	}
	if k.tunnel {
		l.tunnel, l.peer = tunnels(t, far, remote, k)
		l.far.Alerts = &Alerts{}
		l.far.Keep = k.keep
		if l.far.FD, l.far.Stream, l.far.Sealed, err = l.tunnel.Detach(l.far.Alerts); err != nil {
			t.Fatal(err)
		}
	} else {
		l.peer = wire{remote}
		if l.far.FD, err = mtls.DetachTCP(far); err != nil {
			t.Fatal(err)
		}
	}
	_ = l.app.SetDeadline(time.Now().Add(patience))
	_ = remote.SetDeadline(time.Now().Add(patience))
	l.relay = New(l.near, l.far, func(err error, k *Tunnel) { l.done <- ending{err, k} })
	return l
}

// begin makes a link and starts it on a loop of its own.
func begin(t testing.TB, k kind) *link {
	t.Helper()
	l := newLink(t, k)
	start(t, 1).Add(l.relay)
	return l
}

func start(t testing.TB, n int) *Loops {
	t.Helper()
	s, err := Start(n, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// ended waits for the relay's end, and holds that there is only one.
func (l *link) ended(t testing.TB) ending {
	t.Helper()
	select {
	case e := <-l.done:
		select {
		case <-l.done:
			t.Error("done is called twice")
		default:
		}
		return e
	case <-time.After(patience):
		t.Fatal("the relay does not end")
	}
	return ending{}
}

// clean ends the link and holds that it ended as it should.
func (l *link) clean(t testing.TB) *Tunnel {
	t.Helper()
	e := l.ended(t)
	if e.err != nil {
		t.Fatalf("the relay ends with %v", e.err)
	}
	return e.kept
}

// attach gives a tunnel the socket back that its relay has left.
func attach(c *mtls.Conn, t *Tunnel) error {
	k, err := t.Detach()
	if err != nil {
		return err
	}
	return c.Attach(k.FD, k.Stream, k.Sealed)
}

// tunnels makes a tunnel on a and b, of which a is the relay's end.
func tunnels(t testing.TB, a, b *net.TCPConn, k kind) (own, peer *mtls.Conn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, s := b, a
	if k.client {
		c, s = a, b
	}
	dialler := client()
	if k.stock {
		dialler = stockClient()
	}
	type result struct {
		conn *mtls.Conn
		err  error
	}
	ch := make(chan result, 1)
	go func() {
		x, _, err := mtls.Accept(ctx, s, server())
		if err == nil {
			err = x.Grant(ctx, &symbolonv1.Verdict{Protection: encrypted, Keep: k.framed})
		}
		ch <- result{x, err}
	}()
	x, err := mtls.Dial(ctx, c, dialler, func(*mtls.Peer) (*symbolonv1.Open, error) {
		o := mtls.NewOpen(mtls.NewFlowID(), netip.MustParseAddrPort("10.0.0.9:5432"), encrypted, 1)
		o.Framed, o.Renewable = k.framed, k.framed
		return o, nil
	})
	if err == nil {
		_, err = x.ReadVerdict(ctx)
	}
	r := <-ch
	if err := errors.Join(err, r.err); err != nil {
		t.Fatal(err)
	}
	if k.client {
		return x, r.conn
	}
	return r.conn, x
}

// tcpPair is a loopback connection; both ends are closed with the test.
func tcpPair(t testing.TB, buffers int) (a, b *net.TCPConn) {
	t.Helper()
	c := net.ListenConfig{}
	c.SetMultipathTCP(false)
	nl, err := c.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	d, err := net.Dial("tcp4", nl.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	e, err := nl.Accept()
	if err != nil {
		t.Fatal(err)
	}
	a, b = d.(*net.TCPConn), e.(*net.TCPConn)
	t.Cleanup(func() { a.Close(); b.Close() })
	if buffers > 0 {
		for _, x := range []*net.TCPConn{a, b} {
			if err := errors.Join(x.SetReadBuffer(8*buffers), x.SetWriteBuffer(buffers)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return a, b
}

// control runs f on a connection's descriptor.
func control(t testing.TB, c *net.TCPConn, f func(fd int)) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { f(int(fd)) })
	}
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// still waits until a value does not change any more, as far as one can tell.
func still(t testing.TB, what string, value func() uint64) {
	t.Helper()
	last, since := value(), time.Now()
	eventually(t, what, func() bool {
		if now := value(); now != last {
			last, since = now, time.Now()
		}
		return time.Since(since) > 300*time.Millisecond
	})
}
