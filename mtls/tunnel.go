package mtls

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls/record"
)

const (
	// refusalLinger is how long a refused client has to read its verdict.
	refusalLinger = 2 * time.Second
	// refusalDrain bounds what a refused client may still send, bytes.
	refusalDrain = 1 << 20
)

// Peer is who is at the other end, by its verified leaf.
type Peer struct {
	identity.Principal
	// Leaf is the certificate; Principal is read from nothing else.
	Leaf *x509.Certificate
	// Above are the certificates that came with it, towards the root.
	Above []*x509.Certificate
	// NotAfter is when the leaf stops being valid: the tunnel must not outlive it.
	NotAfter time.Time
	// Host: the peer is a host's proxy, speaking for a port that no workload listens
	// on. Its only valid verdict is a refusal.
	Host bool
}

// Serial is the leaf's serial number.
func (p *Peer) Serial() identity.Serial { return identity.SerialOf(p.Leaf) }

// Info is what was negotiated, for the record.
type Info struct {
	Version, CipherSuite, KeyExchange string
	Resumed                           bool
}

// Conn is a tunnel: authenticated, and open once the verdict has accepted.
//
// One goroutine may read, ReadVerdict included, and one write; before the verdict
// only where Protection is already known. Anyone may end it with Close or Reset,
// once or more.
type Conn struct {
	wire       *wire
	tls        *tls.Conn
	in         io.Reader // tls, or the record layer that took over from it
	out        writer
	taken      *record.Writer // what took over writing, until reading follows
	peer       Peer
	info       Info
	demanded   symbolonv1.Protection
	protection symbolonv1.Protection
	frames     *frames // nil: the data phase is not framed
	kept       bool    // the server waits for another Open after this one
	stream     *Stream // the data phase, while somebody else has the socket
	client     bool
	export     exporter
	asked      bool   // the client can renew what its connection stands on
	renewable  bool   // both can
	sent       int    // bytes of early in our Open
	offered    []byte // in the client's; nobody's before the verdict
	early      []byte // of those, what the verdict has taken
}

// writer is the encrypting direction.
type writer interface {
	io.Writer
	CloseWrite() error
}

// Peer is the other end.
func (c *Conn) Peer() *Peer { return &c.peer }

// Info is what the handshake negotiated.
func (c *Conn) Info() Info { return c.info }

// Protection is what the verdict agreed on; UNSPECIFIED before.
func (c *Conn) Protection() symbolonv1.Protection { return c.protection }

// Raw is the TCP connection itself where the data phase is not encrypted, for the
// kernel to splice; nil where it is.
func (c *Conn) Raw() *net.TCPConn {
	tcp, _ := c.clear().(*net.TCPConn)
	return tcp
}

// clear is the socket where the data phase is not encrypted; nil where it is.
func (c *Conn) clear() Socket {
	if c.protection == symbolonv1.Protection_PROTECTION_AUTHENTICATED {
		return c.wire.Socket
	}
	return nil
}

// Read reads application bytes. io.EOF is the peer's close_notify (or FIN, where
// the data phase is not encrypted); ErrTruncated an end without it.
func (c *Conn) Read(p []byte) (int, error) {
	if len(c.early) > 0 {
		n := copy(p, c.early)
		c.early = c.early[n:]
		return n, nil
	}
	if raw := c.clear(); raw != nil {
		return raw.Read(p)
	}
	if c.frames != nil {
		return c.frames.read(c.in, p)
	}
	return c.in.Read(p)
}

// Write writes application bytes.
func (c *Conn) Write(p []byte) (int, error) {
	if raw := c.clear(); raw != nil {
		return raw.Write(p)
	}
	if c.frames != nil {
		return c.frames.write(c.out, p)
	}
	return c.out.Write(p)
}

// CloseWrite ends this side's direction and leaves the other open.
func (c *Conn) CloseWrite() error {
	if raw := c.clear(); raw != nil {
		return raw.CloseWrite()
	}
	if c.frames != nil {
		return c.frames.end(c.out)
	}
	return c.out.CloseWrite()
}

// SetReadDeadline is net.Conn's.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.wire.SetReadDeadline(t) }

// SetWriteDeadline is net.Conn's.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.wire.Socket.SetWriteDeadline(t) }

// Close releases the connection. It is not a clean end of a direction.
func (c *Conn) Close() error { return c.wire.Socket.Close() }

// Reset ends both directions with a TCP RST, which the peer passes on.
func (c *Conn) Reset() error {
	_ = c.wire.SetLinger(0) // fails only on a closed socket
	return c.wire.Socket.Close()
}

// handshake runs TLS on tcp, whose deadline is ctx's.
func handshake(ctx context.Context, tcp Socket, client bool, e *Endpoint, now time.Time) (*Conn, error) {
	c := &Conn{wire: &wire{Socket: tcp}, client: client}
	keys, config, end := e.serverKeys, e.server, tls.Server
	if client {
		keys, config, end = e.clientKeys, e.client, tls.Client
	}
	if keys != nil {
		c.wire.tap = record.NewTap(tcp, keys)
		if client {
			c.wire.tap.Cork()
		}
	}
	c.tls = end(c.wire, config)
	c.in, c.out = c.tls, c.tls
	// Not HandshakeContext: a deadline needs no goroutine of its own.
	if err := c.tls.Handshake(); err != nil {
		_ = c.wire.uncork() // an alert
		c.forget()
		return nil, handshakeError(cmp.Or(ctx.Err(), err), client)
	}
	s := c.tls.ConnectionState()
	if c.wire.tap != nil {
		// What keeps the secrets from being known says Take again, and crypto/tls goes on.
		_ = c.wire.tap.Established(s)
	}
	peer, err := e.judge(s.PeerCertificates, now, client)
	if err != nil {
		_ = c.wire.uncork()
		c.forget()
		return nil, handshakeError(err, client)
	}
	c.peer, c.export = peer, exporterOf(s)
	c.info = Info{
		Version:     tls.VersionName(s.Version),
		CipherSuite: suiteName,
		KeyExchange: s.CurveID.String(),
		Resumed:     s.DidResume,
	}
	return c, nil
}

// suiteName is the only one's: see checkState.
var suiteName = tls.CipherSuiteName(tls.TLS_AES_256_GCM_SHA384)

// Dial makes the client's end on a TCP connection, which may be coming about still. authorize
// sees the verified peer, and answers with the Open to send or the reason not to.
// The tunnel is not open before ReadVerdict; but where Open demands encryption,
// application bytes may be written at once (early data in the plain sense: the
// server's proxy holds them back until it has decided).
//
// Dial owns tcp: on error it is closed. Errors are *DeniedError, or authorize's.
func Dial(ctx context.Context, tcp Socket, e *Endpoint, authorize func(*Peer) (*symbolonv1.Open, error)) (*Conn, error) {
	return DialEarly(ctx, tcp, e, authorize, nil)
}

// DialEarly is Dial, which asks early for application bytes that shall go along with the
// Open, in as few packets, when the peer is authorized. Its error is returned as it is.
// Where the Open asks for frames they are sent, as if written; it is not asked where
// crypto/tls has the data phase. Where it asks for no encryption they are shown to the
// server, which may take some of the first: the Verdict says how many in Early. The rest
// is to be written, as if never sent. A host, which has to refuse, is shown nothing.
func DialEarly(ctx context.Context, tcp Socket, e *Endpoint, authorize func(*Peer) (*symbolonv1.Open, error), early func() ([]byte, error)) (_ *Conn, err error) {
	defer func() {
		if err != nil {
			tcp.Close()
		}
	}()
	stop := deadline(ctx, tcp.SetDeadline)
	defer stop()
	c, err := handshake(ctx, tcp, true, e, e.client.Time())
	if err != nil {
		return nil, cmp.Or(unconnected(tcp, err), err)
	}
	open, err := authorize(&c.peer)
	var b []byte
	if err == nil && early != nil && c.takesAlong(open) {
		b, err = early()
	}
	if err != nil {
		_ = c.tls.CloseWrite() // the server tells a refusal from a cut by it
		_ = c.wire.uncork()
		c.forget()
		return nil, err
	}
	if err := c.sendOpen(open, b); err != nil {
		c.forget()
		return nil, err
	}
	return c, nil
}

// takesAlong tells whether application bytes may go along with open.
func (c *Conn) takesAlong(open *symbolonv1.Open) bool {
	if open.GetFramed() {
		return c.wire.tap != nil
	}
	return open.GetProtection() == symbolonv1.Protection_PROTECTION_AUTHENTICATED && !c.peer.Host
}

// sendOpen sends Open, and in the same record early, if that is not empty: in a frame
// behind it, or within it as far as there is room.
func (c *Conn) sendOpen(open *symbolonv1.Open, early []byte) error {
	c.demanded = open.GetProtection()
	c.startFrames(open)
	encrypted := c.demanded == symbolonv1.Protection_PROTECTION_ENCRYPTED
	if c.wire.tap != nil && !encrypted {
		c.wire.tap.Precise() // the verdict may let the server leave TLS
	}
	if c.sent = 0; !open.GetFramed() {
		c.sent = min(len(early), maxEarly(open))
		open.Early, early = early[:c.sent], nil
	}
	b, err := appendMessage(make([]byte, 0, 256+len(early)+c.sent), open)
	if err == nil {
		if len(early) > 0 {
			b = appendFrame(b, early)
		}
		_, err = c.out.Write(b)
	}
	if err = errors.Join(err, c.wire.uncork()); err != nil {
		return &DeniedError{Reason: NetworkReason(err), Err: fmt.Errorf("sending open: %w", err)}
	}
	if encrypted && c.protection != c.demanded {
		// Nothing is stricter: the verdict cannot change it.
		if err := c.beginWriting(c.demanded); err != nil {
			return &DeniedError{Reason: messageReason(err), Err: fmt.Errorf("after open: %w", err)}
		}
	}
	return nil
}

// ReadVerdict waits for the server's half. On error the tunnel is closed.
// Errors are *DeniedError: PEER_REFUSED with the peer's own reason, and others.
func (c *Conn) ReadVerdict(ctx context.Context) (_ *symbolonv1.Verdict, err error) {
	defer func() {
		if err != nil {
			c.forget()
			c.Close()
		}
	}()
	v := &symbolonv1.Verdict{}
	stop := deadline(ctx, c.wire.Socket.SetReadDeadline)
	defer stop()
	if err := readMessage(c.in, v); err != nil {
		return nil, verdictError(err)
	}
	if err := c.checkVerdict(v); err != nil {
		return v, err
	}
	start := c.beginReading
	if c.protection != v.GetProtection() {
		start = func() error { return c.begin(v.GetProtection()) }
	}
	if err := start(); err != nil {
		return v, &DeniedError{Reason: messageReason(err), Err: fmt.Errorf("after the verdict: %w", err)}
	}
	c.accepted(v)
	return v, nil
}

// accepted takes from an accepting verdict what both sides can do in this connection.
func (c *Conn) accepted(v *symbolonv1.Verdict) {
	c.renewable = c.asked && v.GetRenewable()
	if c.frames != nil {
		c.kept, c.frames.renewable = v.GetKeep(), c.renewable
	}
}

// verdictError is for a verdict that cannot be read.
func verdictError(err error) error {
	reason := messageReason(err)
	if errors.Is(err, io.EOF) || errors.Is(err, ErrTruncated) {
		reason = symbolonv1.Reason_REASON_PROTOCOL // a refusal is a verdict, or an alert
	}
	return &DeniedError{Reason: reason, Err: fmt.Errorf("waiting for the verdict: %w", err)}
}

// checkVerdict is nil where the peer accepts, and may, as strictly as was demanded.
func (c *Conn) checkVerdict(v *symbolonv1.Verdict) error {
	if !v.GetAccept() {
		return &DeniedError{
			Reason: symbolonv1.Reason_REASON_PEER_REFUSED, Peer: v.GetReason(), Policy: v.GetPolicy(),
			Err: fmt.Errorf("the peer refused: %s", v.GetReason()),
		}
	}
	if c.peer.Host {
		return &DeniedError{
			Reason: symbolonv1.Reason_REASON_NOT_A_WORKLOAD,
			Err:    fmt.Errorf("%w: %s accepted a connection for no workload", ErrProtocol, c.peer.ID),
		}
	}
	if !validProtection(v.GetProtection()) || v.GetProtection() < c.demanded {
		return &DeniedError{
			Reason: symbolonv1.Reason_REASON_PROTOCOL,
			Err:    fmt.Errorf("%w: verdict offers %s, open demanded %s", ErrProtocol, v.GetProtection(), c.demanded),
		}
	}
	if n := v.GetEarly(); uint64(n) > uint64(c.sent) {
		return &DeniedError{
			Reason: symbolonv1.Reason_REASON_PROTOCOL,
			Err:    fmt.Errorf("%w: verdict takes %d early bytes, open had %d", ErrProtocol, n, c.sent),
		}
	}
	return nil
}

// Accept makes the server's end and reads the client's Open. The caller decides,
// then calls Grant or Refuse.
//
// Accept owns tcp: on error it is closed, an unreadable Open being refused with
// its reason first. Errors are *DeniedError; Peer() is known on a returned Conn
// even where the error is not nil.
func Accept(ctx context.Context, tcp *net.TCPConn, e *Endpoint) (*Conn, *symbolonv1.Open, error) {
	stop := deadline(ctx, tcp.SetDeadline)
	c, err := handshake(ctx, tcp, false, e, e.server.Time())
	if err != nil {
		stop()
		tcp.Close()
		return nil, nil, err
	}
	open, err := c.readOpen()
	stop()
	if err != nil {
		return c, nil, c.RefuseOpen(err)
	}
	return c, open, nil
}

func (c *Conn) readOpen() (*symbolonv1.Open, error) {
	open := &symbolonv1.Open{}
	if err := readMessage(c.in, open); err != nil {
		return nil, err
	}
	if err := checkOpen(open); err != nil {
		return nil, err
	}
	c.demanded, c.offered = open.GetProtection(), open.GetEarly()
	c.startFrames(open)
	return open, nil
}

// TakeEarly is what a Detached server's verdict has taken of the client's first bytes, to be
// delivered before anything else: Read has not given them out, and does not any more.
func (c *Conn) TakeEarly() []byte {
	b := c.early
	c.early = nil
	return b
}

// RefuseOpen refuses an Open that cannot be served, with its reason, which it returns.
func (c *Conn) RefuseOpen(err error) error {
	reason := messageReason(err)
	if reason == symbolonv1.Reason_REASON_TIMED_OUT {
		reason = symbolonv1.Reason_REASON_HANDSHAKE_TIMEOUT
	}
	if errors.Is(err, io.EOF) {
		err = errors.New("the client ended the tunnel instead")
	}
	c.Refuse(&symbolonv1.Verdict{Reason: reason})
	return &DeniedError{Reason: reason, Err: fmt.Errorf("reading open: %w", err)}
}

// Grant sends an accepting verdict and begins the data phase. v.Protection is
// raised to what the client demanded. On error the tunnel is reset.
func (c *Conn) Grant(ctx context.Context, v *symbolonv1.Verdict) error {
	c.grant(v)
	if v.GetProtection() != symbolonv1.Protection_PROTECTION_ENCRYPTED {
		if err := c.wire.precise(); err != nil { // before the client can know of the verdict
			_ = c.Reset()
			return &DeniedError{Reason: messageReason(err), Err: fmt.Errorf("before the verdict: %w", err)}
		}
	}
	stop := deadline(ctx, c.wire.Socket.SetDeadline)
	defer stop()
	if err := writeMessage(c.out, v); err != nil {
		_ = c.Reset()
		return &DeniedError{Reason: NetworkReason(err), Err: fmt.Errorf("sending verdict: %w", err)}
	}
	if c.protection != v.GetProtection() {
		if err := c.begin(v.GetProtection()); err != nil {
			_ = c.Reset()
			return &DeniedError{Reason: messageReason(err), Err: fmt.Errorf("after the verdict: %w", err)}
		}
	}
	c.kept = v.GetKeep()
	return nil
}

// grant makes v accept.
func (c *Conn) grant(v *symbolonv1.Verdict) {
	v.Accept = true
	v.Protection = max(v.GetProtection(), c.demanded)
	v.Keep = v.GetKeep() && c.frames != nil
	v.Renewable, c.renewable = c.asked, c.asked
	v.Early = uint32(len(c.offered))
	c.early, c.offered = c.offered, nil
	if c.frames != nil {
		c.frames.renewable = c.asked
	}
}

// Refuse sends a denying verdict, gives the client a moment to read it, and
// closes. Early bytes of the client's are thrown away: closing over them would
// reset the connection, and with it the verdict.
func (c *Conn) Refuse(v *symbolonv1.Verdict) {
	defer c.Close()
	c.forget()
	c.offered = nil
	v.Accept, v.Early = false, 0
	v.Protection = symbolonv1.Protection_PROTECTION_UNSPECIFIED
	c.wire.SetDeadline(time.Now().Add(refusalLinger))
	if writeMessage(c.out, v) != nil || c.out.CloseWrite() != nil || c.wire.Socket.CloseWrite() != nil {
		return
	}
	_, _ = io.CopyN(io.Discard, c.wire.Socket, refusalDrain)
}

// beginWriting starts the data phase of this direction, which nobody may be using;
// beginReading that of the other. A client reads its verdict in between, and with it,
// by crypto/tls, the tickets of the server's.
func (c *Conn) beginWriting(p symbolonv1.Protection) error {
	c.protection = p
	if c.wire.tap == nil || p != symbolonv1.Protection_PROTECTION_ENCRYPTED {
		return nil
	}
	w, err := c.wire.tap.TakeWriter()
	switch {
	case err == nil:
		c.out, c.taken = w, w
		return nil
	case errors.Is(err, record.ErrNoSecrets), errors.Is(err, record.ErrFIPS):
		return nil // crypto/tls goes on
	}
	return err
}

func (c *Conn) beginReading() error {
	switch {
	case c.protection != symbolonv1.Protection_PROTECTION_ENCRYPTED:
		c.forget() // raw from here on
		return c.wire.precise()
	case c.taken == nil:
		if c.in == io.Reader(c.tls) {
			c.wire.loosen()
		}
		return nil
	}
	r, err := c.wire.tap.TakeReader(c.tls, c.taken)
	if err != nil {
		return err
	}
	c.in, c.taken = r, nil
	return nil
}

func (c *Conn) begin(p symbolonv1.Protection) error {
	if err := c.beginWriting(p); err != nil {
		return err
	}
	return c.beginReading()
}

// forget gives up the traffic secrets that were kept for the record layer.
func (c *Conn) forget() {
	if c.wire.tap != nil {
		c.wire.tap.Release()
	}
}

// deadline makes I/O on a connection end with ctx, by its SetDeadline or one half
// of it. The returned function lifts it.
func deadline(ctx context.Context, set func(time.Time) error) (lift func()) {
	if t, ok := ctx.Deadline(); ok {
		_ = set(t)
	}
	stop := context.AfterFunc(ctx, func() { _ = set(time.Unix(1, 0)) })
	return func() {
		if stop() {
			_ = set(time.Time{})
		}
	}
}
