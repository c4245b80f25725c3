package proxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/redirect"
)

// dialApp connects to the local application that tuple's client asked for: from src,
// or, where that is not given, from the client's own address if it is to be preserved
// and another host's, or else from whatever address the kernel chooses.
func (p *Proxy) dialApp(ctx context.Context, src netip.Addr, tuple redirect.Tuple) (*socket, error) {
	client := tuple.Src.Addr()
	// An IPv6 link-local address says nothing without its link, which is not known here.
	scoped := client.Is6() && client.IsLinkLocalUnicast()
	if !p.preserveSource || src.IsValid() || scoped || p.isLocal(client) {
		fd, err := redirect.ConnectApp(src, tuple.Dst, redirect.DefaultKeepAlive)
		s := &socket{fd: fd, inline: true}
		if errors.Is(err, unix.EALREADY) {
			err = s.connected(tuple.Dst, time.Now().Add(p.timeouts.Connect))
		}
		return s, err
	}
	return wrap(p.conntrack.DialAs(ctx, client, tuple.Dst, p.timeouts.Connect, redirect.DefaultKeepAlive))
}

func wrap(c *net.TCPConn, err error) (*socket, error) { return &socket{TCPConn: c, fd: -1}, err }
