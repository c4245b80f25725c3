package controller_test

import (
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// Each age is of what it says, counted by the controller's clock.
func TestStatusSaysHowOldEverythingIs(t *testing.T) {
	w := newWorld(t)
	ages := func() *symbolonv1.Ages {
		t.Helper()
		res, err := w.admin().GetStatus(t.Context(), connect.NewRequest(&symbolonv1.GetStatusRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		return res.Msg.GetAges()
	}
	now := func() time.Time { return time.Now().Add(time.Duration(w.offset.Load())) }
	// about: between two moments of the same step, which last seconds at most.
	about := func(what string, got *timestamppb.Timestamp, want time.Time) {
		t.Helper()
		if d := got.AsTime().Sub(want).Abs(); got == nil || d > 5*time.Minute {
			t.Errorf("%s: %v, want about %v", what, got.AsTime(), want.UTC())
		}
	}
	if a := ages(); a.SvidOldest != nil || a.HostSvidNextEnd != nil || a.AwaySince != nil || a.Revoked != nil || a.Scans != 0 || a.ScanOldest != nil {
		t.Errorf("of a new controller: %v", a)
	}

	start := now()
	w.apply(tree)
	h := w.enrol("/acme/prod", map[string]string{"role": "db"})
	if _, err := h.issue(t.Context(), t, "proc.exe", "/usr/bin/postgres"); err != nil {
		t.Fatal(err)
	}
	w.push("grype", 10*time.Hour, finding(hashA, "vuln.max", "high"))
	w.offset.Add(int64(3 * time.Hour))
	if _, err := h.issue(t.Context(), t, "proc.exe", "/usr/sbin/nginx"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.admin().Revoke(t.Context(), connect.NewRequest(&symbolonv1.RevokeRequest{
		SpiffeId: "spiffe://acme.example/acme/dev/x", Reason: "test",
	})); err != nil {
		t.Fatal(err)
	}
	a := ages()
	about("policy", a.Policy, start)
	about("oldest SVID", a.SvidOldest, start)
	about("next end of an SVID", a.SvidNextEnd, start.Add(24*time.Hour))
	if want := "spiffe://acme.example/acme/prod/payments-db"; a.GetSvidNextEndId() != want {
		t.Errorf("it is of %s, want %s", a.GetSvidNextEndId(), want)
	}
	about("host's SVID", a.HostSvidNextEnd, start.Add(24*time.Hour))
	about("host away", a.AwaySince, start)
	if a.GetAwayId() != h.HostID || a.GetHostSvidNextEndId() != h.HostID {
		t.Errorf("away is %s, the next to end is %s; want %s", a.GetAwayId(), a.GetHostSvidNextEndId(), h.HostID)
	}
	about("revocation", a.Revoked, start.Add(3*time.Hour))
	if a.GetScans() != 1 {
		t.Errorf("%d scans", a.GetScans())
	}
	about("scan", a.ScanOldest, start)
	about("end of the scan", a.ScanNextEnd, start.Add(10*time.Hour))

	// While a host is here it is not away, but behind until it has acknowledged.
	e := h.open(t, &symbolonv1.Hello{})
	g := e.generation()
	if a := ages(); a.AwaySince != nil || a.GetHostsBehind() != 1 {
		t.Errorf("connected, but not yet with the generation: %v", a)
	}
	e.ack(g.GetNumber(), "")
	eventually(t, "the host is not behind after its acknowledgement", func() bool { return ages().GetHostsBehind() == 0 })
}
