package policydb

import (
	"cmp"
	"slices"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// maxComparisons bounds the pairs of policies that are compared: some seconds.
const maxComparisons = 5_000_000

// linted is a policy that can be compared: in force, and not expired.
type linted struct {
	r *symbolonv1.Resource
	p *symbolonv1.Policy
}

func (x *linted) key() Key { return KeyOf(x.r) }

// compare looks at pairs of policies of one chain. A policy is compared with those
// that could cover it, which an index finds by one of their conditions, and a deny
// with the allows above it.
func (l *linter) compare() {
	var all []*linted
	allows := make(map[string][]*linted) // those that propagate, by namespace
	for _, r := range l.snapshot.List(KindPolicy, "/") {
		p := r.GetPolicy()
		if p.GetMode() == symbolonv1.Mode_MODE_OBSERVE || l.expired(p) {
			continue
		}
		x := &linted{r: r, p: p}
		all = append(all, x)
		if p.GetVerb() == symbolonv1.Verb_VERB_ALLOW && p.GetPropagate() && !p.GetFallback() {
			allows[r.GetNamespace()] = append(allows[r.GetNamespace()], x)
		}
	}
	index := newLintIndex(all)
	left := maxComparisons
	for _, x := range all {
		if !within(x.r.GetNamespace(), l.namespace) {
			continue
		}
		candidates := index.candidates(x)
		left -= len(candidates)
		if x.p.GetVerb() == symbolonv1.Verb_VERB_DENY && !x.p.GetFallback() {
			for _, ns := range chainOf(parentPath(x.r.GetNamespace())) {
				left -= len(allows[ns])
			}
		}
		if left < 0 {
			l.add(LintNotCompared, lintWarning, x.r, Key{}, theName, "lint one namespace at a time",
				"there are too many policies to compare each with each: this one and those after it were not")
			return
		}
		by := l.covered(x, candidates)
		if by == nil || by.r.GetNamespace() == x.r.GetNamespace() {
			l.narrows(x, allows)
		}
	}
}

// covered reports the first policy, in order of precedence, that leaves x nothing to
// say, and returns it.
func (l *linter) covered(x *linted, candidates []*linted) *linted {
	var by *linted
	for _, y := range candidates {
		if y == x || by != nil && compareKeys(by.key(), y.key()) <= 0 {
			continue
		}
		if reaches(y, x) && leavesNothing(y, x) && covers(y.p, x.p) {
			by = y
		}
	}
	if by == nil {
		return nil
	}
	verb, other := nameOf(verbs, x.p.GetVerb()), by.key()
	switch {
	case x.p.GetVerb() == symbolonv1.Verb_VERB_DENY && by.p.GetVerb() == symbolonv1.Verb_VERB_ALLOW && by.r.GetNamespace() != x.r.GetNamespace():
		l.add(LintNarrowsParent, lintError, x.r, other, []any{"verb", theValue{}}, narrowsRemedy(by),
			"it denies nothing: the allow %s stands above it and decides first", other.Ref())
	case by.p.GetVerb() != x.p.GetVerb() && isVerdict(by.p) && isVerdict(x.p):
		l.add(LintShadowed, lintWarning, x.r, other, theName, "delete one of the two, or narrow "+other.Ref(),
			"it never decides: whatever it matches, %s (%s) decides first", other.Ref(), nameOf(verbs, by.p.GetVerb()))
	case l.same(x, by):
		// Of two that say the same, the second by name is one too many.
		if compareKeys(x.key(), other) > 0 {
			l.add(LintDuplicate, lintWarning, x.r, other, theName, "delete one of the two", "it says the same as %s", other.Ref())
		}
	default:
		l.add(LintShadowed, lintWarning, x.r, other, theName, "delete it, or narrow "+other.Ref(),
			"it adds nothing: %s has the same %s for all that it matches", other.Ref(), verb)
	}
	return by
}

// same tells whether x says all that by does, in the same namespace.
func (l *linter) same(x, by *linted) bool {
	return x.r.GetNamespace() == by.r.GetNamespace() && reaches(x, by) && leavesNothing(x, by) && covers(x.p, by.p)
}

// narrows reports a deny of which allows above it overrule a part: by rule 3 the
// namespace nearest to the root decides.
func (l *linter) narrows(x *linted, allows map[string][]*linted) {
	if x.p.GetVerb() != symbolonv1.Verb_VERB_DENY || x.p.GetFallback() {
		return
	}
	var first *linted
	more := 0
	for _, ns := range chainOf(parentPath(x.r.GetNamespace())) {
		for _, y := range allows[ns] {
			if !overlaps(y.p, x.p) {
				continue
			}
			if first != nil {
				more++
				continue
			}
			first = y
		}
	}
	if first == nil {
		return
	}
	also := ""
	if more > 0 {
		also = " (and " + plural(more, "other allow", "other allows") + " above)"
	}
	l.add(LintNarrowsParent, lintWarning, x.r, first.key(), []any{"verb", theValue{}}, narrowsRemedy(first),
		"what the allow %s%s matches as well is not denied: it stands above and decides first", first.key().Ref(), also)
}

func narrowsRemedy(allow *linted) string {
	return "put the deny into " + allow.r.GetNamespace() + " (with propagate), or make the allow there a fallback: true"
}

func isVerdict(p *symbolonv1.Policy) bool {
	return p.GetVerb() == symbolonv1.Verb_VERB_ALLOW || p.GetVerb() == symbolonv1.Verb_VERB_DENY
}

// reaches tells whether y holds wherever x does.
func reaches(y, x *linted) bool {
	if y.r.GetNamespace() == x.r.GetNamespace() {
		return y.p.GetPropagate() || !x.p.GetPropagate()
	}
	return y.p.GetPropagate() && within(x.r.GetNamespace(), y.r.GetNamespace())
}

// leavesNothing tells whether y, where both match and hold, leaves x nothing to say:
// neither a verdict nor an obligation.
func leavesNothing(y, x *linted) bool {
	ye, yl := obligations(y.p)
	xe, xl := obligations(x.p)
	obliges := xe && !ye || xl && !yl
	if !isVerdict(x.p) {
		return !obliges
	}
	if !isVerdict(y.p) {
		return false
	}
	sameNamespace := y.r.GetNamespace() == x.r.GetNamespace()
	if y.p.GetVerb() == x.p.GetVerb() {
		// Between two fallbacks of different namespaces another one may stand.
		return !obliges && (!y.p.GetFallback() || x.p.GetFallback() && sameNamespace)
	}
	// Another verdict counts if it comes first; behind a deny obligations are of no use.
	deny := y.p.GetVerb() == symbolonv1.Verb_VERB_DENY
	switch {
	case !y.p.GetFallback() && x.p.GetFallback():
		return deny || !obliges
	case y.p.GetFallback() != x.p.GetFallback():
		return false
	case sameNamespace:
		return deny
	default: // fallbacks are asked from the leaf up, others from the root down
		return !x.p.GetFallback() && (deny || !obliges)
	}
}

func obligations(p *symbolonv1.Policy) (encrypt, log bool) {
	return p.GetWithEncrypt() || p.GetVerb() == symbolonv1.Verb_VERB_ENCRYPT, p.GetWithLog() || p.GetVerb() == symbolonv1.Verb_VERB_LOG
}

// lintIndex finds the policies that could cover another by one `in` condition of
// theirs, the rarest: what they cover must have it too.
type lintIndex struct {
	anchored map[anchor][]*linted
	free     []*linted // without such a condition
}

// anchor is one value of one condition.
type anchor struct {
	object     bool
	key, value string
}

func newLintIndex(all []*linted) *lintIndex {
	count := make(map[anchor]int)
	sides := func(p *symbolonv1.Policy, f func(object bool, s *symbolonv1.Selector)) {
		f(false, p.GetSubject())
		f(true, p.GetObject())
	}
	for _, x := range all {
		sides(x.p, func(object bool, s *symbolonv1.Selector) {
			for _, t := range s.GetTerms() {
				for _, c := range t.GetClauses() {
					for _, v := range c.GetIn().GetValues() {
						count[anchor{object, c.GetKey(), v}]++
					}
				}
			}
		})
	}
	i := &lintIndex{anchored: make(map[anchor][]*linted)}
	for _, x := range all {
		var best []anchor
		cost := 0
		sides(x.p, func(object bool, s *symbolonv1.Selector) {
			if as, n := anchorsOf(s, object, count); as != nil && (best == nil || n < cost) {
				best, cost = as, n
			}
		})
		if best == nil {
			i.free = append(i.free, x)
		}
		for _, a := range best {
			i.anchored[a] = append(i.anchored[a], x)
		}
	}
	return i
}

// anchorsOf takes of each alternative the condition whose values are the rarest; nil
// if one has none.
func anchorsOf(s *symbolonv1.Selector, object bool, count map[anchor]int) (out []anchor, cost int) {
	if s.GetAny() {
		return nil, 0
	}
	for _, t := range s.GetTerms() {
		var best []anchor
		least := 0
		for _, c := range t.GetClauses() {
			var as []anchor
			n := 0
			for _, v := range c.GetIn().GetValues() {
				a := anchor{object, c.GetKey(), v}
				as, n = append(as, a), n+count[a]
			}
			if as != nil && (best == nil || n < least) {
				best, least = as, n
			}
		}
		if best == nil {
			return nil, 0
		}
		out, cost = append(out, best...), max(cost, least)
	}
	slices.SortFunc(out, func(a, b anchor) int { return cmp.Or(cmp.Compare(a.key, b.key), cmp.Compare(a.value, b.value)) })
	return slices.Compact(out), cost
}

// candidates are the policies that could cover x, some perhaps twice.
func (i *lintIndex) candidates(x *linted) []*linted {
	out := slices.Clone(i.free)
	for side, s := range []*symbolonv1.Selector{x.p.GetSubject(), x.p.GetObject()} {
		if len(s.GetTerms()) == 0 {
			continue
		}
		for _, c := range s.GetTerms()[0].GetClauses() {
			if vs := c.GetIn().GetValues(); len(vs) > 0 {
				out = append(out, i.anchored[anchor{side == 1, c.GetKey(), vs[0]}]...)
			}
		}
	}
	return out
}
