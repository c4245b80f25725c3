package identity

import (
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const webID = "spiffe://acme.example/acme/prod/web"

var webClaims = Attributes{{"app", "web"}, {"env", "prod"}}

func TestVerifyReadsNameAndClaimsOfTheLeaf(t *testing.T) {
	root := newRoot(t, "acme.example")
	ca := root.intermediate(nil)
	leaf := ca.issue(webID, webClaims, nil)
	p, err := Verify([]*x509.Certificate{leaf, ca.cert}, x509bundle.NewSet(root.bundle()), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	want := Principal{
		ID: spiffeid.RequireFromString(webID), Namespace: "/acme/prod", Name: "web",
		Attributes: Attributes{{"app", "web"}, {"env", "prod"}, {"spiffe.id", webID}, {"spiffe.trust_domain", "acme.example"}},
		Issuer:     FromExtension,
	}
	if d := cmp.Diff(want, p, cmp.AllowUnexported(spiffeid.ID{}, spiffeid.TrustDomain{})); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// hugeCA has an RSA key that is larger than any in TLS.
func hugeCA(t *testing.T, by *authority) *x509.Certificate {
	t.Helper()
	key := &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 1<<17, 1), E: 1<<31 - 1}
	return sign(t, caTemplate(t, "root", by.cert.URIs[0].String()), by.cert, key, by.key)
}

// Each is an attack, or what careless PKI software produces.
func TestVerifyRefuses(t *testing.T) {
	root := newRoot(t, "acme.example")
	ca := root.intermediate(nil)
	foreign := newRoot(t, "evil.example")
	impostor := newRoot(t, "acme.example") // the right name, another key
	bundles := x509bundle.NewSet(root.bundle())
	federated := x509bundle.NewSet(root.bundle(), foreign.bundle())
	now := time.Now()

	under := func(a *authority, leaf *x509.Certificate) []*x509.Certificate {
		return []*x509.Certificate{leaf, a.cert}
	}
	leaf := func(change func(*x509.Certificate)) []*x509.Certificate {
		return under(ca, ca.issue(webID, webClaims, change))
	}
	// A workload that signs with its own SVID.
	holder := &authority{t: t, key: newTestKey(t)}
	holder.cert = ca.issueFor(holder.key.Public(), webID, nil, nil)
	forged := holder.issue("spiffe://acme.example/acme/prod/db", nil, nil)
	// The same, by one whom nobody has certified.
	stranger := &authority{t: t, key: newTestKey(t)}
	stranger.cert = impostor.issueFor(stranger.key.Public(), webID, nil, nil)
	forgedTwice := stranger.issue("spiffe://acme.example/acme/prod/db", nil, nil)
	// An intermediate that has expired under a leaf that has not.
	stale := root.intermediate(func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Minute) })
	constrained := root.intermediate(func(c *x509.Certificate) {
		c.PermittedURIDomains = []string{"other.example"}
		c.PermittedDNSDomainsCritical = true
	})

	for _, tt := range []struct {
		name    string
		chain   []*x509.Certificate
		bundles x509bundle.Source
		want    error
	}{
		{"nothing", nil, bundles, ErrMalformedSVID},
		{"no bundles at all", leaf(nil), nil, ErrNoBundle},
		{"another trust domain", under(foreign, foreign.issue("spiffe://evil.example/x/y", nil, nil)), bundles, ErrNoBundle},
		{"a foreign root for our trust domain", under(foreign, foreign.issue(webID, webClaims, nil)), federated, ErrUntrusted},
		{"our root for a foreign trust domain", under(ca, ca.issue("spiffe://evil.example/x/y", nil, nil)), federated, ErrUntrusted},
		{"a root of the same name", under(impostor, impostor.issue(webID, webClaims, nil)), bundles, ErrUntrusted},
		{"self-signed", func() []*x509.Certificate {
			self := &authority{t: t, key: newTestKey(t), cert: &x509.Certificate{Subject: pkix.Name{CommonName: "me"}}}
			return []*x509.Certificate{self.issueFor(self.key.Public(), webID, webClaims, nil)}
		}(), bundles, ErrUntrusted},
		{"intermediate missing", leaf(nil)[:1], bundles, ErrUntrusted},
		{"expired", leaf(func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Second) }), bundles, ErrExpired},
		{"not yet valid", leaf(func(c *x509.Certificate) { c.NotBefore = now.Add(time.Minute) }), bundles, ErrExpired},
		{"expired intermediate", under(stale, stale.issue(webID, nil, nil)), bundles, ErrExpired},
		{"expired and forged", under(impostor, impostor.issue(webID, nil, func(c *x509.Certificate) {
			c.NotAfter = now.Add(-time.Second)
		})), bundles, ErrUntrusted},
		{"a key above it that takes seconds to verify by", append(leaf(nil), hugeCA(t, root)), bundles, ErrMalformedSVID},
		{"two URI SANs", leaf(func(c *x509.Certificate) {
			c.URIs = append(c.URIs, mustURI(t, "spiffe://acme.example/acme/prod/db"))
		}), bundles, ErrMalformedSVID},
		{"a SPIFFE ID and an address", leaf(func(c *x509.Certificate) {
			c.URIs = append(c.URIs, mustURI(t, "https://acme.example/"))
		}), bundles, ErrMalformedSVID},
		{"no URI SAN", leaf(func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"acme.example"} }), bundles, ErrMalformedSVID},
		{"not a SPIFFE ID", leaf(func(c *x509.Certificate) { c.URIs = []*url.URL{mustURI(t, "https://acme.example/web")} }), bundles, ErrMalformedSVID},
		{"a CA as leaf", []*x509.Certificate{root.intermediate(func(c *x509.Certificate) {
			c.URIs = []*url.URL{mustURI(t, webID)}
			c.KeyUsage |= x509.KeyUsageDigitalSignature
		}).cert}, bundles, ErrMalformedSVID},
		{"may sign certificates", leaf(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), bundles, ErrMalformedSVID},
		{"may sign CRLs", leaf(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }), bundles, ErrMalformedSVID},
		{"no digitalSignature", leaf(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }), bundles, ErrMalformedSVID},
		{"no key usage", leaf(func(c *x509.Certificate) { c.KeyUsage = 0 }), bundles, ErrMalformedSVID},
		{"server only", leaf(func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }), bundles, ErrMalformedSVID},
		{"an SVID signs another", []*x509.Certificate{forged, holder.cert, ca.cert}, bundles, ErrNotCA},
		{"a forger's SVID signs another", []*x509.Certificate{forgedTwice, stranger.cert, ca.cert}, bundles, ErrUntrusted},
		{"an intermediate of other names", under(constrained, constrained.issue(webID, nil, nil)), bundles, ErrNameConstrained},
		{"too many certificates", append(leaf(nil), ca.cert, ca.cert, ca.cert, ca.cert, ca.cert, ca.cert, ca.cert), bundles, ErrMalformedSVID},
		{"the trust domain itself", under(ca, ca.issue("spiffe://acme.example", nil, nil)), bundles, ErrNotWorkload},
		{"a host", under(ca, ca.issue("spiffe://acme.example/symbolon/host/7", webClaims, nil)), bundles, ErrNotWorkload},
		{"a controller", under(ca, ca.issue("spiffe://acme.example/symbolon/controller", nil, nil)), bundles, ErrNotWorkload},
		{"malformed claims", leaf(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: ClaimsOID, Value: []byte{0x30, 0}}}
		}), bundles, ErrMalformedClaims},
		{"critical claims", leaf(func(c *x509.Certificate) { c.ExtraExtensions[0].Critical = true }), bundles, ErrMalformedClaims},
		{"something else critical", leaf(func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 25, 9}, Critical: true, Value: []byte{5, 0}})
		}), bundles, ErrUntrusted},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := Verify(tt.chain, tt.bundles, now)
			if !errors.Is(err, tt.want) {
				t.Errorf("Verify: %v, %v; want %v", p.ID, err, tt.want)
			}
			p, err = NewVerifiedCache(4).Verify(tt.chain, tt.bundles, now)
			if !errors.Is(err, tt.want) || !p.ID.IsZero() {
				t.Errorf("VerifiedCache.Verify: %v, %v; want %v", p.ID, err, tt.want)
			}
		})
	}
}

// TestRefusalsAreShort: a stranger's certificates do not write our logs.
func TestRefusalsAreShort(t *testing.T) {
	const huge = 300 << 10
	loud := strings.Repeat("A", huge)
	root := newRoot(t, "acme.example")
	stranger := newRoot(t, "acme.example")
	named := stranger.intermediate(func(c *x509.Certificate) { c.Subject.CommonName = loud })
	// The candidate issuer's name is what crypto/x509 quotes.
	twin := root.intermediate(func(c *x509.Certificate) { c.Subject = named.cert.Subject })
	constrained := root.intermediate(func(c *x509.Certificate) {
		c.PermittedDNSDomains, c.PermittedDNSDomainsCritical = []string{"acme.example"}, true
	})
	now := time.Now()
	for name, chain := range map[string][]*x509.Certificate{
		"an intermediate's name": {named.issue(webID, nil, nil), twin.cert},
		"a DNS name": {constrained.issue(webID, nil, func(c *x509.Certificate) {
			c.DNSNames = []string{strings.Repeat("a.", huge/2) + "example"}
		}), constrained.cert},
		"a SPIFFE ID":                {stranger.issue("spiffe://acme.example/"+loud, nil, nil)},
		"a trust domain":             {stranger.issue("spiffe://"+strings.ToLower(loud)+"/x/y", nil, nil)},
		"the SPIFFE ID of a CA":      {stranger.intermediate(func(c *x509.Certificate) { c.URIs = []*url.URL{mustURI(t, "spiffe://acme.example/"+loud)} }).cert},
		"a SPIFFE ID without claims": {root.issue("spiffe://acme.example/"+loud, nil, nil)},
	} {
		for from, verify := range map[string]func([]*x509.Certificate, x509bundle.Source, time.Time) (Principal, error){
			"Verify": Verify, "VerifiedCache": NewVerifiedCache(4).Verify,
		} {
			_, err := verify(chain, x509bundle.NewSet(root.bundle()), now)
			if err == nil {
				t.Errorf("%s: %s: accepted", from, name)
			} else if n := len(err.Error()); n > 4096 {
				t.Errorf("%s: %s: an error of %d bytes: %.100s", from, name, n, err)
			}
		}
	}
	key := newTestKey(t)
	long := root.issueFor(key.Public(), "spiffe://acme.example/symbolon/host/"+loud, nil, nil)
	if _, err := NewHostSVID([]*x509.Certificate{long}, key); !errors.Is(err, ErrMalformedSVID) || len(err.Error()) > 4096 {
		t.Errorf("NewHostSVID: %.100v", err)
	}
	// It still says what is wrong.
	if _, err := Verify([]*x509.Certificate{named.issue(webID, nil, nil)}, root.bundle(), now); !errors.Is(err, ErrUntrusted) || !strings.Contains(err.Error(), "no path to a root") {
		t.Errorf("%.200v", err)
	}
}

func TestClaimsInAnIntermediateMeanNothing(t *testing.T) {
	root := newRoot(t, "acme.example")
	ext, err := MarshalClaims(Attributes{{"app", "admin"}})
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*x509.Certificate){
		"claims": func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{ext} },
		"a workload's name": func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{ext}
			c.URIs = []*url.URL{mustURI(t, "spiffe://acme.example/acme/prod/admin")}
		},
		"claims that do not parse": func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: ClaimsOID, Value: []byte("?")}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			ca := root.intermediate(change)
			for _, claims := range []Attributes{nil, webClaims} {
				leaf := ca.issue(webID, claims, nil)
				p, err := Verify([]*x509.Certificate{leaf, ca.cert}, root.bundle(), time.Now())
				if err != nil {
					t.Fatal(err)
				}
				if p.ID.String() != webID || p.Attributes.Get("app") != claims.Get("app") {
					t.Errorf("%s with app=%q, want %s with app=%q", p.ID, p.Attributes.Get("app"), webID, claims.Get("app"))
				}
			}
		})
	}
}

func TestClaimsCannotSpeakForTheCertificate(t *testing.T) {
	root := newRoot(t, "acme.example")
	leaf := root.issue(webID, Attributes{{"spiffe.id", "spiffe://acme.example/acme/prod/db"}, {"spiffe.trust_domain", "evil.example"}}, nil)
	p, err := Verify([]*x509.Certificate{leaf}, root.bundle(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(Attributes{{"spiffe.id", webID}, {"spiffe.trust_domain", "acme.example"}}, p.Attributes); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestVerifySVIDTakesHosts(t *testing.T) {
	root := newRoot(t, "acme.example")
	leaf := root.issue("spiffe://acme.example/symbolon/host/7", nil, nil)
	id, err := VerifySVID([]*x509.Certificate{leaf}, root.bundle(), time.Now())
	if err != nil || id.String() != "spiffe://acme.example/symbolon/host/7" {
		t.Errorf("%s, %v", id, err)
	}
	if _, err := VerifySVID([]*x509.Certificate{leaf}, newRoot(t, "acme.example").bundle(), time.Now()); !errors.Is(err, ErrUntrusted) {
		t.Errorf("another root: %v", err)
	}
}

func TestVerifiedCache(t *testing.T) {
	root, next := newRoot(t, "acme.example"), newRoot(t, "acme.example")
	ca := root.intermediate(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(30 * time.Minute) })
	leaf := ca.issue(webID, webClaims, nil)
	chain := []*x509.Certificate{leaf, ca.cert}
	set := x509bundle.NewSet(root.bundle())
	now := time.Now()
	c := NewVerifiedCache(2)
	for range 2 {
		if p, err := c.Verify(chain, set, now); err != nil || p.Attributes.Get("app") != "web" {
			t.Fatalf("%v, %v", p, err)
		}
	}
	if c.Len() != 1 {
		t.Fatalf("%d entries", c.Len())
	}

	t.Run("ends with the first certificate of the path to end", func(t *testing.T) {
		if _, err := c.Verify(chain, set, now.Add(31*time.Minute)); !errors.Is(err, ErrExpired) {
			t.Errorf("got %v", err)
		}
		if c.Len() != 0 {
			t.Error("an expired chain is kept")
		}
		if _, err := c.Verify(chain, set, now); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("does not outlive a root that is withdrawn in place", func(t *testing.T) {
		set.Add(next.bundle())
		if _, err := c.Verify(chain, set, now); !errors.Is(err, ErrUntrusted) {
			t.Errorf("got %v", err)
		}
		set.Add(root.bundle())
		b, _ := set.Get(spiffeid.RequireTrustDomainFromString("acme.example"))
		if _, err := c.Verify(chain, set, now); err != nil {
			t.Fatal(err)
		}
		b.RemoveX509Authority(root.cert)
		if _, err := c.Verify(chain, set, now); !errors.Is(err, ErrUntrusted) {
			t.Errorf("got %v", err)
		}
		set.Add(root.bundle())
		set.Remove(b.TrustDomain())
		if _, err := c.Verify(chain, set, now); !errors.Is(err, ErrNoBundle) {
			t.Errorf("got %v", err)
		}
		set.Add(root.bundle())
	})
	t.Run("another intermediate is another chain", func(t *testing.T) {
		if _, err := c.Verify([]*x509.Certificate{leaf}, set, now); !errors.Is(err, ErrUntrusted) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("is bounded, and refusals push nobody out", func(t *testing.T) {
		for range 5 {
			l := ca.issue(webID, nil, nil)
			if _, err := c.Verify([]*x509.Certificate{l, ca.cert}, set, now); err != nil {
				t.Fatal(err)
			}
		}
		if c.Len() != 2 {
			t.Errorf("%d entries, want 2", c.Len())
		}
		if _, err := c.Verify(chain, set, now); err != nil {
			t.Fatal(err)
		}
		for range 5 {
			l := next.issue(webID, nil, nil)
			if _, err := c.Verify([]*x509.Certificate{l}, set, now); err == nil {
				t.Fatal("accepted")
			}
		}
		if !c.seen.Contains(verifiedKey(chain, []*x509.Certificate{root.cert})) {
			t.Error("a refused chain took the place of a good one")
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	root := newRoot(b, "acme.example")
	ca := root.intermediate(nil)
	chain := []*x509.Certificate{ca.issue(webID, webClaims, nil), ca.cert}
	set := x509bundle.NewSet(root.bundle())
	now := time.Now()
	b.Run("first", func(b *testing.B) {
		for b.Loop() {
			if _, err := Verify(chain, set, now); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("cached", func(b *testing.B) {
		c := NewVerifiedCache(16)
		for b.Loop() {
			if _, err := c.Verify(chain, set, now); err != nil {
				b.Fatal(err)
			}
		}
	})
}
