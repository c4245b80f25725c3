package cli

import (
	"context"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func (s *adminServer) ListEdges(_ context.Context, r *connect.Request[symbolonv1.ListEdgesRequest]) (*connect.Response[symbolonv1.ListEdgesResponse], error) {
	return answer(s, r, s.edges)
}

func (s *adminServer) ListPolicyHits(_ context.Context, r *connect.Request[symbolonv1.ListPolicyHitsRequest]) (*connect.Response[symbolonv1.ListPolicyHitsResponse], error) {
	if s.hits == nil { // an older controller
		return nil, connect.NewError(connect.CodeUnimplemented, errString("unknown method"))
	}
	return answer(s, r, s.hits)
}

func (s *adminServer) Simulate(_ context.Context, r *connect.Request[symbolonv1.SimulateRequest]) (*connect.Response[symbolonv1.SimulateResponse], error) {
	return answer(s, r, s.simulated)
}

var (
	webEnd = &symbolonv1.EdgeEnd{
		SpiffeId: "spiffe://acme.example/acme/prod/web", Namespace: "/acme/prod", Workload: "web",
		Attributes: map[string]*symbolonv1.LabelValues{"app": values("web"), "proc.exe": values("/usr/sbin/nginx")},
	}
	dbEnd = &symbolonv1.EdgeEnd{
		SpiffeId: "spiffe://acme.example/acme/prod/payments-db", Namespace: "/acme/prod", Workload: "payments-db",
		Attributes: map[string]*symbolonv1.LabelValues{"app": values("db")},
	}
	officeEnd = &symbolonv1.EdgeEnd{External: "/acme/office", Attributes: map[string]*symbolonv1.LabelValues{"ext": values("office")}}
)

// withEdges gives the controller edges of every kind.
func withEdges(s *adminServer) {
	s.edges = &symbolonv1.ListEdgesResponse{Lost: 4, LeftOff: 2, Edges: &symbolonv1.EdgeSet{
		Ends: []*symbolonv1.EdgeEnd{webEnd, dbEnd, officeEnd, {Address: "192.0.2.7"}, {Address: "10.0.0.9", Service: "/acme/lb"}},
		Edges: []*symbolonv1.Edge{
			{
				From: 0, To: 1, Protocol: "tcp", Port: 5432, Outcome: symbolonv1.Outcome_OUTCOME_ALLOW, Reason: symbolonv1.Reason_REASON_POLICY,
				ClientPolicy: "/acme/prod/web-db", ServerPolicy: "/acme/prod/web-db", Protection: symbolonv1.Protection_PROTECTION_ENCRYPTED,
				Reporter: symbolonv1.Reporter_REPORTER_CLIENT, Connections: 812, BytesSent: 4 << 20, BytesReceived: 9 << 30,
				First: at(-30 * time.Hour), Last: at(-20 * time.Second),
			},
			{
				From: 2, To: 0, Protocol: "tcp", Port: 443, Outcome: symbolonv1.Outcome_OUTCOME_ALLOW, Reason: symbolonv1.Reason_REASON_DEFAULT,
				WouldVerdict: "deny", WouldPolicy: "/acme/trial", Reporter: symbolonv1.Reporter_REPORTER_SERVER, AddressOnly: true,
				ExternalAddress: "203.0.113.9", Connections: 3, First: at(-2 * time.Hour), Last: at(-time.Hour),
			},
			{
				From: 3, To: 1, Protocol: "tcp", Port: 5432, Outcome: symbolonv1.Outcome_OUTCOME_DENY, Reason: symbolonv1.Reason_REASON_PEER_UNPROTECTED,
				Reporter: symbolonv1.Reporter_REPORTER_SERVER, AddressOnly: true, Connections: 1, First: at(-time.Hour), Last: at(-time.Hour),
			},
			{
				From: 0, To: 4, Protocol: "tcp", Port: 80, Outcome: symbolonv1.Outcome_OUTCOME_ERROR, Reason: symbolonv1.Reason_REASON_TIMED_OUT,
				Reporter: symbolonv1.Reporter_REPORTER_CLIENT, AddressOnly: true, Connections: 2, First: at(-time.Hour), Last: at(-time.Hour),
			},
			{From: 0, To: 9}, // an end that is not there
		},
	}}
}

func TestEdgeFormats(t *testing.T) {
	for _, format := range []string{"table", "wide", "json", "yaml", "name"} {
		t.Run(format, func(t *testing.T) {
			w := newWorld(t)
			withEdges(w.admin)
			r := w.run("flows", "--edges", "--since", "24h", "--outcome", "deny", "-n", "/acme", "-o", format)
			if r.code != ExitOK || !strings.Contains(r.stderr, "4 connections are in no edge") || !strings.Contains(r.stderr, "2 edges are too many") {
				t.Errorf("exit code %d; stderr:\n%s", r.code, r.stderr)
			}
			golden(t, "flows-edges-"+format, r.stdout)
			want := &symbolonv1.ListEdgesRequest{Namespace: "/acme", Outcome: symbolonv1.Outcome_OUTCOME_DENY, Since: durationpb.New(24 * time.Hour), Last: 100}
			if diff := cmp.Diff(want, w.admin.asked(), protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestEdgeFlagsThatDoNotFit(t *testing.T) {
	w := newWorld(t)
	w.write("p.yaml", "kind: Policy\n")
	for _, args := range [][]string{
		{"flows", "--edges", "--follow"},
		{"flows", "--since", "1h"},
		{"flows", "--edges", "--since", "-1h"},
		{"flows", "--edges", "--since", "yesterday"},
		{"simulate"},
		{"simulate", "-f", w.dir, "--since", "-1h"},
		{"simulate", "-f", w.dir, "-o", "name"},
	} {
		if r := w.run(args...); r.code != ExitUsage {
			t.Errorf("%q: exit code %d, want %d", args, r.code, ExitUsage)
		}
	}
	if w.admin.asked() != nil {
		t.Errorf("asked %v", w.admin.asked())
	}
}

func TestSimulateFormats(t *testing.T) {
	allowed := &symbolonv1.SimulatedVerdict{
		Allow: true, Reason: symbolonv1.Reason_REASON_POLICY, Protection: symbolonv1.Protection_PROTECTION_ENCRYPTED,
		ClientPolicy: "/acme/web-db", ServerPolicy: "/acme/prod/web-db",
	}
	denied := &symbolonv1.SimulatedVerdict{Reason: symbolonv1.Reason_REASON_DEFAULT}
	const newlyDenied, noLonger = symbolonv1.SimulatedType_SIMULATED_TYPE_NEWLY_DENIED, symbolonv1.SimulatedType_SIMULATED_TYPE_NO_LONGER_ENCRYPTED
	answer := func() *symbolonv1.SimulateResponse {
		return &symbolonv1.SimulateResponse{
			Generation: 12, Unchanged: 40, UnchangedConnections: 9000,
			Edges: []*symbolonv1.SimulatedEdge{
				{Type: newlyDenied, From: webEnd, To: dbEnd, Protocol: "tcp", Port: 5432, Before: allowed, After: denied, Connections: 812, First: at(-time.Hour), Last: at(-time.Minute)},
				{Type: symbolonv1.SimulatedType_SIMULATED_TYPE_NEWLY_ALLOWED, From: officeEnd, To: webEnd, Protocol: "tcp", Port: 443, Before: denied, After: &symbolonv1.SimulatedVerdict{Allow: true, Reason: symbolonv1.Reason_REASON_FALLBACK, ServerPolicy: "/acme/o"}, Connections: 7, First: at(-time.Hour), Last: at(-time.Minute), AddressOnly: true},
				{Type: noLonger, From: webEnd, To: webEnd, Protocol: "tcp", Port: 80, Before: allowed, After: &symbolonv1.SimulatedVerdict{Allow: true, Reason: symbolonv1.Reason_REASON_POLICY, Protection: symbolonv1.Protection_PROTECTION_AUTHENTICATED, ClientPolicy: "/a", ServerPolicy: "/a"}, Connections: 1, First: at(-time.Hour), Last: at(-time.Minute)},
			},
			Counts: []*symbolonv1.SimulatedCount{{Type: newlyDenied, Edges: 2, Connections: 900}, {Type: symbolonv1.SimulatedType_SIMULATED_TYPE_NEWLY_ALLOWED, Edges: 1, Connections: 7}, {Type: noLonger, Edges: 1, Connections: 1}},
		}
	}
	w := newWorld(t)
	w.write("p.yaml", "kind: Policy\n")
	w.admin.simulated = answer()
	for _, format := range []string{"table", "json", "yaml"} {
		r := w.run("simulate", "-f", w.dir, "--since", "24h", "--strict", "-o", format)
		if r.code != ExitNegative {
			t.Errorf("%s: exit code %d, want %d:\n%s", format, r.code, ExitNegative, r.stderr)
		}
		golden(t, "simulate-"+format, r.stdout)
		if format == "table" {
			golden(t, "simulate-stderr", r.stderr)
		}
	}
	want := &symbolonv1.SimulateRequest{
		Files: []*symbolonv1.SourceFile{{Name: w.dir + "/p.yaml", Content: []byte("kind: Policy\n")}}, Since: durationpb.New(24 * time.Hour), Strict: true,
	}
	if diff := cmp.Diff(want, w.admin.asked(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	// Only a new denial is a no.
	w.admin.simulated = answer()
	w.admin.simulated.Edges, w.admin.simulated.Counts = w.admin.simulated.Edges[1:], w.admin.simulated.Counts[1:]
	if r := w.run("simulate", "-f", w.dir); r.code != ExitOK {
		t.Errorf("exit code %d, want %d", r.code, ExitOK)
	}
}

func TestPolicyHits(t *testing.T) {
	w := newWorld(t)
	populate(w.admin)
	w.admin.hits = &symbolonv1.ListPolicyHitsResponse{Hits: []*symbolonv1.PolicyHits{{Policy: "/acme/prod/web-may-call-api", Connections: 812, Last: at(-time.Minute)}}}
	golden(t, "policy-list-hits", w.run("policy", "list", "-o", "wide").stdout)
	r := w.run("policy", "get", "/acme/prod/web-may-call-api")
	if !strings.Contains(r.stderr, "has decided 812 connections, the last 1m ago") || strings.Contains(r.stdout, "812") {
		t.Errorf("stdout %q\nstderr %q", r.stdout, r.stderr)
	}
}
