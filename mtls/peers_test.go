package mtls

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

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
		return tunnelAt(t, l, web, db)
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
