package proxy

import (
	"context"
	"net"
	"net/netip"

	"github.com/symbolon/symbolon/redirect"
)

// dialApp connects to the local application that tuple's client asked for: from src,
// or, where that is not given, from the client's own address if it is to be preserved
// and another host's, or else from whatever address the kernel chooses.
func (p *Proxy) dialApp(ctx context.Context, src netip.Addr, tuple redirect.Tuple) (*net.TCPConn, error) {
	client := tuple.Src.Addr()
	// An IPv6 link-local address says nothing without its link, which is not known here.
	scoped := client.Is6() && client.IsLinkLocalUnicast()
	if !p.preserveSource || src.IsValid() || scoped || p.isLocal(client) {
		return p.dial(ctx, redirect.MarkApp, src, tuple.Dst)
	}
	return p.conntrack.DialAs(ctx, client, tuple.Dst, p.timeouts.Connect, redirect.DefaultKeepAlive)
}
