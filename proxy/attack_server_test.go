package proxy

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
)

// server is TLS as the attacker likes it, on a connection that a proxy made.
func (w *world) server(c *net.TCPConn, cert tls.Certificate, change func(*tls.Config)) *tls.Conn {
	cfg := &tls.Config{
		Certificates: []tls.Certificate{cert}, NextProtos: []string{mtls.ALPN}, ClientAuth: tls.RequireAnyClientCert,
	}
	if change != nil {
		change(cfg)
	}
	x := tls.Server(c, cfg)
	_ = x.Handshake()
	return x
}

func (w *world) db() tls.Certificate {
	return *w.ca.workload("/prod/db", map[string][]string{"app": {"db"}}).SVID.TLS
}

// readOpen takes the client's half, as a server would.
func readOpen(c io.Reader) (*symbolonv1.Open, error) {
	var head [4]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint32(head[:]))
	if _, err := io.ReadFull(c, b); err != nil {
		return nil, err
	}
	o := &symbolonv1.Open{}
	return o, proto.Unmarshal(b, o)
}

// answers does the handshake in form, takes the Open, and answers with bytes.
func answers(b func(o *symbolonv1.Open) []byte) func(*world, *net.TCPConn) string {
	return func(w *world, c *net.TCPConn) string {
		x := w.server(c, w.db(), nil)
		o, err := readOpen(x)
		if err != nil {
			return err.Error()
		}
		_, _ = x.Write(b(o))
		_, _ = io.Copy(io.Discard, x)
		return ""
	}
}

// presents shows a certificate and sees what comes: nothing should.
func presents(cert func(w *world) tls.Certificate) func(*world, *net.TCPConn) string {
	return func(w *world, c *net.TCPConn) string {
		x := w.server(c, cert(w), nil)
		_, _ = x.Write(message(&symbolonv1.Verdict{Accept: true, Protection: encrypted}))
		got, _ := io.ReadAll(x)
		return string(got)
	}
}

// A server that is not what it should be gets nothing of the application's, and
// gives it nothing; the application sees a reset, never an end.
func TestMaliciousServers(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Timeouts.Handshake, o.Timeouts.Setup = 3*time.Second, 4*time.Second })
	w.creds.set("0", w.web())
	for _, a := range []struct {
		name string
		// serve returns what it could read.
		serve func(w *world, c *net.TCPConn) string
		// app is what the application may read before its reset.
		app                         string
		reason, outcome, peer, text string
	}{
		{name: "offers less protection than was asked for", serve: answers(func(o *symbolonv1.Open) []byte {
			return append(message(&symbolonv1.Verdict{Accept: true, Protection: authenticated, FlowId: o.GetFlowId()}), "forged"...)
		}), reason: "protocol", text: "demanded"},
		{name: "offers no protection", serve: answers(func(o *symbolonv1.Open) []byte {
			return message(&symbolonv1.Verdict{Accept: true, FlowId: o.GetFlowId()})
		}), reason: "protocol"},
		{name: "invents a protection", serve: answers(func(o *symbolonv1.Open) []byte {
			return message(&symbolonv1.Verdict{Accept: true, Protection: 9, FlowId: o.GetFlowId()})
		}), reason: "protocol"},
		{name: "sends a verdict one byte too large", serve: answers(func(*symbolonv1.Open) []byte { return []byte{0, 0, 0x40, 1} }), reason: "open-too-large"},
		{name: "sends a verdict that is no protobuf", serve: answers(func(*symbolonv1.Open) []byte { return []byte{0, 0, 0, 1, 0xff} }), reason: "open-malformed"},
		{name: "sends data in place of a verdict", serve: answers(func(*symbolonv1.Open) []byte { return []byte("HTTP/1.1 200 OK\r\n\r\nforged") }), reason: "open-too-large"},
		{name: "sends an empty verdict", serve: answers(func(*symbolonv1.Open) []byte { return []byte{0, 0, 0, 0} }), reason: "peer-refused"},
		{name: "refuses by policy", serve: answers(func(*symbolonv1.Open) []byte {
			return message(&symbolonv1.Verdict{Reason: symbolonv1.Reason_REASON_POLICY, Policy: "/prod/no"})
		}), reason: "peer-refused", peer: "policy"},
		{name: "has nobody listening", serve: answers(func(*symbolonv1.Open) []byte {
			return message(&symbolonv1.Verdict{Reason: symbolonv1.Reason_REASON_REFUSED})
		}), reason: "refused", outcome: "error", peer: "refused"},
		{name: "never gives a verdict", serve: answers(func(*symbolonv1.Open) []byte { return nil }), reason: "timed-out", outcome: "error"},
		{name: "ends in place of a verdict", serve: func(w *world, c *net.TCPConn) string {
			x := w.server(c, w.db(), nil)
			_, _ = readOpen(x)
			_ = x.CloseWrite()
			_, _ = io.Copy(io.Discard, x)
			return ""
		}, reason: "protocol"},
		{name: "sends plain bytes in place of a verdict", serve: func(w *world, c *net.TCPConn) string {
			x := w.server(c, w.db(), nil)
			_, _ = readOpen(x)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nforged")
			_, _ = io.Copy(io.Discard, c)
			return ""
		}, reason: "protocol"},
		{name: "cuts the stream without close_notify", serve: func(w *world, c *net.TCPConn) string {
			x := w.server(c, w.db(), nil)
			_, _ = readOpen(x)
			_, _ = x.Write(append(message(&symbolonv1.Verdict{Accept: true, Protection: encrypted}), "\x00\x00\x00\x0ctransfer 100"...))
			_, _ = io.ReadFull(x, make([]byte, len("lenXsecret"))) // the application has got there
			_ = c.CloseWrite()
			_, _ = io.Copy(io.Discard, x)
			return ""
		}, app: "transfer 100", reason: "truncated", outcome: "error"},
		{name: "sends a frame that is too large", serve: func(w *world, c *net.TCPConn) string {
			x := w.server(c, w.db(), nil)
			_, _ = readOpen(x)
			_, _ = x.Write(append(message(&symbolonv1.Verdict{Accept: true, Protection: encrypted}), "\xff\xff\xff\xffx"...))
			_, _ = io.Copy(io.Discard, x)
			return ""
		}, reason: "protocol"},
		{name: "ends TLS inside a frame", serve: func(w *world, c *net.TCPConn) string {
			x := w.server(c, w.db(), nil)
			_, _ = readOpen(x)
			_, _ = x.Write(append(message(&symbolonv1.Verdict{Accept: true, Protection: encrypted}), "\x00\x00\x00\x0ctransfer"...))
			_, _ = io.ReadFull(x, make([]byte, 4+len("secret")))
			_ = x.CloseWrite()
			_, _ = io.Copy(io.Discard, x)
			return ""
		}, app: "transfer", reason: "truncated", outcome: "error"},
		{name: "says nothing", serve: func(_ *world, c *net.TCPConn) string { _, _ = io.Copy(io.Discard, c); return "" }, reason: "handshake-timeout"},
		{name: "has claims that policy denies", serve: presents(func(w *world) tls.Certificate {
			return *w.ca.workload("/prod/other", map[string][]string{"app": {"other"}}).SVID.TLS
		}), reason: "default"},
		{name: "is a host, and accepts", serve: func(w *world, c *net.TCPConn) string {
			x := w.server(c, *w.ca.host("h2").SVID.TLS, nil)
			_, _ = readOpen(x)
			_, _ = x.Write(append(message(&symbolonv1.Verdict{Accept: true, Protection: encrypted}), "forged"...))
			got, _ := io.ReadAll(x)
			return string(got)
		}, reason: "not-a-workload"},
		{name: "is of another trust domain", serve: presents(func(w *world) tls.Certificate {
			return *newAuthority(w, "evil.example").workload("/prod/db", map[string][]string{"app": {"db"}}).SVID.TLS
		}), reason: "wrong-trust-domain"},
		{name: "is expired", serve: presents(func(w *world) tls.Certificate {
			l := w.ca.leaf("/prod/db", map[string][]string{"app": {"db"}})
			l.NotAfter = time.Now().Add(-time.Second)
			return w.ca.issue(l)
		}), reason: "svid-expired"},
		{name: "has two names", serve: presents(func(w *world) tls.Certificate {
			l := w.ca.leaf("/prod/db", map[string][]string{"app": {"db"}})
			l.URIs = append(l.URIs, w.ca.leaf("/prod/x", nil).URIs...)
			return w.ca.issue(l)
		}), reason: "svid-malformed"},
		{name: "has another's certificate and not its key", serve: presents(func(w *world) tls.Certificate {
			c := w.db()
			c.PrivateKey = newKey(w)
			return c
		}), reason: "handshake-failed"},
		{name: "speaks TLS 1.2", serve: func(w *world, c *net.TCPConn) string {
			x := w.server(c, w.db(), func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 })
			got, _ := io.ReadAll(x)
			return string(got)
		}, reason: "peer-unprotected"},
		{name: "has no ALPN", serve: func(w *world, c *net.TCPConn) string {
			x := w.server(c, w.db(), func(c *tls.Config) { c.NextProtos = nil })
			got, _ := io.ReadAll(x)
			return string(got)
		}, reason: "peer-unprotected"},
		{name: "has no proxy", serve: func(_ *world, c *net.TCPConn) string {
			b := make([]byte, 4096)
			n, _ := c.Read(b)
			_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n")
			return string(b[:n])
		}, reason: "peer-unprotected"},
	} {
		t.Run(a.name, func(t *testing.T) {
			w := w.in(t)
			before := w.cost()
			read := make(chan string, 1)
			to := w.serveOther(other4+":0", func(c *net.TCPConn) { read <- a.serve(w, c) })
			listening := w.cost().files - before.files
			got, err := w.ask(to, "secret")
			if !errors.Is(err, syscall.ECONNRESET) || string(got) != a.app {
				t.Errorf("the application reads %q, %v; want %q and a reset", got, err, a.app)
			}
			r := w.records.next()
			want := "deny"
			if a.outcome != "" {
				want = a.outcome
			}
			if r.Reason != a.reason || r.Outcome != want || r.PeerReason != a.peer || !strings.Contains(r.Detail, a.text) {
				t.Errorf("recorded %s %s %s (%s), want %s %s %s (%s)", r.Outcome, r.Reason, r.PeerReason, r.Detail, want, a.reason, a.peer, a.text)
			}
			if r.Source.SPIFFEID != webID || r.Destination.Address != to.String() {
				t.Errorf("recorded %s to %s", r.Source.SPIFFEID, r.Destination.Address)
			}
			if got := within(t, read, "the server's end"); strings.Contains(got, "secret") {
				t.Errorf("the server read %q", got)
			}
			eventually(t, "descriptors are closed", func() bool { return openFiles(t) <= before.files+listening })
			w.records.none()
		})
	}
}

// An application that gives up while the verdict is awaited is no fault of the
// peer's, nor an internal one.
func TestApplicationGivesUp(t *testing.T) {
	w := newWorld(t)
	w.creds.set("0", w.web())
	waits, saw := make(chan struct{}), make(chan error, 1)
	to := w.serveOther(other4+":0", func(c *net.TCPConn) {
		x := w.server(c, w.db(), nil)
		_, _ = readOpen(x)
		close(waits)
		_, err := io.Copy(io.Discard, x)
		saw <- err
	})
	app := w.connect(to)
	_, _ = io.WriteString(app, "never mind")
	within(t, waits, "the Open")
	_ = reset(app)
	if err := within(t, saw, "the server's end"); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the server sees %v, want a reset", err)
	}
	if r := w.records.next(); r.Reason != "reset" || r.Outcome != "error" {
		t.Errorf("recorded %s %s (%s)", r.Outcome, r.Reason, r.Detail)
	}
}

// A refusal is recorded as one, however much the application was sending.
func TestRefusalUnderLoad(t *testing.T) {
	w := newWorld(t)
	w.creds.set("0", w.web())
	to := w.serveOther(other4+":0", func(c *net.TCPConn) {
		x := w.server(c, w.db(), nil)
		_, _ = readOpen(x)
		_, _ = x.Write(message(&symbolonv1.Verdict{Reason: symbolonv1.Reason_REASON_POLICY, Policy: "/prod/no"}))
		_, _ = io.CopyN(io.Discard, c, 4<<10)
		_ = reset(c) // over what it has not read
	})
	refused := 0
	for range 20 {
		_, _ = w.ask(to, strings.Repeat("x", 1<<20))
		switch r := w.records.next(); r.Reason {
		case "peer-refused":
			refused++
			if r.PeerReason != "policy" || r.Outcome != "deny" {
				t.Errorf("recorded %+v", r)
			}
		case "reset": // it overtook the verdict
		default:
			t.Errorf("recorded %s %s (%s)", r.Outcome, r.Reason, r.Detail)
		}
	}
	if refused == 0 {
		t.Error("no refusal got through")
	}
}

// A client or a server that has AES-128 only is none of ours. This process's own
// crypto/tls cannot be one, so it is openssl.
func TestWeakCipherSuite(t *testing.T) {
	w := newWorld(t)
	t.Run("client", func(t *testing.T) {
		w := w.in(t)
		out := openssl(w, w.web(), nil, "s_client", "-connect", w.app.addr.String(), "-alpn", mtls.ALPN, "-ciphersuites", "TLS_AES_128_GCM_SHA256")
		if r := w.records.next(); r.Reason != "handshake-failed" || r.Outcome != "deny" || !strings.Contains(r.Detail, "cipher suite") {
			t.Errorf("recorded %s %s (%s)\n%s", r.Outcome, r.Reason, r.Detail, out())
		}
		if w.app.accepts.Load() != 0 {
			t.Error("the application was reached")
		}
		w.good()
	})
	t.Run("client with both", func(t *testing.T) { // so it was the suite, and nothing else
		w := w.in(t)
		before := w.app.accepts.Load()
		out := openssl(w, w.web(), w.open(encrypted), "s_client", "-connect", w.app.addr.String(), "-alpn", mtls.ALPN,
			"-ciphersuites", "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384", "-quiet")
		eventually(t, "the application is reached", func() bool { return w.app.accepts.Load() == before+1 })
		said := out()
		r := w.records.next() // openssl was killed, so its end is not a clean one
		if r.Reason != "truncated" && r.Detail != "reset" || r.CipherSuite != "TLS_AES_256_GCM_SHA384" || r.Source.SPIFFEID != webID {
			t.Errorf("recorded %+v\n%s", r, said)
		}
	})
	t.Run("server", func(t *testing.T) {
		w := w.in(t)
		own := w.creds.byUID["0"]
		key := w.creds.set("0", w.web())
		defer func() { w.creds.set("0", own); w.p.CredentialChanged(key, own) }()
		const port = "4433"
		out := openssl(w, own, nil, "s_server", "-accept", other4+":"+port, "-alpn", mtls.ALPN, "-ciphersuites", "TLS_AES_128_GCM_SHA256", "-Verify", "1", "-quiet")
		to := netip.MustParseAddrPort(other4 + ":" + port)
		eventually(t, "openssl listens", func() bool {
			return inOther(func() error {
				b, err := os.ReadFile("/proc/thread-self/net/tcp")
				if err == nil && !strings.Contains(string(b), ":1151 ") { // 4433
					err = io.EOF
				}
				return err
			}) == nil
		})
		if got, err := w.ask(to, "secret"); !errors.Is(err, syscall.ECONNRESET) || len(got) > 0 {
			t.Errorf("the application reads %q, %v", got, err)
		}
		if r := w.records.next(); r.Reason != "peer-unprotected" || r.Outcome != "deny" {
			t.Errorf("recorded %s %s (%s)\n%s", r.Outcome, r.Reason, r.Detail, out())
		}
	})
}

// openssl runs openssl in the other host with a credential's certificate and key,
// which it gets through pipes. It ends with the test, and out waits for that.
func openssl(w *world, cred *identity.Credential, stdin []byte, args ...string) (out func() string) {
	w.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cert, key := pem(w, cred)
	c := exec.CommandContext(ctx, "openssl", append(args, "-cert", "/dev/fd/3", "-key", "/dev/fd/4", "-cert_chain", "/dev/fd/5")...)
	var b strings.Builder
	c.Stdout, c.Stderr = &b, &b
	if stdin != nil {
		c.Stdin = strings.NewReader(string(stdin))
	}
	for _, x := range [][]byte{cert[0], key, cert[1]} {
		r, pw, err := os.Pipe()
		if err != nil {
			w.Fatal(err)
		}
		if _, err := pw.Write(x); err != nil { // less than a pipe holds
			w.Fatal(err)
		}
		pw.Close()
		defer r.Close()
		c.ExtraFiles = append(c.ExtraFiles, r)
	}
	if err := inOther(c.Start); err != nil {
		w.Fatal(err)
	}
	wait := func() string {
		cancel()
		_ = c.Wait() // ended by cancel, or by its own error
		return b.String()
	}
	done := false
	w.Cleanup(func() {
		if !done {
			wait()
		}
	})
	return func() string { done = true; return wait() }
}
