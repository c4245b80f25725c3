package controller_test

import (
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// From start to accept: what was seen is suggested, accepted and enforced in one
// generation; what was denied is not.
func TestLearnFromStartToAccept(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	admin, ctx := w.admin(), t.Context()
	before := w.apply(tree).GetGeneration()
	started, err := admin.StartLearn(ctx, connect.NewRequest(&symbolonv1.StartLearnRequest{Namespace: "/acme/prod"}))
	if err != nil || started.Msg.GetGeneration() != before+1 {
		t.Fatalf("%v, %v", started, err)
	}
	again, err := admin.StartLearn(ctx, connect.NewRequest(&symbolonv1.StartLearnRequest{Namespace: "/acme/prod"}))
	if err != nil || again.Msg.GetGeneration() != before+1 {
		t.Errorf("started twice: %v, %v", again, err)
	}

	h := w.enrol("/acme/prod", nil)
	// What was seen before does not count.
	early := func(e *symbolonv1.Edge) {
		e.Port, e.First, e.Last = 99, timestamppb.New(time.Now().Add(-3*time.Hour)), timestamppb.New(time.Now().Add(-2*time.Hour))
	}
	h.edges(t, edgeSet(symbolonv1.Reporter_REPORTER_CLIENT, edgeEnd("/acme/prod", "old", "app", "old"), edgeEnd("/acme/prod", "db", "app", "db"), early))
	job, db := edgeEnd("/acme/prod", "job", "app", "job"), edgeEnd("/acme/prod", "db", "app", "db")
	other := edgeEnd("/acme/prod", "other", "app", "other")
	learned := func(e *symbolonv1.Edge) { e.Reason, e.WouldVerdict = symbolonv1.Reason_REASON_LEARN, "deny" }
	h.edges(t,
		edgeSet(symbolonv1.Reporter_REPORTER_CLIENT, job, db, learned),
		edgeSet(symbolonv1.Reporter_REPORTER_SERVER, other, db, func(e *symbolonv1.Edge) {
			e.Outcome, e.Reason, e.Port = symbolonv1.Outcome_OUTCOME_DENY, symbolonv1.Reason_REASON_DEFAULT, 22
			e.First, e.Last = timestamppb.New(time.Now()), timestamppb.New(time.Now())
		}))
	status, err := admin.ListLearning(ctx, connect.NewRequest(&symbolonv1.ListLearningRequest{}))
	if err != nil || len(status.Msg.GetNamespaces()) != 1 {
		t.Fatalf("%v, %v", status, err)
	}
	if l := status.Msg.GetNamespaces()[0]; l.GetNamespace() != "/acme/prod" || l.GetLetThrough() != 1 || l.GetDenied() != 1 || l.GetAllowed() != 0 || l.First == nil ||
		l.GetStarted().AsTime().After(l.GetFirst().AsTime()) || time.Since(l.GetStarted().AsTime()) > time.Minute {
		t.Errorf("learning: %v", l)
	}

	suggested, err := admin.SuggestPolicies(ctx, connect.NewRequest(&symbolonv1.SuggestPoliciesRequest{Namespace: "/acme/prod"}))
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{"# - \"spiffe://acme.example/acme/prod/job\" to \"spiffe://acme.example/acme/prod/db\", tcp/5432: 1 connection,", "subject: {app: job}", "object: {app: db}", "ports: [tcp/5432]", "kind: PolicyTest"} {
		if !strings.Contains(suggested.Msg.GetYaml(), part) {
			t.Errorf("%q is not in\n%s", part, suggested.Msg.GetYaml())
		}
	}
	if m := suggested.Msg; m.GetCovered() != 1 || m.GetUncovered() != 0 || m.GetDenied() != 1 || len(m.GetResources()) != 2 {
		t.Errorf("suggested %d resources, %d covered, %d not, %d denied", len(m.GetResources()), m.GetCovered(), m.GetUncovered(), m.GetDenied())
	}
	if got := w.apply(tree); got.GetGeneration() == before+1 {
		t.Fatal("the set-up is wrong: an apply of the tree enforces again")
	}
	if _, err := admin.StartLearn(ctx, connect.NewRequest(&symbolonv1.StartLearnRequest{Namespace: "/acme/prod"})); err != nil {
		t.Fatal(err)
	}

	// It has begun to learn once more, and has seen nothing since.
	accept := &symbolonv1.AcceptSuggestionRequest{Namespace: "/acme/prod", Enforce: true, DryRun: true}
	if fresh, err := admin.AcceptSuggestion(ctx, connect.NewRequest(accept)); err != nil || len(fresh.Msg.GetApplied().GetChanges()) != 1 {
		t.Fatalf("%v, %v", fresh, err)
	}
	accept.Since = durationpb.New(time.Hour)
	dry, err := admin.AcceptSuggestion(ctx, connect.NewRequest(accept))
	if err != nil || len(dry.Msg.GetApplied().GetChanges()) != 3 {
		t.Fatalf("%v, %v", dry, err)
	}
	accept.DryRun = false
	accept.Files = []*symbolonv1.SourceFile{{Name: "learned.yaml", Content: []byte(suggested.Msg.GetYaml())}}
	done, err := admin.AcceptSuggestion(ctx, connect.NewRequest(accept))
	if err != nil || done.Msg.GetApplied().GetGeneration() != dry.Msg.GetApplied().GetGeneration()+1 {
		t.Fatalf("%v, %v", done, err)
	}
	if status, err := admin.ListLearning(ctx, connect.NewRequest(&symbolonv1.ListLearningRequest{})); err != nil || len(status.Msg.GetNamespaces()) != 0 {
		t.Errorf("after the end: %v, %v", status, err)
	}
	for port, allow := range map[uint32]bool{5432: true, 22: false} {
		e, err := admin.Explain(ctx, connect.NewRequest(&symbolonv1.ExplainRequest{
			From:     &symbolonv1.ExplainEndpoint{Namespace: "/acme/prod", Attributes: attributes("app", "job")},
			To:       &symbolonv1.ExplainEndpoint{Namespace: "/acme/prod", Attributes: attributes("app", "db")},
			Protocol: "tcp", Port: port,
		}))
		if err != nil || e.Msg.GetAllow() != allow {
			t.Errorf("port %d: %v, %v", port, e, err)
		}
	}
}

func TestLearnRefusals(t *testing.T) {
	w := newWorld(t)
	before := w.apply(tree).GetGeneration()
	admin, ctx := w.admin(), t.Context()
	_, err := admin.StartLearn(ctx, connect.NewRequest(&symbolonv1.StartLearnRequest{Namespace: "/nowhere"}))
	wantCode(t, err, connect.CodeNotFound, "/nowhere")
	_, err = admin.SuggestPolicies(ctx, connect.NewRequest(&symbolonv1.SuggestPoliciesRequest{Namespace: "/nowhere"}))
	wantCode(t, err, connect.CodeNotFound, "/nowhere")
	_, err = admin.SuggestPolicies(ctx, connect.NewRequest(&symbolonv1.SuggestPoliciesRequest{Namespace: "/acme/prod", Keys: []string{"nosuch"}}))
	wantCode(t, err, connect.CodeInvalidArgument, "nosuch")
	_, err = admin.SuggestPolicies(ctx, connect.NewRequest(&symbolonv1.SuggestPoliciesRequest{Namespace: "/acme/prod", Since: durationpb.New(-1)}))
	wantCode(t, err, connect.CodeInvalidArgument, "since")
	_, err = admin.AcceptSuggestion(ctx, connect.NewRequest(&symbolonv1.AcceptSuggestionRequest{Namespace: "/nowhere"}))
	wantCode(t, err, connect.CodeNotFound, "/nowhere")
	// What does not parse, or fails its test, leaves everything as it was: the mode, too.
	if _, err := admin.StartLearn(ctx, connect.NewRequest(&symbolonv1.StartLearnRequest{Namespace: "/acme/prod"})); err != nil {
		t.Fatal(err)
	}
	for yaml, code := range map[string]connect.Code{
		"kind: Polcy\n": connect.CodeInvalidArgument,
		"kind: PolicyTest\nnamespace: /acme/prod\nname: t\ntests:\n- {name: open, from: {app: nobody}, to: {app: db}, port: tcp/1, expect: allow}\n": connect.CodeFailedPrecondition,
	} {
		_, err := admin.AcceptSuggestion(ctx, connect.NewRequest(&symbolonv1.AcceptSuggestionRequest{
			Namespace: "/acme/prod", Enforce: true, Files: []*symbolonv1.SourceFile{{Name: "x.yaml", Content: []byte(yaml)}},
		}))
		wantCode(t, err, code, "x.yaml")
	}
	status, err := admin.ListLearning(ctx, connect.NewRequest(&symbolonv1.ListLearningRequest{}))
	if err != nil || len(status.Msg.GetNamespaces()) != 1 {
		t.Errorf("%v, %v", status, err)
	}
	if g := w.apply("kind: Namespace\nname: /acme/extra\nmode: enforce\n").GetGeneration(); g != before+2 {
		t.Errorf("generation %d, want %d", g, before+2)
	}
}
