package policydb

import (
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// LocalNamespace is the namespace by whose policies a workload is judged on its own
// host, which is enrolled in host, where another CA than the controller's has given it
// its ID: the ID's path without its last segment, if that is a namespace; else that of
// the deepest Profile that speaks of the ID (see ByID); else the host's.
//
// It is never above the host's, or beside it: whoever names workloads in SPIRE cannot
// take one out from under the policies of its host. A Profile from above speaks for the
// host's namespace, as it does for workloads that the controller names.
//
// It is for workloads of this host only. Of a peer the path says nothing: no decision
// depends on a peer's namespace.
func (c *Compiled) LocalNamespace(id spiffeid.ID, host string) string {
	if path := pathNamespace(id); within(path, host) && c.chains[path] != nil {
		return path
	}
	var deepest *symbolonv1.Resource
	for _, r := range c.byID.profiles {
		if !within(r.GetNamespace(), host) || c.chains[r.GetNamespace()] == nil || !speaksOf(r.GetProfile(), id) {
			continue
		}
		if deepest == nil || compareNaming(r, deepest) < 0 {
			deepest = r
		}
	}
	if deepest != nil {
		return deepest.GetNamespace()
	}
	return host
}
