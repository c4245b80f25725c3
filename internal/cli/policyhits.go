package cli

import (
	"context"
	"fmt"

	"connectrpc.com/connect"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
)

// policyHits are the counts by policy; none from a controller that does not count.
func (a *app) policyHits(ctx context.Context, c symbolonv1connect.AdminServiceClient, namespace string) (map[string]*symbolonv1.PolicyHits, error) {
	resp, err := call(ctx, a, c.ListPolicyHits, &symbolonv1.ListPolicyHitsRequest{Namespace: namespace})
	if connect.CodeOf(err) == connect.CodeUnimplemented {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	out := make(map[string]*symbolonv1.PolicyHits)
	for _, h := range resp.GetHits() {
		out[h.GetPolicy()] = h
	}
	return out, nil
}

// hitCells are how many connections a policy decided, and when it last did.
func (a *app) hitCells(r *symbolonv1.Resource, hits map[string]*symbolonv1.PolicyHits) [2]cell {
	if r.GetPolicy() == nil || hits == nil {
		return [2]cell{}
	}
	h := hits[policyRef(r.GetNamespace(), r.GetName())]
	if h == nil {
		return [2]cell{text("0"), text("never")}
	}
	return [2]cell{text(fmt.Sprint(h.GetConnections())), text(ago(a.Now(), h.GetLast()))}
}

// policyRef is "namespace/name", as decisions name a policy.
func policyRef(namespace, name string) string {
	if namespace == "/" {
		return "/" + name
	}
	return namespace + "/" + name
}
