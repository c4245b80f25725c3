package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/policydb"
	"github.com/symbolon/symbolon/redirect"
)

// tcp is the protocol's name in policy.
const tcp = "tcp"

// outbound serves a connection that a local application made. It does not wait.
func (p *Proxy) outbound(ctx context.Context, c *socket) {
	x := p.newConn(c, &slot{p: p}, symbolonv1.Reporter_REPORTER_CLIENT)
	x.quick = true
	x.goOn(ctx, x.serveOutbound(ctx))
}

func (x *conn) serveOutbound(ctx context.Context) error {
	tuple, caller, err := x.p.client(x.accepted)
	if tuple, err = x.addressed(tuple, err); err != nil {
		return err
	}
	if tuple.Dst == x.p.admin {
		return x.later(ctx, func(ctx context.Context) error { return x.serveAdmin(ctx, tuple) })
	}
	owner, err := x.p.caller(x.accepted, tuple, caller)
	if err != nil {
		return deny(symbolonv1.Reason_REASON_UNKNOWN_WORKLOAD, err)
	}
	leave, full := x.p.callers.enter(owner.UID)
	if full != nil {
		return x.p.overloaded("outbound", full)
	}
	x.release = leave
	if me, ok := x.p.known(owner); ok {
		return x.serveCaller(ctx, me, tuple)
	}
	return x.later(ctx, func(ctx context.Context) error {
		me, err := x.p.identifySocket(ctx, owner)
		if err != nil {
			return err
		}
		return x.serveCaller(ctx, me, tuple)
	})
}

// serveCaller is the rest of serveOutbound, when it is known who called whom.
func (x *conn) serveCaller(ctx context.Context, me *party, tuple redirect.Tuple) error {
	c := x.p.policy.Load()
	x.identified(x.rec.GetSource(), me.known(c))
	if err := x.seat(me); err != nil {
		return err
	}
	if c == nil {
		return errNoPolicy
	}
	if x.p.isLocal(tuple.Dst.Addr()) {
		return x.later(ctx, func(ctx context.Context) error { return x.serveLocal(ctx, c, me, tuple) })
	}
	if !x.named(c, me, tuple.Dst) {
		return x.serveRemote(ctx, c, me, tuple, nil)
	}
	return x.later(ctx, func(ctx context.Context) error {
		names := x.names(ctx, c, me, tuple.Dst)
		// The client may have taken its time.
		return x.serveRemote(ctx, x.p.policy.Load(), me, tuple, names)
	})
}

// serveRemote serves a connection to another host, whose address has the given names.
func (x *conn) serveRemote(ctx context.Context, c *policydb.Compiled, me *party, tuple redirect.Tuple, names []string) error {
	ext, service := c.Destination(me.namespace(c), tuple.Dst.Addr(), tcp, tuple.Dst.Port(), names...)
	if ext != nil || service == "" && x.untouched(c, me, tuple.Dst.Addr()) {
		return x.later(ctx, func(ctx context.Context) error { return x.serveExternal(ctx, c, me, ext, tuple, names) })
	}
	x.rec.Destination.External = service
	if own := me.endpoint(c); !c.MayReach(&own, x.p.now()) {
		// Not even a ClientHello leaves for a workload that may talk to nobody.
		x.rec.Generation = c.Generation()
		return deny(symbolonv1.Reason_REASON_DEFAULT, errors.New("no policy of the client's side allows it to connect to anybody"))
	}
	// Behind a balancer each connection has its own tunnel, or it could not balance.
	public := c.PublicOnly(me.namespace(c), tuple.Dst.Addr(), tcp, tuple.Dst.Port(), names...)
	if service != "" || public == "" {
		return x.serveTunnel(ctx, c, me, tuple, service == "" && !x.p.noReuse)
	}
	return x.later(ctx, func(ctx context.Context) error {
		err := x.serveTunnel(ctx, c, me, tuple, !x.p.noReuse)
		if err != nil && !errors.Is(err, errRelaying) {
			// It was likely meant: who reads the record is told what is missing.
			err = fmt.Errorf("%w; External %s has %s, but no private address by name (private: true)", err, public, strings.Join(names, " "))
		}
		return err
	})
}

var errNoPolicy = deny(symbolonv1.Reason_REASON_NO_POLICY, errors.New("no policy has arrived from the controller yet"))

// tuple asks the kernel who called whom. conn.RemoteAddr is not asked: its port may
// have been rewritten.
func (x *conn) tuple() (redirect.Tuple, error) {
	return x.addressed(x.p.conntrack.ClientTuple(x.accepted))
}

// addressed records who called whom, or why that is not known.
func (x *conn) addressed(tuple redirect.Tuple, err error) (redirect.Tuple, error) {
	switch {
	case errors.Is(err, redirect.ErrNotRedirected):
		if a, ok := x.accepted.RemoteAddr().(*net.TCPAddr); ok {
			x.rec.Source.Address = a.AddrPort().String()
		}
		return tuple, deny(symbolonv1.Reason_REASON_NOT_REDIRECTED, err)
	case err != nil:
		return tuple, deny(symbolonv1.Reason_REASON_UNKNOWN_WORKLOAD, err)
	}
	x.addresses(tuple.Src, tuple.Dst)
	return tuple, nil
}

// serveExternal connects to a destination that has no proxy, if policy allows it: an
// External, or with nil one that is let through untouched by a namespace in learn. names
// are those that its address has.
func (x *conn) serveExternal(ctx context.Context, c *policydb.Compiled, me *party, ext *policydb.ExternalMatch, tuple redirect.Tuple, names []string) error {
	outside(x.rec.GetDestination(), &x.ends[1], ext)
	d := x.judgeExternal(c, me, ext, tuple)
	if err := x.decided(policydb.Client, c, &d); err != nil {
		return err
	}
	remote, err := x.p.dial(ctx, redirect.MarkTunnel, tuple.Src.Addr(), tuple.Dst)
	if err != nil {
		return networkError(err)
	}
	r := &relay{near: x.accepted, plain: &socket{TCPConn: remote}, started: x.started}
	return x.open(r, &live{
		question: question{kind: toAddress, near: me, address: tuple.Dst.Addr(), port: tuple.Dst.Port(), names: strings.Join(names, " ")},
		judge: func(c *policydb.Compiled, now time.Time) (bool, time.Time) {
			// By the names that it was made with: that a name has other addresses now is
			// no reason to cut, that policy does not know the name any more is one.
			ext, _ := c.Destination(me.namespace(c), tuple.Dst.Addr(), tcp, tuple.Dst.Port(), names...)
			d := x.judgeExternal(c, me, ext, tuple)
			return d.Allow, d.Until
		},
		expires: me.expires,
	}, me)
}

func (x *conn) judgeExternal(c *policydb.Compiled, me *party, ext *policydb.ExternalMatch, tuple redirect.Tuple) policydb.Decision {
	own := me.endpoint(c)
	if ext == nil {
		return c.DecideUnprotected(policydb.Client, &own, tcp, tuple.Dst.Port(), x.p.now())
	}
	return c.DecideExternal(&own, ext, tcp, tuple.Dst.Port(), x.p.now())
}

// serveTunnel connects to a destination that has a proxy, or must have one: on a
// tunnel that has served this workload before, if one waits, or else on a new one.
func (x *conn) serveTunnel(ctx context.Context, c *policydb.Compiled, me *party, tuple redirect.Tuple, reusable bool) error {
	endpoint := me.current.Load()
	out := &outgoing{conn: x, policy: c, me: me, tuple: tuple, endpoint: endpoint}
	way := route{endpoint, tuple.Src.Addr(), tuple.Dst}
	if reusable {
		for {
			t, ok := x.p.pool.take(way, x.p.now())
			if !ok {
				break
			}
			if x.quick && t.on == nil { // no loop has it, so that one waits
				x.p.pool.put(way, t, x.p.now())
				return x.later(ctx, func(ctx context.Context) error { return x.serveTunnel(ctx, c, me, tuple, true) })
			}
			if x.p.refuseRevoked(t.Peer(), &t.Peer().Principal) != nil {
				_ = t.Close() // a handshake shows whether the peer has another certificate
				continue
			}
			if done, err := out.again(ctx, t, way); done {
				return err
			}
		}
	}
	return x.later(ctx, func(ctx context.Context) error { return out.anew(ctx, way, reusable) })
}

// anew asks on a new tunnel.
func (o *outgoing) anew(ctx context.Context, way route, reusable bool) error {
	x, c, tuple, endpoint := o.conn, o.policy, o.tuple, o.endpoint
	remote, err := x.p.dialTunnel(tuple.Src.Addr(), tuple.Dst)
	if err != nil {
		return networkError(err)
	}
	r := &relay{near: x.accepted, started: x.started}
	b := buffers.Get().(*[]byte)
	framed := false
	t, err := mtls.DialEarly(ctx, remote, endpoint, func(peer *mtls.Peer) (*symbolonv1.Open, error) {
		if peer.Host {
			// Nobody listens there, or it is not known who: the verdict will say.
			x.identified(x.rec.GetDestination(), &peer.Principal)
			return mtls.NewOpen(x.flowID, tuple.Dst, symbolonv1.Protection_PROTECTION_AUTHENTICATED, c.Generation()), nil
		}
		open, err := o.open(peer, reusable)
		framed = open.GetFramed()
		return open, err
	}, func() ([]byte, error) {
		said, err := r.say(*b, framed)
		if err != nil {
			return nil, networkError(err)
		}
		return said, nil
	})
	buffers.Put(b)
	if err != nil {
		return err
	}
	r.tunnel = kept{Conn: t}
	if reusable {
		r.back = x.p.keeper(way)
	}
	if t.Protection() == symbolonv1.Protection_PROTECTION_ENCRYPTED {
		if err := r.copyEarly(); err != nil {
			_ = t.Reset()
			return networkError(err)
		}
	}
	v, _, err := r.verdict(ctx)
	x.tunnelled(t)
	if err != nil {
		x.rec.Protection = symbolonv1.Protection_PROTECTION_UNSPECIFIED
		return err
	}
	if v.GetEarly() > 0 {
		r.early, r.ahead = uint64(v.GetEarly()), true
	}
	return o.relay(r, t, v)
}

// outgoing is the client's side of one connection through a tunnel.
type outgoing struct {
	*conn
	policy   *policydb.Compiled
	me       *party
	tuple    redirect.Tuple
	endpoint *mtls.Endpoint
	peer     *identity.Principal // by its certificate
	token    bool                // Open carried one
	tunnel   *mtls.Conn
}

func (o *outgoing) judge(c *policydb.Compiled, who *identity.Principal, now time.Time) policydb.Decision {
	peer := o.me.sees(c, who)
	return unexplained(c.Decide(policydb.Client, &policydb.Query{
		From: o.me.endpoint(c), To: endpointOf(peer), Protocol: tcp, Port: o.tuple.Dst.Port(),
	}, now), peer)
}

// checkClaims is the proxy's, on the server.
func (o *outgoing) checkClaims(c *policydb.Compiled, who *identity.Principal) error {
	return o.p.checkClaims(c, o.endpoint.Credential().SVID.ID.TrustDomain(), who)
}

// open decides on a verified peer, and makes the Open that asks it.
func (o *outgoing) open(peer *mtls.Peer, reusable bool) (*symbolonv1.Open, error) {
	o.peer = &peer.Principal
	o.policy = o.p.policy.Load() // dialling may have taken its time
	o.identified(o.rec.GetSource(), o.me.known(o.policy))
	o.identified(o.rec.GetDestination(), o.me.sees(o.policy, o.peer))
	if err := o.p.refuseRevoked(peer, o.me.sees(o.policy, o.peer)); err != nil {
		return nil, err
	}
	if err := o.checkClaims(o.policy, o.peer); err != nil {
		return nil, err
	}
	d := o.judge(o.policy, o.peer, o.p.now())
	if err := o.decided(policydb.Client, o.policy, &d); err != nil {
		return nil, err
	}
	open := mtls.NewOpen(o.flowID, o.tuple.Dst, d.Protection, o.policy.Generation())
	// Frames for the next connection, and for the certificates after these.
	open.Framed = d.Protection == symbolonv1.Protection_PROTECTION_ENCRYPTED
	open.Renewable = true
	open.Token = o.p.tokenFor(o.endpoint.Credential(), o.peer)
	o.token = open.GetToken() != ""
	return open, nil
}

// again asks on a tunnel that waits. Not done: the tunnel is gone, and nothing was
// read from the application yet.
func (o *outgoing) again(ctx context.Context, t kept, way route) (done bool, err error) {
	open, err := o.open(t.Peer(), true)
	if err != nil {
		_ = t.Close()
		return true, err
	}
	if !open.GetFramed() { // policy does not ask for encryption any more
		_ = t.Close()
		return false, nil
	}
	b := buffers.Get().(*[]byte)
	said, left := o.accepted.peek((*b)[:maxEarly]) // where it stays until the Verdict
	early := 0
	if left == nil {
		early, err = t.Reopen(ctx, open, said)
	}
	buffers.Put(b)
	switch {
	case left != nil: // the application has: nobody is asked
		o.p.pool.put(way, t, o.p.now())
		return true, networkError(left)
	case err != nil:
		return false, nil
	}
	r := &relay{near: o.accepted, tunnel: t, back: o.p.keeper(way), started: o.started, early: uint64(early), ahead: early > 0}
	if o.quick {
		return true, o.ask(ctx, r, way)
	}
	v, gone, err := r.verdict(ctx)
	if err != nil {
		if !gone && r.unheard(err) {
			return false, nil // it stopped waiting just now
		}
		return true, err
	}
	o.tunnelled(t.Conn)
	o.rec.Reused = true
	return true, o.relay(r, t.Conn, v)
}

// unheard tells whether a tunnel on which no Verdict has come can have brought nothing to an
// application, so that it may be asked again on another one. With bytes behind the
// Open only TLS's own end says so: it stands behind all that the peer has ever granted,
// and nobody on the way can make it up, to have the bytes sent twice.
func (r *relay) unheard(err error) bool {
	switch {
	case mtls.ReasonOf(err) == symbolonv1.Reason_REASON_PEER_REFUSED:
		return false
	case r.early == 0:
		return true
	}
	return errors.Is(err, io.EOF)
}

func (o *outgoing) relay(r *relay, t *mtls.Conn, v *symbolonv1.Verdict) error {
	o.rec.ServerPolicy = v.GetPolicy()
	o.tunnel = t
	o.policy = nil // decided; what is open must not keep a policy that another has replaced
	l := o.standing(o.me, standing{o.endpoint, t.Peer(), o.peer}, o.standsOn)
	l.renewal.token, l.renewal.from, l.renewal.to = o.token, o.tuple.Src.Addr(), o.tuple.Dst
	return o.conn.open(r, l, o.me)
}

// standsOn is the connection for the table.
func (o *outgoing) standsOn(s standing) *live {
	q := tunnelQuestion(toTunnel, o.me, s.shown, o.tunnel, s.who, o.tuple.Dst.Port())
	return s.live(q, func(c *policydb.Compiled, now time.Time) (bool, time.Time) {
		d := o.judge(c, s.who, now)
		return d.Allow && d.Protection <= q.protection && o.me.still(s.shown) && o.checkClaims(c, s.who) == nil, d.Until
	})
}

// keeper puts a tunnel that has ended cleanly where its next connection finds it.
func (p *Proxy) keeper(way route) func(kept) {
	return func(t kept) { p.pool.put(way, t, p.now()) }
}

// dial connects to dst from the application's own source address, so that the
// network in between sees the host that it would have seen.
func (p *Proxy) dial(ctx context.Context, mark int, src netip.Addr, dst netip.AddrPort) (*net.TCPConn, error) {
	d := redirect.Dialer(mark, redirect.DefaultKeepAlive)
	d.Timeout = p.timeouts.Connect
	if src.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(src, 0))
	}
	c, err := d.DialContext(ctx, tcp, dst.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// dialTunnel begins to connect to a proxy, for TLS only: with fast open the first bytes may
// arrive twice. Whether dst answers is told by the handshake, which has its time then.
func (p *Proxy) dialTunnel(src netip.Addr, dst netip.AddrPort) (mtls.Socket, error) {
	fd, err := redirect.ConnectTunnel(src, dst, p.tls.FastOpen)
	if err != nil {
		return nil, err
	}
	return mtls.Connecting(fd, net.TCPAddrFromAddrPort(dst), p.timeouts.Connect, p.timeouts.Handshake), nil
}

func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}
