package policydb

import (
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// ByID tells whether a Profile can be judged by nothing but a SPIFFE ID: its match
// looks at spiffe.id and spiffe.trust_domain alone, and asks one of them for a value.
// What only says which IDs it is not for speaks of nobody: any stranger would fit.
func ByID(p *symbolonv1.Profile) bool {
	asks := false
	for _, c := range p.GetMatch().GetClauses() {
		if !strings.HasPrefix(c.GetKey(), "spiffe.") {
			return false
		}
		asks = asks || positive(c)
	}
	return asks
}

// positive: the clause cannot hold without a value of its key that is named.
func positive(c *symbolonv1.Clause) bool {
	switch c.GetOperator().(type) {
	case *symbolonv1.Clause_In, *symbolonv1.Clause_Prefix:
		return true
	}
	return false
}

// ProfilesByID are the Profiles among resources that speak of SPIFFE IDs alone (see
// ByID), by namespace and name: the policy database of those whose certificate
// carries no claims. Shared with resources, not to be changed.
func ProfilesByID(resources []*symbolonv1.Resource) []*symbolonv1.Resource {
	var out []*symbolonv1.Resource
	for _, r := range resources {
		if p := r.GetProfile(); p != nil && ByID(p) {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b *symbolonv1.Resource) int { return compareKeys(KeyOf(a), KeyOf(b)) })
	return out
}

// ClaimsByID finds the labels that profiles, of ProfilesByID, give to an ID, and
// which of them did: "namespace/name", in order. Nothing else is known of the ID.
func ClaimsByID(profiles []*symbolonv1.Resource, id spiffeid.ID) (claims identity.Attributes, by []string) {
	known := attributesOfID(id)
	for _, r := range profiles {
		if matchTerm(r.GetProfile().GetMatch(), known) {
			claims = claims.Union(identity.AttributesFromProto(r.GetProfile().GetLabels()))
			by = append(by, RefOf(r))
		}
	}
	return claims, by
}

// speaksOf tells whether a Profile of ByID fits an ID.
func speaksOf(p *symbolonv1.Profile, id spiffeid.ID) bool {
	return matchTerm(p.GetMatch(), attributesOfID(id))
}

// attributesOfID is all that an ID says.
func attributesOfID(id spiffeid.ID) identity.Attributes {
	return identity.NewAttributes(map[string][]string{
		"spiffe.id":           {id.String()},
		"spiffe.trust_domain": {id.TrustDomain().Name()},
	})
}
