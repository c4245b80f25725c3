package mtls

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

const (
	encrypted     = symbolonv1.Protection_PROTECTION_ENCRYPTED
	authenticated = symbolonv1.Protection_PROTECTION_AUTHENTICATED
)

var somewhere = netip.MustParseAddrPort("10.0.0.9:5432")

// pair is two ends of a TCP connection on loopback.
func pair(t testing.TB) (client, server *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	return c, s
}

func timeout(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

type accepted struct {
	conn *Conn
	open *symbolonv1.Open
	err  error
}

// accept runs the server's half, and answers with verdict if there is one.
func accept(ctx context.Context, tcp *net.TCPConn, e *Endpoint, verdict *symbolonv1.Verdict) <-chan accepted {
	ch := make(chan accepted, 1)
	go func() {
		var a accepted
		a.conn, a.open, a.err = Accept(ctx, tcp, e)
		if a.err == nil && verdict != nil {
			if verdict.GetAccept() {
				a.err = a.conn.Grant(ctx, verdict)
			} else {
				a.conn.Refuse(verdict)
			}
		}
		ch <- a
	}()
	return ch
}

func asking(p symbolonv1.Protection) func(*Peer) (*symbolonv1.Open, error) {
	return func(*Peer) (*symbolonv1.Open, error) { return NewOpen(NewFlowID(), somewhere, p, 7), nil }
}

// tunnel is an accepted one.
func tunnel(t testing.TB, client, server *Endpoint, ask, grant symbolonv1.Protection) (*Conn, *Conn) {
	t.Helper()
	ctx := timeout(t)
	c, s := pair(t)
	ch := accept(ctx, s, server, &symbolonv1.Verdict{Accept: true, Protection: grant})
	a, err := Dial(ctx, c, client, asking(ask))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.ReadVerdict(ctx); err != nil {
		t.Fatal(err)
	}
	b := <-ch
	if b.err != nil {
		t.Fatal(b.err)
	}
	return a, b.conn
}

func endpoints(t testing.TB) (web, db *Endpoint) {
	ca := newAuthority(t, "acme.example")
	web = NewEndpoint(ca.workload("/prod/web", map[string][]string{"app": {"web"}}), Options{})
	db = NewEndpoint(ca.workload("/prod/db", map[string][]string{"app": {"db"}}), Options{})
	return web, db
}

func TestNegotiatedSuite(t *testing.T) {
	web, db := endpoints(t)
	a, b := tunnel(t, web, db, encrypted, encrypted)
	for _, c := range []*Conn{a, b} {
		want := Info{Version: "TLS 1.3", CipherSuite: "TLS_AES_256_GCM_SHA384", KeyExchange: "X25519MLKEM768"}
		if c.Info() != want {
			t.Errorf("negotiated %+v, want %+v", c.Info(), want)
		}
	}
	if a.Peer().ID.String() != "spiffe://acme.example/prod/db" || a.Peer().Attributes.Get("app") != "db" || a.Peer().Namespace != "/prod" {
		t.Errorf("the client sees %+v", a.Peer())
	}
	if b.Peer().Name != "web" || b.Peer().Attributes.Get("app") != "web" {
		t.Errorf("the server sees %+v", b.Peer())
	}
}

func TestPeerWithoutAES256IsRefused(t *testing.T) {
	// crypto/tls of this process offers only one suite, so the other one is openssl's.
	if err := checkState(&tls.ConnectionState{Version: tls.VersionTLS13, CipherSuite: tls.TLS_AES_128_GCM_SHA256, NegotiatedProtocol: ALPN}); !errors.Is(err, ErrProtocol) {
		t.Errorf("AES-128: %v, want ErrProtocol", err)
	}
	if err := checkState(&tls.ConnectionState{Version: tls.VersionTLS12, CipherSuite: tls.TLS_AES_256_GCM_SHA384, NegotiatedProtocol: ALPN}); !errors.Is(err, ErrProtocol) {
		t.Errorf("TLS 1.2: %v, want ErrProtocol", err)
	}
	if err := checkState(&tls.ConnectionState{Version: tls.VersionTLS13, CipherSuite: tls.TLS_AES_256_GCM_SHA384}); !errors.Is(err, ErrProtocol) {
		t.Errorf("no ALPN: %v, want ErrProtocol", err)
	}
}

func TestProtectionIsTheStricterOfBoth(t *testing.T) {
	web, db := endpoints(t)
	for _, tc := range []struct{ ask, grant, want symbolonv1.Protection }{
		{encrypted, encrypted, encrypted},
		{encrypted, authenticated, encrypted},
		{authenticated, encrypted, encrypted},
		{authenticated, authenticated, authenticated},
	} {
		a, b := tunnel(t, web, db, tc.ask, tc.grant)
		if a.Protection() != tc.want || b.Protection() != tc.want {
			t.Errorf("asked %v, granted %v: client has %v, server %v, want %v", tc.ask, tc.grant, a.Protection(), b.Protection(), tc.want)
		}
		if raw := a.Raw() != nil; raw != (tc.want == authenticated) {
			t.Errorf("asked %v, granted %v: raw socket given: %v", tc.ask, tc.grant, raw)
		}
		talk(t, a, b)
	}
}

// talk sends both ways, then half-closes both ways.
func talk(t testing.TB, a, b *Conn) {
	t.Helper()
	question, answer := strings.Repeat("question ", 9000), strings.Repeat("answer ", 9000)
	go func() {
		io.WriteString(a, question)
		a.CloseWrite()
	}()
	got, err := io.ReadAll(b)
	if err != nil || string(got) != question {
		t.Fatalf("server read %d bytes, %v; want %d", len(got), err, len(question))
	}
	go func() {
		io.WriteString(b, answer)
		b.CloseWrite()
	}()
	got, err = io.ReadAll(a)
	if err != nil || string(got) != answer {
		t.Fatalf("client read %d bytes, %v; want %d", len(got), err, len(answer))
	}
}

// Bytes that follow the verdict at once, in the clear, must not be swallowed by
// crypto/tls's read buffer.
func TestRawBytesRightBehindTheVerdict(t *testing.T) {
	web, db := endpoints(t)
	for range 20 {
		ctx := timeout(t)
		c, s := pair(t)
		greeted := make(chan error, 1)
		go func() {
			b, _, err := Accept(ctx, s, db)
			if err == nil {
				err = b.Grant(ctx, &symbolonv1.Verdict{Protection: authenticated})
			}
			if err == nil {
				_, err = io.WriteString(b.Raw(), "SSH-2.0-hello")
			}
			greeted <- err
		}()
		a, err := Dial(ctx, c, web, asking(authenticated))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond) // let both arrive in one read
		if _, err := a.ReadVerdict(ctx); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 13)
		if _, err := io.ReadFull(a.Raw(), buf); err != nil || string(buf) != "SSH-2.0-hello" {
			t.Fatalf("read %q, %v", buf, err)
		}
		if err := <-greeted; err != nil {
			t.Fatal(err)
		}
	}
}

func TestEarlyDataWaitsForTheVerdict(t *testing.T) {
	web, db := endpoints(t)
	ctx := timeout(t)
	c, s := pair(t)
	a, b := make(chan accepted, 1), (*Conn)(nil)
	go func() {
		conn, open, err := Accept(ctx, s, db)
		a <- accepted{conn, open, err}
	}()
	client, err := Dial(ctx, c, web, asking(encrypted))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(client, "early"); err != nil {
		t.Fatal(err)
	}
	got := <-a
	if got.err != nil {
		t.Fatal(got.err)
	}
	b = got.conn
	if err := b.Grant(ctx, &symbolonv1.Verdict{Protection: encrypted}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 5)
	if _, err := io.ReadFull(b, buf); err != nil || string(buf) != "early" {
		t.Fatalf("read %q, %v", buf, err)
	}
	if _, err := client.ReadVerdict(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestRefusalReachesTheClientOverEarlyData(t *testing.T) {
	web, db := endpoints(t)
	ctx := timeout(t)
	c, s := pair(t)
	refuse := accept(ctx, s, db, &symbolonv1.Verdict{Reason: symbolonv1.Reason_REASON_POLICY, Policy: "/prod/no"})
	a, err := Dial(ctx, c, web, asking(encrypted))
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(a, strings.Repeat("x", 60<<10))
	_, err = a.ReadVerdict(ctx)
	var d *DeniedError
	if !errors.As(err, &d) || d.Reason != symbolonv1.Reason_REASON_PEER_REFUSED || d.Peer != symbolonv1.Reason_REASON_POLICY || d.Policy != "/prod/no" {
		t.Fatalf("got %v (%+v)", err, d)
	}
	<-refuse
}

func TestTruncationIsNotAnEnd(t *testing.T) {
	web, db := endpoints(t)
	a, b := tunnel(t, web, db, encrypted, encrypted)
	io.WriteString(a, "half a mess")
	a.wire.tcpConn.CloseWrite() // a FIN at a record boundary, as an attacker would send
	got, err := io.ReadAll(b)
	if string(got) != "half a mess" || !errors.Is(err, ErrTruncated) {
		t.Fatalf("read %q, %v; want ErrTruncated", got, err)
	}
}

func TestResumptionIsJudgedAgain(t *testing.T) {
	ca := newAuthority(t, "acme.example")
	now := time.Now()
	clock := func() time.Time { return now }
	web := NewEndpoint(ca.workload("/prod/web", nil), Options{Now: clock})
	dbCred := ca.workload("/prod/db", nil)
	db := NewEndpoint(dbCred, Options{Now: clock})
	// Sessions are kept by destination, so all connections go to one listener.
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	connect := func() (client *Conn, server accepted, err error) {
		t.Helper()
		ctx := timeout(t)
		c, err := net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
		if err != nil {
			t.Fatal(err)
		}
		s, err := l.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		ch := accept(ctx, s, db, &symbolonv1.Verdict{Accept: true, Protection: encrypted})
		client, err = Dial(ctx, c, web, asking(encrypted))
		if err == nil {
			_, err = client.ReadVerdict(ctx)
		}
		return client, <-ch, err
	}
	if a, b, err := connect(); err != nil || b.err != nil || a.Info().Resumed {
		t.Fatalf("first: %v, %v, resumed %v", err, b.err, a.Info().Resumed)
	}
	a, b, err := connect()
	if err != nil || b.err != nil {
		t.Fatal(err, b.err)
	}
	if !a.Info().Resumed || !b.conn.Info().Resumed {
		t.Fatal("the second handshake was not resumed")
	}
	if b.conn.Peer().Name != "web" || a.Peer().Name != "db" {
		t.Errorf("resumed peers: %v and %v", b.conn.Peer().ID, a.Peer().ID)
	}
	// The domain's bundle goes: as after a revoked root.
	dbCred.Bundles.Remove(ca.td)
	_, b, err = connect()
	if ReasonOf(b.err) != symbolonv1.Reason_REASON_WRONG_TRUST_DOMAIN {
		t.Errorf("server after the bundle went: %v", b.err)
	}
	if err == nil {
		t.Error("the client's resumed session was accepted without a bundle")
	}
}

func TestUnacceptablePeers(t *testing.T) {
	ca, other := newAuthority(t, "acme.example"), newAuthority(t, "evil.example")
	claims := identity.NewAttributes(map[string][]string{"app": {"web"}})
	good := ca.workload("/prod/db", nil)
	for _, tc := range []struct {
		name string
		cred func() *identity.Credential
		want symbolonv1.Reason
	}{
		{"another trust domain", func() *identity.Credential { return other.credential(other.leaf("/prod/web", claims), ca) }, symbolonv1.Reason_REASON_WRONG_TRUST_DOMAIN},
		{"another domain's CA for our name", func() *identity.Credential {
			fake := newAuthority(t, "acme.example")
			c := fake.credential(fake.leaf("/prod/web", claims))
			c.Bundles.Add(x509bundle.FromX509Authorities(ca.td, []*x509.Certificate{ca.root})) // it believes the real one
			return c
		}, symbolonv1.Reason_REASON_PEER_UNVERIFIED},
		{"expired", func() *identity.Credential {
			l := ca.leaf("/prod/web", claims)
			l.NotBefore, l.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
			return ca.credential(l)
		}, symbolonv1.Reason_REASON_SVID_EXPIRED},
		{"two URI SANs", func() *identity.Credential {
			l := ca.leaf("/prod/web", claims)
			l.URIs = append(l.URIs, ca.leaf("/prod/admin", nil).URIs...)
			return ca.credential(l)
		}, symbolonv1.Reason_REASON_SVID_MALFORMED},
		{"a CA as leaf", func() *identity.Credential {
			l := ca.leaf("/prod/web", claims)
			l.IsCA, l.KeyUsage = true, l.KeyUsage|x509.KeyUsageCertSign
			return ca.credential(l)
		}, symbolonv1.Reason_REASON_SVID_MALFORMED},
		{"claims that do not parse", func() *identity.Credential {
			l := ca.leaf("/prod/web", claims)
			l.ExtraExtensions[0].Value = []byte{0x30, 0x03, 0x02, 0x01, 0x09}
			return ca.credential(l)
		}, symbolonv1.Reason_REASON_CLAIMS_MALFORMED},
		{"a host's certificate", func() *identity.Credential { return ca.host("h1") }, symbolonv1.Reason_REASON_NOT_A_WORKLOAD},
	} {
		t.Run(tc.name+" as client", func(t *testing.T) {
			ctx := timeout(t)
			c, s := pair(t)
			ch := accept(ctx, s, NewEndpoint(good, Options{}), nil)
			a, err := Dial(ctx, c, NewEndpoint(tc.cred(), Options{}), asking(encrypted))
			if err == nil {
				_, err = a.ReadVerdict(ctx)
			}
			if err == nil {
				t.Error("the client got a verdict")
			}
			if b := <-ch; ReasonOf(b.err) != tc.want {
				t.Errorf("the server says %v (%v), want %v", ReasonOf(b.err), b.err, tc.want)
			}
		})
		if tc.want == symbolonv1.Reason_REASON_NOT_A_WORKLOAD {
			continue // as a server it may refuse: TestHostCanOnlyRefuse
		}
		t.Run(tc.name+" as server", func(t *testing.T) {
			ctx := timeout(t)
			c, s := pair(t)
			ch := accept(ctx, s, NewEndpoint(tc.cred(), Options{}), &symbolonv1.Verdict{Accept: true, Protection: encrypted})
			asked := false
			_, err := Dial(ctx, c, NewEndpoint(good, Options{}), func(*Peer) (*symbolonv1.Open, error) { asked = true; return nil, io.EOF })
			if ReasonOf(err) != tc.want || asked {
				t.Errorf("the client says %v (%v), asked %v; want %v", ReasonOf(err), err, asked, tc.want)
			}
			c.Close()
			<-ch
		})
	}
}

// The claims of a tunnel's peer are the leaf's, whatever its issuer's certificate says.
func TestClaimsInAnIntermediateCountForNothing(t *testing.T) {
	ca := newAuthority(t, "acme.example")
	e, err := identity.MarshalClaims(identity.NewAttributes(map[string][]string{"app": {"admin"}}))
	if err != nil {
		t.Fatal(err)
	}
	issuer := *ca.issuer
	issuer.ExtraExtensions = append(issuer.ExtraExtensions, e)
	ca.issuer = sign(t, &issuer, ca.root, ca.issueKey, ca.rootKey)
	web := NewEndpoint(ca.workload("/prod/web", map[string][]string{"app": {"web"}}), Options{})
	_, b := tunnel(t, web, NewEndpoint(ca.workload("/prod/db", nil), Options{}), encrypted, encrypted)
	if got := b.Peer().Attributes.Of("app"); len(got) != 1 || got[0].Value != "web" {
		t.Errorf("app = %v, want web alone", got)
	}
}

func TestHostCanOnlyRefuse(t *testing.T) {
	ca := newAuthority(t, "acme.example")
	web, host := NewEndpoint(ca.workload("/prod/web", nil), Options{}), NewEndpoint(ca.host("h1"), Options{})
	for _, tc := range []struct {
		verdict *symbolonv1.Verdict
		reason  symbolonv1.Reason
		peer    symbolonv1.Reason
	}{
		{&symbolonv1.Verdict{Reason: symbolonv1.Reason_REASON_REFUSED}, symbolonv1.Reason_REASON_PEER_REFUSED, symbolonv1.Reason_REASON_REFUSED},
		{&symbolonv1.Verdict{Accept: true, Protection: encrypted}, symbolonv1.Reason_REASON_NOT_A_WORKLOAD, 0},
	} {
		ctx := timeout(t)
		c, s := pair(t)
		ch := accept(ctx, s, host, tc.verdict)
		a, err := Dial(ctx, c, web, func(p *Peer) (*symbolonv1.Open, error) {
			if !p.Host {
				t.Error("the peer does not count as a host")
			}
			return asking(authenticated)(p)
		})
		if err != nil {
			t.Fatal(err)
		}
		_, err = a.ReadVerdict(ctx)
		var d *DeniedError
		if !errors.As(err, &d) || d.Reason != tc.reason || d.Peer != tc.peer {
			t.Errorf("verdict %v: got %v (%+v)", tc.verdict, err, d)
		}
		<-ch
	}
}

// A server that offers less protection than the client demanded is no server of ours.
func TestVerdictCannotDowngrade(t *testing.T) {
	web, db := endpoints(t)
	ctx := timeout(t)
	c, s := pair(t)
	go func() {
		b, _, err := Accept(ctx, s, db)
		if err == nil {
			writeMessage(b.out, &symbolonv1.Verdict{Accept: true, Protection: authenticated})
		}
	}()
	a, err := Dial(ctx, c, web, asking(encrypted))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.ReadVerdict(ctx); ReasonOf(err) != symbolonv1.Reason_REASON_PROTOCOL {
		t.Fatalf("got %v, want a protocol error", err)
	}
}

func TestBadOpens(t *testing.T) {
	web, db := endpoints(t)
	marshal := func(o *symbolonv1.Open) []byte {
		b, err := proto.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
	}
	with := func(change func(*symbolonv1.Open)) []byte {
		o := NewOpen(NewFlowID(), somewhere, encrypted, 1)
		change(o)
		return marshal(o)
	}
	for _, tc := range []struct {
		name  string
		bytes []byte
		want  symbolonv1.Reason
	}{
		{"not protobuf", []byte{0, 0, 0, 3, 0xff, 0xff, 0xff}, symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"too large", []byte{0, 0x40, 0, 1}, symbolonv1.Reason_REASON_OPEN_TOO_LARGE},
		{"gigantic", []byte{0xff, 0xff, 0xff, 0xff}, symbolonv1.Reason_REASON_OPEN_TOO_LARGE},
		{"empty", []byte{0, 0, 0, 0}, symbolonv1.Reason_REASON_VERSION},
		{"version 2", with(func(o *symbolonv1.Open) { o.Version = 2 }), symbolonv1.Reason_REASON_VERSION},
		{"no address", with(func(o *symbolonv1.Open) { o.DestinationIp = nil }), symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"port 0", with(func(o *symbolonv1.Open) { o.DestinationPort = 0 }), symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"port 65536", with(func(o *symbolonv1.Open) { o.DestinationPort = 65536 }), symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"no protection", with(func(o *symbolonv1.Open) { o.Protection = 0 }), symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"unknown protection", with(func(o *symbolonv1.Open) { o.Protection = 9 }), symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"early bytes with encryption", with(func(o *symbolonv1.Open) { o.Early = []byte("x") }), symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"too many early bytes", with(func(o *symbolonv1.Open) {
			o.Protection, o.Early = authenticated, make([]byte, MaxEarly+1)
		}), symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"early bytes of no connection", with(func(o *symbolonv1.Open) {
			o.Protection, o.Early, o.Renews = authenticated, []byte("x"), make([]byte, len(Claim{}))
		}), symbolonv1.Reason_REASON_OPEN_MALFORMED},
		{"short flow id", with(func(o *symbolonv1.Open) { o.FlowId = o.GetFlowId()[:3] }), symbolonv1.Reason_REASON_OPEN_MALFORMED},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := timeout(t)
			c, s := pair(t)
			ch := accept(ctx, s, db, nil)
			a, err := handshake(ctx, c, true, web, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			a.demanded = encrypted
			if _, err := a.out.Write(tc.bytes); err != nil {
				t.Fatal(err)
			}
			_, err = a.ReadVerdict(ctx)
			var d *DeniedError
			if !errors.As(err, &d) || d.Peer != tc.want {
				t.Errorf("the client hears %v (%+v), want %v", err, d, tc.want)
			}
			if b := <-ch; ReasonOf(b.err) != tc.want || b.conn.Peer().Name != "web" {
				t.Errorf("the server says %v, want %v", b.err, tc.want)
			}
		})
	}
}

func TestOpenCutShortTimesOut(t *testing.T) {
	web, db := endpoints(t)
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	c, s := pair(t)
	ch := accept(ctx, s, db, nil)
	a, err := handshake(timeout(t), c, true, web, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	a.out.Write([]byte{0, 0, 0, 40, 1, 2, 3})
	if b := <-ch; ReasonOf(b.err) != symbolonv1.Reason_REASON_HANDSHAKE_TIMEOUT {
		t.Errorf("got %v, want a handshake timeout", b.err)
	}
}

// What answers where there is no proxy.
func TestDestinationsWithoutAProxy(t *testing.T) {
	web, _ := endpoints(t)
	plainTLS := newAuthority(t, "web.example").workload("/x/y", nil)
	for _, tc := range []struct {
		name  string
		serve func(*net.TCPConn)
	}{
		{"speaks first", func(s *net.TCPConn) { io.WriteString(s, "SSH-2.0-OpenSSH_9.2p1\r\n"); io.Copy(io.Discard, s) }},
		{"closes", func(s *net.TCPConn) { s.Close() }},
		{"resets", func(s *net.TCPConn) { s.SetLinger(0); s.Close() }},
		{"answers HTTP", func(s *net.TCPConn) {
			s.Read(make([]byte, 1))
			io.WriteString(s, "HTTP/1.1 400 Bad Request\r\n\r\n")
			io.Copy(io.Discard, s)
		}},
		{"is an HTTPS server", func(s *net.TCPConn) {
			tls.Server(s, &tls.Config{Certificates: []tls.Certificate{*plainTLS.SVID.TLS}, NextProtos: []string{"h2"}}).Handshake()
			s.Close()
		}},
		{"is TLS without ALPN", func(s *net.TCPConn) {
			tls.Server(s, &tls.Config{Certificates: []tls.Certificate{*plainTLS.SVID.TLS}}).Handshake()
			io.Copy(io.Discard, s)
		}},
		{"is TLS 1.2", func(s *net.TCPConn) {
			tls.Server(s, &tls.Config{Certificates: []tls.Certificate{*plainTLS.SVID.TLS}, MaxVersion: tls.VersionTLS12}).Handshake()
			s.Close()
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, s := pair(t)
			done := make(chan struct{})
			go func() { defer close(done); tc.serve(s) }()
			_, err := Dial(timeout(t), c, web, asking(encrypted))
			if ReasonOf(err) != symbolonv1.Reason_REASON_PEER_UNPROTECTED {
				t.Errorf("got %v (%v), want peer-unprotected", ReasonOf(err), err)
			}
			<-done
		})
	}
	t.Run("says nothing", func(t *testing.T) {
		c, _ := pair(t)
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		defer cancel()
		if _, err := Dial(ctx, c, web, asking(encrypted)); ReasonOf(err) != symbolonv1.Reason_REASON_HANDSHAKE_TIMEOUT {
			t.Errorf("got %v, want a handshake timeout", err)
		}
	})
}

func TestResetIsPassedOn(t *testing.T) {
	web, db := endpoints(t)
	for _, p := range []symbolonv1.Protection{encrypted, authenticated} {
		a, b := tunnel(t, web, db, p, p)
		a.Reset()
		b.SetReadDeadline(time.Now().Add(5 * time.Second))
		_, err := b.Read(make([]byte, 1))
		if NetworkReason(err) != symbolonv1.Reason_REASON_RESET {
			t.Errorf("%v: read after the peer's reset: %v", p, err)
		}
	}
}
