package controller_test

import (
	"bytes"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"connectrpc.com/connect"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
	"github.com/symbolon/symbolon/controller/enrol"
)

func (w *world) ca() *symbolonv1.GetCAResponse {
	w.t.Helper()
	res, err := w.admin().GetCA(w.t.Context(), connect.NewRequest(&symbolonv1.GetCARequest{}))
	if err != nil {
		w.t.Fatal(err)
	}
	return res.Msg
}

func (w *world) rotate() *symbolonv1.RotateIntermediateResponse {
	w.t.Helper()
	res, err := w.admin().RotateIntermediate(w.t.Context(), connect.NewRequest(&symbolonv1.RotateIntermediateRequest{}))
	if err != nil {
		w.t.Fatal(err)
	}
	return res.Msg
}

// reissued follows the word to ask anew, as a proxy does, and comes as the new host.
func (w *world) reissued(h *host) *host {
	w.t.Helper()
	if _, err := h.issue(w.t.Context(), w.t, postgres...); err != nil {
		w.t.Fatal(err)
	}
	next, err := h.Renew(w.t.Context(), h.ProxyServiceClient)
	if err != nil {
		w.t.Fatal(err)
	}
	return &host{next, w.proxy(next.TLS())}
}

// Connected hosts are told at once, one that is away when it comes back, also to a
// controller that was restarted meanwhile; it is named until then, what it has is good
// until then, and nobody is told twice.
func TestIntermediateRotation(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	labels := map[string]string{"role": "db"}
	here, away := w.enrol("/acme/prod", labels), w.enrol("/acme/prod", labels)
	for _, h := range []*host{here, away} {
		if _, err := h.issue(t.Context(), t, postgres...); err != nil {
			t.Fatal(err)
		}
	}
	s := here.open(t, &symbolonv1.Hello{})
	s.ack(s.generation().GetNumber(), "")
	before := w.ca()
	if before.GetRotated() != nil || before.GetEarlierUntil() != nil || len(before.GetBehind()) != 0 || before.GetIntermediateRenewal() == nil {
		t.Errorf("before: %v", before)
	}
	if before.GetRoot().GetKey() != "ECDSA P-256" || len(before.GetPin()) != 64 || before.GetUpstream() {
		t.Errorf("root: %v", before)
	}
	eventually(t, "connected", func() bool { return w.hostOf(here).GetConnected() })

	rotated := w.rotate()
	if rotated.GetHostsConnected() != 1 || rotated.GetHostsAway() != 1 ||
		!bytes.Equal(rotated.GetPrevious().GetCertificate(), before.GetIntermediate().GetCertificate()) {
		t.Errorf("answer: %v", rotated)
	}
	s.reissue()
	after := w.ca()
	if !bytes.Equal(after.GetIntermediate().GetCertificate(), rotated.GetIntermediate().GetCertificate()) ||
		!bytes.Equal(after.GetRoot().GetCertificate(), before.GetRoot().GetCertificate()) || after.GetRotatedBy() != "admin token from 127.0.0.1" {
		t.Errorf("after: %v", after)
	}
	if n := len(after.GetBehind()); n != 2 {
		t.Errorf("%d hosts are behind, want both", n)
	}
	behind := func(want *host, connected bool) {
		t.Helper()
		got := w.ca().GetBehind()
		if len(got) != 1 {
			t.Fatalf("behind: %v, want %s only", got, want.HostID)
		}
		if b := got[0]; b.GetHostId() != want.HostID || b.GetConnected() != connected || !b.GetHostSvid() || b.GetWorkloads() != 1 || b.GetUntil() == nil {
			t.Errorf("behind: %v", b)
		}
	}
	here = w.reissued(here)
	if !bytes.Equal(here.Chain[1].Raw, rotated.GetIntermediate().GetCertificate()) {
		t.Error("the host's new SVID is of another intermediate")
	}
	behind(away, false)

	w.halt()
	port := w.address()
	w.cfg.Listen = port
	w.start()
	behind(away, false)
	s = away.open(t, &symbolonv1.Hello{}) // by its old SVID
	g := s.generation()
	s.reissue()
	s.ack(g.GetNumber(), "")
	behind(away, true)
	away = w.reissued(away)
	if b := w.ca(); len(b.GetBehind()) != 0 || b.GetEarlierUntil() == nil {
		t.Errorf("all are done: %v", b)
	}
	// Both come again, and hear nothing: the next word is another's.
	for _, h := range []*host{here, away} {
		s := h.open(t, &symbolonv1.Hello{})
		s.ack(s.generation().GetNumber(), "")
		w.revoke(&symbolonv1.RevokeRequest{SpiffeId: "spiffe://acme.example/x/" + h.HostID, Reason: "a test's"})
		s.revocations()
	}
}

// Old copies of ca.pem and join tokens of before are as good after, and who has no
// admin token neither rotates nor looks.
func TestIntermediateRotationForThoseOutside(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	pem, err := os.ReadFile(filepath.Join(w.cfg.DataDir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	config, token := w.tls(), w.token("/acme/prod", nil)
	stranger := symbolonv1connect.NewAdminServiceClient(w.client(config), "https://"+w.address())
	_, err = stranger.RotateIntermediate(t.Context(), connect.NewRequest(&symbolonv1.RotateIntermediateRequest{}))
	wantCode(t, err, connect.CodeUnauthenticated)
	_, err = stranger.GetCA(t.Context(), connect.NewRequest(&symbolonv1.GetCARequest{}))
	wantCode(t, err, connect.CodeUnauthenticated)
	if w.ca().GetRotated() != nil {
		t.Error("a stranger has rotated")
	}
	w.rotate()
	if now, err := os.ReadFile(filepath.Join(w.cfg.DataDir, "ca.pem")); err != nil || !bytes.Equal(now, pem) {
		t.Errorf("ca.pem is another one, %v", err)
	}
	fresh := w.client(config.Clone())
	res, err := fresh.Get("https://" + w.address() + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusOK || len(res.TLS.PeerCertificates) < 2 ||
		!bytes.Equal(res.TLS.PeerCertificates[1].Raw, w.ca().GetIntermediate().GetCertificate()) {
		t.Error("the controller does not serve by the new intermediate")
	}
	if _, err := enrol.Enrol(t.Context(), w.address(), token, nil, nil); err != nil {
		t.Errorf("a token of before: %v", err)
	}
}

// A change of Profiles has hosts ask for their workloads' SVIDs only; their own are no others
// but by what signs.
func TestReissueSaysWhetherTheHostsOwn(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	h := w.enrol("/acme/prod", nil)
	s := h.open(t, &symbolonv1.Hello{})
	s.ack(s.generation().GetNumber(), "")
	profile := func(name string) {
		t.Helper()
		w.apply("kind: Profile\nnamespace: /acme/prod\nname: " + name + "\nmatch: {os.user: " + name + "}\nworkload: " + name + "\n")
		s.ack(s.generation().GetNumber(), "")
	}
	want := func(what string, workloadsOnly bool) {
		t.Helper()
		m := s.receive().GetReissue()
		if m == nil || m.GetWorkloadsOnly() != workloadsOnly {
			t.Errorf("%s: %v, want a reissue with workloads_only %v", what, m, workloadsOnly)
		}
	}
	profile("a")
	want("a Profile", true)
	w.rotate()
	want("another intermediate", false)
	profile("b")
	want("a Profile, before the host has renewed", false)
	if _, err := h.Renew(t.Context(), h.ProxyServiceClient); err != nil {
		t.Fatal(err)
	}
	profile("c")
	want("a Profile, after it", true)
}
