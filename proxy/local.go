package proxy

import (
	"context"
	"net"
	"net/netip"
	"sort"
	"sync"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/policydb"
	"github.com/symbolon/symbolon/redirect"
)

// serveLocal serves a connection between two workloads of this host: both are
// identified here, both sides are decided here, and the bytes never leave the
// kernel, so there is no TLS, whatever protection policy asks for.
func (x *conn) serveLocal(ctx context.Context, c *policydb.Compiled, me *party, tuple redirect.Tuple) error {
	x.rec.Reporter, x.rec.Local = symbolonv1.Reporter_REPORTER_LOCAL, true
	server, listens, err := x.listener(ctx, tuple)
	if err != nil {
		return err
	}
	x.identified(x.rec.GetDestination(), server.known(c))
	if err := x.seat(server); err != nil {
		return err
	}
	if err := x.decideLocal(c, me, server, tuple); err != nil {
		return err
	}
	l := &live{
		question: question{kind: bothLocal, near: me, far: server, port: tuple.Dst.Port()},
		judge: func(c *policydb.Compiled, now time.Time) (bool, time.Time) {
			q := localQuery(c, me, server, tuple)
			client, srv := c.Decide(policydb.Client, q, now), c.Decide(policydb.Server, q, now)
			return client.Allow && srv.Allow, earlier(client.Until, srv.Until)
		},
		// No certificate was shown: what counts is that both still have one.
		expires: func() time.Time { return earlier(me.expires(), server.expires()) },
	}
	return x.reach(ctx, tuple, tuple.Src.Addr(), server, listens, func(_ context.Context, app *socket, err error) error {
		if err != nil {
			return err
		}
		return x.open(&relay{near: x.accepted, plain: app, started: x.started}, l, me, server)
	})
}

// serveAdmin lets local programs reach the proxy's own metrics and health page,
// which is on loopback and no workload's.
func (x *conn) serveAdmin(ctx context.Context, tuple redirect.Tuple) error {
	x.rec.Reporter, x.rec.Local = symbolonv1.Reporter_REPORTER_LOCAL, true
	own, err := x.p.dial(ctx, redirect.MarkApp, netip.Addr{}, tuple.Dst)
	if err != nil {
		return networkError(err)
	}
	r := &relay{near: x.accepted, plain: &socket{TCPConn: own}, started: x.started}
	return x.open(r, &live{judge: func(*policydb.Compiled, time.Time) (bool, time.Time) { return true, time.Time{} }})
}

func (x *conn) decideLocal(c *policydb.Compiled, me, server *party, tuple redirect.Tuple) error {
	q, now := localQuery(c, me, server, tuple), x.p.now()
	for side, peer := range []*party{policydb.Client: server, policydb.Server: me} {
		side := policydb.Side(side)
		d := unexplained(c.Decide(side, q, now), peer.known(c))
		if err := x.decided(side, c, &d); err != nil {
			return err
		}
	}
	return nil
}

func localQuery(c *policydb.Compiled, me, server *party, tuple redirect.Tuple) *policydb.Query {
	return &policydb.Query{From: me.endpoint(c), To: server.endpoint(c), Protocol: tcp, Port: tuple.Dst.Port()}
}

// localRefresh is how long a list of the host's addresses is believed. A
// destination that it lacks is served by a tunnel to ourselves: slower, not wrong.
const localRefresh = time.Second

// localAddresses knows which addresses are this host's.
type localAddresses struct {
	mu    sync.Mutex
	read  time.Time
	known map[netip.Addr]struct{}
}

func (l *localAddresses) has(a netip.Addr, now time.Time) bool {
	a = a.Unmap()
	if a.IsLoopback() {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.read) > localRefresh {
		addrs, err := net.InterfaceAddrs()
		if err == nil {
			l.read, l.known = now, make(map[netip.Addr]struct{}, len(addrs))
			for _, x := range addrs {
				if p, err := netip.ParsePrefix(x.String()); err == nil {
					l.known[p.Addr().Unmap().WithZone("")] = struct{}{}
				}
			}
		}
	}
	_, ok := l.known[a]
	return ok
}

// list is every address of the host but loopback and link-local, as text.
func (l *localAddresses) list(now time.Time) []string {
	l.has(netip.IPv4Unspecified(), now)
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []string
	for a := range l.known {
		if a.IsGlobalUnicast() {
			out = append(out, a.String())
		}
	}
	sort.Strings(out)
	return out[:min(len(out), maxAddresses)]
}

// maxAddresses is how many of its addresses a host tells the controller.
const maxAddresses = 64

func (p *Proxy) isLocal(a netip.Addr) bool { return p.local.has(a, p.now()) }
