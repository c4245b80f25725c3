package controller

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/policydb"
)

// maxKnown bounds the ends among which a suggestion looks for what it would newly allow:
// it looks at their pairs.
const maxKnown = 1000

// withMode is a namespace's document with another mode. Errors: not_found.
func withMode(s *policydb.Snapshot, namespace string, mode symbolonv1.Mode) (policydb.Document, error) {
	r := s.Get(policydb.KindNamespace, namespace, "")
	if r == nil {
		return policydb.Document{}, connect.NewError(connect.CodeNotFound, fmt.Errorf("there is no namespace %q", namespace))
	}
	r = proto.CloneOf(r)
	r.GetNamespaceKind().Mode = mode
	return policydb.Document{Resource: r}, nil
}

// learnRecord is when learn start put a namespace into learn. It counts while the
// namespace is in learn.
type learnRecord struct {
	Started time.Time `json:"started"`
}

// noteLearn remembers that a namespace begins to learn now.
func (s *Server) noteLearn(ctx context.Context, namespace string) error {
	op, err := putJSON(learnPrefix+namespace, &learnRecord{Started: s.opts.Now().UTC()})
	if err == nil {
		_, _, err = s.policies.store.Txn(ctx, nil, []store.Op{op})
	}
	return err
}

// learnsSince is when a namespace began to learn; zero: it does not, or nobody noted it.
func (s *Server) learnsSince(ctx context.Context, snapshot *policydb.Snapshot, namespace string) (time.Time, error) {
	if snapshot.Get(policydb.KindNamespace, namespace, "").GetNamespaceKind().GetMode() != symbolonv1.Mode_MODE_LEARN {
		return time.Time{}, nil
	}
	kv, err := s.policies.store.Get(ctx, learnPrefix+namespace)
	if errors.Is(err, store.ErrNotFound) {
		return time.Time{}, nil
	}
	var r learnRecord
	if err == nil {
		err = getJSON(kv, &r)
	}
	return r.Started, err
}

// StartLearn is one generation, or none where the namespace is in learn.
func (s adminService) StartLearn(ctx context.Context, req *connect.Request[symbolonv1.StartLearnRequest]) (*connect.Response[symbolonv1.StartLearnResponse], error) {
	snapshot := s.policies.snapshot()
	doc, err := withMode(snapshot, req.Msg.GetNamespace(), symbolonv1.Mode_MODE_LEARN)
	if err != nil {
		return nil, err
	}
	if snapshot.Get(policydb.KindNamespace, req.Msg.GetNamespace(), "").GetNamespaceKind().GetMode() != symbolonv1.Mode_MODE_LEARN {
		// First: a time that is noted and not used does no harm.
		if err := s.noteLearn(ctx, req.Msg.GetNamespace()); err != nil {
			return nil, s.internal("learn start", err)
		}
	}
	_, generation, published, err := s.policies.apply(ctx, change{
		upserts: []policydb.Document{doc}, base: snapshot.Generation(), actor: actorOf(req.Peer()), message: "learn start",
	})
	if err != nil {
		return nil, s.refuseChange("learn start", err)
	}
	s.publish(published)
	return connect.NewResponse(&symbolonv1.StartLearnResponse{Generation: generation}), nil
}

// ListLearning counts by what is in force now, not by what was when an edge was seen.
func (s adminService) ListLearning(ctx context.Context, _ *connect.Request[symbolonv1.ListLearningRequest]) (*connect.Response[symbolonv1.ListLearningResponse], error) {
	snapshot := s.policies.snapshot()
	compiled, err := s.policies.forExplain()
	if err != nil {
		return nil, s.internal("compile", err)
	}
	res := &symbolonv1.ListLearningResponse{}
	for _, r := range snapshot.List(policydb.KindNamespace, "/") {
		if r.GetNamespaceKind().GetMode() != symbolonv1.Mode_MODE_LEARN {
			continue
		}
		started, err := s.learnsSince(ctx, snapshot, r.GetNamespace())
		if err != nil {
			return nil, s.internal("learn", err)
		}
		seen := s.edges.policyEdges(r.GetNamespace(), latest(started, s.opts.Now().Add(-s.cfg.Edges.Retention)), compiled.LocalNamespace)
		g, err := snapshot.Suggest(seen, policydb.SuggestOptions{Namespace: r.GetNamespace(), Now: s.opts.Now()})
		if err != nil {
			return nil, s.internal("learn", err)
		}
		l := &symbolonv1.Learning{
			Namespace: r.GetNamespace(), Allowed: uint64(g.Already), Denied: uint64(g.Denied), LetThrough: uint64(g.Covered) + uint64(len(g.Uncovered)),
		}
		if !started.IsZero() {
			l.Started = timestamppb.New(started)
		}
		for _, e := range seen {
			if l.First == nil || e.First.Before(l.First.AsTime()) {
				l.First = timestamppb.New(e.First)
			}
			if l.Last == nil || e.Last.After(l.Last.AsTime()) {
				l.Last = timestamppb.New(e.Last)
			}
		}
		res.Namespaces = append(res.Namespaces, l)
	}
	return connect.NewResponse(res), nil
}

// SuggestPolicies changes nothing.
func (s adminService) SuggestPolicies(ctx context.Context, req *connect.Request[symbolonv1.SuggestPoliciesRequest]) (*connect.Response[symbolonv1.SuggestPoliciesResponse], error) {
	m := req.Msg
	snapshot := s.policies.snapshot()
	g, err := s.suggest(ctx, snapshot, m.GetNamespace(), m.GetKeys(), m.GetSince())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&symbolonv1.SuggestPoliciesResponse{
		Yaml: string(g.YAML()), Resources: g.Resources(), Covered: uint64(g.Covered), Already: uint64(g.Already),
		Uncovered: uint64(len(g.Uncovered)), Denied: uint64(g.Denied), Generation: snapshot.Generation(),
	}), nil
}

func (s *Server) suggest(ctx context.Context, snapshot *policydb.Snapshot, namespace string, keys []string, since *durationpb.Duration) (*policydb.Suggestion, error) {
	now := s.opts.Now()
	from, err := pastOf(since, now)
	if err != nil {
		return nil, err
	}
	if since == nil {
		if from, err = s.learnsSince(ctx, snapshot, namespace); err != nil {
			return nil, s.internal("suggest", err)
		}
	}
	compiled, err := s.policies.forExplain()
	if err != nil {
		return nil, s.internal("compile", err)
	}
	g, err := snapshot.Suggest(s.edges.policyEdges(namespace, from, compiled.LocalNamespace), policydb.SuggestOptions{
		Namespace: namespace, Keys: keys, Known: s.known(snapshot), Now: now,
	})
	switch {
	case errors.Is(err, policydb.ErrNoNamespace):
		return nil, connect.NewError(connect.CodeNotFound, err)
	case errors.Is(err, policydb.ErrUnreadable):
		return nil, s.internal("suggest", err)
	case err != nil:
		return nil, invalidf("%v", err)
	}
	return g, nil
}

// known are the workloads with a valid SVID, and the Externals.
func (s *Server) known(snapshot *policydb.Snapshot) []policydb.Known {
	var out []policydb.Known
	for _, w := range s.inventory.list("") {
		id, err := spiffeid.FromString(w.SPIFFEID)
		if err != nil {
			continue
		}
		if p, err := identity.NewPrincipal(id, w.Claims); err == nil && len(out) < maxKnown {
			out = append(out, policydb.Known{Name: w.SPIFFEID, Endpoint: policydb.Endpoint{Namespace: p.Namespace, Attributes: p.Attributes}})
		}
	}
	for _, r := range snapshot.List(policydb.KindExternal, "/") {
		if len(out) < maxKnown {
			labels := identity.AttributesFromProto(r.GetExternal().GetLabels())
			out = append(out, policydb.Known{Name: policydb.RefOf(r), Endpoint: policydb.Endpoint{External: policydb.RefOf(r), Attributes: labels}})
		}
	}
	return out
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// AcceptSuggestion is one generation, on the very one that the suggestion was made on.
func (s adminService) AcceptSuggestion(ctx context.Context, req *connect.Request[symbolonv1.AcceptSuggestionRequest]) (*connect.Response[symbolonv1.AcceptSuggestionResponse], error) {
	m := req.Msg
	if n := len(m.GetFiles()); n > maxFiles {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%d files, the limit is %d", n, maxFiles))
	}
	if err := checkMessage(m.GetMessage()); err != nil {
		return nil, err
	}
	snapshot := s.policies.snapshot()
	enforced, err := withMode(snapshot, m.GetNamespace(), symbolonv1.Mode_MODE_ENFORCE)
	if err != nil {
		return nil, err
	}
	docs, err := parseFiles(m.GetFiles())
	if err != nil {
		return nil, err
	}
	if len(m.GetFiles()) == 0 {
		g, err := s.suggest(ctx, snapshot, m.GetNamespace(), m.GetKeys(), m.GetSince())
		if err != nil {
			return nil, err
		}
		for _, r := range g.Resources() {
			docs = append(docs, policydb.Document{Resource: r})
		}
	}
	if m.GetEnforce() {
		docs = append(docs, enforced)
	}
	plan, generation, published, err := s.policies.apply(ctx, change{
		upserts: docs, base: snapshot.Generation(), dryRun: m.GetDryRun(), actor: actorOf(req.Peer()), message: m.GetMessage(),
	})
	if err != nil {
		return nil, s.refuseChange("learn accept", err)
	}
	s.publish(published)
	res := &symbolonv1.ApplyResponse{Generation: generation, Warnings: plan.Warnings, Tests: plan.TestResults}
	for _, c := range plan.Changes {
		res.Changes = append(res.Changes, changeProto(c))
	}
	return connect.NewResponse(&symbolonv1.AcceptSuggestionResponse{Applied: res}), nil
}
