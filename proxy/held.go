package proxy

import (
	"net"
	"net/netip"

	"github.com/symbolon/symbolon/redirect"
)

// settle makes sure that the connection to an application belongs to one listener, whom the
// caller looks at afterwards. While the last ACK of its handshake is held back it does, if
// the kernel has queued it. But under a flood the kernel keeps nothing of a SYN: it answers
// by a cookie, and whoever listens when the ACK arrives gets the connection, and with it the
// bytes. Then the ACK goes at once.
func (p *Proxy) settle(app *socket, dst netip.AddrPort) {
	if !app.held {
		return
	}
	if own, ok := app.LocalAddr().(*net.TCPAddr); ok {
		if _, err := p.diag.Owner(dst, own.AddrPort()); err == nil {
			return
		}
	}
	_ = app.control(redirect.Acknowledge)
	app.held = false
}
