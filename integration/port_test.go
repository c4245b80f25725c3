package integration

import (
	"fmt"
	"io"
	"net"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/netlab"
)

func init() {
	// line-from PORT ADDR: "line" from that port.
	clients["line-from"] = func(a []string) (string, error) {
		port, err := strconv.Atoi(a[0])
		if err != nil {
			return "", err
		}
		d := net.Dialer{Timeout: clientTimeout, LocalAddr: &net.TCPAddr{Port: port}, Control: func(_, _ string, c syscall.RawConn) (err error) {
			if cerr := c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1) }); cerr != nil {
				return cerr
			}
			return err
		}}
		c, err := d.Dial("tcp", a[1])
		if err != nil {
			return "", err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(clientTimeout))
		if _, err := io.WriteString(c, "line\n"); err != nil {
			return "", err
		}
		_, err = c.Read(make([]byte, 1))
		return "no error", err
	}
}

// An application that takes the port of a tunnel which the peer has just reset, and
// calls the tunnel's destination, is served like any other: by chance, or on purpose to
// get around the proxy.
func TestPortOfAResetTunnel(t *testing.T) {
	for _, onExit := range []string{"closed", "open"} {
		t.Run(onExit, func(t *testing.T) {
			w := newBareWorld(t, "conntrack")
			w.enrolWith(fmt.Sprintf("redirect: {on_exit: %s}", onExit))
			w.echo(w.Server)
			w.apply(allow("client-echo", "client", "echo", ""))
			w.Client.Sysctl("net.netfilter.nf_conntrack_tcp_timeout_close", "120") // 10: too little for a busy machine
			w.families(t, func(t *testing.T, addr string) {
				w.expect("the server resets", w.try(w.Client, "line", addr+":7003"), "reset")
				ports := w.resetTunnels(w.Client, addr)
				if len(ports) == 0 {
					t.Fatal("conntrack knows of no tunnel that was reset")
				}
				for _, port := range ports {
					w.expect("from the port of a reset tunnel", w.try(w.Client, "line-from", port, addr+":7003"), "reset")
					w.recorded(w.client, "from port "+port, func(l *flow.Line) bool {
						return strings.HasSuffix(l.Source.Address, ":"+port) && l.Destination.Address == addr+":7003" && l.Outcome == "allow"
					})
				}
			})
		})
	}
}

var resetTunnel = regexp.MustCompile(`CLOSE src=\S+ dst=\S+ sport=(\d+) dport=7003 (?:zone-orig=\d+ )?src=\S+ dst=\S+ sport=7003 `)

// resetTunnels are the ports of the tunnels to port 7003 that conntrack has seen reset.
func (w *world) resetTunnels(h *netlab.Host, addr string) (ports []string) {
	w.t.Helper()
	family := map[bool]string{true: "ipv4", false: "ipv6"}[addr[0] != '[']
	out, err := h.Output(w.ctx(), "conntrack", "-L", "-f", family, "-p", "tcp")
	if err != nil {
		w.t.Fatal(err)
	}
	for _, m := range resetTunnel.FindAllStringSubmatch(out, -1) {
		ports = append(ports, m[1])
	}
	return ports
}
