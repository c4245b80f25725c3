package controller

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/store"
)

// TestPolicyEdges: what two sides report is one edge, with what was allowed and what
// policy denied apart; what failed for another reason is none.
func TestPolicyEdges(t *testing.T) {
	st, err := store.Open(filepath.Join(t.TempDir(), "s.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.Close() })
	now := time.Unix(1_800_000_000, 0).UTC()
	td := spiffeid.RequireTrustDomainFromString("acme.example")
	b, err := openEdges(context.Background(), st, DefaultConfig().Edges, td, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	end := func(name string) *edgeEnd {
		e, err := newEdgeEnd(&symbolonv1.EdgeEnd{
			SpiffeId: "spiffe://acme.example/acme/" + name, Namespace: "/acme", Workload: name,
			Attributes: map[string]*symbolonv1.LabelValues{"app": {Values: []string{name}}},
		}, td)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	external, err := newEdgeEnd(&symbolonv1.EdgeEnd{External: "/acme/office"}, td)
	if err != nil {
		t.Fatal(err)
	}
	web, db := end("web"), end("db")
	const client, server = symbolonv1.Reporter_REPORTER_CLIENT, symbolonv1.Reporter_REPORTER_SERVER
	const allow, deny, failed = symbolonv1.Outcome_OUTCOME_ALLOW, symbolonv1.Outcome_OUTCOME_DENY, symbolonv1.Outcome_OUTCOME_ERROR
	add := func(from, to *edgeEnd, by symbolonv1.Reporter, o symbolonv1.Outcome, r, peer symbolonv1.Reason, n uint64, ago time.Duration) {
		b.add([]takenEdge{{"/acme", "", from, to, &symbolonv1.Edge{
			Reporter: by, Protocol: "tcp", Port: 80, Outcome: o, Reason: r, PeerReason: peer, Connections: n,
			Protection: symbolonv1.Protection_PROTECTION_ENCRYPTED, ExternalAddress: "192.0.2.1",
			First: timestamppb.New(now.Add(-ago)), Last: timestamppb.New(now.Add(-ago)),
		}}}, 0, func(string, string) bool { return false })
	}
	const policy, byDefault, peer, expired = symbolonv1.Reason_REASON_POLICY, symbolonv1.Reason_REASON_DEFAULT, symbolonv1.Reason_REASON_PEER_REFUSED, symbolonv1.Reason_REASON_SVID_EXPIRED
	add(web, db, client, allow, policy, 0, 3, time.Minute)
	add(web, db, client, allow, byDefault, 0, 4, time.Hour)
	add(web, db, server, allow, policy, 0, 5, 0)
	add(db, web, client, deny, peer, policy, 1, 0)
	add(db, web, client, deny, expired, 0, 9, 0)
	add(db, web, client, failed, symbolonv1.Reason_REASON_TIMED_OUT, 0, 9, 0)
	add(external, web, server, allow, policy, 0, 2, 0)

	var got []string
	for _, e := range b.policyEdges("/acme", now.Add(-2*time.Hour), nil) {
		got = append(got, fmt.Sprintf("%s%s%v to %s: allowed %t, encrypted %t, %d, %v, address only %t",
			e.From.External, e.From.Attributes.Get("app"), e.FromAddress, e.To.Attributes.Get("app"), e.Allowed, e.Encrypted, e.Connections, e.Last.Sub(e.First), e.AddressOnly))
	}
	want := []string{
		"/acme/office192.0.2.1 to web: allowed true, encrypted true, 2, 0s, address only true",
		"dbinvalid IP to web: allowed false, encrypted true, 1, 0s, address only false",
		"webinvalid IP to db: allowed true, encrypted true, 7, 1h0m0s, address only false",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got := b.policyEdges("/acme", now.Add(-time.Second), nil); len(got) != 3 || got[2].Connections != 5 {
		t.Errorf("of the last second: %v", got)
	}
	if got := b.policyEdges("/other", time.Time{}, nil); len(got) != 0 {
		t.Errorf("of another namespace: %v", got)
	}
}
