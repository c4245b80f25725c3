package proxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/policydb"
	"github.com/symbolon/symbolon/redirect"
)

// tcp is the protocol's name in policy.
const tcp = "tcp"

// outbound serves a connection that a local application made.
func (p *Proxy) outbound(ctx context.Context, c *net.TCPConn) {
	x := p.newConn(c, symbolonv1.Reporter_REPORTER_CLIENT)
	x.end(x.serveOutbound(ctx))
}

func (x *conn) serveOutbound(ctx context.Context) error {
	setup, cancel := context.WithTimeout(ctx, x.p.timeouts.Setup)
	defer cancel()
	tuple, err := x.tuple()
	if err != nil {
		return err
	}
	if tuple.Dst == x.p.admin {
		return x.serveAdmin(setup, tuple)
	}
	owner, err := x.p.diag.Owner(tuple.Src, tuple.Dst)
	if err != nil {
		return deny(symbolonv1.Reason_REASON_UNKNOWN_WORKLOAD, err)
	}
	me, err := x.p.identify(setup, owner)
	if err != nil {
		return err
	}
	identified(x.rec.GetSource(), me.principal())
	c := x.p.policy.Load()
	if c == nil {
		return errNoPolicy
	}
	if x.p.isLocal(tuple.Dst.Addr()) {
		return x.serveLocal(setup, c, me, tuple)
	}
	ext, service := c.Destination(me.principal().Namespace, tuple.Dst.Addr(), tcp, tuple.Dst.Port())
	if ext != nil {
		return x.serveExternal(setup, c, me, ext, tuple)
	}
	x.rec.Destination.External = service
	return x.serveTunnel(setup, c, me, tuple)
}

var errNoPolicy = deny(symbolonv1.Reason_REASON_NO_POLICY, errors.New("no policy has arrived from the controller yet"))

// tuple asks the kernel who called whom. conn.RemoteAddr is not asked: its port may
// have been rewritten.
func (x *conn) tuple() (redirect.Tuple, error) {
	tuple, err := x.p.conntrack.ClientTuple(x.accepted)
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

// serveExternal connects to a destination that has no proxy, if policy allows it.
func (x *conn) serveExternal(ctx context.Context, c *policydb.Compiled, me *party, ext *policydb.ExternalMatch, tuple redirect.Tuple) error {
	x.rec.Destination.External = ext.Ref
	x.rec.Destination.Attributes = ext.Labels.Proto()
	d := x.judgeExternal(c, me, ext, tuple)
	if err := x.decided(policydb.Client, c, &d); err != nil {
		return err
	}
	remote, err := x.p.dial(ctx, redirect.MarkTunnel, tuple.Src.Addr(), tuple.Dst)
	if err != nil {
		return networkError(err)
	}
	r := &relay{near: x.accepted, far: plain{remote}, started: x.started}
	return x.open(r, &live{
		judge: func(c *policydb.Compiled, now time.Time) (bool, time.Time) {
			ext, _ := c.Destination(me.principal().Namespace, tuple.Dst.Addr(), tcp, tuple.Dst.Port())
			if ext == nil {
				return false, time.Time{}
			}
			d := x.judgeExternal(c, me, ext, tuple)
			return d.Allow, d.Until
		},
		until: d.Until,
	}, c, me)
}

func (x *conn) judgeExternal(c *policydb.Compiled, me *party, ext *policydb.ExternalMatch, tuple redirect.Tuple) policydb.Decision {
	return c.Decide(policydb.Client, &policydb.Query{
		From: me.endpoint(), To: policydb.Endpoint{External: ext.Ref, Attributes: ext.Labels},
		Protocol: tcp, Port: tuple.Dst.Port(),
	}, x.p.now())
}

// serveTunnel connects to a destination that has a proxy, or must have one.
func (x *conn) serveTunnel(ctx context.Context, c *policydb.Compiled, me *party, tuple redirect.Tuple) error {
	remote, err := x.p.dial(ctx, redirect.MarkTunnel, tuple.Src.Addr(), tuple.Dst)
	if err != nil {
		return networkError(err)
	}
	var (
		until time.Time
		peer  policydb.Endpoint
	)
	judge := func(c *policydb.Compiled, now time.Time) policydb.Decision {
		return c.Decide(policydb.Client, &policydb.Query{From: me.endpoint(), To: peer, Protocol: tcp, Port: tuple.Dst.Port()}, now)
	}
	expires := me.expires()
	hs, cancel := context.WithTimeout(ctx, x.p.timeouts.Handshake)
	defer cancel()
	t, err := mtls.Dial(hs, remote, me.current.Load(), func(peerOf *mtls.Peer) (*symbolonv1.Open, error) {
		identified(x.rec.GetDestination(), &peerOf.Principal)
		if peerOf.Host {
			// Nobody listens there, or it is not known who: the verdict will say.
			return mtls.NewOpen(x.flowID, tuple.Dst, symbolonv1.Protection_PROTECTION_AUTHENTICATED, c.Generation()), nil
		}
		peer = policydb.Endpoint{Namespace: peerOf.Namespace, Attributes: peerOf.Attributes}
		d := judge(c, x.p.now())
		until = d.Until
		if err := x.decided(policydb.Client, c, &d); err != nil {
			return nil, err
		}
		return mtls.NewOpen(x.flowID, tuple.Dst, d.Protection, c.Generation()), nil
	})
	if err != nil {
		return err
	}
	r := &relay{near: x.accepted, far: t, started: x.started}
	if t.Protection() == symbolonv1.Protection_PROTECTION_ENCRYPTED {
		r.start() // a round trip earlier; the peer's proxy holds it back
	}
	v, err := t.ReadVerdict(ctx)
	if err != nil {
		x.tunnelled(t)
		x.rec.Protection = symbolonv1.Protection_PROTECTION_UNSPECIFIED
		r.wait()
		return err
	}
	x.tunnelled(t)
	x.rec.ServerPolicy = v.GetPolicy()
	return x.open(r, &live{
		judge: func(c *policydb.Compiled, now time.Time) (bool, time.Time) {
			d := judge(c, now)
			return d.Allow && d.Protection <= t.Protection(), d.Until
		},
		expires: earlier(expires, t.Peer().NotAfter),
		until:   until,
	}, c, me)
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

func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}
