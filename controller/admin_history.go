package controller

import (
	"context"
	"net"
	"slices"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/policydb"
)

// actorOf is whom the history names: what let the caller in, and from where. There is
// one admin token, so that is all that is known of who.
func actorOf(peer connect.Peer) string {
	from := peer.Addr
	if host, _, err := net.SplitHostPort(from); err == nil {
		from = host
	}
	return "admin token from " + from
}

// ListGenerations is the history, the newest first.
func (s adminService) ListGenerations(_ context.Context, req *connect.Request[symbolonv1.ListGenerationsRequest]) (*connect.Response[symbolonv1.ListGenerationsResponse], error) {
	records, generation := s.policies.generations()
	res := &symbolonv1.ListGenerationsResponse{Generation: generation}
	for _, r := range slices.Backward(records) {
		if n := req.Msg.GetLast(); n > 0 && len(res.Generations) == int(n) {
			break
		}
		res.Generations = append(res.Generations, r.proto())
	}
	return connect.NewResponse(res), nil
}

// GetGeneration is what one generation changed, and all that was in force in it.
func (s adminService) GetGeneration(ctx context.Context, req *connect.Request[symbolonv1.GetGenerationRequest]) (*connect.Response[symbolonv1.GetGenerationResponse], error) {
	record, changes, resources, err := s.policies.generation(ctx, req.Msg.GetGeneration())
	if err != nil {
		return nil, s.refuseChange("read history", err)
	}
	res := &symbolonv1.GetGenerationResponse{Generation: record.proto()}
	for _, c := range changes {
		res.Changes = append(res.Changes, changeProto(c))
	}
	if req.Msg.GetContent() {
		res.Resources, res.Yaml = resources, yamlOf(resources)
	}
	return connect.NewResponse(res), nil
}

// Rollback is one generation or nothing, as Apply is.
func (s adminService) Rollback(ctx context.Context, req *connect.Request[symbolonv1.RollbackRequest]) (*connect.Response[symbolonv1.RollbackResponse], error) {
	m := req.Msg
	if err := checkMessage(m.GetMessage()); err != nil {
		return nil, err
	}
	if m.GetGeneration() == 0 {
		return nil, invalidf("generation is missing")
	}
	plan, generation, published, err := s.policies.apply(ctx, change{
		rollback: m.GetGeneration(), base: m.GetBaseGeneration(), dryRun: m.GetDryRun(),
		actor: actorOf(req.Peer()), message: m.GetMessage(),
	})
	if err != nil {
		return nil, s.refuseChange("rollback", err)
	}
	s.publish(published)
	res := &symbolonv1.RollbackResponse{Generation: generation, Warnings: plan.Warnings, Tests: plan.TestResults}
	for _, c := range plan.Changes {
		res.Changes = append(res.Changes, changeProto(c))
	}
	return connect.NewResponse(res), nil
}

// generations are the records, oldest first, and the generation in force.
func (p *policies) generations() ([]generationRecord, uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.history.records), p.state.Generation
}

// generation is a generation's record, what it changed, and all that was in force in
// it, both in the order of listings. Errors: errNotKept, the store's.
func (p *policies) generation(ctx context.Context, number uint64) (record generationRecord, changes []policydb.Change, resources []*symbolonv1.Resource, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	found, err := p.history.find(number)
	if err != nil {
		return record, nil, nil, err
	}
	later, err := p.history.back(ctx, number)
	if err != nil {
		return record, nil, nil, err
	}
	before := make(past)
	if err := p.history.undo(ctx, found, before); err != nil {
		return record, nil, nil, err
	}
	snapshot := p.db.Snapshot()
	after := func(key policydb.Key) *symbolonv1.Resource {
		if r, ok := later[key]; ok {
			return r
		}
		return snapshot.Get(key.Kind, key.Namespace, key.Name)
	}
	for key, old := range before {
		c := policydb.Change{Type: symbolonv1.ChangeType_CHANGE_TYPE_UPDATED, Previous: old, Resource: after(key)}
		switch {
		case old == nil && c.Resource == nil || proto.Equal(old, c.Resource):
			continue
		case old == nil:
			c.Type = symbolonv1.ChangeType_CHANGE_TYPE_CREATED
		case c.Resource == nil:
			c.Type = symbolonv1.ChangeType_CHANGE_TYPE_DELETED
		}
		changes = append(changes, c)
	}
	for _, r := range snapshot.All() {
		if _, ok := later[policydb.KeyOf(r)]; !ok {
			resources = append(resources, r)
		}
	}
	for _, r := range later {
		if r != nil {
			resources = append(resources, r)
		}
	}
	slices.SortFunc(changes, func(a, b policydb.Change) int { return policydb.CompareKeys(a.Key(), b.Key()) })
	slices.SortFunc(resources, func(a, b *symbolonv1.Resource) int {
		return policydb.CompareKeys(policydb.KeyOf(a), policydb.KeyOf(b))
	})
	return *found, changes, resources, nil
}
