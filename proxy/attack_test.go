package proxy

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/redirect"
)

const (
	encrypted     = symbolonv1.Protection_PROTECTION_ENCRYPTED
	authenticated = symbolonv1.Protection_PROTECTION_AUTHENTICATED
)

// attack is a connection to the protected application that must not reach it.
type attack struct {
	name string
	// run does its worst on a connection that is already open.
	run func(t *testing.T, w *world, c *net.TCPConn)
	// waits: only the deadline ends it.
	waits bool
	// reason, outcome (deny if empty), identity and detail are the record's; detail
	// may be a part.
	reason, outcome, identity, detail string
}

// handshake is TLS as the attacker likes it. Errors are part of the attack.
func (w *world) handshake(c *net.TCPConn, cert *tls.Certificate, change func(*tls.Config)) *tls.Conn {
	cfg := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{mtls.ALPN}, MinVersion: tls.VersionTLS12}
	if cert != nil {
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	if change != nil {
		change(cfg)
	}
	x := tls.Client(c, cfg)
	_ = x.Handshake()
	return x
}

// message frames an Open.
func message(o proto.Message) []byte {
	b, err := proto.Marshal(o)
	if err != nil {
		panic(err)
	}
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
}

func (w *world) open(p symbolonv1.Protection) []byte {
	return message(mtls.NewOpen(mtls.NewFlowID(), w.app.addr, p, 1))
}

// withCertificate opens a tunnel in form, with a certificate of the attacker's
// choice, and sends application bytes with it.
func withCertificate(issue func(w *world) tls.Certificate) func(*testing.T, *world, *net.TCPConn) {
	return func(_ *testing.T, w *world, c *net.TCPConn) {
		cert := issue(w)
		x := w.handshake(c, &cert, nil)
		_, _ = x.Write(append(w.open(encrypted), "secret"...))
	}
}

// withBytes sends bytes in place of an Open, as a client that policy lets in.
func withBytes(b ...byte) func(*testing.T, *world, *net.TCPConn) {
	return func(t *testing.T, w *world, c *net.TCPConn) {
		x := w.handshake(c, w.web().SVID.TLS, nil)
		if _, err := x.Write(b); err != nil {
			t.Error(err)
		}
	}
}

func sends(b string) func(*testing.T, *world, *net.TCPConn) {
	return func(t *testing.T, _ *world, c *net.TCPConn) {
		if _, err := io.WriteString(c, b); err != nil {
			t.Error(err)
		}
	}
}

// hello is a ClientHello in full.
func hello(t testing.TB, alpn ...string) []byte {
	t.Helper()
	a, b := net.Pipe()
	defer b.Close()
	go func() {
		_ = tls.Client(a, &tls.Config{InsecureSkipVerify: true, NextProtos: alpn}).Handshake()
		a.Close()
	}()
	head := make([]byte, 5)
	if _, err := io.ReadFull(b, head); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint16(head[3:]))
	if _, err := io.ReadFull(b, body); err != nil {
		t.Fatal(err)
	}
	return append(head, body...)
}

const webID = "spiffe://acme.example/prod/web"

// attacks are those of "What bad input gets", and their relatives.
var attacks = []attack{
	// Without a proxy, or pretending to have one.
	{name: "junk in plain text", run: sends("GET / HTTP/1.1\r\n\r\n"), reason: "peer-unprotected"},
	{name: "garbage by the ten thousand", run: func(_ *testing.T, _ *world, c *net.TCPConn) {
		_, _ = io.WriteString(c, strings.Repeat("\xff\x00\x16garbage", 8000)) // it is reset at the first
	}, reason: "peer-unprotected"},
	{name: "a TLS record of garbage, 16 KiB", run: sends("\x16\x03\x01\x40\x00\x01\x00\x3f\xfc" + strings.Repeat("\x01", 16<<10)), reason: "peer-unprotected"},
	{name: "a ClientHello cut short, then FIN", run: func(t *testing.T, _ *world, c *net.TCPConn) {
		h := hello(t, mtls.ALPN)
		_, _ = c.Write(h[:len(h)-1])
		_ = c.CloseWrite()
	}, reason: "peer-unprotected"},
	{name: "a ClientHello cut short, then silence", waits: true, run: func(t *testing.T, _ *world, c *net.TCPConn) {
		_, _ = c.Write(hello(t, mtls.ALPN)[:700])
	}, reason: "peer-unprotected"},
	{name: "a ClientHello byte by byte that never ends", waits: true, run: func(t *testing.T, _ *world, c *net.TCPConn) {
		_ = c.SetNoDelay(true)
		for _, b := range hello(t, mtls.ALPN)[:600] {
			_, _ = c.Write([]byte{b})
		}
	}, reason: "peer-unprotected"},
	{name: "a ClientHello in full, then silence", waits: true, run: func(t *testing.T, _ *world, c *net.TCPConn) {
		_, _ = c.Write(hello(t, mtls.ALPN))
	}, reason: "handshake-timeout"},
	{name: "a ClientHello in full, then FIN", run: func(t *testing.T, _ *world, c *net.TCPConn) {
		_, _ = c.Write(hello(t, mtls.ALPN))
		_ = c.CloseWrite()
	}, reason: "handshake-failed"},
	{name: "silence", waits: true, run: func(*testing.T, *world, *net.TCPConn) {}, reason: "silent-client"},
	{name: "FIN and nothing else", run: func(_ *testing.T, _ *world, c *net.TCPConn) { _ = c.CloseWrite() }, reason: "reset", outcome: "error"},
	{name: "another ALPN", run: func(_ *testing.T, w *world, c *net.TCPConn) {
		w.handshake(c, w.web().SVID.TLS, func(c *tls.Config) { c.NextProtos = []string{"h2", "symbolon/2"} })
	}, reason: "peer-unprotected"},
	{name: "no ALPN", run: func(_ *testing.T, w *world, c *net.TCPConn) {
		w.handshake(c, w.web().SVID.TLS, func(c *tls.Config) { c.NextProtos = nil })
	}, reason: "peer-unprotected"},
	{name: "TLS 1.2", run: func(_ *testing.T, w *world, c *net.TCPConn) {
		w.handshake(c, w.web().SVID.TLS, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 })
	}, reason: "handshake-failed", detail: "version"},

	// With the wrong certificate.
	{name: "no certificate", run: func(_ *testing.T, w *world, c *net.TCPConn) {
		_, _ = w.handshake(c, nil, nil).Write(w.open(encrypted))
	}, reason: "handshake-failed", detail: "certificate"},
	{name: "another trust domain", run: withCertificate(func(w *world) tls.Certificate {
		return newAuthority(w, "evil.example").issue(newAuthority(w, "evil.example").leaf("/prod/web", map[string][]string{"app": {"web"}}))
	}), reason: "wrong-trust-domain"},
	{name: "our trust domain by another's key", run: withCertificate(func(w *world) tls.Certificate {
		fake := newAuthority(w, "acme.example")
		return fake.issue(fake.leaf("/prod/web", map[string][]string{"app": {"web"}}))
	}), reason: "peer-unverified"},
	{name: "an expired SVID", run: withCertificate(func(w *world) tls.Certificate {
		l := w.ca.leaf("/prod/web", map[string][]string{"app": {"web"}})
		l.NotAfter = time.Now().Add(-time.Minute)
		return w.ca.issue(l)
	}), reason: "svid-expired"},
	{name: "an SVID of the future", run: withCertificate(func(w *world) tls.Certificate {
		l := w.ca.leaf("/prod/web", map[string][]string{"app": {"web"}})
		l.NotBefore = time.Now().Add(30 * time.Minute)
		return w.ca.issue(l)
	}), reason: "svid-expired"},
	{name: "claims in an intermediate", run: withCertificate(func(w *world) tls.Certificate {
		spoilt := *w.ca.issuer
		spoilt.ExtraExtensions = []pkix.Extension{w.ca.claims(map[string][]string{"app": {"web"}})}
		with := *w.ca
		with.issuer = sign(w, &spoilt, w.ca.root, &w.ca.issues.PublicKey, w.ca.rootKey)
		return with.issue(with.leaf("/prod/other", nil))
	}), reason: "no-claims", identity: "spiffe://acme.example/prod/other"},
	{name: "two URI SANs", run: withCertificate(func(w *world) tls.Certificate {
		l := w.ca.leaf("/prod/web", map[string][]string{"app": {"web"}})
		l.URIs = append(l.URIs, spiffeid.RequireFromPath(w.ca.domain, "/prod/admin").URL())
		return w.ca.issue(l)
	}), reason: "svid-malformed"},
	{name: "no URI SAN", run: withCertificate(func(w *world) tls.Certificate {
		l := w.ca.leaf("/prod/web", map[string][]string{"app": {"web"}})
		l.URIs = nil
		return w.ca.issue(l)
	}), reason: "svid-malformed"},
	{name: "a CA's certificate as its own", run: withCertificate(func(w *world) tls.Certificate {
		l := w.ca.leaf("/prod/web", map[string][]string{"app": {"web"}})
		l.IsCA, l.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
		return w.ca.issue(l)
	}), reason: "svid-malformed"},
	{name: "a workload that signs for another", run: withCertificate(func(w *world) tls.Certificate {
		mine := w.ca.issue(w.ca.leaf("/prod/other", nil)) // good, and no CA
		child := *w.ca
		child.issuer, child.issues = mine.Leaf, mine.PrivateKey.(*ecdsa.PrivateKey)
		forged := child.issue(child.leaf("/prod/web", map[string][]string{"app": {"web"}}))
		forged.Certificate = append(forged.Certificate, w.ca.issuer.Raw)
		return forged
	}), reason: "not-a-ca"},
	{name: "an intermediate of other names", run: withCertificate(func(w *world) tls.Certificate {
		other := caTemplate(w, "issuer of others")
		other.PermittedURIDomains, other.PermittedDNSDomainsCritical = []string{"other.example"}, true
		child := *w.ca
		child.issuer = sign(w, other, w.ca.root, &w.ca.issues.PublicKey, w.ca.rootKey)
		return child.issue(child.leaf("/prod/web", map[string][]string{"app": {"web"}}))
	}), reason: "name-constrained"},
	{name: "claims that do not parse", run: withCertificate(func(w *world) tls.Certificate {
		l := w.ca.leaf("/prod/web", map[string][]string{"app": {"web"}})
		l.ExtraExtensions[0].Value = []byte{0x30, 0x03, 0x02, 0x01, 0x02}
		return w.ca.issue(l)
	}), reason: "claims-malformed"},
	{name: "a host's certificate", run: withCertificate(func(w *world) tls.Certificate {
		return *w.ca.host("h2").SVID.TLS
	}), reason: "not-a-workload"},
	{name: "somebody else's certificate without its key", run: func(_ *testing.T, w *world, c *net.TCPConn) {
		stolen := *w.web().SVID.TLS
		stolen.PrivateKey = newKey(w)
		_, _ = w.handshake(c, &stolen, nil).Write(w.open(encrypted))
	}, reason: "handshake-failed"},
	{name: "a workload that policy knows nothing of", run: withCertificate(func(w *world) tls.Certificate {
		return *w.ca.workload("/prod/other", map[string][]string{"app": {"other"}}).SVID.TLS
	}), reason: "default", identity: "spiffe://acme.example/prod/other"},

	// With the right certificate, and the wrong Open.
	{name: "an Open that is no protobuf", run: withBytes(0, 0, 0, 3, 0xff, 0xff, 0xff), reason: "open-malformed", identity: webID},
	{name: "an Open without a destination", run: func(_ *testing.T, w *world, c *net.TCPConn) {
		_, _ = w.handshake(c, w.web().SVID.TLS, nil).Write(message(&symbolonv1.Open{Version: 1, Protection: encrypted}))
	}, reason: "open-malformed", identity: webID},
	{name: "an Open of another version", run: func(_ *testing.T, w *world, c *net.TCPConn) {
		_, _ = w.handshake(c, w.web().SVID.TLS, nil).Write(message(&symbolonv1.Open{Version: 2}))
	}, reason: "version", identity: webID},
	{name: "an Open that asks for no protection", run: func(_ *testing.T, w *world, c *net.TCPConn) {
		o := mtls.NewOpen(mtls.NewFlowID(), w.app.addr, 0, 1)
		_, _ = w.handshake(c, w.web().SVID.TLS, nil).Write(message(o))
	}, reason: "open-malformed", identity: webID},
	{name: "an Open one byte too large", run: withBytes(0, 0, 0x40, 1), reason: "open-too-large", identity: webID},
	{name: "an Open of 4 GiB", run: withBytes(0xff, 0xff, 0xff, 0xff), reason: "open-too-large", identity: webID},
	{name: "application bytes in place of an Open", run: withBytes([]byte("GET / HTTP/1.1\r\n\r\n")...), reason: "open-too-large", identity: webID},
	{name: "an Open cut short, then silence", waits: true, run: withBytes(0, 0, 0, 40, 8, 1), reason: "handshake-timeout", identity: webID},
	{name: "no Open at all", waits: true, run: withBytes(), reason: "handshake-timeout", identity: webID},
	{name: "an Open cut short, then close_notify", run: func(_ *testing.T, w *world, c *net.TCPConn) {
		x := w.handshake(c, w.web().SVID.TLS, nil)
		_, _ = x.Write([]byte{0, 0, 0, 40, 8, 1})
		_ = x.CloseWrite()
	}, reason: "protocol", identity: webID},
	{name: "an Open cut short, then FIN", run: func(_ *testing.T, w *world, c *net.TCPConn) {
		_, _ = w.handshake(c, w.web().SVID.TLS, nil).Write([]byte{0, 0, 0, 40, 8, 1})
		_ = c.CloseWrite()
	}, reason: "truncated", outcome: "error", identity: webID},
	{name: "close_notify in place of an Open", run: func(_ *testing.T, w *world, c *net.TCPConn) {
		_ = w.handshake(c, w.web().SVID.TLS, nil).CloseWrite()
	}, reason: "peer-refused", identity: webID},
	{name: "plain bytes under the handshake", run: func(_ *testing.T, w *world, c *net.TCPConn) {
		w.handshake(c, w.web().SVID.TLS, nil)
		_, _ = io.WriteString(c, "GET / HTTP/1.1\r\n\r\n")
	}, reason: "protocol", identity: webID},
	{name: "a record that does not decrypt", run: func(_ *testing.T, w *world, c *net.TCPConn) {
		w.handshake(c, w.web().SVID.TLS, nil)
		_, _ = io.WriteString(c, "\x17\x03\x03\x00\x20"+strings.Repeat("x", 32))
	}, reason: "protocol", identity: webID},
	{name: "a reset in place of an Open", run: func(_ *testing.T, w *world, c *net.TCPConn) {
		x := w.handshake(c, w.web().SVID.TLS, nil)
		_, _ = x.Write([]byte{0, 0, 0, 40})
		_ = c.SetLinger(0)
		_ = c.Close()
	}, reason: "reset", outcome: "error"},
}

// Each attack is refused with a reason of its own, and at once; it reaches no
// application, leaves nothing behind, and keeps nobody else from being served.
func TestAttacks(t *testing.T) {
	w := newWorld(t, unhurried)
	w.good() // and what is made once is made
	for _, a := range attacks {
		if a.waits {
			continue
		}
		t.Run(a.name, func(t *testing.T) {
			w := w.in(t)
			before, reached := w.cost(), w.app.accepts.Load()
			c := w.call(w.app.addr)
			a.run(t, w, c)
			_, _ = ended(t, c)
			c.Close() // a refusal waits a moment for its reader
			a.check(t, w.records.next(), c)
			if n := w.app.accepts.Load() - reached; n != 0 {
				t.Errorf("the application was reached %d times", n)
			}
			w.nothingLeft(before)
			w.good()
			w.records.none()
		})
	}
	if got := w.app.received(); strings.Contains(got, "secret") || strings.Contains(got, "GET") {
		t.Errorf("the application received %q", got)
	}
}

// unhurried gives every phase more time than a test has.
func unhurried(o *Options) { o.Timeouts.Handshake, o.Timeouts.Setup = 4*patience, 4*patience }

// Who waits for others to wait is ended by the deadline, all alike.
func TestAttacksThatWait(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Timeouts.Handshake = 3 * time.Second })
	w.good()
	before, reached := w.cost(), w.app.accepts.Load()
	by := make(map[string]*attack)
	conns := make(map[string]*net.TCPConn)
	for i := range attacks {
		if a := &attacks[i]; a.waits {
			c := w.call(w.app.addr)
			a.run(t, w, c)
			by[c.LocalAddr().String()], conns[c.LocalAddr().String()] = a, c
		}
	}
	for range by {
		r := w.records.next()
		a, ok := by[r.Source.Address]
		if !ok {
			t.Errorf("a record of nobody's: %+v", r)
			continue
		}
		t.Run(a.name, func(t *testing.T) { a.check(t, r, conns[r.Source.Address]) })
	}
	for _, c := range conns {
		_, _ = ended(t, c)
		c.Close()
	}
	if n := w.app.accepts.Load() - reached; n != 0 {
		t.Errorf("the application was reached %d times", n)
	}
	w.nothingLeft(before)
	w.good()
	w.records.none()
}

// check compares an attack's record.
func (a *attack) check(t *testing.T, r *flow.Line, c *net.TCPConn) {
	t.Helper()
	outcome := "deny"
	if a.outcome != "" {
		outcome = a.outcome
	}
	if r.Reason != a.reason || r.Outcome != outcome {
		t.Errorf("recorded %s %s (%s), want %s %s", r.Outcome, r.Reason, r.Detail, outcome, a.reason)
	}
	if !strings.Contains(r.Detail, a.detail) {
		t.Errorf("detail %q, want %q in it", r.Detail, a.detail)
	}
	if a.identity != "" && r.Source.SPIFFEID != a.identity {
		t.Errorf("recorded as %q, want %q", r.Source.SPIFFEID, a.identity)
	}
	if want := c.LocalAddr().String(); r.Source.Address != want {
		t.Errorf("recorded from %s, want %s", r.Source.Address, want)
	}
}

// Reasons tell attacks apart: an operator must not find one word for everything.
func TestReasonsAreManyAndNoneIsInternal(t *testing.T) {
	var reasons []string
	for _, a := range attacks {
		reasons = append(reasons, a.reason)
	}
	slices.Sort(reasons)
	if n := len(slices.Compact(reasons)); n < 17 || slices.Contains(reasons, "internal") {
		t.Errorf("%d different reasons: %v", n, slices.Compact(reasons))
	}
}

// in is the world in a subtest.
func (w *world) in(t *testing.T) *world {
	x := *w
	x.T = t
	ca := *w.ca
	ca.TB = t
	x.ca, x.records = &ca, &recorder{t, w.records.ch}
	return &x
}

// What is sent before the verdict never reaches an application that policy closes.
func TestEarlyBytesStopAtTheDenial(t *testing.T) {
	w := newWorld(t)
	w.policy(strings.Replace(baseline, "verb: allow", "verb: deny", 1))
	for _, p := range []symbolonv1.Protection{encrypted, authenticated} {
		c := w.call(w.app.addr)
		x := w.handshake(c, w.web().SVID.TLS, nil)
		_, _ = x.Write(w.open(p))
		for range 20 {
			if _, err := io.WriteString(x, strings.Repeat("secret", 2000)); err != nil {
				break // refused meanwhile
			}
		}
		r := w.records.next()
		if r.Reason != "policy" || r.ServerPolicy != "/prod/web-calls-db" || r.Outcome != "deny" || r.BytesSent != 0 {
			t.Errorf("%v: recorded %+v", p, r)
		}
		_, _ = ended(t, c)
	}
	if w.app.accepts.Load() != 0 {
		t.Error("the application was reached")
	}
}

// Nobody talks to the proxy's own ports, from outside or from here.
func TestOwnPortsAreClosed(t *testing.T) {
	w := newWorld(t)
	for _, port := range []uint16{redirect.DefaultInboundPort, redirect.DefaultOutboundPort} {
		for _, host := range []string{protected4, protected6} {
			to := net.JoinHostPort(host, fmt.Sprint(port))
			err := inOther(func() error {
				c, err := net.DialTimeout("tcp", to, patience)
				if err == nil {
					c.Close()
				}
				return err
			})
			if !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("from outside to %s: %v, want refused", to, err)
			}
		}
		for _, host := range []string{protected4, "127.0.0.1", "::1"} {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(host, fmt.Sprint(port)), patience)
			if err == nil {
				c.Close()
			}
			if !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("from here to %s port %d: %v, want refused", host, port, err)
			}
		}
	}
	w.records.none()
	w.good()
}
