package policydb

import (
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// covers tells whether q surely matches whatever p does, at any time. It may miss a
// cover that takes several alternatives or ranges together.
func covers(q, p *symbolonv1.Policy) bool {
	if !coversSelector(q.GetSubject(), p.GetSubject()) || !coversSelector(q.GetObject(), p.GetObject()) ||
		!coversPorts(q.GetPorts(), p.GetPorts()) ||
		!subset(q.GetWhereSame(), p.GetWhereSame()) || !subset(q.GetWhereDifferent(), p.GetWhereDifferent()) {
		return false
	}
	if q.GetWhen() != nil && !proto.Equal(q.GetWhen(), p.GetWhen()) {
		return false
	}
	return q.GetExpires() == nil || p.GetExpires() != nil && !q.GetExpires().AsTime().Before(p.GetExpires().AsTime())
}

func coversSelector(q, p *symbolonv1.Selector) bool {
	if q.GetAny() || p.GetAny() {
		return q.GetAny()
	}
	for _, pt := range p.GetTerms() {
		if !slices.ContainsFunc(q.GetTerms(), func(qt *symbolonv1.Term) bool { return coversTerm(qt, pt) }) {
			return false
		}
	}
	return true
}

// coversTerm: each condition of q follows from p's on the same key.
func coversTerm(q, p *symbolonv1.Term) bool {
	for _, qc := range q.GetClauses() {
		pc := clauseOf(p, qc.GetKey())
		if pc == nil || !implies(pc, qc) {
			return false
		}
	}
	return true
}

// implies tells whether attributes that satisfy p satisfy q. A key may have several
// values, so that a value that is there says nothing of one that must not be.
func implies(p, q *symbolonv1.Clause) bool {
	if absent(p) || absent(q) {
		return absent(p) && absent(q)
	}
	switch op := q.GetOperator().(type) {
	case *symbolonv1.Clause_Exists:
		return true // every other condition needs the key
	case *symbolonv1.Clause_In:
		return p.GetIn() != nil && subset(p.GetIn().GetValues(), op.In.GetValues())
	case *symbolonv1.Clause_Not:
		return p.GetNot() != nil && subset(op.Not.GetValues(), p.GetNot().GetValues())
	case *symbolonv1.Clause_Prefix:
		starts := func(v string) bool { return strings.HasPrefix(v, op.Prefix) }
		switch op := p.GetOperator().(type) {
		case *symbolonv1.Clause_In:
			return !slices.ContainsFunc(op.In.GetValues(), func(v string) bool { return !starts(v) })
		case *symbolonv1.Clause_Prefix:
			return starts(op.Prefix)
		}
	}
	return false
}

func coversPorts(q, p []*symbolonv1.PortRange) bool {
	if len(q) == 0 || len(p) == 0 {
		return len(q) == 0
	}
	for _, b := range p {
		if !slices.ContainsFunc(q, func(a *symbolonv1.PortRange) bool {
			return a.GetProtocol() == b.GetProtocol() && a.GetFirst() <= b.GetFirst() && b.GetLast() <= a.GetLast()
		}) {
			return false
		}
	}
	return true
}

// overlaps tells whether some connection may match both. Keys are taken to have one
// value each, as they nearly always do: {app: web} and {app: db} do not overlap.
func overlaps(q, p *symbolonv1.Policy) bool {
	a, errA := compilePorts(q.GetPorts())
	b, errB := compilePorts(p.GetPorts())
	if errA != nil || errB != nil || !a.overlaps(b) {
		return false
	}
	return overlapsSelector(q.GetSubject(), p.GetSubject()) && overlapsSelector(q.GetObject(), p.GetObject())
}

func overlapsSelector(q, p *symbolonv1.Selector) bool {
	if q.GetAny() || p.GetAny() {
		return true
	}
	for _, qt := range q.GetTerms() {
		for _, pt := range p.GetTerms() {
			if !slices.ContainsFunc(qt.GetClauses(), func(qc *symbolonv1.Clause) bool {
				pc := clauseOf(pt, qc.GetKey())
				return pc != nil && excludes(qc, pc)
			}) {
				return true
			}
		}
	}
	return false
}

// excludes tells whether no single value, nor the lack of one, satisfies both.
func excludes(a, b *symbolonv1.Clause) bool {
	if absent(a) || absent(b) {
		return absent(a) != absent(b)
	}
	if a.GetIn() == nil {
		a, b = b, a
	}
	if in := a.GetIn(); in != nil {
		return !slices.ContainsFunc(in.GetValues(), func(v string) bool {
			switch op := b.GetOperator().(type) {
			case *symbolonv1.Clause_In:
				return slices.Contains(op.In.GetValues(), v)
			case *symbolonv1.Clause_Not:
				return !slices.Contains(op.Not.GetValues(), v)
			case *symbolonv1.Clause_Prefix:
				return strings.HasPrefix(v, op.Prefix)
			}
			return true
		})
	}
	if x, y := a.GetPrefix(), b.GetPrefix(); x != "" && y != "" {
		return !strings.HasPrefix(x, y) && !strings.HasPrefix(y, x)
	}
	return false
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
