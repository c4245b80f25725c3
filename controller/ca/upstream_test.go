package ca_test

import (
	"crypto"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/controller/ca"
	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/identity"
)

// operatorCA is somebody's own CA.
type operatorCA struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newOperatorCA(t *testing.T, key crypto.Signer, by *operatorCA, change func(*x509.Certificate)) *operatorCA {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "Operator " + t.Name()},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if by != nil {
		template.Subject.CommonName += " issuing"
	}
	if change != nil {
		change(template)
	}
	c := &operatorCA{key: key}
	if by == nil {
		by = &operatorCA{template, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.cert, key.Public(), by.key)
	if err != nil {
		t.Fatal(err)
	}
	c.cert = parse(t, [][]byte{der})[0]
	return c
}

// files writes certificates and a key, and a configuration that names them.
func (w *world) files(key crypto.Signer, certs ...*operatorCA) ca.Config {
	w.t.Helper()
	cfg := w.config()
	cfg.UpstreamCert, cfg.UpstreamKey = filepath.Join(w.dir, "upstream.pem"), filepath.Join(w.dir, "upstream.key")
	var text []byte
	for _, c := range certs {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw})...)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		w.t.Fatal(err)
	}
	for path, content := range map[string][]byte{cfg.UpstreamCert: text, cfg.UpstreamKey: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
	return cfg
}

// Under the operator's root or intermediate SVIDs lead to the operator's root, and to
// nothing else; its key is read once, and is in the store sealed only.
func TestOperatorsCA(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, _ := ed25519.GenerateKey(rand.Reader)
	for name, tc := range map[string]struct {
		key   crypto.Signer
		below bool // of an intermediate
	}{
		"ECDSA root": {ecKey(t, elliptic.P384()), false}, "RSA root": {rsaKey, false}, "Ed25519 root": {edKey, false},
		"intermediate": {ecKey(t, elliptic.P256()), true}, "RSA intermediate": {rsaKey, true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, "acme.example")
			top := newOperatorCA(t, tc.key, nil, nil)
			chain := []*operatorCA{top}
			if tc.below {
				top = newOperatorCA(t, ecKey(t, elliptic.P256()), nil, nil)
				signs := newOperatorCA(t, tc.key, top, func(c *x509.Certificate) { c.MaxPathLen = 1 })
				chain = []*operatorCA{signs, top}
			}
			cfg := w.files(tc.key, chain...)
			for range 2 { // the second time from the store, without the files
				st, err := store.Open(filepath.Join(w.dir, "db"))
				if err != nil {
					t.Fatal(err)
				}
				c, err := ca.Open(t.Context(), st, cfg)
				if err != nil {
					t.Fatal(err)
				}
				if roots := c.Roots(); len(roots) != 1 || !roots[0].Equal(top.cert) {
					t.Errorf("roots %v", roots)
				}
				issued, err := c.IssueWorkload(ecKey(t, elliptic.P256()).Public(), spiffeid.RequireFromPath(w.td, "/a/b"), nil, "h1")
				if err != nil {
					t.Fatal(err)
				}
				if p, err := identity.Verify(parse(t, issued.Chain), c.Bundle(), w.now); err != nil || p.ID.Path() != "/a/b" {
					t.Errorf("%v, %v", p.ID, err)
				}
				if want := 1 + len(chain); len(issued.Chain) != want {
					t.Errorf("a chain of %d, want %d", len(issued.Chain), want)
				}
				if err := c.Renew(t.Context()); err != nil {
					t.Error(err)
				}
				if err := st.Close(); err != nil {
					t.Fatal(err)
				}
				_, _ = os.Remove(cfg.UpstreamCert), os.Remove(cfg.UpstreamKey)
			}
			raw, err := os.ReadFile(filepath.Join(w.dir, "db"))
			if err != nil {
				t.Fatal(err)
			}
			der, err := x509.MarshalPKCS8PrivateKey(tc.key)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(raw), string(der[len(der)-32:])) {
				t.Error("the key stands in the store")
			}
			// Nor does it open for another trust domain.
			other := w.config()
			other.TrustDomain = spiffeid.RequireTrustDomainFromString("evil.example")
			if _, err := w.try(other); !errors.Is(err, ca.ErrTrustDomain) {
				t.Errorf("as another trust domain's: %v", err)
			}
		})
	}
}

func TestUnusableOperatorsCA(t *testing.T) {
	key := ecKey(t, elliptic.P256())
	small := ecKey(t, elliptic.P521())
	for name, tc := range map[string]struct {
		config func(w *world) ca.Config
		say    string
	}{
		"another key": {func(w *world) ca.Config {
			return w.files(ecKey(t, elliptic.P256()), newOperatorCA(t, key, nil, nil))
		}, "is not the key of"},
		"a key that others can read": {func(w *world) ca.Config {
			cfg := w.files(key, newOperatorCA(t, key, nil, nil))
			if err := os.Chmod(cfg.UpstreamKey, 0o644); err != nil {
				t.Fatal(err)
			}
			return cfg
		}, "chmod 600"},
		"a kind of key": {func(w *world) ca.Config { return w.files(small, newOperatorCA(t, small, nil, nil)) }, "kind that is not accepted"},
		"no key": {func(w *world) ca.Config {
			cfg := w.files(key, newOperatorCA(t, key, nil, nil))
			_ = os.Remove(cfg.UpstreamKey)
			return cfg
		}, "upstream_key_file"},
		"no certificate": {func(w *world) ca.Config { return w.files(key) }, "no PEM certificate"},
		"no CA": {func(w *world) ca.Config {
			return w.files(key, newOperatorCA(t, key, nil, func(c *x509.Certificate) { c.IsCA = false }))
		}, "no CA certificate"},
		"an intermediate without its root": {func(w *world) ca.Config {
			return w.files(key, newOperatorCA(t, key, newOperatorCA(t, ecKey(t, elliptic.P256()), nil, nil), nil))
		}, "is not signed by"},
		"no room below it": {func(w *world) ca.Config {
			return w.files(key, newOperatorCA(t, key, nil, func(c *x509.Certificate) { c.MaxPathLenZero = true }))
		}, "path length"},
		"constrained to other names": {func(w *world) ca.Config {
			return w.files(key, newOperatorCA(t, key, newOperatorCA(t, key, nil, nil), func(c *x509.Certificate) {
				c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"other.example"}, true
			}), newOperatorCA(t, key, nil, nil))
		}, "name constraint"},
		"expired": {func(w *world) ca.Config {
			return w.files(key, newOperatorCA(t, key, nil, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }))
		}, "valid now"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, "acme.example")
			_, err := w.try(tc.config(w))
			if !errors.Is(err, ca.ErrUpstream) || !strings.Contains(err.Error(), tc.say) {
				t.Errorf("%v, want %q", err, tc.say)
			}
		})
	}
}

// A CA that is in force is not exchanged by a line in the configuration.
func TestOperatorsCAComesTooLate(t *testing.T) {
	w := newWorld(t, "acme.example")
	st, err := store.Open(filepath.Join(w.dir, "db"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Open(t.Context(), st, w.config()); err != nil {
		t.Fatal(err)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	key := ecKey(t, elliptic.P256())
	if _, err := w.try(w.files(key, newOperatorCA(t, key, nil, nil))); !errors.Is(err, ca.ErrUpstream) || !strings.Contains(err.Error(), "first start only") {
		t.Error(err)
	}
}
