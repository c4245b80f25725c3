package controller_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
	"github.com/symbolon/symbolon/controller/ca"
	"github.com/symbolon/symbolon/controller/enrol"
)

const (
	start  = symbolonv1.RootStep_ROOT_STEP_START
	sign   = symbolonv1.RootStep_ROOT_STEP_SIGN
	finish = symbolonv1.RootStep_ROOT_STEP_FINISH
	abort  = symbolonv1.RootStep_ROOT_STEP_ABORT
)

func (w *world) tryRoot(step symbolonv1.RootStep, force bool) (*symbolonv1.RotateRootResponse, error) {
	w.t.Helper()
	res, err := w.admin().RotateRoot(w.t.Context(), connect.NewRequest(&symbolonv1.RotateRootRequest{Step: step, Force: force}))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

func (w *world) root(step symbolonv1.RootStep) *symbolonv1.RotateRootResponse {
	w.t.Helper()
	res, err := w.tryRoot(step, false)
	if err != nil {
		w.t.Fatalf("%v: %v", step, err)
	}
	if !res.GetChanged() {
		w.t.Fatalf("%v has changed nothing", step)
	}
	return res
}

// refusesRoot wants a step refused, and those named.
func (w *world) refusesRoot(step symbolonv1.RootStep, words ...string) {
	w.t.Helper()
	before := w.ca()
	_, err := w.tryRoot(step, false)
	wantCode(w.t, err, connect.CodeFailedPrecondition, words...)
	if after := w.ca(); after.GetRootRotation().GetPhase() != before.GetRootRotation().GetPhase() ||
		!bytes.Equal(after.GetRoot().GetCertificate(), before.GetRoot().GetCertificate()) {
		w.t.Errorf("%v was refused, and has changed something: %v", step, after.GetRootRotation())
	}
}

// rootBehind are the hosts that stand against the next step.
func (w *world) rootBehind() (ids []string) {
	w.t.Helper()
	for _, b := range w.ca().GetRootRotation().GetBehind() {
		ids = append(ids, b.GetHostId())
	}
	return ids
}

// again starts the controller anew, at the same address.
func (w *world) again() {
	w.t.Helper()
	address := w.address()
	w.halt()
	w.cfg.Listen = address
	w.start()
}

// heard takes generations until one has so many roots of its own, and believes them, as a
// proxy does before it acknowledges.
func (s *session) heard(roots int) *symbolonv1.Generation {
	s.t.Helper()
	for {
		g := s.generation()
		s.believes(g.GetNumber(), g.GetBundleVersion())
		if len(g.GetBundle()) == roots {
			return g
		}
	}
}

func (s *session) believes(generation, bundle uint64) {
	s.t.Helper()
	err := s.stream.Send(&symbolonv1.SessionRequest{Message: &symbolonv1.SessionRequest_Ack{Ack: &symbolonv1.Ack{Generation: generation, BundleVersion: bundle}}})
	if err != nil {
		s.t.Fatal(err)
	}
}

// with is the host with the roots of a generation.
func (w *world) with(h *host, g *symbolonv1.Generation) *host {
	w.t.Helper()
	var roots []*x509.Certificate
	for _, der := range g.GetBundle() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			w.t.Fatal(err)
		}
		roots = append(roots, c)
	}
	next := h.WithRoots(roots, g.GetBundleVersion())
	return &host{next, w.proxy(next.TLS())}
}

func (w *world) caFile() (certs [][]byte) {
	w.t.Helper()
	data, err := os.ReadFile(filepath.Join(w.cfg.DataDir, "ca.pem"))
	if err != nil {
		w.t.Fatal(err)
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		certs = append(certs, block.Bytes)
	}
	return certs
}

// The whole way, with a restart of the controller in every phase: nobody is passed by.
// A host that is connected, one that comes late with nothing but the old root, and one
// that enrols in the midst of it.
func TestRootRotation(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	labels := map[string]string{"role": "db"}
	here, late := w.enrol("/acme/prod", labels), w.enrol("/acme/prod", labels)
	for _, h := range []*host{here, late} {
		if _, err := h.issue(t.Context(), t, postgres...); err != nil {
			t.Fatal(err)
		}
	}
	oldToken := w.token("/acme/prod", nil)
	wasted := w.token("/acme/prod", nil)
	old := w.caFile()[0]
	oldPin := w.ca().GetPin()
	stale := w.tls() // an operator's copy of ca.pem
	s := here.open(t, &symbolonv1.Hello{})
	s.heard(1)
	eventually(t, "connected", func() bool { return w.hostOf(here).GetConnected() })
	if w.ca().GetRootRotation() != nil {
		t.Error("a rotation before there was one")
	}

	published := w.root(start)
	if r := published.GetRotation(); r.GetPhase() != symbolonv1.RootPhase_ROOT_PHASE_PUBLISH || r.GetBundleVersion() == 0 ||
		published.GetHostsConnected() != 1 || published.GetHostsAway() != 1 || len(r.GetBehind()) != 2 || r.GetStartedBy() != "admin token from 127.0.0.1" {
		t.Errorf("%v", published)
	}
	next := published.GetRotation().GetOther().GetCertificate()
	if f := w.caFile(); len(f) != 2 || !bytes.Equal(f[0], old) || !bytes.Equal(f[1], next) {
		t.Error("ca.pem has not both roots")
	}
	w.refusesRoot(sign, here.HostID, late.HostID, "away", "connect")
	w.refusesRoot(finish, "not now")
	g := s.heard(2)
	here = w.with(here, g)
	eventually(t, "one has acknowledged", func() bool { return slices.Equal(w.rootBehind(), []string{late.HostID}) })
	w.refusesRoot(sign, late.HostID)
	if again, err := w.tryRoot(start, false); err != nil || again.GetChanged() || !bytes.Equal(again.GetRotation().GetOther().GetCertificate(), next) {
		t.Errorf("start again: %v, %v", again, err)
	}

	w.again() // what was acknowledged is not forgotten
	if b := w.rootBehind(); !slices.Equal(b, []string{late.HostID}) {
		t.Errorf("after a restart %v are behind, want %s", b, late.HostID)
	}
	// A proxy that does not say what it believes, of an earlier version, say, counts as one
	// that does not know.
	old1 := late.open(t, &symbolonv1.Hello{})
	old1.ack(old1.generation().GetNumber(), "")
	w.refusesRoot(sign, late.HostID)
	s = here.open(t, &symbolonv1.Hello{BundleVersion: here.BundleVersion})
	s.heard(2)
	eventually(t, "connected", func() bool { return w.hostOf(here).GetConnected() })
	forced, err := w.tryRoot(sign, true)
	if err != nil || len(forced.GetPassedOver()) != 1 || forced.GetPassedOver()[0].GetHostId() != late.HostID || !forced.GetRotation().GetCrossed() {
		t.Fatalf("forced: %v, %v", forced, err)
	}
	s.reissue()
	if a := w.ca(); !bytes.Equal(a.GetRoot().GetCertificate(), next) || !bytes.Equal(a.GetRootRotation().GetOther().GetCertificate(), old) || a.GetPin() == oldPin {
		t.Errorf("signing: %v", a)
	}
	w.refusesRoot(abort, "signs already")
	w.refusesRoot(start, "signs already")
	w.refusesRoot(finish, here.HostID, late.HostID, "enrol")

	w.again()
	// Who knows the old root only believes the controller by it: a host that was away, a
	// join token of before, an operator's copy of ca.pem.
	if res, err := w.client(stale).Get("https://" + w.address() + "/readyz"); err != nil {
		t.Errorf("an old ca.pem: %v", err)
	} else {
		_ = res.Body.Close()
	}
	fromToken, err := enrol.Enrol(t.Context(), w.address(), oldToken, nil, nil)
	if err != nil {
		t.Fatalf("a join token of before: %v", err)
	}
	if len(fromToken.Roots) != 2 || fromToken.BundleVersion == 0 || ca.Pin(fromToken.Roots[0]) != w.ca().GetPin() {
		t.Errorf("enrolled with %d roots, version %d", len(fromToken.Roots), fromToken.BundleVersion)
	}
	young := &host{fromToken, w.proxy(fromToken.TLS())}
	ys := young.open(t, &symbolonv1.Hello{BundleVersion: young.BundleVersion})
	ys.heard(2)
	newToken := w.token("/acme/prod", nil)
	s2 := late.open(t, &symbolonv1.Hello{})
	g = s2.generation()
	s2.reissue()
	s2.believes(g.GetNumber(), g.GetBundleVersion())
	late = w.reissued(w.with(late, g))
	eventually(t, "only who has SVIDs of the old root is behind", func() bool { return slices.Equal(w.rootBehind(), []string{here.HostID}) })
	s = here.open(t, &symbolonv1.Hello{BundleVersion: here.BundleVersion})
	s.heard(2)
	was := here
	here = w.reissued(here)
	if !bytes.Equal(here.Chain[1].RawIssuer, here.Roots[0].RawSubject) || here.BundleVersion != was.BundleVersion {
		t.Error("the host's new SVID is not of the new root")
	}
	if b := w.ca().GetRootRotation().GetBehind(); len(b) != 0 {
		t.Errorf("behind at the end: %v", b)
	}

	finished := w.root(finish)
	if finished.GetTokens() != 1 || len(finished.GetPassedOver()) != 0 || finished.GetRotation().GetPhase() != 0 || finished.GetRotation().GetFinished() == nil {
		t.Errorf("%v", finished)
	}
	// Sessions that began under a certificate of the old root end; the new SVID starts one.
	wantCode(t, s.end(), connect.CodeUnauthenticated, "not believed")
	wantCode(t, s2.end(), connect.CodeUnauthenticated, "not believed")
	if g := ys.heard(1); !bytes.Equal(g.GetBundle()[0], next) || g.GetBundleVersion() <= young.BundleVersion {
		t.Error("who has enrolled with the new root has not heard of the end")
	}
	_, err = was.issue(t.Context(), t, postgres...) // on a connection of before
	wantCode(t, err, connect.CodeUnauthenticated, "not believed")
	if _, err := w.proxy(was.TLS()).RenewHost(t.Context(), connect.NewRequest(&symbolonv1.RenewHostRequest{})); err == nil {
		t.Error("an SVID of the old root is believed")
	}
	if f := w.caFile(); len(f) != 1 || !bytes.Equal(f[0], next) {
		t.Error("ca.pem has not the new root alone")
	}
	if res, err := w.client(stale.Clone()).Get("https://" + w.address() + "/readyz"); err == nil {
		_ = res.Body.Close()
		t.Error("the old root still vouches for the controller")
	}
	if _, err := enrol.Enrol(t.Context(), w.address(), wasted, nil, nil); !errors.Is(err, enrol.ErrPin) {
		t.Errorf("a join token that pins the old root: %v", err)
	}
	if _, err := enrol.Enrol(t.Context(), w.address(), newToken, nil, nil); err != nil {
		t.Errorf("a join token of the new root: %v", err)
	}
	for i, h := range []*host{here, late, here, late} {
		if i == 2 {
			w.again()
		}
		s := h.open(t, &symbolonv1.Hello{BundleVersion: h.BundleVersion})
		if g := s.heard(1); !bytes.Equal(g.GetBundle()[0], next) {
			t.Error("another root")
		}
	}
	if again, err := w.tryRoot(finish, false); err != nil || again.GetChanged() {
		t.Errorf("finish again: %v, %v", again, err)
	}
}

// A host that never comes blocks the end, until it is removed, its SVID has ended, or the
// operator wants it cut off; one that is revoked does not: it gets nothing newer anyway.
func TestWhoHoldsUpTheRootsRotation(t *testing.T) {
	w := newWorld(t, func(w *world) { w.cfg.CA.SVIDTTL, w.cfg.CA.RotateEvery = 2*time.Hour, time.Hour })
	w.apply(tree)
	removed, revoked, away := w.enrol("/acme/prod", nil), w.enrol("/acme/prod", nil), w.enrol("/acme/prod", nil)
	w.root(start)
	if b := w.rootBehind(); len(b) != 3 {
		t.Fatalf("behind: %v", b)
	}
	w.revoke(&symbolonv1.RevokeRequest{Host: revoked.HostID, Reason: "a test's"})
	if _, err := w.admin().RemoveHost(t.Context(), connect.NewRequest(&symbolonv1.RemoveHostRequest{Id: removed.HostID})); err != nil {
		t.Fatal(err)
	}
	w.refusesRoot(sign, "1 hosts", away.HostID)
	if _, err := w.tryRoot(sign, true); err != nil {
		t.Fatal(err)
	}
	w.refusesRoot(finish, "1 hosts", away.HostID)
	// On one connection: to the clocks of others, what the controller signs for a new one
	// would not be valid yet.
	admin := w.admin()
	finishes := func() error {
		_, err := admin.RotateRoot(t.Context(), connect.NewRequest(&symbolonv1.RotateRootRequest{Step: finish}))
		return err
	}
	wantCode(t, finishes(), connect.CodeFailedPrecondition, "1 hosts", away.HostID)
	w.offset.Store(int64(110 * time.Minute))
	wantCode(t, finishes(), connect.CodeFailedPrecondition, away.HostID)
	w.offset.Store(int64(121 * time.Minute)) // it must enrol again anyway
	if err := finishes(); err != nil {
		t.Errorf("after its SVID has ended: %v", err)
	}
	w.offset.Store(0)

	// And with force: it is named as who loses.
	lost := w.enrol("/acme/prod", nil)
	w.root(start)
	if _, err := w.tryRoot(sign, true); err != nil {
		t.Fatal(err)
	}
	res, err := w.tryRoot(finish, true)
	if err != nil {
		t.Fatal(err)
	}
	named := false
	for _, p := range res.GetPassedOver() { // the first one is there again, as the clock is
		named = named || p.GetHostId() == lost.HostID && p.GetHostSvid() && !p.GetAcknowledged() && p.GetUntil() != nil
	}
	if !named {
		t.Errorf("passed over: %v", res.GetPassedOver())
	}
	if _, err := lost.issue(t.Context(), t, postgres...); err == nil {
		t.Error("it is let in")
	}
}

// What is given up is not believed any more, wherever it was heard of.
func TestRootRotationAborted(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	h := w.enrol("/acme/prod", nil)
	s := h.open(t, &symbolonv1.Hello{})
	s.heard(1)
	if res, err := w.tryRoot(abort, false); err != nil || res.GetChanged() {
		t.Errorf("nothing to abort: %v, %v", res, err)
	}
	w.root(start)
	two := s.heard(2)
	w.root(abort)
	one := s.heard(1)
	if !bytes.Equal(one.GetBundle()[0], h.Roots[0].Raw) || one.GetBundleVersion() <= two.GetBundleVersion() {
		t.Errorf("after: version %d, was %d", one.GetBundleVersion(), two.GetBundleVersion())
	}
	if f := w.caFile(); len(f) != 1 || !bytes.Equal(f[0], h.Roots[0].Raw) {
		t.Error("ca.pem is not as it was")
	}
	w.refusesRoot(sign, "start")
	// A host that restarts believes nothing of it.
	w.again()
	if g := h.open(t, &symbolonv1.Hello{}).generation(); len(g.GetBundle()) != 1 {
		t.Errorf("%d roots", len(g.GetBundle()))
	}
}

// operatorsRoot makes a CA and its key, as files.
func operatorsRoot(t *testing.T, name string) (cert, key string, der []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if der, err = x509.CreateCertificate(rand.Reader, c, c, k.Public(), k); err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "next.pem"), filepath.Join(dir, "next.key")
	for file, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: pkcs8}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key, der
}

// A controller with a root of its own goes over to the operator's, whose files can be taken
// away after the first step; from there only to another of his.
func TestRootRotationToTheOperators(t *testing.T) {
	cert, key, der := operatorsRoot(t, "Operator's")
	w := newWorld(t, func(w *world) { w.cfg.CA.NextCertFile, w.cfg.CA.NextKeyFile = cert, key })
	w.apply(tree)
	h := w.enrol("/acme/prod", nil)
	s := h.open(t, &symbolonv1.Hello{})
	s.heard(1)
	if r := w.root(start).GetRotation(); !bytes.Equal(r.GetOther().GetCertificate(), der) {
		t.Errorf("the next root is %v", r.GetOther())
	}
	for _, file := range []string{cert, key} {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	h = w.with(h, s.heard(2))
	eventually(t, "acknowledged", func() bool { return len(w.rootBehind()) == 0 })
	if r := w.root(sign).GetRotation(); !r.GetCrossed() {
		t.Errorf("not cross-signed: %v", r)
	}
	s.reissue()
	h = w.reissued(h)
	w.root(finish)
	if c := w.ca(); !c.GetUpstream() || !bytes.Equal(c.GetRoot().GetCertificate(), der) {
		t.Errorf("%v", c)
	}
	if _, err := h.issue(t.Context(), t, postgres...); err != nil {
		t.Errorf("by an SVID under the operator's root: %v", err)
	}
	w.refusesRoot(start, "ca.next_cert_file", "no such file")
	w.cfg.CA.NextCertFile, w.cfg.CA.NextKeyFile = "", ""
	w.again()
	w.refusesRoot(start, "ca.next_cert_file", "restart")
}

// Neither a stranger, nor a host, nor who may ask for claims, rotates.
func TestWhoMayRotateTheRoot(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	h := w.enrol("/acme/prod", nil)
	claims, err := os.ReadFile(filepath.Join(w.cfg.DataDir, "claims.token"))
	if err != nil {
		t.Fatal(err)
	}
	withClaims := w.client(w.tls())
	withClaims.Transport = bearer{string(bytes.TrimSpace(claims)), withClaims.Transport}
	for who, client := range map[string]*http.Client{"a stranger": w.client(w.tls()), "a host": w.client(h.TLS()), "a composer": withClaims} {
		for step := range symbolonv1.RootStep_name {
			_, err := symbolonv1connect.NewAdminServiceClient(client, "https://"+w.address()).
				RotateRoot(t.Context(), connect.NewRequest(&symbolonv1.RotateRootRequest{Step: symbolonv1.RootStep(step), Force: true}))
			if connect.CodeOf(err) != connect.CodeUnauthenticated {
				t.Errorf("%s, %v: %v", who, symbolonv1.RootStep(step), err)
			}
		}
	}
	for _, step := range []symbolonv1.RootStep{0, 99} {
		_, err := w.tryRoot(step, true)
		wantCode(t, err, connect.CodeInvalidArgument, "step")
	}
	if w.ca().GetRootRotation() != nil {
		t.Error("somebody has rotated")
	}
}

// A trust domain that follows our bundle by https_spiffe sees both roots from the start,
// and finds its way at every step by the roots that it had before: also where it asks only
// after the new root signs.
func TestFollowersOfARotatedRoot(t *testing.T) {
	ours := newWorld(t, func(w *world) { w.cfg.Federation.Listen, w.cfg.Federation.RefreshHint = "127.0.0.1:0", time.Hour })
	follower := func(name string) *world {
		f := newWorld(t, func(w *world) { w.cfg.TrustDomain = name })
		own := ours.trustDomains().GetOwn()
		f.apply("kind: TrustDomain\nnamespace: /\nname: acme.example\nprofile: https_spiffe\nclaims: [app]\nendpoint_id: " + own.GetEndpointId() +
			"\nendpoint: " + own.GetEndpoint() + "\nbundle: |\n  " + own.GetBundle())
		return f
	}
	roots := func(f *world) (int, uint64) {
		t.Helper()
		d, err := f.refresh("acme.example")
		if err != nil {
			t.Fatal(err)
		}
		b, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString("acme.example"), []byte(d.GetBundle()))
		if err != nil {
			t.Fatal(err)
		}
		return len(b.X509Authorities()), d.GetSequence()
	}
	often, seldom := follower("often.example"), follower("seldom.example")
	n, first := roots(often)
	if n != 1 {
		t.Fatalf("%d roots", n)
	}
	_, _ = roots(seldom)
	ours.root(start)
	n, second := roots(often)
	if n != 2 || second <= first {
		t.Errorf("published: %d roots, sequence %d, was %d", n, second, first)
	}
	ours.root(sign)
	for _, f := range []*world{often, seldom} { // the second has the old root only
		if n, sequence := roots(f); n != 2 || sequence != second {
			t.Errorf("signing: %d roots, sequence %d, want %d", n, sequence, second)
		}
	}
	ours.refusesRoot(finish, "other trust domains", "refresh_hint")
	ours.offset.Store(int64(time.Hour))
	ours.root(finish)
	ours.offset.Store(0)
	if n, sequence := roots(often); n != 1 || sequence <= second {
		t.Errorf("finished: %d roots, sequence %d, was %d", n, sequence, second)
	}
}
