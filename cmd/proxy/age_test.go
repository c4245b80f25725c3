package main

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/internal/handover"
	"github.com/symbolon/symbolon/proxy"
)

func TestSVIDAges(t *testing.T) {
	noon := time.Date(2026, 11, 3, 12, 0, 0, 0, time.UTC)
	svid := func(from, to int) *identity.Credential {
		return &identity.Credential{SVID: &identity.SVID{Chain: []*x509.Certificate{{
			NotBefore: noon.Add(time.Duration(from) * time.Hour), NotAfter: noon.Add(time.Duration(to) * time.Hour),
		}}}}
	}
	away := errors.New("the controller is away")
	for _, tt := range []struct {
		in   []identity.Status
		want map[string]any
	}{
		{nil, map[string]any{"count": 0, "not_replaced": 0}},
		{[]identity.Status{{Err: away}}, map[string]any{"count": 0, "not_replaced": 1}},
		{[]identity.Status{{Credential: svid(0, 24)}, {Credential: svid(-3, 21), Err: away}, {Credential: svid(-1, 20)}},
			map[string]any{"count": 3, "not_replaced": 1, "oldest_since": noon.Add(-3 * time.Hour), "next_end": noon.Add(20 * time.Hour)}},
	} {
		if diff := cmp.Diff(tt.want, svidAges(tt.in)); diff != "" {
			t.Error(diff)
		}
	}
}

// What is in force has the age of when the controller said it, in the process that heard it
// and in the one that follows; roots are as old as their last change.
func TestAgesSurviveARestart(t *testing.T) {
	j := newJoined(t)
	own := j.host.cred.Load()
	tree := []*symbolonv1.Resource{{Namespace: "/", Kind: &symbolonv1.Resource_NamespaceKind{NamespaceKind: &symbolonv1.Namespace{
		Mode: symbolonv1.Mode_MODE_ENFORCE, Default: symbolonv1.Default_DEFAULT_DENY, Protection: symbolonv1.Protection_PROTECTION_ENCRYPTED,
	}}}}
	var bundle [][]byte
	for _, r := range own.Roots {
		bundle = append(bundle, r.Raw)
	}
	partner := [][]byte{own.Roots[0].Raw}
	generation := func(n uint64, domains ...string) *symbolonv1.Generation {
		g := &symbolonv1.Generation{Number: n, HostNamespace: "/", Resources: tree, Bundle: bundle}
		for _, d := range domains {
			g.Bundles = append(g.Bundles, &symbolonv1.TrustBundle{TrustDomain: d, Roots: partner})
		}
		return g
	}
	apply := func(g *symbolonv1.Generation) {
		t.Helper()
		if r := g.GetRevocations(); r != nil { // as the session does
			if err := j.revokedByController(r); err != nil {
				t.Fatal(err)
			}
		}
		j.received(g)
		if err := j.apply(g); err != nil {
			t.Fatal(err)
		}
	}
	type ages struct {
		Heard       time.Time `json:"controller_heard"`
		Policy      time.Time `json:"policy_since"`
		Revocations time.Time `json:"revocations_since"`
		Bundles     map[string]struct {
			Roots   int
			Since   time.Time
			NextEnd time.Time `json:"next_end"`
		}
	}
	status := func(d *daemonParts) (out ages) {
		t.Helper()
		b, err := json.Marshal(d.debugStatus())
		if err == nil {
			err = json.Unmarshal(b, &out)
		}
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	if a := status(j.daemonParts); !a.Policy.IsZero() || !a.Heard.IsZero() || len(a.Bundles) != 0 {
		t.Errorf("before the controller has said anything: %+v", a)
	}
	// What a controller says in the field counts for nothing.
	g := generation(8)
	g.Revocations = &symbolonv1.Revocations{Number: 1}
	g.Received = &symbolonv1.Received{Policy: timestamppb.New(time.Unix(1, 0))}
	apply(g)
	first := status(j.daemonParts)
	if name := own.TrustDomain.Name(); first.Policy.Before(time.Now().Add(-time.Hour)) || first.Bundles[name].Roots != 1 ||
		!first.Bundles[name].Since.Equal(first.Policy) || !first.Bundles[name].NextEnd.Equal(own.Roots[0].NotAfter) {
		t.Errorf("the first generation: %+v", first)
	}
	// A later one that says nothing of revocations, with roots that are as they were.
	apply(generation(9, "partner.example"))
	second := status(j.daemonParts)
	if !second.Policy.After(first.Policy) || !second.Revocations.Equal(first.Revocations) || !second.Heard.Equal(second.Policy) {
		t.Errorf("the second generation: %+v after %+v", second, first)
	}
	if name := own.TrustDomain.Name(); !second.Bundles[name].Since.Equal(first.Policy) || !second.Bundles["partner.example"].Since.Equal(second.Policy) {
		t.Errorf("bundles: %+v", second.Bundles)
	}
	if err := j.revokedByController(&symbolonv1.Revocations{Number: 2, Base: 1}); err != nil {
		t.Fatal(err)
	}
	third := status(j.daemonParts)
	if !third.Revocations.After(second.Policy) || !third.Policy.Equal(second.Policy) || !third.Heard.Equal(third.Revocations) {
		t.Errorf("revocations: %+v after %+v", third, second)
	}

	// The next process, of what this one leaves.
	s, err := j.snapshot()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Wipe()
	left := new(symbolonv1.Generation)
	if err := proto.Unmarshal(s.Policy, left); err != nil {
		t.Fatal(err)
	}
	next := &daemonParts{cfg: j.cfg, log: j.log, host: j.host, source: j.source, manager: j.manager, reports: j.reports, session: &proxy.Session{}}
	next.keeper = newKeeper(handover.Store{}, j.log, next.snapshot)
	next.proxy = proxy.New(proxy.Options{Log: j.log, Credentials: j.manager, Records: j.reports})
	if err := next.applyKept(left); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(third, status(next)); diff != "" {
		t.Errorf("after a restart: %s", diff)
	}
}
