package controller_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// yamlNow is all that is in force.
func (w *world) yamlNow() string {
	w.t.Helper()
	res, err := w.admin().ListResources(w.t.Context(), connect.NewRequest(&symbolonv1.ListResourcesRequest{}))
	if err != nil {
		w.t.Fatal(err)
	}
	return res.Msg.GetYaml()
}

func (w *world) history() []*symbolonv1.PolicyGeneration {
	w.t.Helper()
	res, err := w.admin().ListGenerations(w.t.Context(), connect.NewRequest(&symbolonv1.ListGenerationsRequest{}))
	if err != nil {
		w.t.Fatal(err)
	}
	return res.Msg.GetGenerations()
}

func (w *world) generation(n uint64) *symbolonv1.GetGenerationResponse {
	w.t.Helper()
	res, err := w.admin().GetGeneration(w.t.Context(), connect.NewRequest(&symbolonv1.GetGenerationRequest{Generation: n, Content: true}))
	if err != nil {
		w.t.Fatal(err)
	}
	return res.Msg
}

func (w *world) rollback(req *symbolonv1.RollbackRequest) (*symbolonv1.RollbackResponse, error) {
	w.t.Helper()
	res, err := w.admin().Rollback(w.t.Context(), connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

// changesOf is "updated Policy /acme/web-to-db", in order.
func changesOf(cs []*symbolonv1.Change) []string {
	var out []string
	for _, c := range cs {
		what := strings.ToLower(strings.TrimPrefix(c.GetType().String(), "CHANGE_TYPE_"))
		out = append(out, fmt.Sprintf("%s %s %s/%s", what, c.GetKind(), c.GetNamespace(), c.GetName()))
	}
	return out
}

// inAnHour is a time as YAML has it.
func inAnHour() string { return time.Now().Add(time.Hour).UTC().Format(time.RFC3339) }

const ftp = "kind: Policy\nnamespace: /acme\nname: ftp\nsubject: {app: web}\nverb: allow\nobject: {app: db}\nports: [tcp/21]\n"

// TestEveryGenerationCanBeSeenAndRestored, also by a controller that was restarted.
func TestEveryGenerationCanBeSeenAndRestored(t *testing.T) {
	w := newWorld(t)
	was := map[uint64]string{1: w.yamlNow()}
	step := func() { was[uint64(len(was)+1)] = w.yamlNow() }
	w.apply(tree)
	step()
	if _, err := w.tryApply(&symbolonv1.ApplyRequest{Message: "CR-1: FTP", Files: []*symbolonv1.SourceFile{{
		Name: "a.yaml", Content: []byte(ftp + "---\n" + strings.Replace(treePolicy, "tcp/5432", "tcp/5433", 1)),
	}}}); err != nil {
		t.Fatal(err)
	}
	step()
	_, err := w.admin().Delete(t.Context(), connect.NewRequest(&symbolonv1.DeleteRequest{Message: "no more cards", Keys: []*symbolonv1.ResourceKey{
		{Kind: "Policy", Namespace: "/acme/prod", Name: "web-to-cards"}, {Kind: "External", Namespace: "/acme", Name: "cards"},
	}}))
	if err != nil {
		t.Fatal(err)
	}
	step()
	w.apply(tree) // unchanged but for what was deleted and changed
	step()

	for range 2 {
		for n, want := range was {
			if diff := cmp.Diff(want, w.generation(n).GetYaml()); diff != "" {
				t.Errorf("generation %d (-was +is shown):\n%s", n, diff)
			}
		}
		w.halt()
		w.start()
	}
	third := w.generation(3)
	want := []string{"created Policy /acme/ftp", "updated Policy /acme/web-to-db"}
	if diff := cmp.Diff(want, changesOf(third.GetChanges())); diff != "" {
		t.Errorf("generation 3 changed (-want +got):\n%s", diff)
	}
	if f := third.GetChanges()[1].GetFields(); len(f) != 1 || f[0].GetPath() != "ports" || f[0].GetBefore() != "[tcp/5432]" || f[0].GetAfter() != "[tcp/5433]" {
		t.Errorf("fields %v", f)
	}

	// Back and forth: each is a new generation, equal to the old one.
	for i, n := range []uint64{3, 1, 5, 2, 4} {
		res, err := w.rollback(&symbolonv1.RollbackRequest{Generation: n, BaseGeneration: uint64(5 + i), Message: "try"})
		if err != nil || res.GetGeneration() != uint64(6+i) {
			t.Fatalf("rollback to %d: generation %d, %v", n, res.GetGeneration(), err)
		}
		if diff := cmp.Diff(was[n], w.yamlNow()); diff != "" {
			t.Errorf("rolled back to %d (-was +is):\n%s", n, diff)
		}
	}
	h := w.history()
	if len(h) != 10 || h[0].GetRollbackOf() != 4 || h[0].GetMessage() != "try" || h[0].GetTime() == nil {
		t.Fatalf("history of %d, newest %v", len(h), h[0])
	}
	for i, want := range map[int]*symbolonv1.PolicyGeneration{
		9: {Generation: 1, Actor: "controller", Message: "history begins"},
		7: {Generation: 3, Actor: "admin token from 127.0.0.1", Message: "CR-1: FTP", Created: 1, Updated: 1},
		6: {Generation: 4, Actor: "admin token from 127.0.0.1", Message: "no more cards", Deleted: 2},
	} {
		got := h[i]
		if got.GetGeneration() != want.GetGeneration() || got.GetActor() != want.GetActor() || got.GetMessage() != want.GetMessage() ||
			countOf(got) != countOf(want) {
			t.Errorf("got %v, want %v", got, want)
		}
	}
}

func countOf(g *symbolonv1.PolicyGeneration) [3]uint32 {
	return [3]uint32{g.GetCreated(), g.GetUpdated(), g.GetDeleted()}
}

// treePolicy is one document of tree.
const treePolicy = `
kind: Policy
namespace: /acme
name: web-to-db
subject: {app: web}
verb: allow
object: {app: db}
ports: [tcp/5432]
propagate: true
`

// TestRollbackIsCheckedAsAnApplyIs: the PolicyTests of then run again, and what is
// refused changes nothing.
func TestRollbackIsCheckedAsAnApplyIs(t *testing.T) {
	w := newWorld(t)
	w.apply(tree) // 2
	w.apply(`
kind: PolicyTest
namespace: /acme/prod
name: t
tests:
- {name: web reaches db, from: {app: web}, to: {app: db}, port: tcp/5432, expect: allow}
---
kind: Policy
namespace: /acme/prod
name: temporary
subject: {app: web}
verb: allow
object: {app: db}
expires: ` + inAnHour() + `
`) // 3
	if _, err := w.tryApply(&symbolonv1.ApplyRequest{Files: []*symbolonv1.SourceFile{{Name: "a", Content: []byte(strings.Replace(treePolicy, "allow", "log", 1))}}}); err != nil {
		t.Fatal(err) // 4: the temporary one still allows it
	}
	w.apply(treePolicy) // 5
	w.offset.Store(int64(2 * 3600e9))
	before := w.yamlNow()

	_, err := w.rollback(&symbolonv1.RollbackRequest{Generation: 4})
	wantCode(t, err, connect.CodeFailedPrecondition, "web reaches db", "want allow, got deny by default")
	_, err = w.rollback(&symbolonv1.RollbackRequest{Generation: 3, BaseGeneration: 4})
	wantCode(t, err, connect.CodeAborted, "generation 5 is in force, not 4")
	for _, n := range []uint64{6, 99} {
		_, err = w.rollback(&symbolonv1.RollbackRequest{Generation: n})
		wantCode(t, err, connect.CodeNotFound, "not kept", "1 to 5")
	}
	_, err = w.rollback(&symbolonv1.RollbackRequest{})
	wantCode(t, err, connect.CodeInvalidArgument)
	_, err = w.rollback(&symbolonv1.RollbackRequest{Generation: 2, Message: strings.Repeat("x", 2000)})
	wantCode(t, err, connect.CodeInvalidArgument, "message")
	_, err = w.rollback(&symbolonv1.RollbackRequest{Generation: 2, Message: "\x1b[2J"})
	wantCode(t, err, connect.CodeInvalidArgument, "control characters")
	// What is in force is what it was; going back to an equal one changes nothing.
	res, err := w.rollback(&symbolonv1.RollbackRequest{Generation: 3})
	if err != nil || res.GetGeneration() != 5 || len(res.GetChanges()) != 0 || w.yamlNow() != before {
		t.Errorf("%v, %v", res, err)
	}
	if res, err = w.rollback(&symbolonv1.RollbackRequest{Generation: 2, DryRun: true}); err != nil || res.GetGeneration() != 5 || w.yamlNow() != before {
		t.Errorf("%v, %v", res, err)
	}
	want := []string{"deleted Policy /acme/prod/temporary", "deleted PolicyTest /acme/prod/t"}
	if diff := cmp.Diff(want, changesOf(res.GetChanges())); diff != "" {
		t.Error(diff)
	}
	// A host keeps its namespace from being rolled away.
	w.offset.Store(0)
	w.enrol("/acme/dev", nil)
	_, err = w.rollback(&symbolonv1.RollbackRequest{Generation: 1})
	wantCode(t, err, connect.CodeFailedPrecondition, "/acme/dev has host")
}

// TestPruneStaysInTheNamespacesThatAreDeclared.
func TestPruneStaysInTheNamespacesThatAreDeclared(t *testing.T) {
	w := newWorld(t)
	w.apply(tree + "---\n" + ftp)
	req := &symbolonv1.ApplyRequest{DryRun: true, Prune: true, Files: []*symbolonv1.SourceFile{{
		Name: "a.yaml", Content: []byte("kind: Namespace\nname: /acme\nmode: enforce\n---" + treePolicy),
	}}}
	want := []string{
		"unchanged Namespace /acme/", "deleted Policy /acme/ftp", "unchanged Policy /acme/web-to-db", "deleted External /acme/cards",
	}
	for _, dry := range []bool{true, false} {
		req.DryRun = dry
		res, err := w.tryApply(req)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, changesOf(res.GetChanges())); diff != "" {
			t.Errorf("dry %t (-want +got):\n%s", dry, diff)
		}
	}
	if now := w.yamlNow(); strings.Contains(now, "ftp") || !strings.Contains(now, "name: web-to-cards") || !strings.Contains(now, "name: /acme/dev") {
		t.Errorf("left:\n%s", now)
	}
}
