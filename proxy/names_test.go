package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/symbolon/symbolon/internal/netlab"
	"github.com/symbolon/symbolon/proxy/names"
	"github.com/symbolon/symbolon/redirect"
)

// byName is what db may reach by names: a whole one, and any below another.
const byName = baseline + `---
kind: External
namespace: /prod
name: api
labels: {ext: api}
addresses: {fqdns: [api.example.com], private: true}
---
kind: External
namespace: /prod
name: cards
labels: {ext: cards}
addresses: {fqdns: ["*.pay.example.com"], private: true}
---
kind: Policy
namespace: /prod
name: db-calls-out
subject: {app: db}
verb: allow
object: {ext: [api, cards]}
`

// newNamedWorld is newWorld with a DNS server on the other host, which the proxy asks, and
// the clock of the names.
func newNamedWorld(t *testing.T) (*world, *netlab.DNS, *clock) {
	t.Helper()
	var udp net.PacketConn
	var tcp net.Listener
	if err := inOther(func() (err error) {
		if udp, err = net.ListenPacket("udp", other4+":53"); err == nil {
			tcp, err = net.Listen("tcp", other4+":53")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	d := netlab.ServeDNS(udp, tcp)
	t.Cleanup(func() { d.Close() })
	file := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(file, []byte("nameserver "+other4+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	ticks := &clock{}
	n := names.New(names.Options{Dial: redirect.Dialer(redirect.MarkControl, redirect.DefaultKeepAlive).DialContext, Conf: file, Now: ticks.now})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { n.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	return newWorld(t, func(o *Options) { o.Names, o.Timeouts.Handshake = n, 3*time.Second }), d, ticks
}

// serveTLS is a server of the other host that echoes, with any certificate.
func (w *world) serveTLS(address string) netip.AddrPort {
	w.Helper()
	cert := *w.ca.workload("/prod/other", nil).SVID.TLS
	return w.serveOther(address, func(c *net.TCPConn) {
		x := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}})
		_, _ = io.Copy(x, x)
		_ = x.CloseWrite()
	})
}

// sayHello is an application of this host that speaks TLS and asks for a name.
func (w *world) sayHello(to netip.AddrPort, name string) error {
	w.Helper()
	c, err := net.DialTimeout("tcp", to.String(), patience)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	x := tls.Client(c, &tls.Config{ServerName: name, InsecureSkipVerify: true})
	if err := x.Handshake(); err != nil {
		return err
	}
	speaks(w, x)
	_ = x.CloseWrite()
	_, _ = ended(w, x)
	return nil
}

func TestOutboundExternalByName(t *testing.T) {
	w, d, ticks := newNamedWorld(t)
	// By TCP, from whichever port: the proxy's questions do not come back to itself.
	d.Script("api.example.com", func(q netlab.DNSQuestion) netlab.DNSReply {
		r := netlab.DNSReply{Truncated: true}
		for _, a := range []string{otherB, other6} {
			if x := netlab.DNSAddress(q.Name, 1, a); x.Header.Type == q.Type {
				r.Records = append(r.Records, x)
			}
		}
		return r
	})
	w.policy(byName)
	for _, address := range []string{otherB, other6} {
		t.Run(address, func(t *testing.T) {
			w := w.in(t)
			to := w.serveOther(net.JoinHostPort(address, "0"), func(c *net.TCPConn) { _, _ = io.Copy(c, c); _ = c.CloseWrite() })
			c := w.connect(to)
			speaks(t, c)
			_ = c.CloseWrite()
			_, _ = ended(t, c)
			r := w.records.next()
			if r.Outcome != "allow" || r.Protection != "none" || r.Destination.External != "/prod/api" || r.ClientPolicy != "/prod/db-calls-out" {
				t.Errorf("recorded %+v", r)
			}
		})
	}
	shown := fmt.Sprintf("%+v", w.p.policies().Names)
	if !strings.Contains(shown, "Name:api.example.com") || !strings.Contains(shown, otherB) {
		t.Errorf("shown: %s", shown)
	}

	// Other addresses do not cut; a policy without the name does.
	saw := make(chan error, 1)
	to := w.serveOther(otherB+":0", func(c *net.TCPConn) { _, err := io.Copy(c, c); saw <- err })
	c := w.connect(to)
	speaks(t, c)
	d.Set("api.example.com", 1, "192.0.2.7")
	eventually(t, "the new answer is known", func() bool { return len(w.p.names.Of(netip.MustParseAddr("192.0.2.7"))) > 0 })
	ticks.advance(10 * time.Minute)
	if names := w.p.names.Of(to.Addr()); len(names) > 0 {
		t.Errorf("%s still is %v", to.Addr(), names)
	}
	w.policy(byName + "---\nkind: External\nnamespace: /\nname: unrelated\naddresses: {cidrs: [198.51.100.0/24]}\n")
	speaks(t, c)
	w.policy(strings.Replace(byName, "[api.example.com]", "[www.example.com]", 1))
	w.wasCut(c, saw, "policy-changed")
}

// What a client says of a name counts only if the address that it has dialled is the
// name's, as the proxy itself finds out.
func TestOutboundExternalBelowAWildcard(t *testing.T) {
	w, d, _ := newNamedWorld(t)
	w.policy(byName)
	to := w.serveTLS(otherB + ":0")
	d.Set("eu.pay.example.com", 60, "192.0.2.7", otherB)
	d.Set("us.pay.example.com", 60, "192.0.2.7")
	d.Set("www.example.com", 60, otherB)
	d.Script("ill.pay.example.com", func(netlab.DNSQuestion) netlab.DNSReply {
		return netlab.DNSReply{Code: dnsmessage.RCodeServerFailure}
	})
	if err := w.sayHello(to, "EU.pay.example.com"); err != nil {
		t.Errorf("its own name: %v", err)
	}
	if r := w.records.next(); r.Outcome != "allow" || r.Destination.External != "/prod/cards" || r.Protection != "none" {
		t.Errorf("recorded %+v", r)
	}
	for name, why := range map[string]string{
		"us.pay.example.com":  "a name that has another address",
		"no.pay.example.com":  "a name that is not there",
		"ill.pay.example.com": "a name that is not found out",
		"www.example.com":     "a name that policy does not know",
		"pay.example.com":     "the wildcard's own",
		"":                    "no name",
	} {
		if err := w.sayHello(to, name); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: %v", why, err)
		}
		if r := w.records.next(); r.Outcome != "deny" || r.Reason != "peer-unprotected" || r.Destination.External != "" {
			t.Errorf("%s: recorded %+v", why, r)
		}
	}
	if n := d.Queries("www.example.com"); n != 0 {
		t.Errorf("asked %d times for a name that policy does not know: clients choose what is asked", n)
	}
	for why, text := range map[string]string{"no TLS": "GET / HTTP/1.1\r\nHost: eu.pay.example.com\r\n\r\n", "nothing said": ""} {
		if got, err := w.ask(to, text); !errors.Is(err, syscall.ECONNRESET) || len(got) > 0 {
			t.Errorf("%s: %q, %v", why, got, err)
		}
		if r := w.records.next(); r.Outcome != "deny" || r.Destination.External != "" {
			t.Errorf("%s: recorded %+v", why, r)
		}
	}
	// For a workload that may talk to nobody, nothing is asked.
	w.policy(strings.Replace(byName, "{app: db}\nverb: allow\nobject: {ext", "{app: web}\nverb: allow\nobject: {ext", 1))
	before := d.Queries("de.pay.example.com")
	_ = w.sayHello(to, "de.pay.example.com")
	if r := w.records.next(); r.Outcome != "deny" || d.Queries("de.pay.example.com") != before {
		t.Errorf("recorded %+v, asked %d times", r, d.Queries("de.pay.example.com")-before)
	}
}

// The attacks: whoever answers for a name that may be reached leads it to a host with a
// proxy, to a Service, to this host itself, or past a deny on the network.
func TestNamesTakeNoTunnelAway(t *testing.T) {
	w, d, _ := newNamedWorld(t)
	read := make(chan string, 1)
	to := w.serveOther(otherB+":0", func(c *net.TCPConn) {
		b := make([]byte, 4096)
		n, _ := c.Read(b)
		read <- string(b[:n])
	})
	d.Set("api.example.com", 60, otherB, protected4, "127.0.0.1")
	refused := func(why, reason string, asked bool) (detail string) {
		t.Helper()
		if got, err := w.ask(to, "secret"); !errors.Is(err, syscall.ECONNRESET) || len(got) > 0 {
			t.Errorf("%s: the application reads %q, %v", why, got, err)
		}
		r := w.records.next()
		if r.Outcome != "deny" || r.Reason != reason {
			t.Errorf("%s: recorded %s %s", why, r.Outcome, r.Reason)
		}
		if asked {
			if s := within(t, read, "the server's read"); strings.Contains(s, "secret") {
				t.Errorf("%s: the server read %q", why, s)
			}
		}
		return r.Detail
	}
	w.policy(strings.ReplaceAll(byName, ", private: true", ""))
	if d := refused("a private address", "peer-unprotected", true); !strings.Contains(d, "External /prod/api has api.example.com, but no private address by name") {
		t.Errorf("a private address: it is said that %q", d)
	}
	w.policy(byName)
	w.knownPeers(otherB)
	refused("a host with a proxy", "peer-unprotected", true)
	w.knownPeers("192.0.2.1")
	w.policy(byName + "---\nkind: Service\nnamespace: /prod\nname: lb\naddresses: {cidrs: [10.1.0.0/24]}\n")
	refused("a Service", "peer-unprotected", true)
	w.policy(byName + "---\nkind: External\nnamespace: /\nname: net\nlabels: {ext: net}\naddresses: {cidrs: [10.1.0.0/16]}\n" +
		"---\nkind: Policy\nnamespace: /\nname: no-net\nsubject: any\nverb: deny\nobject: {ext: net}\npropagate: true\n")
	refused("a network that is denied", "policy", false)
	w.policy(byName)
	for _, own := range []netip.AddrPort{w.app.addr, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), w.app.addr.Port())} {
		if got, err := w.ask(own, "secret"); !errors.Is(err, syscall.ECONNRESET) || len(got) > 0 {
			t.Errorf("%s: the application reads %q, %v", own, got, err)
		}
		if r := w.records.next(); r.Outcome != "deny" || r.Destination.External != "" {
			t.Errorf("%s: recorded %+v", own, r)
		}
	}
	if strings.Contains(w.app.received(), "secret") {
		t.Error("the application was sent what policy denies")
	}
}
