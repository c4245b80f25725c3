package controller

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/policydb"
)

// maxEdgeAnswer bounds one answer, bytes: clients bound what they read.
const maxEdgeAnswer = 48 << 20

// takeEdges takes what a host adds to edges. What is refused counts as lost.
func (s *Server) takeEdges(host *hostRecord, m *symbolonv1.ReportFlowsRequest) {
	if m.GetEdges() == nil && m.GetEdgesLost() == 0 {
		return
	}
	in := edgeIntake{
		host: host, td: s.cfg.trustDomain(), now: s.opts.Now(), retention: s.cfg.Edges.Retention,
		hasNamespace: s.policies.hasNamespace,
	}
	taken, refused, why := in.take(m.GetEdges())
	if refused > 0 {
		s.log.Warn("edges refused", zap.String("host", host.ID), zap.Uint64("connections", refused), zap.NamedError("last", why))
	}
	s.edges.add(taken, saturated(m.GetEdgesLost(), refused), func(policy, namespace string) bool {
		ns, _ := splitRef(policy)
		return within(namespace, ns) && s.policies.hasPolicy(policy)
	})
}

// splitRef is the namespace and the name of "namespace/name".
func splitRef(ref string) (namespace, name string) {
	i := strings.LastIndexByte(ref, '/')
	if i < 0 {
		return "", ref
	}
	return ref[:max(i, 1)], ref[i+1:]
}

func (p *policies) hasPolicy(ref string) bool {
	namespace, name := splitRef(ref)
	return p.snapshot().Get(policydb.KindPolicy, namespace, name) != nil
}

// pastOf is the moment that a duration of the past begins at; zero: no bound.
// Errors: invalid_argument.
func pastOf(since *durationpb.Duration, now time.Time) (time.Time, error) {
	if since == nil {
		return time.Time{}, nil
	}
	if err := since.CheckValid(); err != nil || since.AsDuration() <= 0 {
		return time.Time{}, invalidf("since %v: want more than 0", since.AsDuration())
	}
	return now.Add(-since.AsDuration()), nil
}

// ListEdges lists what is kept, the last seen first.
func (s adminService) ListEdges(_ context.Context, req *connect.Request[symbolonv1.ListEdgesRequest]) (*connect.Response[symbolonv1.ListEdgesResponse], error) {
	m := req.Msg
	if ns := m.GetNamespace(); ns != "" {
		if err := s.namespaceError(ns); err != nil {
			return nil, err
		}
	}
	since, err := pastOf(m.GetSince(), s.opts.Now())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(s.edges.answer(since, int(m.GetLast()), func(r *edgeRecord) bool {
		return (m.GetOutcome() == symbolonv1.Outcome_OUTCOME_UNSPECIFIED || r.edge.GetOutcome() == m.GetOutcome()) && r.touches(m.GetNamespace())
	})), nil
}

// touches tells whether one end is in a namespace or below it; "" is above all. A foreign
// end that its own host reports is where the record is kept.
func (r *edgeRecord) touches(namespace string) bool {
	foreign := r.from.foreign && r.edge.GetReporter() != symbolonv1.Reporter_REPORTER_SERVER || r.to.foreign && r.edge.GetReporter() != symbolonv1.Reporter_REPORTER_CLIENT
	return namespace == "" || endTouches(r.from, namespace) || endTouches(r.to, namespace) || foreign && within(r.namespace, namespace)
}

func endTouches(e *edgeEnd, namespace string) bool {
	ns := e.message.GetNamespace()
	return ns != "" && !e.foreign && within(ns, namespace)
}

// since returns records seen at or after a moment that are wanted, the last seen
// first. Called with the lock held.
func (b *edgeBook) since(since time.Time, wanted func(*edgeRecord) bool) []*edgeRecord {
	var out []*edgeRecord
	for _, r := range b.records {
		if !r.edge.GetLast().AsTime().Before(since) && wanted(r) {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(x, y *edgeRecord) int {
		if c := y.edge.GetLast().AsTime().Compare(x.edge.GetLast().AsTime()); c != 0 {
			return c
		}
		return strings.Compare(x.key(), y.key())
	})
	return out
}

func (b *edgeBook) answer(since time.Time, last int, wanted func(*edgeRecord) bool) *symbolonv1.ListEdgesResponse {
	b.mu.Lock()
	defer b.mu.Unlock()
	res := &symbolonv1.ListEdgesResponse{Edges: &symbolonv1.EdgeSet{}, Lost: b.lost, Evicted: b.evicted}
	found := b.since(since, wanted)
	if last > 0 && last < len(found) {
		found = found[:last]
	}
	places, size := make(map[*edgeEnd]uint32), 0
	place := func(e *edgeEnd) uint32 {
		n, ok := places[e]
		if !ok {
			n = uint32(len(res.Edges.Ends))
			places[e] = n
			size += proto.Size(e.message)
			res.Edges.Ends = append(res.Edges.Ends, e.message)
		}
		return n
	}
	for i, r := range found {
		e := proto.CloneOf(r.edge)
		e.From, e.To = place(r.from), place(r.to)
		if size += proto.Size(e); size > maxEdgeAnswer {
			res.LeftOff = uint64(len(found) - i)
			break
		}
		res.Edges.Edges = append(res.Edges.Edges, e)
	}
	return res
}

// ListPolicyHits counts what policies decided, by their names.
func (s adminService) ListPolicyHits(_ context.Context, req *connect.Request[symbolonv1.ListPolicyHitsRequest]) (*connect.Response[symbolonv1.ListPolicyHitsResponse], error) {
	if ns := req.Msg.GetNamespace(); ns != "" {
		if err := s.namespaceError(ns); err != nil {
			return nil, err
		}
	}
	res := &symbolonv1.ListPolicyHitsResponse{}
	b := s.edges
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, policy := range slices.Sorted(maps.Keys(b.hits)) {
		if ns, _ := splitRef(policy); !within(ns, req.Msg.GetNamespace()) || !s.policies.hasPolicy(policy) {
			continue
		}
		h := b.hits[policy]
		res.Hits = append(res.Hits, &symbolonv1.PolicyHits{Policy: policy, Connections: h.Connections, Last: timestamppb.New(h.Last)})
	}
	return connect.NewResponse(res), nil
}
