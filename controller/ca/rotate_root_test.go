package ca_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/controller/ca"
	"github.com/symbolon/symbolon/controller/seal"
	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/identity"
)

// steps is a CA whose controller is restarted after every step.
type steps struct {
	*world
	cfg ca.Config
	st  store.Store
	*ca.CA
}

func newSteps(t *testing.T) *steps {
	w := newWorld(t, "acme.example")
	s := &steps{world: w, cfg: w.config()}
	s.restart()
	t.Cleanup(func() { _ = s.st.Close() })
	return s
}

func (s *steps) restart() {
	s.t.Helper()
	if s.st != nil {
		if err := s.st.Close(); err != nil {
			s.t.Fatal(err)
		}
	}
	var err error
	if s.st, err = store.Open(filepath.Join(s.dir, "db")); err != nil {
		s.t.Fatal(err)
	}
	if s.CA, err = ca.Open(s.t.Context(), s.st, s.cfg); err != nil {
		s.t.Fatal(err)
	}
}

// take takes a step, sees that it is the same after a restart, and that to take it again
// changes nothing.
func (s *steps) take(step func(*ca.CA) (bool, error)) {
	s.t.Helper()
	if changed, err := step(s.CA); err != nil || !changed {
		s.t.Fatalf("changed %v, %v", changed, err)
	}
	before, roots := s.Status(), s.Roots()
	issued := s.issue(s.CA)
	s.restart()
	after := s.Status()
	if before.RootRotation.Phase != after.RootRotation.Phase || before.RootRotation.Version != after.RootRotation.Version ||
		before.RootRotation.Crossed != after.RootRotation.Crossed || !before.Intermediate.Equal(after.Intermediate) || !sameRoots(roots, s.Roots()) {
		s.t.Errorf("after a restart: %+v, before: %+v", after, before)
	}
	s.verifies(s.CA, "of before the restart", issued.Chain)
	s.verifies(s.CA, "of after the restart", s.issue(s.CA).Chain)
	if changed, err := step(s.CA); err != nil || changed {
		s.t.Errorf("again: changed %v, %v", changed, err)
	}
	if again := s.Status(); again.RootRotation.Version != after.RootRotation.Version || !again.Intermediate.Equal(after.Intermediate) {
		s.t.Errorf("again: %+v, before: %+v", again, after)
	}
}

func sameRoots(a, b []*x509.Certificate) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !a[i].Equal(b[i]) {
			return false
		}
	}
	return true
}

func (s *steps) start() {
	s.t.Helper()
	s.take(func(c *ca.CA) (bool, error) { return c.StartRoot(s.t.Context(), "a") })
}
func (s *steps) sign() {
	s.t.Helper()
	s.take(func(c *ca.CA) (bool, error) { return c.SignRoot(s.t.Context(), "b") })
}
func (s *steps) finish() {
	s.t.Helper()
	s.take(func(c *ca.CA) (bool, error) { return c.FinishRoot(s.t.Context(), "c") })
}
func (s *steps) abort() {
	s.t.Helper()
	s.take(func(c *ca.CA) (bool, error) { return c.AbortRoot(s.t.Context()) })
}

// by verifies as one does who believes these roots.
func (s *steps) by(chain [][]byte, roots ...*x509.Certificate) error {
	_, err := identity.VerifySVID(parse(s.t, chain), x509bundle.FromX509Authorities(s.td, roots), s.now)
	return err
}

// has tells whether something lies in the store.
func (s *steps) has(key string) bool {
	s.t.Helper()
	_, err := s.st.Get(s.t.Context(), key)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		s.t.Fatal(err)
	}
	return err == nil
}

// Through all phases: who believes what, by which roots each certificate verifies, and
// what is left of keys.
func TestRootRotation(t *testing.T) {
	s := newSteps(t)
	if _, v := s.Trust(); v != 0 || s.Status().RootRotation != (ca.RootRotation{}) {
		t.Errorf("before: %+v", s.Status())
	}
	old, first := s.Roots()[0], s.issue(s.CA)

	s.start()
	roots, published := s.Trust()
	if len(roots) != 2 || !roots[0].Equal(old) || published == 0 {
		t.Fatalf("published: %d roots, version %d", len(roots), published)
	}
	next := roots[1]
	if bytes.Equal(next.RawSubject, old.RawSubject) || bytes.Equal(next.RawSubjectPublicKeyInfo, old.RawSubjectPublicKeyInfo) {
		t.Error("the next root has the old one's name or key")
	}
	if status := s.Status(); !status.Root.Equal(old) || !status.RootRotation.Other.Equal(next) || s.Pin() != ca.Pin(old) || status.RootRotation.StartedBy != "a" {
		t.Errorf("%+v", status)
	}
	if !s.has("ca/next-root") {
		t.Error("the next root is not in the store")
	}
	second := s.issue(s.CA)
	if err := s.by(second.Chain, next); !errors.Is(err, identity.ErrUntrusted) {
		t.Errorf("the next root signs before it is believed: %v", err)
	}

	s.sign()
	roots, signed := s.Trust()
	if len(roots) != 2 || !roots[0].Equal(next) || !roots[1].Equal(old) || signed != published {
		t.Fatalf("signing: %v, version %d, was %d", roots, signed, published)
	}
	status := s.Status()
	if r := status.RootRotation; !status.Root.Equal(next) || !r.Other.Equal(old) || !r.Crossed || s.Pin() != ca.Pin(next) || r.SignedBy != "b" || status.EarlierUntil.IsZero() {
		t.Errorf("%+v", status)
	}
	if s.has("ca/next-root") {
		t.Error("the next root's key lies in two places")
	}
	third := s.issue(s.CA)
	for what, root := range map[string]*x509.Certificate{"the new root alone": next, "the old root alone, by the cross-signed one": old} {
		if err := s.by(third.Chain, root); err != nil {
			t.Errorf("by %s: %v", what, err)
		}
	}
	for what, is := range map[string]*ca.Issued{"first": first, "second": second} {
		s.verifies(s.CA, what, is.Chain)
		if !s.OfOldRoot(is.Issuer()) {
			t.Errorf("%s is not known to be of the old root", what)
		}
	}
	if s.OfOldRoot(third.Issuer()) {
		t.Error("what the new root signs counts as the old one's")
	}
	if _, _, err := s.RotateIntermediate(t.Context(), "d"); err != nil {
		t.Fatal(err)
	}
	s.restart()
	if s.OfOldRoot(third.Issuer()) || s.OfOldRoot(s.issue(s.CA).Issuer()) || !s.OfOldRoot(second.Issuer()) {
		t.Error("the new root's second intermediate, or its first, counts as the old one's")
	}

	s.finish()
	roots, finished := s.Trust()
	if len(roots) != 1 || !roots[0].Equal(next) || finished <= signed {
		t.Fatalf("finished: %v, version %d, was %d", roots, finished, signed)
	}
	for what, is := range map[string]*ca.Issued{"first": first, "second": second} {
		if err := s.by(is.Chain, s.Roots()...); !errors.Is(err, identity.ErrUntrusted) {
			t.Errorf("%s, which the old root has signed: %v", what, err)
		}
	}
	s.verifies(s.CA, "what the new one has signed", third.Chain)
	if is := s.issue(s.CA); len(is.Chain) != 2 {
		t.Errorf("a chain of %d: the cross-signed root is still shown", len(is.Chain))
	}
	if r := s.Status().RootRotation; r.Phase != ca.PhaseNone || r.Other != nil || r.FinishedBy != "c" || r.Finished.IsZero() {
		t.Errorf("%+v", r)
	}
	// And again.
	s.start()
	s.sign()
	s.finish()
	if s.Roots()[0].Equal(next) {
		t.Error("a second rotation has changed nothing")
	}
}

// The controller's own chain leads, at every phase, to whatever root a host knows that is
// believed; after the end to the new one only.
func TestServerCertificateWhileTheRootIsRotated(t *testing.T) {
	s := newSteps(t)
	chain := func(server *ca.ServerCertificate) [][]byte {
		t.Helper()
		c, err := server.Get(nil)
		if err != nil {
			t.Fatal(err)
		}
		return c.Certificate
	}
	server := s.ServerCertificate(nil, nil)
	old := s.Roots()[0]
	chain(server)
	if _, err := s.StartRoot(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	if err := s.by(chain(server), old); err != nil {
		t.Error(err)
	}
	if _, err := s.SignRoot(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	next := s.Roots()[0]
	both := chain(server)
	for _, root := range []*x509.Certificate{old, next} {
		if err := s.by(both, root); err != nil {
			t.Errorf("by %s: %v", root.Subject, err)
		}
		if !pinned(parse(t, both), ca.Pin(root)) {
			t.Errorf("a join token with the pin of %s does not find its root in the chain", root.Subject)
		}
	}
	if _, err := s.FinishRoot(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	if err := s.by(chain(server), old); err == nil || pinned(parse(t, chain(server)), ca.Pin(old)) {
		t.Error("the old root still vouches for the controller")
	}
	if err := s.by(chain(server), next); err != nil {
		t.Error(err)
	}
}

func pinned(chain []*x509.Certificate, pin string) bool {
	for _, c := range chain[1:] {
		if ca.Pin(c) == pin {
			return true
		}
	}
	return false
}

// Steps out of their order are refused, and change nothing.
func TestRootRotationOutOfOrder(t *testing.T) {
	s := newSteps(t)
	refused := func(what string, _ bool, err error) {
		t.Helper()
		if !errors.Is(err, ca.ErrPhase) {
			t.Errorf("%s: %v", what, err)
		}
	}
	sign := func() (bool, error) { return s.SignRoot(t.Context(), "") }
	finish := func() (bool, error) { return s.FinishRoot(t.Context(), "") }
	abort := func() (bool, error) { return s.AbortRoot(t.Context()) }
	start := func() (bool, error) { return s.StartRoot(t.Context(), "") }
	call := func(what string, f func() (bool, error)) {
		t.Helper()
		changed, err := f()
		refused(what, changed, err)
	}

	call("sign before start", sign)
	for what, f := range map[string]func() (bool, error){"finish": finish, "abort": abort} {
		if changed, err := f(); changed || err != nil {
			t.Errorf("%s of nothing: %v, %v", what, changed, err)
		}
	}
	s.start()
	call("finish before sign", finish)
	s.sign()
	call("abort after sign", abort)
	call("start before finish", start)
	if r := s.Status().RootRotation; r.Phase != ca.PhaseSign {
		t.Errorf("%+v", r)
	}
}

// What was given up is not believed, its key is gone, and the number of what is believed
// has grown, so that nobody mistakes it for what was before.
func TestRootRotationAborted(t *testing.T) {
	s := newSteps(t)
	old := s.Roots()[0]
	s.start()
	_, published := s.Trust()
	s.abort()
	roots, aborted := s.Trust()
	if len(roots) != 1 || !roots[0].Equal(old) || aborted <= published || s.has("ca/next-root") {
		t.Errorf("%v, version %d, was %d", roots, aborted, published)
	}
	s.start()
	if s.Roots()[1].Equal(old) {
		t.Error("the next try has no next root")
	}
}

// Whoever has the old root's key can, until the end, make what is believed; after it,
// nothing: not with the key alone, nor with the cross-signed root.
func TestOldRootsKeyIsWorthNothing(t *testing.T) {
	s := newSteps(t)
	kv, err := s.st.Get(t.Context(), "ca/root")
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := seal.Load(s.cfg.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(unseal(t, sealed, kv))
	if err != nil {
		t.Fatal(err)
	}
	stolen, old := key.(*ecdsa.PrivateKey), s.Roots()[0]
	s.start()
	s.sign()
	cross := parse(t, s.issue(s.CA).Chain)[2]
	forged := func(above ...*x509.Certificate) [][]byte {
		mine := ecKey(t, elliptic.P256())
		ca := &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SerialNumber: big.NewInt(1)}
		ca.NotBefore, ca.NotAfter = s.now.Add(-time.Hour), s.now.Add(time.Hour)
		der, err := x509.CreateCertificate(rand.Reader, ca, old, mine.Public(), stolen)
		if err != nil {
			t.Fatal(err)
		}
		leaf := &x509.Certificate{
			URIs: []*url.URL{spiffeid.RequireFromPath(s.td, "/acme/prod/admin").URL()}, KeyUsage: x509.KeyUsageDigitalSignature, SerialNumber: big.NewInt(2),
			NotBefore: s.now.Add(-time.Hour), NotAfter: s.now.Add(time.Hour),
		}
		leafDER, err := x509.CreateCertificate(rand.Reader, leaf, parse(t, [][]byte{der})[0], ecKey(t, elliptic.P256()).Public(), mine)
		if err != nil {
			t.Fatal(err)
		}
		chain := [][]byte{leafDER, der}
		for _, c := range above {
			chain = append(chain, c.Raw)
		}
		return chain
	}
	if err := s.by(forged(), s.Roots()...); err != nil {
		t.Fatalf("the forgery is none: %v", err)
	}
	s.finish()
	for what, chain := range map[string][][]byte{"alone": forged(), "with the old root": forged(old), "with the cross-signed root": forged(cross, old)} {
		if err := s.by(chain, s.Roots()...); !errors.Is(err, identity.ErrUntrusted) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// The old root's key leaves the store when the new one signs; neither of the two ever
// lies there in the clear.
func TestRootKeysInTheStore(t *testing.T) {
	s := newSteps(t)
	sealed, err := seal.Load(s.cfg.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	scalar := func(key string) []byte {
		t.Helper()
		kv, err := s.st.Get(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		private, err := x509.ParsePKCS8PrivateKey(unseal(t, sealed, kv))
		if err != nil {
			t.Fatal(err)
		}
		b, err := private.(*ecdsa.PrivateKey).Bytes()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	old := scalar("ca/root")
	s.start()
	next := scalar("ca/next-root")
	s.sign()
	if is := scalar("ca/root"); !bytes.Equal(is, next) || bytes.Equal(is, old) {
		t.Error("what is sealed as the root's key is not the new root's")
	}
	kvs, _, err := s.st.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range kvs {
		for _, secret := range [][]byte{old, next} {
			for form, b := range secretForms(secret, secret) {
				if bytes.Contains(kv.Value, b) {
					t.Errorf("%s holds a root's key (%s)", kv.Key, form)
				}
			}
		}
	}
}

// From a root of the controller's to the operator's, and on to another of his; each read
// from the files that the configuration names as the next, and from nowhere else.
func TestRootRotationToOperatorsCA(t *testing.T) {
	s := newSteps(t)
	name := func(c *operatorCA, above ...*operatorCA) {
		cfg := s.files(c.key, append([]*operatorCA{c}, above...)...)
		sum := sha256.Sum256(c.cert.Raw)
		suffix := "." + c.cert.SerialNumber.String() + string('a'+rune(sum[0]%26))
		for from, to := range map[string]*string{cfg.UpstreamCert: &s.cfg.NextCert, cfg.UpstreamKey: &s.cfg.NextKey} {
			if err := os.Rename(from, from+suffix); err != nil {
				t.Fatal(err)
			}
			*to = from + suffix
		}
		s.restart()
	}
	top := newOperatorCA(t, ecKey(t, elliptic.P384()), nil, nil)
	below := newOperatorCA(t, ecKey(t, elliptic.P256()), top, nil)
	name(below, top)
	mine := s.Roots()[0]
	s.start()
	s.sign()
	if !s.Roots()[0].Equal(top.cert) || !s.Status().Upstream || !s.Status().RootRotation.Crossed {
		t.Errorf("%+v", s.Status())
	}
	is := s.issue(s.CA)
	for _, root := range []*x509.Certificate{mine, top.cert} {
		if err := s.by(is.Chain, root); err != nil {
			t.Errorf("by %s: %v", root.Subject, err)
		}
	}
	s.finish()
	if changed, err := s.StartRoot(t.Context(), ""); !errors.Is(err, ca.ErrUpstream) || changed {
		t.Errorf("the root in force as the next one: %v", err)
	}
	s.cfg.UpstreamCert, s.cfg.UpstreamKey = s.cfg.NextCert, s.cfg.NextKey
	s.cfg.NextCert, s.cfg.NextKey = "", ""
	s.restart() // the same, as it is in force
	if changed, err := s.StartRoot(t.Context(), ""); !errors.Is(err, ca.ErrUpstream) || changed {
		t.Errorf("with no next one named: %v", err)
	}
	other := newOperatorCA(t, ecKey(t, elliptic.P256()), nil, nil)
	name(other)
	s.start()
	s.sign()
	if err := s.by(s.issue(s.CA).Chain, top.cert); err != nil {
		t.Errorf("by his old root: %v", err)
	}
	s.finish() // restarts with the first one still named as the operator's CA
	if roots := s.Roots(); len(roots) != 1 || !roots[0].Equal(other.cert) {
		t.Errorf("%v", roots)
	}
}

// An operator's CA that may sign nothing below its own intermediates cannot vouch for the
// next root: it is rotated all the same, and that is said.
func TestRootRotationWithoutCrossSigning(t *testing.T) {
	w := newWorld(t, "acme.example")
	tight := newOperatorCA(t, ecKey(t, elliptic.P256()), nil, func(c *x509.Certificate) { c.MaxPathLen = 1 })
	s := &steps{world: w, cfg: w.files(tight.key, tight)}
	s.restart()
	t.Cleanup(func() { _ = s.st.Close() })
	next := newOperatorCA(t, ecKey(t, elliptic.P256()), nil, nil)
	if err := os.Mkdir(filepath.Join(w.dir, "next"), 0o700); err != nil {
		t.Fatal(err)
	}
	in := *w
	in.dir = filepath.Join(w.dir, "next")
	cfg := in.files(next.key, next)
	s.cfg.NextCert, s.cfg.NextKey = cfg.UpstreamCert, cfg.UpstreamKey
	s.restart()
	s.start()
	s.sign()
	if s.Status().RootRotation.Crossed {
		t.Error("it says that the old root vouches for the new one")
	}
	is := s.issue(s.CA)
	if err := s.by(is.Chain, tight.cert); err == nil {
		t.Error("the old root vouches beyond its path length")
	}
	if err := s.by(is.Chain, next.cert); err != nil {
		t.Error(err)
	}
	s.finish()
}
