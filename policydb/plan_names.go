package policydb

import (
	"fmt"
	"slices"
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// checkNames refuses what names cannot do: one that two Externals of a namespace claim,
// more than proxies resolve, and a deny that only a name would give its object.
func (p *planner) checkNames() {
	var named []*symbolonv1.Resource
	exact := make(map[string]bool)
	for _, r := range slices.Concat(p.candidate.List(KindExternal, "/"), p.candidate.List(KindService, "/")) {
		names := addressesOf(r).GetFqdns()
		for _, name := range names {
			if !strings.HasPrefix(name, "*.") {
				exact[name] = true
			}
		}
		if len(names) > 0 && r.GetExternal() != nil {
			named = append(named, r)
		}
	}
	if len(named) == 0 && len(exact) == 0 {
		return
	}
	if len(exact) > maxExactNames {
		for _, r := range p.changed() {
			if len(addressesOf(r).GetFqdns()) > 0 {
				p.fail(r, problem{[]any{"addresses", "fqdns"}, mistake{
					fmt.Sprintf("there would be %d names in all, the limit is %d", len(exact), maxExactNames),
					"each proxy resolves every name that it can see; write networks (cidrs), or a wildcard, which costs nothing before it is used",
				}})
				return
			}
		}
	}
	p.checkNameClaims(named)
	p.checkDenies(named)
}

func addressesOf(r *symbolonv1.Resource) *symbolonv1.Addresses {
	if e := r.GetExternal(); e != nil {
		return e.GetAddresses()
	}
	return r.GetService().GetAddresses()
}

// checkNameClaims is checkOverlaps for names.
func (p *planner) checkNameClaims(named []*symbolonv1.Resource) {
	type claim struct {
		by    *symbolonv1.Resource
		ports portSet
	}
	claims := make(map[[2]string][]claim)
	for _, r := range named {
		ports, err := compilePorts(r.GetExternal().GetAddresses().GetPorts())
		if err != nil {
			p.fail(r, problem{[]any{"addresses", "ports"}, mistake{err.Error(), ""}})
			continue
		}
		for _, name := range r.GetExternal().GetAddresses().GetFqdns() {
			at := [2]string{r.GetNamespace(), name}
			for _, other := range claims[at] {
				if other.ports.overlaps(ports) {
					p.fail(r, problem{[]any{"addresses", "fqdns", name}, mistake{
						fmt.Sprintf("%s is claimed by External %s too", name, RefOf(other.by)), "give each its own names or ports",
					}})
				}
			}
			claims[at] = append(claims[at], claim{r, ports})
		}
	}
}

// checkDenies is rule 8: a name is no proof, so none can be the ground of a denial.
// Whoever answers for the name says which addresses are denied, and the client needs but
// another address. A deny that would match without the name (any, for instance) holds.
func (p *planner) checkDenies(named []*symbolonv1.Resource) {
	changed := make(map[Key]bool)
	denies := false
	for _, r := range p.changed() {
		denies = denies || r.GetPolicy().GetVerb() == symbolonv1.Verb_VERB_DENY
		if len(r.GetExternal().GetAddresses().GetFqdns()) > 0 || r.GetPolicy().GetVerb() == symbolonv1.Verb_VERB_DENY {
			changed[KeyOf(r)] = true
		}
	}
	if len(changed) == 0 {
		return
	}
	only := slices.DeleteFunc(slices.Clone(named), func(r *symbolonv1.Resource) bool {
		return len(r.GetExternal().GetAddresses().GetCidrs()) > 0 || !denies && !changed[KeyOf(r)]
	})
	if len(only) == 0 {
		return
	}
	for _, r := range p.candidate.List(KindPolicy, "/") {
		policy := r.GetPolicy()
		if policy.GetVerb() != symbolonv1.Verb_VERB_DENY {
			continue
		}
		for _, x := range only {
			meet := within(r.GetNamespace(), x.GetNamespace()) || policy.GetPropagate() && within(x.GetNamespace(), r.GetNamespace())
			if !meet || !changed[KeyOf(r)] && !changed[KeyOf(x)] {
				continue
			}
			labels := identity.AttributesFromProto(x.GetExternal().GetLabels())
			for _, end := range []struct {
				name     string
				selector *symbolonv1.Selector
			}{{"subject", policy.GetSubject()}, {"object", policy.GetObject()}} {
				if evadable(end.selector, labels) {
					p.failDeny(r, x, end.name, changed[KeyOf(r)])
				}
			}
		}
	}
}

func (p *planner) failDeny(deny, external *symbolonv1.Resource, end string, changed bool) {
	const hint = "give the External networks (cidrs), or deny any and allow what may be reached"
	if changed {
		p.fail(deny, problem{[]any{end}, mistake{
			fmt.Sprintf("the %s of this deny is External %s, which has names (fqdns) only: a name is no proof", end, RefOf(external)), hint,
		}})
		return
	}
	p.fail(external, problem{[]any{"addresses", "fqdns"}, mistake{
		fmt.Sprintf("External %s has names only, and is the %s of the deny %s: a name is no proof", RefOf(external), end, RefOf(deny)), hint,
	}})
}
