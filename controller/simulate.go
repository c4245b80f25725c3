package controller

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/policydb"
)

// maxSimulated bounds the list in one answer; the counts have them all.
const maxSimulated = 10_000

var simulatedTypes = map[policydb.Difference]symbolonv1.SimulatedType{
	policydb.NewlyDenied:       symbolonv1.SimulatedType_SIMULATED_TYPE_NEWLY_DENIED,
	policydb.NewlyAllowed:      symbolonv1.SimulatedType_SIMULATED_TYPE_NEWLY_ALLOWED,
	policydb.NewlyEncrypted:    symbolonv1.SimulatedType_SIMULATED_TYPE_NEWLY_ENCRYPTED,
	policydb.NoLongerEncrypted: symbolonv1.SimulatedType_SIMULATED_TYPE_NO_LONGER_ENCRYPTED,
}

// Simulate plans the files as Apply would, and decides the recorded edges by what is
// in force and by what would be.
func (s adminService) Simulate(_ context.Context, req *connect.Request[symbolonv1.SimulateRequest]) (*connect.Response[symbolonv1.SimulateResponse], error) {
	if n := len(req.Msg.GetFiles()); n > maxFiles {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%d files, the limit is %d", n, maxFiles))
	}
	now := s.opts.Now()
	since, err := pastOf(req.Msg.GetSince(), now)
	if err != nil {
		return nil, err
	}
	docs, err := parseFiles(req.Msg.GetFiles())
	if err != nil {
		return nil, err
	}
	plan, err := s.policies.db.Plan(docs, nil, req.Msg.GetStrict())
	if err != nil {
		return nil, s.refuseChange("simulate", err)
	}
	base, candidate := plan.Snapshots()
	current, err := policydb.Compile(base.All(), base.Generation())
	if err != nil {
		return nil, s.internal("compile", err)
	}
	draft, err := policydb.Compile(candidate.All(), base.Generation())
	if err != nil {
		return nil, s.internal("compile", err)
	}
	seen := s.edges.seen(since, false, current.LocalNamespace, func(_, _ *policydb.Endpoint) bool { return true })
	edges := make([]policydb.Edge, len(seen))
	for i := range seen {
		edges[i] = seen[i].Edge
	}
	res := &symbolonv1.SimulateResponse{Generation: base.Generation(), Warnings: plan.Warnings, Tests: plan.TestResults}
	for _, c := range plan.Changes {
		res.Changes = append(res.Changes, changeProto(c))
	}
	fillSimulation(res, seen, policydb.Simulate(current, draft, edges, now))
	return connect.NewResponse(res), nil
}

func fillSimulation(res *symbolonv1.SimulateResponse, seen []seenEdge, simulated []policydb.Simulated) {
	counts := make(map[symbolonv1.SimulatedType]*symbolonv1.SimulatedCount)
	for i, x := range simulated {
		e := &seen[i]
		if x.Difference == policydb.Unchanged {
			res.Unchanged++
			res.UnchangedConnections = saturated(res.GetUnchangedConnections(), e.Connections)
			continue
		}
		kind := simulatedTypes[x.Difference]
		n := counts[kind]
		if n == nil {
			n = &symbolonv1.SimulatedCount{Type: kind}
			counts[kind] = n
			res.Counts = append(res.Counts, n)
		}
		n.Edges++
		n.Connections = saturated(n.GetConnections(), e.Connections)
		res.Edges = append(res.Edges, &symbolonv1.SimulatedEdge{
			Type: kind, From: e.from.message, To: e.to.message, Protocol: e.Protocol, Port: uint32(e.Port),
			Before: simulatedVerdict(x.Before), After: simulatedVerdict(x.After), AddressOnly: e.AddressOnly,
			Connections: e.Connections, First: timestamppb.New(e.First), Last: timestamppb.New(e.Last),
		})
	}
	slices.SortFunc(res.Counts, func(x, y *symbolonv1.SimulatedCount) int { return cmp.Compare(x.GetType(), y.GetType()) })
	// Edges of as many connections keep the order of who, whom and port.
	slices.SortStableFunc(res.Edges, func(x, y *symbolonv1.SimulatedEdge) int {
		return cmp.Or(cmp.Compare(x.GetType(), y.GetType()), cmp.Compare(y.GetConnections(), x.GetConnections()))
	})
	if len(res.Edges) > maxSimulated {
		res.Edges = res.Edges[:maxSimulated]
	}
}

func simulatedVerdict(v policydb.EdgeVerdict) *symbolonv1.SimulatedVerdict {
	return &symbolonv1.SimulatedVerdict{
		Allow: v.Allow, Protection: v.Protection, Reason: v.Reason, ClientPolicy: v.ClientPolicy, ServerPolicy: v.ServerPolicy,
	}
}
