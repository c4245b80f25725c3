package controller_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	"crypto/x509"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

func (w *world) revoke(req *symbolonv1.RevokeRequest) *symbolonv1.RevokeResponse {
	w.t.Helper()
	res, err := w.admin().Revoke(w.t.Context(), connect.NewRequest(req))
	if err != nil {
		w.t.Fatal(err)
	}
	return res.Msg
}

func (w *world) unrevoke(id string) {
	w.t.Helper()
	if _, err := w.admin().Unrevoke(w.t.Context(), connect.NewRequest(&symbolonv1.UnrevokeRequest{Id: id})); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) revocations() *symbolonv1.ListRevocationsResponse {
	w.t.Helper()
	res, err := w.admin().ListRevocations(w.t.Context(), connect.NewRequest(&symbolonv1.ListRevocationsRequest{}))
	if err != nil {
		w.t.Fatal(err)
	}
	return res.Msg
}

func (s *session) revocations() *symbolonv1.Revocations {
	s.t.Helper()
	m := s.receive()
	if m.GetRevocations() == nil {
		s.t.Fatalf("got %v, want revocations", m)
	}
	return m.GetRevocations()
}

func (s *session) ackRevocations(number uint64) {
	s.t.Helper()
	err := s.stream.Send(&symbolonv1.SessionRequest{Message: &symbolonv1.SessionRequest_Revoked{Revoked: &symbolonv1.RevocationsAck{Number: number}}})
	if err != nil {
		s.t.Fatal(err)
	}
}

// leafOf is the certificate of an answer, and who it speaks for.
func leafOf(t *testing.T, svid *symbolonv1.IssuedSVID) (*x509.Certificate, *identity.Principal) {
	t.Helper()
	leaf, err := x509.ParseCertificate(svid.GetChain()[0])
	if err != nil {
		t.Fatal(err)
	}
	p, err := identity.PrincipalOf(leaf)
	if err != nil {
		t.Fatal(err)
	}
	return leaf, &p
}

var postgres = []string{"proc.exe", "/usr/bin/postgres"}

// follower is a proxy as far as revocations go.
type follower struct {
	*session
	set *identity.Revocations
}

func (f *follower) take(m *symbolonv1.Revocations) {
	f.t.Helper()
	next, err := f.set.Update(m)
	if err != nil {
		f.t.Fatal(err)
	}
	f.set = next
	f.ackRevocations(next.Number())
}

func (w *world) follow(h *host) *follower {
	w.t.Helper()
	f := &follower{session: h.open(w.t, &symbolonv1.Hello{})}
	g := f.generation()
	f.take(g.GetRevocations())
	f.ack(g.GetNumber(), "")
	return f
}

// Whatever an identity is revoked by: every session hears of it, its SVID is refused by
// what they hear, none is issued, nobody else is touched; and until it is unrevoked.
func TestRevocation(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	one, other := w.enrol("/acme/prod", map[string]string{"role": "db"}), w.enrol("/acme/prod", map[string]string{"role": "db"})
	sessions := []*follower{w.follow(one), w.follow(other)}
	for _, tc := range []struct {
		name string
		req  func(leaf *x509.Certificate) *symbolonv1.RevokeRequest
		// what is refused of: the SVID at hand, the next one on the same host, the same
		// workload's on the other, another workload's on the same host.
		this, next, elsewhere, neighbour bool
	}{
		{"id", func(*x509.Certificate) *symbolonv1.RevokeRequest {
			return &symbolonv1.RevokeRequest{SpiffeId: "spiffe://acme.example/acme/prod/payments-db"}
		}, true, true, true, false},
		{"serial", func(l *x509.Certificate) *symbolonv1.RevokeRequest {
			return &symbolonv1.RevokeRequest{Serial: fmt.Sprintf("%X", l.SerialNumber)}
		}, true, false, false, false},
		{"host", func(*x509.Certificate) *symbolonv1.RevokeRequest { return &symbolonv1.RevokeRequest{Host: one.HostID} }, true, true, false, true},
		{"host ID", func(*x509.Certificate) *symbolonv1.RevokeRequest {
			return &symbolonv1.RevokeRequest{SpiffeId: "spiffe://acme.example/symbolon/host/" + one.HostID}
		}, true, true, false, true},
		{"labels", func(*x509.Certificate) *symbolonv1.RevokeRequest {
			return &symbolonv1.RevokeRequest{Labels: map[string]string{"app": "db", "env": "prod"}}
		}, true, true, true, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			issue := func(h *host, attrs ...string) (*symbolonv1.IssueSVIDResponse, error) {
				return h.issue(t.Context(), t, attrs...)
			}
			first, err := issue(one, postgres...)
			if err != nil {
				t.Fatal(err)
			}
			leaf, who := leafOf(t, first.GetSvid())
			neighbour, err := issue(one, "proc.exe", "/usr/sbin/nginx")
			if err != nil {
				t.Fatal(err)
			}
			nleaf, nwho := leafOf(t, neighbour.GetSvid())
			req := tc.req(leaf)
			req.Reason = "a test's"
			made := w.revoke(req)
			began := time.Now()
			for _, s := range sessions {
				s.take(s.revocations())
				if refused := s.set.Check(identity.SerialOf(leaf), who) != nil; refused != tc.this {
					t.Errorf("the SVID is refused: %v", refused)
				}
				if refused := s.set.Check(identity.SerialOf(nleaf), nwho) != nil; refused != tc.neighbour {
					t.Errorf("the neighbour's SVID is refused: %v", refused)
				}
			}
			t.Logf("all sessions have heard of it %v after the answer", time.Since(began))
			if made.GetWorkloads() == 0 || made.GetHostsConnected() != 2 || made.GetHostsAway() != 0 || made.GetAlready() {
				t.Errorf("answered %v", made)
			}
			for _, again := range []struct {
				what    string
				host    *host
				attrs   []string
				refused bool
			}{
				{"on the same host", one, postgres, tc.next},
				{"on another host", other, postgres, tc.elsewhere},
				{"of a neighbour", one, []string{"proc.exe", "/usr/sbin/nginx"}, tc.neighbour},
			} {
				issued, err := issue(again.host, again.attrs...)
				if again.refused {
					wantCode(t, err, connect.CodePermissionDenied, "revoked", made.GetRecord().GetRevocation().GetId())
				} else if err != nil {
					t.Errorf("an SVID %s: %v", again.what, err)
				} else if l, p := leafOf(t, issued.GetSvid()); sessions[0].set.Check(identity.SerialOf(l), p) != nil {
					t.Errorf("the new SVID %s is refused", again.what)
				}
			}
			if again := w.revoke(req); !again.GetAlready() || again.GetRecord().GetRevocation().GetId() != made.GetRecord().GetRevocation().GetId() {
				t.Errorf("once more: %v", again)
			}
			list := w.revocations()
			if len(list.GetRecords()) != 1 || list.GetRecords()[0].GetReason() != "a test's" || !strings.HasPrefix(list.GetRecords()[0].GetActor(), "admin token") {
				t.Errorf("listed %v", list)
			}
			w.unrevoke(made.GetRecord().GetRevocation().GetId())
			for _, s := range sessions {
				if s.take(s.revocations()); s.set.Len() != 0 {
					t.Errorf("%d revocations are left", s.set.Len())
				}
			}
			if _, err := issue(one, postgres...); err != nil {
				t.Errorf("after the end: %v", err)
			}
		})
	}
}

// What is revoked stays so, whoever restarts; and who comes gets the whole.
func TestRevocationsLast(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	h := w.enrol("/acme/prod", map[string]string{"role": "db"})
	issued, err := h.issue(t.Context(), t, postgres...)
	if err != nil {
		t.Fatal(err)
	}
	leaf, who := leafOf(t, issued.GetSvid())
	w.revoke(&symbolonv1.RevokeRequest{Serial: fmt.Sprintf("%x", leaf.SerialNumber), Reason: "r"})
	w.revoke(&symbolonv1.RevokeRequest{SpiffeId: "spiffe://partner.example/x", Reason: "r"})
	w.revoke(&symbolonv1.RevokeRequest{Serial: "01", TrustDomain: "partner.example", Reason: "r"})
	before := w.revocations()
	w.halt()
	w.start()
	after := w.revocations()
	if len(after.GetRecords()) != 3 || after.GetNumber() != before.GetNumber() {
		t.Fatalf("after a restart: %v", after)
	}
	f := w.follow(&host{h.HostCredential, w.proxy(h.TLS())})
	if f.set.Len() != 3 || !errors.Is(f.set.Check(identity.SerialOf(leaf), who), identity.ErrRevoked) {
		t.Errorf("a new session has %d", f.set.Len())
	}
	for end := time.Now().Add(20 * time.Second); len(w.revocations().GetHostsBehind()) > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the acknowledgement is not seen")
		}
	}
	w.revoke(&symbolonv1.RevokeRequest{Labels: map[string]string{"app": "x"}, Reason: "r"})
	if behind := w.revocations().GetHostsBehind(); len(behind) != 1 || behind[0] != h.HostID {
		t.Errorf("behind: %v", behind)
	}
	f.take(f.revocations())
}

// A host that is removed leaves nothing that is accepted.
func TestRemovedHostIsRevoked(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	gone, stays := w.enrol("/acme/prod", map[string]string{"role": "db"}), w.enrol("/acme/prod", map[string]string{"role": "db"})
	f := w.follow(stays)
	var serials []identity.Serial
	var who *identity.Principal
	for range 3 {
		issued, err := gone.issue(t.Context(), t, postgres...)
		if err != nil {
			t.Fatal(err)
		}
		var leaf *x509.Certificate
		leaf, who = leafOf(t, issued.GetSvid())
		serials = append(serials, identity.SerialOf(leaf))
	}
	if _, err := w.admin().RemoveHost(t.Context(), connect.NewRequest(&symbolonv1.RemoveHostRequest{Id: gone.HostID})); err != nil {
		t.Fatal(err)
	}
	f.take(f.revocations())
	for _, s := range serials {
		if f.set.Check(s, who) == nil {
			t.Errorf("the SVID %s is still good", s)
		}
	}
	kept, err := stays.issue(t.Context(), t, postgres...)
	if err != nil {
		t.Fatal(err)
	}
	if leaf, p := leafOf(t, kept.GetSvid()); f.set.Check(identity.SerialOf(leaf), p) != nil {
		t.Error("the same workload elsewhere is refused")
	}
	if r := w.revocations().GetRecords(); len(r) != 1 || r[0].GetExpires() == nil || time.Until(r[0].GetExpires().AsTime()) < 23*time.Hour {
		t.Errorf("revoked: %v", r)
	}
	if _, err := w.admin().RemoveHost(t.Context(), connect.NewRequest(&symbolonv1.RemoveHostRequest{Id: "nobody"})); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("a host that is not there: %v", err)
	}
	if n := len(w.revocations().GetRecords()); n != 1 {
		t.Errorf("%d revocations", n)
	}
}

// A host's certificate that is revoked opens nothing here either; one whose host is
// revoked may listen, and gets nothing.
func TestRevokedHostAtTheController(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	h := w.enrol("/acme/prod", map[string]string{"role": "db"})
	f := w.follow(h)
	made := w.revoke(&symbolonv1.RevokeRequest{Host: h.HostID, Reason: "r"})
	f.take(f.revocations())
	_, der := csr(t)
	_, err := h.RenewHost(t.Context(), connect.NewRequest(&symbolonv1.RenewHostRequest{Csr: der}))
	wantCode(t, err, connect.CodePermissionDenied, "revoked")
	w.unrevoke(made.GetRecord().GetRevocation().GetId())
	f.take(f.revocations())
	if _, err = h.RenewHost(t.Context(), connect.NewRequest(&symbolonv1.RenewHostRequest{Csr: der})); err != nil {
		t.Error(err)
	}
	w.revoke(&symbolonv1.RevokeRequest{Serial: fmt.Sprintf("%x", h.Chain[0].SerialNumber), Reason: "r"})
	wantCode(t, f.end(), connect.CodeUnauthenticated, "revoked")
	_, err = h.issue(t.Context(), t, postgres...)
	wantCode(t, err, connect.CodeUnauthenticated, "revoked")
}

// The revocation of another trust domain's certificate ends when the operator said that it
// may, and one of which he said nothing does not. (What has ended is pruned.)
func TestForeignSerialEnds(t *testing.T) {
	w := newWorld(t)
	lasting := w.revoke(&symbolonv1.RevokeRequest{Serial: "01", TrustDomain: "partner.example", Reason: "r"})
	ending := w.revoke(&symbolonv1.RevokeRequest{Serial: "02", TrustDomain: "partner.example", Ttl: durationpb.New(2 * time.Hour), Reason: "r"})
	if lasting.GetRecord().Expires != nil || ending.GetRecord().Expires == nil {
		t.Fatalf("until %v and %v", lasting.GetRecord().GetExpires(), ending.GetRecord().GetExpires())
	}
	if end := ending.GetRecord().GetExpires().AsTime(); time.Until(end) < time.Hour || time.Until(end) > 2*time.Hour+time.Minute {
		t.Errorf("until %v", end)
	}
}

// Who has the key of a revoked host says nothing more of who talks to whom.
func TestARevokedHostReportsNothing(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	h := w.enrol("/acme/prod", map[string]string{"role": "db"})
	report := func() error {
		_, err := h.ReportFlows(t.Context(), connect.NewRequest(&symbolonv1.ReportFlowsRequest{}))
		return err
	}
	if err := report(); err != nil {
		t.Fatal(err)
	}
	made := w.revoke(&symbolonv1.RevokeRequest{Host: h.HostID, Reason: "r"})
	wantCode(t, report(), connect.CodePermissionDenied, "revoked")
	w.unrevoke(made.GetRecord().GetRevocation().GetId())
	if err := report(); err != nil {
		t.Errorf("after the end: %v", err)
	}
}

func TestBadRevocations(t *testing.T) {
	w := newWorld(t)
	for _, tc := range []struct {
		req  *symbolonv1.RevokeRequest
		code connect.Code
		say  string
	}{
		{&symbolonv1.RevokeRequest{}, connect.CodeInvalidArgument, "exactly one"},
		{&symbolonv1.RevokeRequest{SpiffeId: "spiffe://a.example/b", Host: "h"}, connect.CodeInvalidArgument, "exactly one"},
		{&symbolonv1.RevokeRequest{SpiffeId: "web"}, connect.CodeInvalidArgument, "spiffe://acme.example/"},
		{&symbolonv1.RevokeRequest{SpiffeId: "spiffe://acme.example"}, connect.CodeInvalidArgument, "not a SPIFFE ID"},
		{&symbolonv1.RevokeRequest{SpiffeId: "spiffe://acme.example/symbolon/controller"}, connect.CodeInvalidArgument, "this controller"},
		{&symbolonv1.RevokeRequest{SpiffeId: "spiffe://acme.example/symbolon/host/nobody"}, connect.CodeNotFound, "nobody"},
		{&symbolonv1.RevokeRequest{Host: "nobody"}, connect.CodeNotFound, "nobody"},
		{&symbolonv1.RevokeRequest{Serial: "xyz"}, connect.CodeInvalidArgument, "hexadecimal"},
		{&symbolonv1.RevokeRequest{Serial: "01", TrustDomain: "a b"}, connect.CodeInvalidArgument, "trust domain"},
		{&symbolonv1.RevokeRequest{Host: "h", TrustDomain: "a.example"}, connect.CodeInvalidArgument, "serial number only"},
		{&symbolonv1.RevokeRequest{Serial: "01", Ttl: durationpb.New(time.Hour)}, connect.CodeInvalidArgument, "another trust domain"},
		{&symbolonv1.RevokeRequest{SpiffeId: "spiffe://a.example/b", Ttl: durationpb.New(time.Hour)}, connect.CodeInvalidArgument, "another trust domain"},
		{&symbolonv1.RevokeRequest{Serial: "01", TrustDomain: "a.example", Ttl: durationpb.New(time.Second)}, connect.CodeInvalidArgument, "1m"},
		{&symbolonv1.RevokeRequest{Labels: map[string]string{"": "x"}}, connect.CodeInvalidArgument, "key"},
		{&symbolonv1.RevokeRequest{Labels: map[string]string{"app": ""}}, connect.CodeInvalidArgument, "app"},
		{&symbolonv1.RevokeRequest{SpiffeId: "spiffe://a.example/b", Reason: "two\nlines"}, connect.CodeInvalidArgument, "one line"},
	} {
		_, err := w.admin().Revoke(t.Context(), connect.NewRequest(tc.req))
		wantCode(t, err, tc.code, tc.say)
	}
	_, err := w.admin().Unrevoke(t.Context(), connect.NewRequest(&symbolonv1.UnrevokeRequest{Id: "nothing"}))
	wantCode(t, err, connect.CodeNotFound, "nothing", "symbolon ca revocations")
	if n := len(w.revocations().GetRecords()); n != 0 {
		t.Errorf("%d revocations", n)
	}
}
