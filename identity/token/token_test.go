package token

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

var (
	acme  = spiffeid.RequireTrustDomainFromString("acme.example")
	webID = spiffeid.RequireFromString("spiffe://site-a.test/web")
	now   = time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// leaf is a certificate for a key; nothing here asks who signed it.
func leaf(t testing.TB, key crypto.Signer) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: serial, URIs: []*url.URL{webID.URL()}, NotAfter: now.Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func announced(t testing.TB, keys ...*ecdsa.PrivateKey) []*symbolonv1.TokenKey {
	t.Helper()
	var out []*symbolonv1.TokenKey
	for _, k := range keys {
		der, err := x509.MarshalPKIXPublicKey(k.Public())
		if err != nil {
			t.Fatal(err)
		}
		id, err := Thumbprint(k.Public())
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, &symbolonv1.TokenKey{Id: id, PublicKey: der})
	}
	return out
}

// good is a statement that verifies for webID's leaf.
func good(t testing.TB, leaf *x509.Certificate) *Statement {
	t.Helper()
	jkt, err := Thumbprint(leaf.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return &Statement{
		Subject: webID, Audience: acme, Thumbprint: jkt, IssuedAt: now, Expiry: now.Add(MaxLife),
		Claims: identity.NewAttributes(map[string][]string{"app": {"web"}, "env": {"a", "b"}}),
	}
}

func sign(t testing.TB, key *ecdsa.PrivateKey, s *Statement) string {
	t.Helper()
	compact, err := Sign(key, s)
	if err != nil {
		t.Fatal(err)
	}
	return compact
}

// jws signs anything, with any header.
func jws(t testing.TB, alg jose.SignatureAlgorithm, key any, kid, typ, body string) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: kid}}, (&jose.SignerOptions{}).WithType(jose.ContentType(typ)))
	if err != nil {
		t.Fatal(err)
	}
	x, err := signer.Sign([]byte(body))
	if err != nil {
		t.Fatal(err)
	}
	compact, err := x.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return compact
}

func TestVerify(t *testing.T) {
	theirs, other := newKey(t), newKey(t)
	key, forger := newKey(t), newKey(t)
	cert := leaf(t, theirs)
	v := NewVerifier()
	if err := v.Set(acme, announced(t, newKey(t), key)); err != nil {
		t.Fatal(err)
	}
	p, err := identity.NewPrincipal(webID, nil)
	if err != nil {
		t.Fatal(err)
	}
	with := func(change func(*Statement)) string {
		s := good(t, cert)
		change(s)
		return sign(t, key, s)
	}
	kid := announced(t, key)[0].GetId()
	body := `{"sub":"spiffe://site-a.test/web","aud":"acme.example","iat":1782907200,"exp":1782910800,"cnf":{"jkt":"` + good(t, cert).Thumbprint + `"},"claims":{"app":["web"]}}`
	valid := sign(t, key, good(t, cert))
	parts := strings.Split(valid, ".")
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","kid":"`+kid+`","typ":"`+Type+`"}`)) + "." + parts[1] + "."
	for _, tc := range []struct {
		name, token string
		want        error
	}{
		{"good", valid, nil},
		{"as the test writes it", jws(t, jose.ES256, key, kid, Type, body), nil},
		{"a clock that is a little behind", with(func(s *Statement) { s.IssuedAt = now.Add(leeway) }), nil},
		{"nothing", "", ErrInvalid},
		{"junk", strings.Repeat("x", 100), ErrInvalid},
		{"too long", valid + strings.Repeat("A", MaxSize), ErrInvalid},
		{"forged by another's key", sign(t, forger, good(t, cert)), ErrInvalid},
		{"forged under our key's name", jws(t, jose.ES256, forger, kid, Type, body), ErrInvalid},
		{"signed by the workload itself", sign(t, theirs, good(t, cert)), ErrInvalid},
		{"another's claims behind our signature", parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(body, "web\"]", "adm\"]", 1))) + "." + parts[2], ErrInvalid},
		{"no signature", parts[0] + "." + parts[1] + ".", ErrInvalid},
		{"alg none", none, ErrInvalid},
		{"our public key as an HMAC's secret", jws(t, jose.HS256, announced(t, key)[0].GetPublicKey(), kid, Type, body), ErrInvalid},
		{"another type of token", jws(t, jose.ES256, key, kid, "JWT", body), ErrInvalid},
		{"no name of a key", jws(t, jose.ES256, key, "", Type, body), ErrInvalid},
		{"a payload that is no JSON", jws(t, jose.ES256, key, kid, Type, "app=web"), ErrInvalid},
		{"a subject that is no SPIFFE ID", jws(t, jose.ES256, key, kid, Type, strings.Replace(body, "spiffe://", "https://", 1)), ErrInvalid},
		{"bound to nothing", jws(t, jose.ES256, key, kid, Type, strings.Replace(body, "jkt", "kid", 1)), ErrInvalid},
		{"valid for a year", jws(t, jose.ES256, key, kid, Type, strings.Replace(body, "1782910800", "1814436000", 1)), ErrInvalid},
		{"more claims than an SVID may carry", jws(t, jose.ES256, key, kid, Type, strings.Replace(body, `["web"]`, `["`+strings.Join(numbers(65), `","`)+`"]`, 1)), ErrInvalid},
		{"several audiences", jws(t, jose.ES256, key, kid, Type, strings.Replace(body, `"acme.example"`, `["acme.example"]`, 1)), ErrInvalid},
		{"another subject", with(func(s *Statement) { s.Subject = spiffeid.RequireFromString("spiffe://site-a.test/db") }), ErrWrongSubject},
		{"another audience", with(func(s *Statement) { s.Audience = spiffeid.RequireTrustDomainFromString("evil.example") }), ErrWrongSubject},
		{"another key", with(func(s *Statement) { s.Thumbprint = good(t, leaf(t, other)).Thumbprint }), ErrWrongKey},
		{"expired", with(func(s *Statement) { s.IssuedAt, s.Expiry = now.Add(-time.Hour), now }), ErrExpired},
		{"of the future", with(func(s *Statement) { s.IssuedAt, s.Expiry = now.Add(2*time.Minute), now.Add(time.Hour) }), ErrExpired},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for range 2 { // what is remembered is as good or bad
				got, err := v.Verify(tc.token, &p, cert, now)
				if !errors.Is(err, tc.want) || (err == nil) != (tc.want == nil) {
					t.Fatalf("%v, want %v", err, tc.want)
				}
				if err == nil && (got.Issuer != identity.FromToken || got.Attributes.Get("app") != "web" || got.Attributes.Get("spiffe.id") != webID.String()) {
					t.Errorf("%+v", got)
				}
				if err != nil && len(err.Error()) > 512 {
					t.Errorf("an error of %d bytes", len(err.Error()))
				}
			}
		})
	}
	t.Run("a claim about the ID", func(t *testing.T) {
		got, err := v.Verify(with(func(s *Statement) {
			s.Claims = identity.NewAttributes(map[string][]string{"spiffe.trust_domain": {"acme.example"}})
		}), &p, cert, now)
		if err != nil || got.Attributes.Get("spiffe.trust_domain") != "site-a.test" {
			t.Errorf("%+v, %v", got, err)
		}
	})
	t.Run("a key that is withdrawn", func(t *testing.T) {
		if err := v.Set(acme, announced(t, forger)); err != nil {
			t.Fatal(err)
		}
		if _, err := v.Verify(valid, &p, cert, now); !errors.Is(err, ErrInvalid) {
			t.Errorf("%v", err)
		}
	})
	t.Run("no keys at all", func(t *testing.T) {
		if _, err := NewVerifier().Verify(valid, &p, cert, now); !errors.Is(err, ErrInvalid) {
			t.Errorf("%v", err)
		}
	})
}

func isLabel(key string) bool { return !strings.Contains(key, ".") }

func numbers(n int) (out []string) {
	for i := range n {
		out = append(out, fmt.Sprint(i))
	}
	return out
}

// A key set that is not one is refused whole, and the last one holds.
func TestSetRefuses(t *testing.T) {
	key := newKey(t)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	renamed := announced(t, key)
	renamed[0].Id = "x"
	v := NewVerifier()
	if err := v.Set(acme, announced(t, key)); err != nil {
		t.Fatal(err)
	}
	for name, keys := range map[string][]*symbolonv1.TokenKey{
		"another name":  renamed,
		"another curve": announced(t, p384),
		"junk":          {{Id: "x", PublicKey: []byte("junk")}},
		"too many":      make([]*symbolonv1.TokenKey, maxKeys+1),
	} {
		if err := v.Set(acme, keys); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	cert := leaf(t, newKey(t))
	p, _ := identity.NewPrincipal(webID, nil)
	if _, err := v.Verify(sign(t, key, good(t, cert)), &p, cert, now); err != nil {
		t.Error(err)
	}
}

// What an SVID may carry fits into a token, and that into Open, in whatever printable
// characters; what does not is not signed.
func TestSizes(t *testing.T) {
	cert := leaf(t, newKey(t))
	for _, char := range []string{"x", `"`, `\`, "<", "ü"} {
		claims := make(map[string][]string)
		for i := range identity.MaxClaims {
			// 64 claims of 4096 bytes in all: key and overhead take 12.
			claims[fmt.Sprintf("k%03d", i)] = []string{strings.Repeat(char, 50/len(char))}
		}
		s := good(t, cert)
		s.Claims = identity.NewAttributes(claims)
		ext, err := identity.MarshalClaims(s.Claims)
		if err != nil || len(ext.Value) < 3600 {
			t.Fatalf("claims of %d bytes: %v", len(ext.Value), err)
		}
		compact, err := Sign(newKey(t), s)
		if err != nil {
			t.Errorf("%q: %v", char, err)
		}
		t.Logf("%q: claims of %d bytes, a token of %d", char, len(ext.Value), len(compact))
	}
	s := good(t, cert)
	s.Claims = identity.NewAttributes(map[string][]string{"k": numbers(identity.MaxClaims + 1)})
	if _, err := Sign(newKey(t), s); !errors.Is(err, ErrInvalid) {
		t.Errorf("too many claims: %v", err)
	}
}

func TestStatementReadsBack(t *testing.T) {
	key, cert := newKey(t), leaf(t, newKey(t))
	want := good(t, cert)
	got, err := open(sign(t, key, want), map[string]*ecdsa.PublicKey{announced(t, key)[0].GetId(): &key.PublicKey})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(spiffeid.ID{}, spiffeid.TrustDomain{})); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// The payload's form is a promise to other programs.
func TestGoldenPayload(t *testing.T) {
	s := good(t, leaf(t, newKey(t)))
	s.Thumbprint = "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"
	parts := strings.Split(sign(t, newKey(t), s), ".")
	got, err := base64.RawURLEncoding.DecodeString(parts[1])
	const want = `{"sub":"spiffe://site-a.test/web","aud":"acme.example","iat":1782907200,"exp":1782910800,` +
		`"cnf":{"jkt":"NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"},"claims":{"app":["web"],"env":["a","b"]}}`
	if d := cmp.Diff(want, string(got)); d != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, d)
	}
	head, err := base64.RawURLEncoding.DecodeString(parts[0])
	if err != nil || !strings.Contains(string(head), `"alg":"ES256"`) || !strings.Contains(string(head), `"typ":"symbolon-claims+jwt"`) {
		t.Errorf("header %s, %v", head, err)
	}
}

func TestProof(t *testing.T) {
	ec, nonce := newKey(t), []byte("0123456789abcdef")
	ec384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.Signer{ec, ec384, r, ed} {
		cert := leaf(t, key)
		sig, err := Prove(key, nonce, cert)
		if err != nil {
			t.Fatal(err)
		}
		if err := CheckProof(cert, nonce, sig); err != nil {
			t.Errorf("%T: %v", key, err)
		}
		for name, err := range map[string]error{
			"another nonce":       CheckProof(cert, []byte("0123456789abcdeF"), sig),
			"no nonce":            CheckProof(cert, nil, sig),
			"another certificate": CheckProof(leaf(t, key), nonce, sig),
			"another key":         CheckProof(leaf(t, newKey(t)), nonce, sig),
			"no signature":        CheckProof(cert, nonce, nil),
		} {
			if !errors.Is(err, ErrProof) {
				t.Errorf("%T: %s: %v", key, name, err)
			}
		}
	}
}

// What is read of a token that the controller signed stays in the bounds of an SVID's
// claims, and reads the same again.
func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"sub":"spiffe://site-a.test/web","aud":"acme.example","iat":1,"exp":3600,"cnf":{"jkt":"x"},"claims":{"app":["web"]}}`))
	f.Add([]byte(`{"sub":"spiffe://a/b","aud":"a","iat":-9223372036854775808,"exp":9223372036854775807,"cnf":{"jkt":"x"},"claims":{"":["\ud800"]}}`))
	key := newKey(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parse(b)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("%v is no ErrInvalid", err)
			}
			return
		}
		if life := s.Expiry.Sub(s.IssuedAt); life <= 0 || life > MaxLife+leeway {
			t.Errorf("a life of %v", life)
		}
		if _, err := identity.MarshalClaims(s.Claims); err != nil {
			t.Errorf("claims %v: %v", s.Claims, err)
		}
		compact, err := Sign(key, s)
		if err != nil {
			return // longer than a token may be
		}
		again, err := open(compact, map[string]*ecdsa.PublicKey{announced(t, key)[0].GetId(): &key.PublicKey})
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(s, again, cmp.AllowUnexported(spiffeid.ID{}, spiffeid.TrustDomain{})); d != "" {
			t.Errorf("(-first +again):\n%s", d)
		}
	})
}

// Any bytes as a token: no panic, and nobody is believed more than the controller has
// signed (a signature has several spellings).
func FuzzVerify(f *testing.F) {
	key, cert := newKey(f), leaf(f, newKey(f))
	v := NewVerifier()
	if err := v.Set(acme, announced(f, key)); err != nil {
		f.Fatal(err)
	}
	valid := sign(f, key, good(f, cert))
	p, _ := identity.NewPrincipal(webID, nil)
	f.Add(valid)
	f.Add("a.b.c")
	f.Fuzz(func(t *testing.T, s string) {
		if got, err := v.Verify(s, &p, cert, now); err == nil && got.Attributes.Filter(isLabel).String() != "app=web env=a env=b" {
			t.Errorf("%q is believed: %s", s, got.Attributes)
		}
	})
}
