package controller

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/aymanbagabas/go-udiff"
	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/policydb"
)

// maxFiles bounds one Apply, besides its size.
const maxFiles = 10_000

// Apply is one generation or nothing.
func (s adminService) Apply(ctx context.Context, req *connect.Request[symbolonv1.ApplyRequest]) (*connect.Response[symbolonv1.ApplyResponse], error) {
	if n := len(req.Msg.GetFiles()); n > maxFiles {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%d files, the limit is %d", n, maxFiles))
	}
	if err := checkMessage(req.Msg.GetMessage()); err != nil {
		return nil, err
	}
	docs, err := parseFiles(req.Msg.GetFiles())
	if err != nil {
		return nil, err
	}
	plan, generation, published, err := s.policies.apply(ctx, change{
		upserts: docs, prune: req.Msg.GetPrune(), dryRun: req.Msg.GetDryRun(), strict: req.Msg.GetStrict(),
		actor: actorOf(req.Peer()), message: req.Msg.GetMessage(),
	})
	if err != nil {
		return nil, s.refuseChange("apply", err)
	}
	s.publish(published)
	res := &symbolonv1.ApplyResponse{Generation: generation, Warnings: plan.Warnings, Tests: plan.TestResults}
	for _, c := range plan.Changes {
		res.Changes = append(res.Changes, changeProto(c))
	}
	return connect.NewResponse(res), nil
}

// Delete is one generation or nothing.
func (s adminService) Delete(ctx context.Context, req *connect.Request[symbolonv1.DeleteRequest]) (*connect.Response[symbolonv1.DeleteResponse], error) {
	if err := checkMessage(req.Msg.GetMessage()); err != nil {
		return nil, err
	}
	var keys []policydb.Key
	for _, k := range req.Msg.GetKeys() {
		key := policydb.Key{Kind: k.GetKind(), Namespace: k.GetNamespace(), Name: k.GetName()}
		if key.Kind == policydb.KindNamespace && key.Namespace == "" {
			// A Namespace is its path, wherever it is written.
			key = policydb.Key{Kind: key.Kind, Namespace: key.Name}
		}
		if s.policies.snapshot().Get(key.Kind, key.Namespace, key.Name) == nil {
			return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("there is no %s", key))
		}
		keys = append(keys, key)
	}
	_, generation, published, err := s.policies.apply(ctx, change{deletes: keys, actor: actorOf(req.Peer()), message: req.Msg.GetMessage()})
	if err != nil {
		return nil, s.refuseChange("delete", err)
	}
	s.publish(published)
	return connect.NewResponse(&symbolonv1.DeleteResponse{Generation: generation}), nil
}

func (s *Server) publish(d *distribution) {
	if d == nil {
		return
	}
	s.hub.publish(d)
	s.log.Info("generation published", zap.Uint64("generation", d.generation()))
}

// refuseChange gives an error its code: invalid_argument for what is wrong in itself,
// failed_precondition where a PolicyTest failed or a namespace has hosts, aborted
// for a change by somebody else meanwhile.
func (s *Server) refuseChange(what string, err error) error {
	var wrong *policydb.ValidationErrors
	switch {
	case errors.As(err, &wrong) && slices.ContainsFunc(wrong.TestResults, func(t *symbolonv1.TestResult) bool { return !t.GetPassed() }):
		// The files are good; what they would do is not wanted.
		return refused(connect.CodeFailedPrecondition, err.Error())
	case errors.As(err, &wrong):
		return refused(connect.CodeInvalidArgument, err.Error())
	case errors.Is(err, store.ErrInvalid):
		return refused(connect.CodeInvalidArgument, err.Error())
	case errors.Is(err, policydb.ErrConflict):
		return connect.NewError(connect.CodeAborted, err)
	case errors.Is(err, errNotKept):
		return connect.NewError(connect.CodeNotFound, err)
	case errors.Is(err, errOccupied):
		return connect.NewError(connect.CodeFailedPrecondition, err)
	}
	return s.internal(what, err)
}

func changeProto(c policydb.Change) *symbolonv1.Change {
	key := c.Key()
	out := &symbolonv1.Change{Type: c.Type, Kind: key.Kind, Namespace: key.Namespace, Name: key.Name}
	if c.Type == symbolonv1.ChangeType_CHANGE_TYPE_UPDATED {
		out.Diff = diff(policydb.FormatYAML(c.Previous), policydb.FormatYAML(c.Resource))
		for _, f := range policydb.FieldChanges(c.Previous, c.Resource) {
			out.Fields = append(out.Fields, &symbolonv1.FieldChange{Path: f.Path, Before: f.Before, After: f.After})
		}
	}
	return out
}

// diff is the hunks of a unified diff, without the two lines that name files.
func diff(before, after []byte) string {
	_, hunks, _ := strings.Cut(udiff.Unified("", "", string(before), string(after)), "\n")
	_, hunks, _ = strings.Cut(hunks, "\n")
	return hunks
}

// ListResources gives resources as messages and as YAML.
func (s adminService) ListResources(_ context.Context, req *connect.Request[symbolonv1.ListResourcesRequest]) (*connect.Response[symbolonv1.ListResourcesResponse], error) {
	kind := ""
	if want := req.Msg.GetKind(); want != "" {
		for _, k := range policydb.Kinds() {
			if strings.EqualFold(k, want) {
				kind = k
			}
		}
		if kind == "" {
			return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("kind %q: want one of %s", want, strings.Join(policydb.Kinds(), ", ")))
		}
	}
	if ns := req.Msg.GetNamespace(); ns != "" {
		if err := s.namespaceError(ns); err != nil {
			return nil, err
		}
	}
	snapshot := s.policies.snapshot()
	res := &symbolonv1.ListResourcesResponse{
		Resources:  snapshot.List(kind, req.Msg.GetNamespace()),
		Generation: snapshot.Generation(),
	}
	res.Yaml = yamlOf(res.Resources)
	return connect.NewResponse(res), nil
}

// yamlOf is resources as documents of one file.
func yamlOf(resources []*symbolonv1.Resource) string {
	var yaml bytes.Buffer
	for i, r := range resources {
		if i > 0 {
			yaml.WriteString("---\n")
		}
		yaml.Write(policydb.FormatYAML(r))
	}
	return yaml.String()
}
