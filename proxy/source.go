package proxy

import (
	"context"
	"net"
	"net/netip"

	"github.com/symbolon/symbolon/redirect"
)

// preserves tells whether the local application sees its client's own address: where src,
// the one to connect from, is not given, and the client is another host's.
func (p *Proxy) preserves(src netip.Addr, tuple redirect.Tuple) bool {
	client := tuple.Src.Addr()
	// An IPv6 link-local address says nothing without its link, which is not known here.
	scoped := client.Is6() && client.IsLinkLocalUnicast()
	return p.preserveSource && !src.IsValid() && !scoped && !p.isLocal(client)
}

// dialApp connects to the local application that tuple's client asked for: from src,
// or from the client's own address, which waits, or else from whatever address the
// kernel chooses. EALREADY: the socket is on its way, connected tells what comes of it.
func (p *Proxy) dialApp(ctx context.Context, src netip.Addr, tuple redirect.Tuple) (*socket, error) {
	if p.preserves(src, tuple) {
		return wrap(p.conntrack.DialAs(ctx, tuple.Src.Addr(), tuple.Dst, p.timeouts.Connect, redirect.DefaultKeepAlive))
	}
	fd, err := redirect.ConnectApp(src, tuple.Dst, redirect.DefaultKeepAlive)
	return &socket{fd: fd, inline: true, held: true}, err
}

func wrap(c *net.TCPConn, err error) (*socket, error) { return &socket{TCPConn: c, fd: -1}, err }
