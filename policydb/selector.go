package policydb

import (
	"slices"
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// What a selector means, said once and plainly. Assign and Reference use it; the
// compiled form (matcher.go) is held against it by fuzzing.

func matchSelector(s *symbolonv1.Selector, attrs identity.Attributes) bool {
	if s.GetAny() {
		return true
	}
	return slices.ContainsFunc(s.GetTerms(), func(t *symbolonv1.Term) bool { return matchTerm(t, attrs) })
}

// matchTerm evaluates a term clause by clause; an empty one matches nothing.
func matchTerm(t *symbolonv1.Term, attrs identity.Attributes) bool {
	for _, c := range t.GetClauses() {
		if !matchClause(c, attrs) {
			return false
		}
	}
	return len(t.GetClauses()) > 0
}

// matchClause is rule 6: a missing attribute satisfies only exists: false; of
// several values a positive operator needs one, not needs none.
func matchClause(c *symbolonv1.Clause, attrs identity.Attributes) bool {
	values := attrs.Of(c.GetKey())
	if op, ok := c.GetOperator().(*symbolonv1.Clause_Exists); ok {
		return op.Exists == (len(values) > 0)
	}
	if len(values) == 0 {
		return false
	}
	switch op := c.GetOperator().(type) {
	case *symbolonv1.Clause_In:
		return anyOf(values, op.In.GetValues())
	case *symbolonv1.Clause_Not:
		return !anyOf(values, op.Not.GetValues())
	case *symbolonv1.Clause_Prefix:
		return slices.ContainsFunc(values, func(a identity.Attribute) bool { return strings.HasPrefix(a.Value, op.Prefix) })
	}
	return false
}

func anyOf(values identity.Attributes, want []string) bool {
	return slices.ContainsFunc(values, func(a identity.Attribute) bool { return slices.Contains(want, a.Value) })
}
