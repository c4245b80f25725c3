package controller

import (
	"context"
	"fmt"

	"connectrpc.com/connect"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/policydb"
)

// candidateFiles reads the files of a question about a candidate.
func (s adminService) candidateFiles(files []*symbolonv1.SourceFile, namespace string) ([]policydb.Document, error) {
	if n := len(files); n > maxFiles {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%d files, the limit is %d", n, maxFiles))
	}
	docs, err := parseFiles(files)
	if err != nil || namespace == "" {
		return docs, err
	}
	for _, d := range docs {
		if d.Resource.GetNamespaceKind() != nil && d.Resource.GetNamespace() == namespace {
			return docs, nil // the candidate has it
		}
	}
	return docs, s.namespaceError(namespace)
}

// TestPolicy runs every PolicyTest, whether it would refuse an apply or not.
func (s adminService) TestPolicy(_ context.Context, req *connect.Request[symbolonv1.TestPolicyRequest]) (*connect.Response[symbolonv1.TestPolicyResponse], error) {
	docs, err := s.candidateFiles(req.Msg.GetFiles(), req.Msg.GetNamespace())
	if err != nil {
		return nil, err
	}
	cases, err := s.policies.db.Test(docs, req.Msg.GetNamespace())
	if err != nil {
		return nil, s.refuseChange("test", err)
	}
	res := &symbolonv1.TestPolicyResponse{Generation: s.policies.snapshot().Generation()}
	for _, c := range cases {
		out := &symbolonv1.TestCase{
			Namespace: c.PolicyTest.Namespace, PolicyTest: c.PolicyTest.Name, Name: c.Name,
			Passed: c.Failure == "", Message: c.Failure, File: c.File, Line: uint32(c.Line),
			Protocol: c.Protocol, Port: uint32(c.Port),
		}
		for _, e := range c.Sides {
			out.Sides = append(out.Sides, explainSide(e))
		}
		res.Cases = append(res.Cases, out)
	}
	return connect.NewResponse(res), nil
}

// LintPolicy changes nothing and refuses nothing but what cannot be read.
func (s adminService) LintPolicy(_ context.Context, req *connect.Request[symbolonv1.LintPolicyRequest]) (*connect.Response[symbolonv1.LintPolicyResponse], error) {
	docs, err := s.candidateFiles(req.Msg.GetFiles(), req.Msg.GetNamespace())
	if err != nil {
		return nil, err
	}
	findings, omitted, err := s.policies.db.LintCandidate(docs, req.Msg.GetNamespace())
	if err != nil {
		return nil, s.refuseChange("lint", err)
	}
	res := &symbolonv1.LintPolicyResponse{Generation: s.policies.snapshot().Generation(), Omitted: uint32(omitted)}
	for _, f := range findings {
		out := &symbolonv1.LintFinding{
			Code: f.Code, Severity: f.Severity, Kind: f.Key.Kind, Namespace: f.Key.Namespace, Name: f.Key.Name,
			Message: f.Message, Remedy: f.Hint, File: f.File, Line: uint32(f.Line), Column: uint32(f.Column), Excerpt: f.Excerpt,
		}
		if f.Other != (policydb.Key{}) {
			out.Other = f.Other.Ref()
		}
		res.Findings = append(res.Findings, out)
	}
	return connect.NewResponse(res), nil
}
