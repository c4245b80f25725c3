package controller_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/token"
)

// foreignCA is what another trust domain signs with.
type foreignCA struct {
	t    *testing.T
	td   spiffeid.TrustDomain
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newForeignCA(t *testing.T, td string) *foreignCA {
	t.Helper()
	f := &foreignCA{t: t, td: spiffeid.RequireTrustDomainFromString(td), key: newECKey(t)}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: td}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		URIs: []*url.URL{f.td.ID().URL()},
	}
	f.cert = f.sign(c, c, f.key)
	return f
}

func newECKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (f *foreignCA) sign(c, parent *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	f.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), f.key)
	if err != nil {
		f.t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		f.t.Fatal(err)
	}
	return out
}

func (f *foreignCA) issue(path string, change func(*x509.Certificate)) *identity.SVID {
	f.t.Helper()
	key := newECKey(f.t)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(2), URIs: []*url.URL{spiffeid.RequireFromPath(f.td, path).URL()},
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		NotBefore:   time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
	}
	if change != nil {
		change(c)
	}
	svid, err := identity.NewSVID([]*x509.Certificate{f.sign(c, f.cert, key)}, key)
	if err != nil {
		f.t.Fatal(err)
	}
	return svid
}

func (f *foreignCA) trustDomain() string {
	f.t.Helper()
	b, err := spiffebundle.FromX509Authorities(f.td, []*x509.Certificate{f.cert}).Marshal()
	if err != nil {
		f.t.Fatal(err)
	}
	return fmt.Sprintf("kind: TrustDomain\nnamespace: /\nname: %s\nclaims: [app]\nbundle: |\n  %s\n", f.td.Name(), b)
}

const tokenPolicy = `
kind: Namespace
name: /
mode: enforce
default: deny
attributes: {app: {}, tier: {}}
---
{kind: Namespace, name: /prod, mode: enforce}
---
{kind: Profile, namespace: /prod, name: by-program, match: {proc.exe: /usr/bin/web}, labels: {tier: front}}
---
{kind: Profile, namespace: /prod, name: by-both, match: {spiffe.trust_domain: site-a.test, proc.exe: /usr/bin/web}, labels: {app: web}}
---
`

// request asks for a nonce, and signs it.
func (h *host) request(t *testing.T, svid *identity.SVID, pairs ...string) *symbolonv1.IssueTokenRequest {
	t.Helper()
	res, err := h.IssueToken(t.Context(), connect.NewRequest(&symbolonv1.IssueTokenRequest{}))
	if err != nil || res.Msg.GetToken() != "" {
		t.Fatalf("%v, %v", res, err)
	}
	sig, err := token.Prove(svid.Key, res.Msg.GetNonce(), svid.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	req := &symbolonv1.IssueTokenRequest{Attributes: attributes(pairs...), Nonce: res.Msg.GetNonce(), Signature: sig}
	for _, c := range svid.Chain {
		req.Chain = append(req.Chain, c.Raw)
	}
	return req
}

func (h *host) tokenKeys(t *testing.T) []*symbolonv1.TokenKey {
	t.Helper()
	s := h.Session(t.Context())
	defer func() { _, _ = s.CloseRequest(), s.CloseResponse() }()
	if err := s.Send(&symbolonv1.SessionRequest{Message: &symbolonv1.SessionRequest_Hello{Hello: &symbolonv1.Hello{}}}); err != nil {
		t.Fatal(err)
	}
	m, err := s.Receive()
	if err != nil {
		t.Fatal(err)
	}
	return m.GetGeneration().GetTokenKeys()
}

// A token says what Profiles make of host, program and SPIFFE ID, and verifies by the
// keys that hosts are given, also after a restart.
func TestIssueToken(t *testing.T) {
	w := newWorld(t)
	site := newForeignCA(t, "site-a.test")
	w.apply(tokenPolicy + site.trustDomain())
	h := w.enrol("/prod", map[string]string{"zone": "x"})
	svid := site.issue("/prod/web", nil)
	issue := func() *symbolonv1.IssueTokenResponse {
		res, err := h.IssueToken(t.Context(), connect.NewRequest(h.request(t, svid, "proc.exe", "/usr/bin/web")))
		if err != nil {
			t.Fatal(err)
		}
		return res.Msg
	}
	v := token.NewVerifier()
	if err := v.Set(spiffeid.RequireTrustDomainFromString("acme.example"), h.tokenKeys(t)); err != nil {
		t.Fatal(err)
	}
	check := func(res *symbolonv1.IssueTokenResponse) {
		t.Helper()
		tok, err := v.Take(res.GetToken(), svid, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		want := identity.NewAttributes(map[string][]string{
			"app": {"web"}, "tier": {"front"}, "host.zone": {"x"}, "host.id": {h.HostID}, "host.hostname": {"db1"},
			"spiffe.id": {"spiffe://site-a.test/prod/web"}, "spiffe.trust_domain": {"site-a.test"},
		})
		got := tok.Principal.Attributes.Filter(func(k string) bool { return want.Has(k) })
		if d := cmp.Diff(want.Filter(got.Has), got); d != "" || tok.Principal.Attributes.Get("app") != "web" || tok.Principal.Attributes.Get("host.zone") != "x" {
			t.Errorf("%s\n(-want +got):\n%s", tok.Principal.Attributes, d)
		}
		if life := time.Until(tok.NotAfter); life > token.MaxLife || life < token.MaxLife-time.Minute || res.GetRotateAt().AsTime().After(tok.NotAfter) {
			t.Errorf("valid for %v, to be renewed at %v", life, res.GetRotateAt().AsTime())
		}
	}
	res := issue()
	check(res)
	if d := cmp.Diff([]string{"/prod/by-both", "/prod/by-program"}, res.GetProfiles()); d != "" {
		t.Error(d)
	}
	w.halt()
	w.start()
	h.ProxyServiceClient = w.proxy(h.TLS())
	check(issue())
}

// Each is refused, whatever else is in order.
func TestIssueTokenRefuses(t *testing.T) {
	w := newWorld(t)
	site, stranger := newForeignCA(t, "site-a.test"), newForeignCA(t, "stranger.test")
	w.apply(tokenPolicy + site.trustDomain())
	h, other := w.enrol("/prod", nil), w.enrol("/prod", nil)
	svid := site.issue("/prod/web", nil)
	own, err := h.issue(t.Context(), t, "proc.exe", "/usr/bin/web")
	if err != nil {
		t.Fatal(err)
	}
	ext, err := identity.MarshalClaims(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name  string
		req   func() *symbolonv1.IssueTokenRequest
		code  connect.Code
		words string
	}{
		{"an attribute that a host may not assert", func() *symbolonv1.IssueTokenRequest { return h.request(t, svid, "host.zone", "y") }, connect.CodePermissionDenied, "host.zone"},
		{"a label", func() *symbolonv1.IssueTokenRequest { return h.request(t, svid, "app", "admin") }, connect.CodePermissionDenied, "app"},
		{"an ID of its own choice", func() *symbolonv1.IssueTokenRequest {
			return h.request(t, svid, "spiffe.id", "spiffe://site-a.test/admin")
		}, connect.CodePermissionDenied, "spiffe.id"},
		{"a trust domain that nobody has let in", func() *symbolonv1.IssueTokenRequest { return h.request(t, stranger.issue("/x/y", nil)) }, connect.CodePermissionDenied, "TrustDomain stranger.test"},
		{"another's CA for a name of that domain", func() *symbolonv1.IssueTokenRequest {
			return h.request(t, newForeignCA(t, "site-a.test").issue("/prod/web", nil))
		}, connect.CodePermissionDenied, "not believed"},
		{"an SVID that has expired", func() *symbolonv1.IssueTokenRequest {
			return h.request(t, site.issue("/prod/web", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }))
		}, connect.CodePermissionDenied, "not believed"},
		{"an SVID of our own", func() *symbolonv1.IssueTokenRequest {
			r := h.request(t, svid)
			r.Chain = own.GetSvid().GetChain()
			return r
		}, connect.CodePermissionDenied, "acme.example"},
		{"an SVID with claims", func() *symbolonv1.IssueTokenRequest {
			return h.request(t, site.issue("/prod/web", func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{ext} }))
		}, connect.CodeInvalidArgument, "carries claims"},
		{"a certificate without its key", func() *symbolonv1.IssueTokenRequest {
			r := h.request(t, site.issue("/prod/other", nil))
			r.Chain = [][]byte{svid.Chain[0].Raw}
			return r
		}, connect.CodePermissionDenied, "no proof"},
		{"a nonce that is none", func() *symbolonv1.IssueTokenRequest {
			r := h.request(t, svid)
			r.Nonce[12] ^= 1
			return r
		}, connect.CodeFailedPrecondition, "nonce"},
		{"another host's nonce", func() *symbolonv1.IssueTokenRequest { return other.request(t, svid) }, connect.CodeFailedPrecondition, "nonce"},
		{"no chain", func() *symbolonv1.IssueTokenRequest { r := h.request(t, svid); r.Chain = nil; return r }, connect.CodeInvalidArgument, "chain"},
		{"a long chain", func() *symbolonv1.IssueTokenRequest {
			r := h.request(t, svid)
			r.Chain = strings9(r.GetChain()[0])
			return r
		}, connect.CodeInvalidArgument, "chain"},
		{"a chain of junk", func() *symbolonv1.IssueTokenRequest {
			r := h.request(t, svid)
			r.Chain = [][]byte{[]byte("junk")}
			return r
		}, connect.CodeInvalidArgument, "no certificate"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := h.IssueToken(t.Context(), connect.NewRequest(tc.req()))
			if connect.CodeOf(err) != tc.code || !strings.Contains(fmt.Sprint(err), tc.words) {
				t.Errorf("%v, want %v with %q", err, tc.code, tc.words)
			}
		})
	}
	t.Run("a nonce of a while ago", func(t *testing.T) {
		r := h.request(t, svid)
		w.offset.Store(int64(6 * time.Minute))
		defer w.offset.Store(0)
		if _, err := h.IssueToken(t.Context(), connect.NewRequest(r)); connect.CodeOf(err) != connect.CodeFailedPrecondition {
			t.Errorf("%v", err)
		}
	})
}

// Nobody who is revoked gets a token, by whatever he is, and a good one again afterwards.
func TestIssueTokenToTheRevoked(t *testing.T) {
	w := newWorld(t)
	site := newForeignCA(t, "site-a.test")
	w.apply(tokenPolicy + site.trustDomain())
	h := w.enrol("/prod", nil)
	svid := site.issue("/prod/web", nil)
	ask := func() error {
		_, err := h.IssueToken(t.Context(), connect.NewRequest(h.request(t, svid, "proc.exe", "/usr/bin/web")))
		return err
	}
	for name, by := range map[string]*symbolonv1.RevokeRequest{
		"ID":     {SpiffeId: "spiffe://site-a.test/prod/web", Reason: "r"},
		"serial": {TrustDomain: "site-a.test", Serial: fmt.Sprintf("%x", svid.Chain[0].SerialNumber), Reason: "r"},
		"labels": {Labels: map[string]string{"app": "web", "tier": "front"}, Reason: "r"},
		"host":   {Host: h.HostID, Reason: "r"},
	} {
		t.Run(name, func(t *testing.T) {
			made := w.revoke(by)
			if err := ask(); connect.CodeOf(err) != connect.CodePermissionDenied || !strings.Contains(fmt.Sprint(err), "revoked") {
				t.Errorf("%v, want that it is revoked", err)
			}
			w.unrevoke(made.GetRecord().GetRevocation().GetId())
			if err := ask(); err != nil {
				t.Errorf("after the revocation: %v", err)
			}
		})
	}
}

func strings9(der []byte) (out [][]byte) {
	for range 9 {
		out = append(out, der)
	}
	return out
}
