package policydb

import (
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// foreign tells of an allow by attributes that another trust domain may assert: its
// workloads meet it as one's own do, which is hardly meant where nothing says so.
func (l *linter) foreign(r *symbolonv1.Resource, p *symbolonv1.Policy) {
	if p.GetVerb() != symbolonv1.Verb_VERB_ALLOW || p.GetMode() == symbolonv1.Mode_MODE_OBSERVE {
		return
	}
	for _, side := range []struct {
		name     string
		selector *symbolonv1.Selector
	}{{"subject", p.GetSubject()}, {"object", p.GetObject()}} {
		for i, t := range side.selector.GetTerms() {
			for _, domain := range sortedKeys(l.given.foreign) {
				if !l.given.foreign[domain].meets(t) {
					continue
				}
				l.add(LintForeignLabel, lintWarning, r, Key{KindTrustDomain, "/", domain}, []any{side.name, i},
					"add spiffe.trust_domain to it, to say whose workloads are meant",
					"workloads of %s can meet the %s too, by what their trust domain may claim", domain, side.name)
				return
			}
		}
	}
}

// meets tells whether a workload of the domain can meet a term that does not speak of
// trust domains: each key that must be there is one that it may assert.
func (s *claimSet) meets(t *symbolonv1.Term) bool {
	for _, c := range t.GetClauses() {
		if strings.HasPrefix(c.GetKey(), "spiffe.") || !absent(c) && !s.has(c.GetKey()) {
			return false
		}
	}
	return true
}
