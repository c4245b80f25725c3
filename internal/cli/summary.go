package cli

import (
	"fmt"
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// summary says in one line what a resource is for, for people; it is not parsed.
func summary(r *symbolonv1.Resource) string {
	switch k := r.GetKind().(type) {
	case *symbolonv1.Resource_NamespaceKind:
		ns := k.NamespaceKind
		return fmt.Sprintf("%s, default %s, protection %s", word(ns.GetMode()),
			orInherit(word(ns.GetDefault())), orInherit(word(ns.GetProtection())))
	case *symbolonv1.Resource_Profile:
		p := k.Profile
		s := termText(p.GetMatch()) + " →"
		if p.GetWorkload() != "" {
			s += " " + p.GetWorkload()
		}
		if len(p.GetLabels()) > 0 {
			s += " [" + attributes(p.GetLabels()) + "]"
		}
		return s
	case *symbolonv1.Resource_Policy:
		return policySummary(k.Policy)
	case *symbolonv1.Resource_External:
		s := addressesText(k.External.GetAddresses())
		if l := attributes(k.External.GetLabels()); l != "" {
			s += " [" + l + "]"
		}
		return s
	case *symbolonv1.Resource_Service:
		return addressesText(k.Service.GetAddresses())
	case *symbolonv1.Resource_PolicyTest:
		return fmt.Sprintf("%d tests", len(k.PolicyTest.GetTests()))
	case *symbolonv1.Resource_TrustDomain:
		return trustDomainSummary(k.TrustDomain)
	default:
		return ""
	}
}

func trustDomainSummary(t *symbolonv1.TrustDomain) string {
	from := "bundle given"
	switch {
	case t.GetEndpoint() != "":
		from = "bundle from " + t.GetEndpoint()
	case t.GetBundle() == "":
		from = "no bundle"
	}
	if len(t.GetClaims()) == 0 {
		return from + ", no claims"
	}
	return from + ", claims " + strings.Join(t.GetClaims(), ",")
}

func policySummary(p *symbolonv1.Policy) string {
	parts := []string{word(p.GetVerb()), selectorText(p.GetSubject()), "→", selectorText(p.GetObject())}
	if len(p.GetPorts()) > 0 {
		parts = append(parts, "on "+portsText(p.GetPorts()))
	}
	for _, k := range p.GetWhereSame() {
		parts = append(parts, "same "+k)
	}
	for _, k := range p.GetWhereDifferent() {
		parts = append(parts, "different "+k)
	}
	if p.GetWithEncrypt() {
		parts = append(parts, "with encrypt")
	}
	if p.GetWithLog() {
		parts = append(parts, "with log")
	}
	if p.GetWhen() != nil {
		parts = append(parts, "in a time window")
	}
	if p.GetExpires() != nil {
		parts = append(parts, "until "+p.GetExpires().AsTime().Format("2006-01-02"))
	}
	if p.GetMode() == symbolonv1.Mode_MODE_OBSERVE {
		parts = append(parts, "(observed)")
	}
	if p.GetFallback() {
		parts = append(parts, "(fallback)")
	}
	if p.GetPropagate() {
		parts = append(parts, "(and below)")
	}
	return strings.Join(parts, " ")
}

func selectorText(s *symbolonv1.Selector) string {
	if s.GetAny() {
		return "any"
	}
	var terms []string
	for _, t := range s.GetTerms() {
		terms = append(terms, termText(t))
	}
	return strings.Join(terms, " or ")
}

// termText writes the clauses of an AND: "app=web env!=dev".
func termText(t *symbolonv1.Term) string {
	var clauses []string
	for _, c := range t.GetClauses() {
		key := c.GetKey()
		switch op := c.GetOperator().(type) {
		case *symbolonv1.Clause_In:
			clauses = append(clauses, key+"="+strings.Join(op.In.GetValues(), "|"))
		case *symbolonv1.Clause_Not:
			clauses = append(clauses, key+"!="+strings.Join(op.Not.GetValues(), "|"))
		case *symbolonv1.Clause_Prefix:
			clauses = append(clauses, key+"="+op.Prefix+"…")
		case *symbolonv1.Clause_Exists:
			if op.Exists {
				clauses = append(clauses, "has "+key)
			} else {
				clauses = append(clauses, "no "+key)
			}
		default:
			clauses = append(clauses, key+"?")
		}
	}
	return strings.Join(clauses, " ")
}

func addressesText(a *symbolonv1.Addresses) string {
	s := strings.Join(append(append([]string(nil), a.GetCidrs()...), a.GetFqdns()...), ",")
	if len(a.GetPorts()) > 0 {
		s += " on " + portsText(a.GetPorts())
	}
	return s
}

func portsText(ports []*symbolonv1.PortRange) string {
	var parts []string
	for _, p := range ports {
		if p.GetFirst() == p.GetLast() {
			parts = append(parts, fmt.Sprintf("%s/%d", p.GetProtocol(), p.GetFirst()))
		} else {
			parts = append(parts, fmt.Sprintf("%s/%d-%d", p.GetProtocol(), p.GetFirst(), p.GetLast()))
		}
	}
	return strings.Join(parts, ",")
}

// shorten keeps n runes.
func shorten(s string, n int) string {
	r := []rune(s)
	if len(r) <= n {
		return s
	}
	return string(r[:n-1]) + "…"
}
