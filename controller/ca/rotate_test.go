package ca_test

import (
	"bytes"
	"crypto/elliptic"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/controller/ca"
	"github.com/symbolon/symbolon/controller/seal"
	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/identity"
)

func (w *world) issue(c *ca.CA) *ca.Issued {
	w.t.Helper()
	i, err := c.IssueWorkload(ecKey(w.t, elliptic.P256()).Public(), spiffeid.RequireFromPath(w.td, "/a/b"), nil, "h1")
	if err != nil {
		w.t.Fatal(err)
	}
	return i
}

func (w *world) verifies(c *ca.CA, what string, chain [][]byte) {
	w.t.Helper()
	if _, err := identity.VerifySVID(parse(w.t, chain), c.Bundle(), w.now); err != nil {
		w.t.Errorf("%s: %v", what, err)
	}
}

// A rotated intermediate signs at once, the server's certificate included; what the old
// one has signed stays valid under the same root; and a restart goes on with the new one,
// and knows until when there may be something of the old.
func TestRotateIntermediate(t *testing.T) {
	w := newWorld(t, "acme.example")
	st, err := store.Open(filepath.Join(w.dir, "db"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := ca.Open(t.Context(), st, w.config())
	if err != nil {
		t.Fatal(err)
	}
	if s := c.Status(); !s.Replaced.IsZero() || !s.EarlierUntil.IsZero() || s.Upstream || !s.Renewal.Equal(s.Intermediate.NotAfter.Add(-90*24*time.Hour)) {
		t.Errorf("before: %+v", s)
	}
	server := c.ServerCertificate(nil, nil)
	before, err := server.Get(nil)
	if err != nil {
		t.Fatal(err)
	}
	pin, root, was := c.Pin(), c.Roots()[0], w.issue(c)
	sealedWas, err := st.Get(t.Context(), "ca/intermediate")
	if err != nil {
		t.Fatal(err)
	}

	previous, next, err := c.RotateIntermediate(t.Context(), "somebody")
	if err != nil {
		t.Fatal(err)
	}
	is := w.issue(c)
	if !bytes.Equal(was.Chain[1], previous.Raw) || !bytes.Equal(is.Chain[1], next.Raw) || previous.Equal(next) || bytes.Equal(previous.SubjectKeyId, next.SubjectKeyId) {
		t.Error("the new one does not sign, or has the old one's key")
	}
	if was.Issuer() == is.Issuer() || c.InForce(was) || !c.InForce(is) {
		t.Errorf("issuers %s, %s", was.Issuer(), is.Issuer())
	}
	if len(next.PermittedURIDomains) != 1 || next.PermittedURIDomains[0] != "acme.example" || next.MaxPathLen != 0 || !next.MaxPathLenZero {
		t.Errorf("the new one is not confined: %v, path length %d", next.PermittedURIDomains, next.MaxPathLen)
	}
	w.verifies(c, "of the old one", was.Chain)
	w.verifies(c, "of the new one", is.Chain)
	if c.Pin() != pin || !c.Roots()[0].Equal(root) {
		t.Error("the root is another one: join tokens and hosts have lost it")
	}
	after, err := server.Get(nil)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(before.Certificate[0], after.Certificate[0]) || !bytes.Equal(after.Certificate[1], next.Raw) {
		t.Error("the controller still serves by the old intermediate")
	}
	sealedIs, err := st.Get(t.Context(), "ca/intermediate")
	if err != nil || bytes.Equal(sealedWas.Value, sealedIs.Value) {
		t.Errorf("what is sealed is the old one's key, %v", err)
	}
	key, err := seal.Load(w.config().KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	unseal(t, key, sealedIs)
	status := c.Status()
	if !status.Replaced.Equal(w.now) || status.By != "somebody" || !status.EarlierUntil.Equal(w.now.Add(24*time.Hour)) {
		t.Errorf("after: %+v", status)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}

	again := w.open()
	if s := again.Status(); !s.Intermediate.Equal(next) || !s.Replaced.Equal(status.Replaced) || s.By != "somebody" || !s.EarlierUntil.Equal(status.EarlierUntil) {
		t.Errorf("after a restart: %+v", s)
	}
	w.verifies(again, "after a restart", w.issue(again).Chain)
	w.now = w.now.Add(24 * time.Hour)
	if s := again.Status(); !s.EarlierUntil.IsZero() {
		t.Errorf("a day later there may still be something until %v", s.EarlierUntil)
	}
}

// Below the operator's CA, too; and once that has ended, the old intermediate stays.
func TestRotateIntermediateOfOperatorsCA(t *testing.T) {
	w := newWorld(t, "acme.example")
	top := newOperatorCA(t, ecKey(t, elliptic.P256()), nil, nil)
	signs := newOperatorCA(t, ecKey(t, elliptic.P256()), top, nil)
	c, err := w.try(w.files(signs.key, signs, top))
	if err != nil {
		t.Fatal(err)
	}
	_, next, err := c.RotateIntermediate(t.Context(), "somebody")
	if err != nil {
		t.Fatal(err)
	}
	w.verifies(c, "of the new one", w.issue(c).Chain)
	if s := c.Status(); !s.Upstream || !s.Root.Equal(top.cert) {
		t.Errorf("%+v", s)
	}
	w.now = w.now.Add(1001 * 24 * time.Hour)
	if _, _, err := c.RotateIntermediate(t.Context(), "somebody"); !errors.Is(err, ca.ErrUpstream) {
		t.Errorf("after the end of the operator's CA: %v", err)
	}
	if err := c.Renew(t.Context()); err != nil {
		t.Errorf("renew: %v", err)
	}
	if s := c.Status(); !s.Intermediate.Equal(next) || !s.Renewal.IsZero() {
		t.Errorf("%+v", s)
	}
}

// What is replaced by itself is noted, with nobody's name.
func TestRenewalIsNoted(t *testing.T) {
	w := newWorld(t, "acme.example")
	c := w.open()
	w.now = c.Status().Renewal
	if err := c.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s := c.Status(); !s.Replaced.Equal(w.now) || s.By != "" || s.EarlierUntil.IsZero() {
		t.Errorf("%+v", s)
	}
}
