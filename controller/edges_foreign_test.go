package controller_test

import (
	"strings"
	"testing"

	"connectrpc.com/connect"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func foreignEnd(id, workload string, pairs ...string) *symbolonv1.EdgeEnd {
	path := strings.TrimSuffix(id[strings.Index(id[9:], "/")+9:], "/"+workload)
	return &symbolonv1.EdgeEnd{SpiffeId: id, Namespace: path, Workload: workload, Attributes: attributes(pairs...), AttributesFrom: "policy"}
}

// Workloads of other trust domains: a partner's are judged by our side alone, whatever
// namespace their path names; those that a host of ours answers for (SPIRE's) in the
// namespace in which it judges them.
func TestEdgesOfForeignTrustDomains(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	admin, ctx := w.admin(), t.Context()
	if _, err := admin.StartLearn(ctx, connect.NewRequest(&symbolonv1.StartLearnRequest{Namespace: "/acme/prod"})); err != nil {
		t.Fatal(err)
	}
	h := w.enrol("/acme/prod", nil)
	db := edgeEnd("/acme/prod", "db", "app", "db")
	partner := foreignEnd("spiffe://partner.example/acme/dev/web", "web", "app", "web")
	job, svc := foreignEnd("spiffe://spire.example/elsewhere/job", "job", "app", "job"), foreignEnd("spiffe://spire.example/acme/prod/svc", "svc", "app", "svc")
	on := func(port uint32) func(*symbolonv1.Edge) { return func(e *symbolonv1.Edge) { e.Port = port } }
	h.edges(t,
		edgeSet(server, partner, db, on(1)),
		edgeSet(client, job, partner, on(2)),
		// One connection, which both ends report.
		edgeSet(client, job, svc, on(3)), edgeSet(server, job, svc, on(3)),
		// A partner's own business, as seen by nobody of ours.
		edgeSet(client, db, &symbolonv1.EdgeEnd{Address: "192.0.2.1"}, on(4)),
	)
	suggested, err := admin.SuggestPolicies(ctx, connect.NewRequest(&symbolonv1.SuggestPoliciesRequest{Namespace: "/acme/prod", Keys: []string{"app"}}))
	if err != nil {
		t.Fatal(err)
	}
	yaml := suggested.Msg.GetYaml()
	for _, part := range []string{
		// A partner's label alone is not what it is here.
		"subject: {app: web, spiffe.trust_domain: partner.example}\nverb: allow\nobject: {app: db}\nports: [tcp/1]",
		"subject: {app: job}\nverb: allow\nobject: {app: web, spiffe.trust_domain: partner.example}\nports: [tcp/2]",
		"subject: {app: job}\nverb: allow\nobject: {app: svc}\nports: [tcp/3]",
	} {
		if !strings.Contains(yaml, part) {
			t.Errorf("%q is not in\n%s", part, yaml)
		}
	}
	if m := suggested.Msg; m.GetCovered() != 3 || m.GetUncovered() != 1 {
		t.Errorf("%d covered, %d not:\n%s", m.GetCovered(), m.GetUncovered(), yaml)
	}
	// Its PolicyTest would refuse the draft below.
	policies, _, _ := strings.Cut(yaml, "---\nkind: PolicyTest")
	if _, err := admin.AcceptSuggestion(ctx, connect.NewRequest(&symbolonv1.AcceptSuggestionRequest{
		Namespace: "/acme/prod", Enforce: true, Files: []*symbolonv1.SourceFile{{Name: "learned.yaml", Content: []byte(policies)}},
	})); err != nil {
		t.Fatal(err)
	}
	// In /acme/dev, which the partner's path names, nothing of ours is judged.
	res, err := admin.Simulate(ctx, connect.NewRequest(&symbolonv1.SimulateRequest{Files: []*symbolonv1.SourceFile{{Name: "draft.yaml", Content: []byte(`
kind: Policy
namespace: /acme/prod
name: no-partner
subject: {spiffe.trust_domain: partner.example}
verb: deny
object: any
---
kind: Policy
namespace: /acme/dev
name: of-nobody-here
subject: any
verb: deny
object: any
---
kind: Policy
namespace: /acme/prod
name: no-svc
subject: any
verb: deny
object: {spiffe.id: {prefix: "spiffe://spire.example/acme/prod/"}}
`)}}}))
	if err != nil {
		t.Fatal(err)
	}
	denied := make(map[uint32]*symbolonv1.SimulatedEdge)
	for _, e := range res.Msg.GetEdges() {
		if e.GetType() != symbolonv1.SimulatedType_SIMULATED_TYPE_NEWLY_DENIED || denied[e.GetPort()] != nil {
			t.Errorf("simulated %v", e)
		}
		denied[e.GetPort()] = e
	}
	if len(denied) != 2 || denied[1] == nil || denied[3] == nil {
		t.Fatalf("newly denied: %v", res.Msg.GetEdges())
	}
	if v := denied[1].GetAfter(); v.GetServerPolicy() != "/acme/prod/no-partner" || v.GetClientPolicy() != "" {
		t.Errorf("the partner is denied by %v", v)
	}
	if v := denied[3].GetAfter(); v.GetServerPolicy() != "/acme/prod/no-svc" || v.GetClientPolicy() != "/acme/prod/no-svc" {
		t.Errorf("both ends are ours, and judge; denied by %v", v)
	}
	if e := denied[3]; e.GetConnections() != 1 {
		t.Errorf("one connection that both report counts %d times", e.GetConnections())
	}
}
