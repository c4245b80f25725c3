package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/identity"
)

// above is a CA of another's, with an intermediate of its own, which signs for us.
type above struct {
	t     *testing.T
	clock *time.Time
	// roots are believed; the last one signs.
	roots []*signer
	away  error
	life  time.Duration
	// spoil makes something else of an answer; nil: nothing.
	spoil func(chain, roots []*x509.Certificate) ([]*x509.Certificate, []*x509.Certificate)
	asked int
}

func (a *above) String() string { return "the test's server" }

func (a *above) ca() *CA {
	return &CA{cfg: Config{TrustDomain: spiffeid.RequireTrustDomainFromString("prod.example"), Now: func() time.Time { return *a.clock }}}
}

func (a *above) newRoot() {
	a.t.Helper()
	root, err := a.ca().newRoot(true)
	if err != nil {
		a.t.Fatal(err)
	}
	a.roots = append(a.roots, root)
}

func (a *above) believed() (out []*x509.Certificate) {
	for _, r := range a.roots {
		out = append(out, r.cert)
	}
	return out
}

func (a *above) Sign(_ context.Context, csr []byte, _ time.Duration) (chain, roots []*x509.Certificate, err error) {
	a.t.Helper()
	a.asked++
	if a.away != nil {
		return nil, nil, a.away
	}
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil || req.CheckSignature() != nil {
		a.t.Fatalf("a bad request: %v", err)
	}
	root := a.roots[len(a.roots)-1]
	key, err := newKey()
	if err != nil {
		a.t.Fatal(err)
	}
	sign := func(by *signer, pub any) *x509.Certificate {
		tmpl := a.ca().authority("server", a.life)
		cert, err := create(tmpl, by.cert, pub, by.key)
		if err != nil {
			a.t.Fatal(err)
		}
		return cert
	}
	own := &signer{cert: sign(root, key.Public()), key: key}
	chain, roots = []*x509.Certificate{sign(own, req.PublicKey), own.cert}, a.believed()
	if a.spoil != nil {
		chain, roots = a.spoil(chain, roots)
	}
	return chain, roots, nil
}

// below is a world of a CA below another.
type below struct {
	*testing.T
	above *above
	store store.Store
	file  string
	now   time.Time
}

func newBelow(t *testing.T) *below {
	t.Helper()
	st, err := store.Open(filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.Close() })
	b := &below{T: t, store: st, file: filepath.Join(t.TempDir(), "seal.key"), now: time.Now().Truncate(time.Second)}
	b.above = &above{t: t, clock: &b.now, life: 24 * time.Hour}
	b.above.newRoot()
	return b
}

func (b *below) config() Config {
	return Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString("prod.example"), KeyFile: b.file, External: b.above,
		TTL: 4 * time.Hour, RotateEvery: 30 * time.Minute, Now: func() time.Time { return b.now },
	}
}

func (b *below) open() *CA {
	b.Helper()
	c, err := Open(b.Context(), b.store, b.config())
	if err != nil {
		b.Fatal(err)
	}
	return c
}

// issues holds that c issues what verifies by roots.
func (b *below) issues(c *CA, roots ...*x509.Certificate) *Issued {
	b.Helper()
	key, err := newKey()
	if err != nil {
		b.Fatal(err)
	}
	issued, err := c.IssueWorkload(key.Public(), spiffeid.RequireFromString("spiffe://prod.example/acme/web"), nil, "h1")
	if err != nil {
		b.Fatal(err)
	}
	var chain []*x509.Certificate
	for _, der := range issued.Chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			b.Fatal(err)
		}
		chain = append(chain, cert)
	}
	if _, err := identity.VerifySVID(chain, x509bundle.FromX509Authorities(c.cfg.TrustDomain, roots), b.now); err != nil {
		b.Errorf("issued: %v", err)
	}
	if issued.Leaf.NotAfter.After(c.Status().Intermediate.NotAfter) {
		b.Error("an SVID outlives what has signed it")
	}
	return issued
}

// What another CA signs is renewed at half of its life; while that CA is away, what is valid
// signs on, over restarts too, and what is not stops the start.
func TestBelowAnotherCA(t *testing.T) {
	b := newBelow(t)
	c := b.open()
	b.issues(c, b.above.believed()...)
	first := c.Status()
	if !first.Upstream || first.Stranded || len(c.Roots()) != 1 || c.Pin() != Pin(b.above.roots[0].cert) {
		t.Errorf("status: %+v", first)
	}
	if want := first.Intermediate.NotBefore.Add(first.Intermediate.NotAfter.Sub(first.Intermediate.NotBefore) / 2); !first.Renewal.Equal(want) {
		t.Errorf("renewal at %v, want %v", first.Renewal, want)
	}
	if err := c.Renew(t.Context()); err != nil || b.above.asked != 1 {
		t.Errorf("asked %d times before it is due, %v", b.above.asked, err)
	}

	b.above.away = errors.New("away")
	b.now = b.now.Add(13 * time.Hour)
	if err := c.Renew(t.Context()); !errors.Is(err, b.above.away) {
		t.Errorf("renewed: %v", err)
	}
	b.issues(c, b.above.believed()...)
	c = b.open()
	if s := c.Status(); !s.Intermediate.Equal(first.Intermediate) {
		t.Error("a restart has another intermediate")
	}
	b.issues(c, b.above.believed()...)
	if _, _, err := c.RotateIntermediate(t.Context(), "op"); !errors.Is(err, b.above.away) {
		t.Errorf("rotated: %v", err)
	}

	b.above.away = nil
	if err := c.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s := c.Status(); s.Intermediate.Equal(first.Intermediate) || s.Replaced.IsZero() || s.EarlierUntil.After(first.Intermediate.NotAfter) {
		t.Errorf("after renewal: %+v", s)
	}
	b.issues(b.open(), b.above.believed()...)

	b.above.away = errors.New("away")
	b.now = b.now.Add(30 * time.Hour)
	if _, err := Open(t.Context(), b.store, b.config()); !errors.Is(err, b.above.away) {
		t.Errorf("a start with nothing valid: %v", err)
	}
	b.above.away = nil
	b.issues(b.open(), b.above.believed()...)
}

// Roots come and go above us: what is believed follows, is numbered, and outlives a restart;
// what leads to a root that has gone is renewed at once.
func TestRootsOfAnotherCA(t *testing.T) {
	b := newBelow(t)
	c := b.open()
	_, version := c.Trust()
	if changed, err := c.SetRoots(t.Context(), b.above.believed()); changed || err != nil {
		t.Errorf("the same roots: %v, %v", changed, err)
	}
	if changed, err := c.SetRoots(t.Context(), nil); changed || err != nil {
		t.Errorf("no roots: %v, %v", changed, err)
	}
	b.above.newRoot()
	if changed, err := c.SetRoots(t.Context(), b.above.believed()); !changed || err != nil {
		t.Fatalf("another root: %v, %v", changed, err)
	}
	roots, next := c.Trust()
	if len(roots) != 2 || next <= version || c.Pin() != Pin(b.above.roots[0].cert) || c.Status().Stranded {
		t.Errorf("%d roots, version %d after %d, %+v", len(roots), next, version, c.Status())
	}
	c = b.open()
	if roots, again := c.Trust(); len(roots) != 2 || again != next {
		t.Errorf("after a restart: %d roots, version %d", len(roots), again)
	}
	b.issues(c, b.above.roots[0].cert)

	// The first one is withdrawn, while what we have leads to it.
	b.above.roots = b.above.roots[1:]
	if changed, err := c.SetRoots(t.Context(), b.above.believed()); !changed || err != nil {
		t.Fatalf("a root fewer: %v, %v", changed, err)
	}
	if roots := c.Roots(); len(roots) != 1 || !roots[0].Equal(b.above.roots[0].cert) || !c.Status().Stranded {
		t.Errorf("what was withdrawn is believed: %d roots, %+v", len(roots), c.Status())
	}
	if err := c.Renew(t.Context()); err != nil || c.Status().Stranded {
		t.Errorf("not renewed at once: %v", err)
	}
	b.issues(c, b.above.roots[0].cert)
}

// An answer that is no CA for us changes nothing.
func TestAnotherCAsBadAnswers(t *testing.T) {
	b := newBelow(t)
	c := b.open()
	was := c.Status().Intermediate
	other := newBelow(t)
	key := func() *ecdsa.PrivateKey {
		k, err := newKey()
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	root := b.above.roots[0]
	forKey := func(change func(*x509.Certificate)) *x509.Certificate {
		tmpl := b.above.ca().authority("x", time.Hour)
		change(tmpl)
		cert, err := create(tmpl, root.cert, key().Public(), root.key)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	type certs = []*x509.Certificate
	for name, spoil := range map[string]func(chain, roots certs) (certs, certs){
		"nothing":  func(_, roots certs) (certs, certs) { return nil, roots },
		"no roots": func(chain, _ certs) (certs, certs) { return chain, nil },
		"another's key": func(chain, roots certs) (certs, certs) {
			return append(certs{forKey(func(*x509.Certificate) {})}, chain[1:]...), roots
		},
		"another's root": func(chain, _ certs) (certs, certs) { return chain, other.above.believed() },
		"a hole":         func(chain, roots certs) (certs, certs) { return chain[:1], roots },
		"no CA above": func(chain, roots certs) (certs, certs) {
			return append(chain, forKey(func(c *x509.Certificate) { c.IsCA = false })), roots
		},
	} {
		b.above.spoil = spoil
		if _, _, err := c.RotateIntermediate(t.Context(), "op"); !errors.Is(err, ErrUpstream) {
			t.Errorf("%s: %v", name, err)
		}
		if !c.Status().Intermediate.Equal(was) || len(c.Roots()) != 1 || c.Status().Stranded {
			t.Errorf("%s: it is in force", name)
		}
	}
	b.above.spoil = nil
	b.issues(c, b.above.believed()...)
}

// A store is either's: the one with a root of its own, or the one below another's.
func TestAnotherCAsStoreIsNotOurs(t *testing.T) {
	b := newBelow(t)
	c := b.open()
	if _, err := c.StartRoot(t.Context(), "op"); !errors.Is(err, ErrUpstream) || !strings.Contains(err.Error(), "rotated there") {
		t.Errorf("the root is rotated here: %v", err)
	}
	alone := b.config()
	alone.External = nil
	if _, err := Open(t.Context(), b.store, alone); !errors.Is(err, ErrUpstream) || !strings.Contains(err.Error(), "ca.upstream_spire_server") {
		t.Errorf("a root of its own beside it: %v", err)
	}
	elsewhere := b.config()
	elsewhere.TrustDomain = spiffeid.RequireTrustDomainFromString("other.example")
	if _, err := Open(t.Context(), b.store, elsewhere); !errors.Is(err, ErrTrustDomain) {
		t.Errorf("another trust domain: %v", err)
	}
	own := newBelow(t)
	alone = own.config()
	alone.External = nil
	if _, err := Open(t.Context(), own.store, alone); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), own.store, own.config()); !errors.Is(err, ErrUpstream) || !strings.Contains(err.Error(), "data_dir") {
		t.Errorf("below another with a root of its own: %v", err)
	}
}
