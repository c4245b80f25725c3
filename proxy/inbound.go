package proxy

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/policydb"
	"github.com/symbolon/symbolon/redirect"
)

// inbound serves a connection that arrived for a local port. It does not wait.
func (p *Proxy) inbound(ctx context.Context, c *socket) {
	p.crew.run(func() {
		defer p.conns.Done()
		p.serveArrived(ctx, c)
	})
}

func (p *Proxy) serveArrived(ctx context.Context, c *socket) {
	x := p.newConn(c, &slot{p: p}, symbolonv1.Reporter_REPORTER_SERVER)
	remote, _ := c.RemoteAddr().(*net.TCPAddr) // the address is right, if not the port
	leave, full := p.strangers.enter(sourceOf(remote.AddrPort().Addr()))
	if full != nil {
		x.slot.leave()
		p.refuse(c, symbolonv1.Reporter_REPORTER_SERVER, full)
		return
	}
	x.release = leave
	x.serve(ctx, x.serveInbound)
}

func (x *conn) serveInbound(setup context.Context) error {
	tuple, err := x.tuple()
	if err != nil {
		return err
	}
	me, socket, refusal := x.listener(setup, tuple)
	if refusal != nil {
		return x.refuseInbound(setup, refusal)
	}
	c := x.p.policy.Load()
	x.identified(x.rec.GetDestination(), me.known(c))
	if err := x.seat(me); err != nil {
		return x.refuseInbound(setup, err)
	}
	if c == nil {
		return x.refuseInbound(setup, errNoPolicy)
	}
	start := time.Now()
	quiet, deadline := start.Add(x.p.timeouts.Handshake), start.Add(x.p.timeouts.Handshake)
	source, unprotected := x.source(c, me, tuple)
	if unprotected && (source != nil || !x.p.peers.has(tuple.Src.Addr())) {
		quiet = start.Add(x.p.timeouts.Quiet)
	}
	kind, err := mtls.Peek(x.accepted.TCPConn, quiet, deadline)
	if err != nil {
		return networkError(err)
	}
	c = x.p.policy.Load() // the client may have taken its time
	source, unprotected = x.source(c, me, tuple)
	switch kind {
	case mtls.Tunnel:
		return x.acceptTunnel(setup, me, socket, tuple)
	case mtls.Closed:
		// A client that has ended its direction may still wait to be spoken to.
		if !unprotected {
			return deny(symbolonv1.Reason_REASON_RESET, errors.New("closed by the client before its first byte"))
		}
	case mtls.Silent:
		if !unprotected {
			return deny(symbolonv1.Reason_REASON_SILENT_CLIENT, errors.New("the client sent nothing, and no External covers its address"))
		}
	}
	if !unprotected {
		return deny(symbolonv1.Reason_REASON_PEER_UNPROTECTED, errors.New("the client has no proxy, and no External covers its address"))
	}
	if err := x.confirmed(setup); err != nil {
		return err
	}
	return x.acceptExternal(setup, c, me, socket, source, tuple)
}

// listener finds the workload that listens on the original destination, and its
// listening socket.
func (x *conn) listener(ctx context.Context, tuple redirect.Tuple) (*party, redirect.SocketOwner, error) {
	owner, err := x.p.diag.Listener(tuple.Dst, tuple.Src)
	if errors.Is(err, redirect.ErrNoSocket) {
		return nil, owner, deny(symbolonv1.Reason_REASON_REFUSED, fmt.Errorf("nobody listens on %s", tuple.Dst))
	}
	if err != nil {
		return nil, owner, deny(symbolonv1.Reason_REASON_UNKNOWN_WORKLOAD, err)
	}
	me, err := x.p.identify(ctx, owner)
	return me, owner, err
}

// knownListener is listener without waiting; not ok: that knows more.
func (x *conn) knownListener(tuple redirect.Tuple) (me *party, owner redirect.SocketOwner, ok bool) {
	owner, err := x.p.diag.Listener(tuple.Dst, tuple.Src)
	if err != nil {
		return nil, owner, false
	}
	s, err := x.p.socket(owner)
	if err != nil {
		return nil, owner, false
	}
	me, ok = x.p.known(s)
	return me, owner, ok
}

// reach dials the local application, makes sure that it still is who was identified
// (between then and now it may have ended, and another user's program may have taken its
// port), and goes on with then.
func (x *conn) reach(ctx context.Context, tuple redirect.Tuple, src netip.Addr, me *party, listens redirect.SocketOwner, then func(context.Context, *socket, error) error) error {
	if x.quick && x.p.preserves(src, tuple) { // which waits
		return x.later(ctx, func(ctx context.Context) error { return x.reach(ctx, tuple, src, me, listens, then) })
	}
	app, err := x.p.dialApp(ctx, src, tuple)
	if errors.Is(err, unix.EALREADY) {
		return x.later(ctx, func(ctx context.Context) error {
			err := app.connected(tuple.Dst, time.Now().Add(x.p.timeouts.Connect))
			return x.reached(ctx, app, err, tuple, me, listens, then)
		})
	}
	return x.reached(ctx, app, err, tuple, me, listens, then)
}

// reached is the rest of reach; err is what became of the connection to app.
func (x *conn) reached(ctx context.Context, app *socket, err error, tuple redirect.Tuple, me *party, listens redirect.SocketOwner, then func(context.Context, *socket, error) error) error {
	if err != nil {
		return then(ctx, nil, networkError(err))
	}
	x.p.settle(app, tuple.Dst)
	if owner, err := x.p.diag.Listener(tuple.Dst, tuple.Src); err == nil && owner.Cookie == listens.Cookie {
		return then(ctx, app, nil) // the very same socket
	}
	return x.later(ctx, func(ctx context.Context) error {
		now, _, err := x.listener(ctx, tuple)
		if err == nil && now != me {
			err = deny(symbolonv1.Reason_REASON_UNKNOWN_WORKLOAD, errors.New("another program has taken the port meanwhile"))
		}
		if err != nil {
			app.reset()
			return then(ctx, nil, err)
		}
		return then(ctx, app, nil)
	})
}

// refuseInbound refuses where there is no workload to speak for. A tunnel gets the
// reason, under the host's own certificate; anything else a reset.
func (x *conn) refuseInbound(ctx context.Context, why error) error {
	host := x.p.hostEndpoint()
	if host == nil {
		return why
	}
	start := time.Now()
	if kind, err := mtls.Peek(x.accepted.TCPConn, start.Add(x.p.timeouts.Quiet), start.Add(x.p.timeouts.Handshake)); err != nil || kind != mtls.Tunnel {
		return why
	}
	hs, cancel := context.WithTimeout(ctx, x.p.timeouts.Handshake)
	defer cancel()
	t, open, err := mtls.Accept(hs, x.accepted.TCPConn, host)
	if t != nil {
		x.identified(x.rec.GetSource(), &t.Peer().Principal)
	}
	if err != nil {
		// The host may not know the client's trust domain: why it is refused is not that.
		return fmt.Errorf("%w; the client could not be told: %w", why, err)
	}
	copy(x.flowID[:], open.GetFlowId())
	t.Refuse(&symbolonv1.Verdict{Reason: mtls.ReasonOf(why), FlowId: x.flowID[:]})
	return why
}

// acceptTunnel is the server's half of symbolon/1. A tunnel may bring one connection
// after another; each is judged and recorded by itself, and x is the first.
func (x *conn) acceptTunnel(ctx context.Context, me *party, socket redirect.SocketOwner, tuple redirect.Tuple) error {
	hs, cancel := context.WithTimeout(ctx, x.p.timeouts.Handshake)
	defer cancel()
	endpoint := me.current.Load()
	t, open, err := mtls.Accept(hs, x.accepted.TCPConn, endpoint)
	if t != nil {
		x.identified(x.rec.GetSource(), &t.Peer().Principal)
		x.tunnelled(t)
	}
	if err != nil {
		return err
	}
	if len(open.GetRenews()) > 0 {
		return x.renews(ctx, me, endpoint, t, open)
	}
	in := &incoming{conn: x, me: me, socket: socket, tuple: tuple, endpoint: endpoint, tunnel: kept{Conn: t}}
	x.after = in.over
	if err := in.serve(ctx, x.p.policy.Load(), open); err != nil {
		return err
	}
	in.over(nil)
	return nil
}

// over writes the record of a connection that has ended, and serves the next ones
// of its tunnel, if there may be any.
func (in *incoming) over(err error) {
	in.report(err)
	if err == nil && in.tunnel.on != nil {
		in.park()
		return
	}
	// What a loop has carried, and not given back, is over.
	for err == nil && in.accepted != nil && in.tunnel.Reusable() {
		err = in.next()
	}
	if !errors.Is(err, errRelaying) { // or its own over goes on
		in.gone()
	}
}

// incoming is the server's side of the connections on one tunnel.
type incoming struct {
	*conn
	me       *party
	socket   redirect.SocketOwner // the one that listens
	tuple    redirect.Tuple
	endpoint *mtls.Endpoint
	tunnel   kept

	// While it waits in the lot.
	since time.Time
	spot  *list.Element // guarded by the lot's lock; nil: it is not there
}

var errTunnelOver = errors.New("the tunnel serves no more connections")

// next waits for one more connection, and serves it as if it had come by itself.
// Any error ends the tunnel.
func (in *incoming) next() error {
	idle, cancel := context.WithTimeout(in.p.accepting, keepIdleServer)
	open, err := in.tunnel.NextOpen(idle)
	cancel()
	switch {
	case errors.Is(err, io.EOF):
		return err
	case err != nil:
		in.again().report(err)
		return err
	}
	next := in.again()
	ctx, stop := next.setup()
	defer stop()
	err = next.serveNext(ctx, open)
	if !errors.Is(err, errRelaying) {
		next.report(err)
	}
	return err
}

// setup bounds what comes before the bytes.
func (x *conn) setup() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(x.p.accepting), x.p.timeouts.Setup)
}

// again is one more connection on the tunnel, which does not know yet who listens.
func (in *incoming) again() *incoming {
	x := in.p.newConn(in.accepted, in.slot, symbolonv1.Reporter_REPORTER_SERVER)
	x.rec.Reused = true
	x.addresses(in.tuple.Src, in.tuple.Dst)
	x.identified(x.rec.GetSource(), &in.tunnel.Peer().Principal)
	x.tunnelled(in.tunnel.Conn)
	next := &incoming{conn: x, tuple: in.tuple, endpoint: in.endpoint, tunnel: in.tunnel}
	x.after = next.over
	return next
}

// ended ends the tunnel with its last connection, whose error was err, unless that goes
// on by itself.
func (in *incoming) ended(err error) {
	switch {
	case errors.Is(err, errRelaying):
	case errors.Is(err, errTunnelOver): // without a word: the client asks on another one
		in.p.conns.Add(1) // beside whoever calls
		in.leave()
	default:
		in.report(err)
		in.gone()
	}
}

// serveNext serves a connection that an Open behind the first one announces. Any error
// but errRelaying ends the tunnel.
func (in *incoming) serveNext(ctx context.Context, open *symbolonv1.Open) error {
	if me, socket, ok := in.knownListener(in.tuple); ok {
		return in.serveBy(ctx, me, socket, nil, open)
	}
	return in.later(ctx, func(ctx context.Context) error {
		me, socket, refusal := in.listener(ctx, in.tuple)
		return in.serveBy(ctx, me, socket, refusal, open)
	})
}

// serveBy is the rest of serveNext, when it is known who listens: me, or nobody by
// refusal.
func (in *incoming) serveBy(ctx context.Context, me *party, socket redirect.SocketOwner, refusal error, open *symbolonv1.Open) error {
	p, x := in.p, in.conn
	c := p.policy.Load()
	if c == nil {
		refusal = errNoPolicy
	}
	if refusal == nil {
		refusal = x.seat(me)
	}
	if refusal != nil {
		copy(x.flowID[:], open.GetFlowId())
		return in.refuse(ctx, &symbolonv1.Verdict{Reason: mtls.ReasonOf(refusal), FlowId: x.flowID[:]}, refusal)
	}
	if me.current.Load() != in.endpoint || past(in.tunnel.Peer().NotAfter, p.now()) {
		// Another workload listens now, or a certificate is another: only a new
		// handshake can show that. The client makes one.
		x.unseat()
		x.reported = true // no record: the connection comes again
		return errTunnelOver
	}
	in.me, in.socket = me, socket
	return in.serve(ctx, c, open)
}

// serve judges one connection, dials the application, and relays.
func (in *incoming) serve(ctx context.Context, c *policydb.Compiled, open *symbolonv1.Open) error {
	x, t, me := in.conn, in.tunnel, in.me
	if in.quick && open.GetToken() != "" { // one that is new takes a while to verify
		return in.later(ctx, func(ctx context.Context) error { return in.serve(ctx, x.p.policy.Load(), open) })
	}
	x.identified(x.rec.GetDestination(), me.known(c))
	copy(x.flowID[:], open.GetFlowId())
	peer, err := x.p.shown(t.Peer(), open)
	if err == nil {
		x.identified(x.rec.GetSource(), me.sees(c, peer))
		err = x.p.refuseRevoked(t.Peer(), me.sees(c, peer)) // the handshake may have been long ago
	}
	if err == nil {
		err = in.checkClaims(c, peer)
	}
	if err != nil {
		return in.refuse(ctx, &symbolonv1.Verdict{Reason: mtls.ReasonOf(err), FlowId: x.flowID[:]}, err)
	}
	d := in.judge(c, peer, x.p.now())
	verdict := &symbolonv1.Verdict{Reason: d.Reason, Protection: d.Protection, FlowId: x.flowID[:], Log: d.Log, Keep: !x.p.noReuse}
	if t.Peer().ID.TrustDomain() == me.principal().ID.TrustDomain() {
		verdict.Policy = d.Policy // a stranger need not know how our policies are called
	}
	if err := x.decided(policydb.Server, c, &d); err != nil {
		return in.refuse(ctx, verdict, err)
	}
	return x.reach(ctx, in.tuple, netip.Addr{}, me, in.socket, func(ctx context.Context, app *socket, err error) error {
		if err != nil {
			verdict.Reason, verdict.Policy = mtls.ReasonOf(err), ""
			return in.refuse(ctx, verdict, err)
		}
		return in.grant(ctx, app, verdict, peer)
	})
}

// refuse sends a denying verdict because of err, which it returns.
func (in *incoming) refuse(ctx context.Context, v *symbolonv1.Verdict, err error) error {
	return in.later(ctx, func(context.Context) error {
		in.tunnel.Refuse(v)
		return err
	})
}

// grant sends an accepting verdict, and relays.
func (in *incoming) grant(ctx context.Context, app *socket, verdict *symbolonv1.Verdict, peer *identity.Principal) error {
	x, t, me := in.conn, in.tunnel, in.me
	if err := t.Grant(ctx, verdict); err != nil {
		app.reset()
		return err
	}
	x.tunnelled(t.Conn)
	in.tunnel.on = nil // the relay's, until it gives it back
	r := &relay{near: app, tunnel: t, back: func(k kept) { in.tunnel = k }, started: x.started, serverIsNear: true}
	return x.open(r, x.standing(me, standing{in.endpoint, t.Peer(), peer}, in.standsOn), me)
}

// judge decides on the client, by its certificate or token.
func (in *incoming) judge(c *policydb.Compiled, who *identity.Principal, now time.Time) policydb.Decision {
	from := in.me.sees(c, who)
	return unexplained(c.Decide(policydb.Server, &policydb.Query{
		From: endpointOf(from), To: in.me.endpoint(c), Protocol: tcp, Port: in.tuple.Dst.Port(),
	}, now), from)
}

// checkClaims is the proxy's, on the client.
func (in *incoming) checkClaims(c *policydb.Compiled, who *identity.Principal) error {
	return in.p.checkClaims(c, in.endpoint.Credential().SVID.ID.TrustDomain(), who)
}

// standsOn is the connection for the table.
func (in *incoming) standsOn(s standing) *live {
	q := tunnelQuestion(fromTunnel, in.me, s.shown, in.tunnel.Conn, s.who, in.tuple.Dst.Port())
	return s.live(q, func(c *policydb.Compiled, now time.Time) (bool, time.Time) {
		d := in.judge(c, s.who, now)
		return d.Allow && d.Protection <= q.protection && in.me.still(s.shown) && in.checkClaims(c, s.who) == nil, d.Until
	})
}

// source finds the External that covers a client without a proxy; false: it may not be
// served. Nil and true: a namespace in learn lets in whoever comes.
func (x *conn) source(c *policydb.Compiled, me *party, tuple redirect.Tuple) (*policydb.ExternalMatch, bool) {
	ns := me.namespace(c)
	ext, ok := c.Source(ns, tuple.Src.Addr())
	return ext, ok || c.Learns(ns)
}

// acceptExternal serves a client without a proxy, by its address alone: it counts
// for nothing but the External that policy gives it; with nil, for nothing at all.
func (x *conn) acceptExternal(ctx context.Context, c *policydb.Compiled, me *party, listens redirect.SocketOwner, ext *policydb.ExternalMatch, tuple redirect.Tuple) error {
	outside(x.rec.GetSource(), &x.ends[0], ext)
	judge := func(c *policydb.Compiled, ext *policydb.ExternalMatch, now time.Time) policydb.Decision {
		own := me.endpoint(c)
		if ext == nil {
			return c.DecideUnprotected(policydb.Server, &own, tcp, tuple.Dst.Port(), now)
		}
		return c.Decide(policydb.Server, &policydb.Query{
			From: policydb.Endpoint{External: ext.Ref, Attributes: ext.Labels}, To: own,
			Protocol: tcp, Port: tuple.Dst.Port(),
		}, now)
	}
	d := judge(c, ext, x.p.now())
	if err := x.decided(policydb.Server, c, &d); err != nil {
		return err
	}
	l := &live{
		question: question{kind: fromAddress, near: me, address: tuple.Src.Addr(), port: tuple.Dst.Port()},
		judge: func(c *policydb.Compiled, now time.Time) (bool, time.Time) {
			ext, ok := x.source(c, me, tuple)
			if !ok {
				return false, time.Time{}
			}
			d := judge(c, ext, now)
			return d.Allow, d.Until
		},
		expires: me.expires,
	}
	return x.reach(ctx, tuple, netip.Addr{}, me, listens, func(_ context.Context, app *socket, err error) error {
		if err != nil {
			return err
		}
		return x.open(&relay{near: app, plain: x.accepted, started: x.started, serverIsNear: true}, l, me)
	})
}
