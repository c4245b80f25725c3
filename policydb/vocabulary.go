package policydb

import (
	"fmt"
	"slices"
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// vocabulary is the labels that may be used in one namespace: what it and its
// ancestors declare. A label that several of them declare must satisfy each: below,
// a declaration can only narrow.
type vocabulary map[string][]*symbolonv1.AttributeRule

// vocabularies finds them, each once.
type vocabularies struct {
	snapshot *Snapshot
	byPath   map[string]vocabulary
}

func (v *vocabularies) of(namespace string) vocabulary {
	if voc, ok := v.byPath[namespace]; ok {
		return voc
	}
	voc := make(vocabulary)
	for _, ns := range chainOf(namespace) {
		r := v.snapshot.Get(KindNamespace, ns, "")
		for key, rule := range r.GetNamespaceKind().GetAttributes() {
			voc[key] = append(voc[key], rule)
		}
	}
	if v.byPath == nil {
		v.byPath = make(map[string]vocabulary)
	}
	v.byPath[namespace] = voc
	return voc
}

// key checks that a label is declared. Dotted keys need no declaration.
func (v vocabulary) key(key, namespace string) *mistake {
	if !isLabel(key) {
		return nil
	}
	if _, ok := v[key]; ok {
		return nil
	}
	keys := sortedKeys(v)
	hint := didYouMean(key, keys)
	if hint == "" || nearest(key, keys) == "" {
		hint = strings.TrimPrefix(hint+"\n  ", "\n  ") + fmt.Sprintf(`declare it with "attributes: {%s: {}}" in Namespace %s or above`, key, namespace)
	}
	return wrong(hint, "label %s is not in the vocabulary of %s", printable(key), namespace)
}

// value checks that a declared label may have this value.
func (v vocabulary) value(key, value string) *mistake {
	for _, rule := range v[key] {
		if vs := rule.GetValues(); len(vs) > 0 && !slices.Contains(vs, value) {
			return wrong(didYouMean(value, vs), "label %s has no value %s", key, printable(value))
		}
	}
	return nil
}

// prefix checks that some declared value starts with it.
func (v vocabulary) prefix(key, prefix string) *mistake {
	for _, rule := range v[key] {
		starts := func(s string) bool { return strings.HasPrefix(s, prefix) }
		if vs := rule.GetValues(); len(vs) > 0 && !slices.ContainsFunc(vs, starts) {
			return wrong(oneOf(vs), "no value of label %s starts with %s", key, printable(prefix))
		}
	}
	return nil
}

// checkVocabulary checks every label that r uses against its namespace's words.
func checkVocabulary(r *symbolonv1.Resource, v vocabulary) []problem {
	c := &checker{}
	ns := r.GetNamespace()
	switch k := r.GetKind().(type) {
	case *symbolonv1.Resource_Profile:
		c.declared(v, ns, k.Profile.GetLabels(), "labels")
	case *symbolonv1.Resource_External:
		c.declared(v, ns, k.External.GetLabels(), "labels")
	case *symbolonv1.Resource_Policy:
		c.declaredSelector(v, ns, "subject", k.Policy.GetSubject())
		c.declaredSelector(v, ns, "object", k.Policy.GetObject())
		for _, key := range k.Policy.GetWhereSame() {
			c.add(v.key(key, ns), "where", "same", key)
		}
		for _, key := range k.Policy.GetWhereDifferent() {
			c.add(v.key(key, ns), "where", "different", key)
		}
	case *symbolonv1.Resource_PolicyTest:
		for i, t := range k.PolicyTest.GetTests() {
			c.declared(v, ns, t.GetFrom(), "tests", i, "from")
			c.declared(v, ns, t.GetTo(), "tests", i, "to")
		}
	}
	return c.problems
}

func (c *checker) declared(v vocabulary, ns string, labels map[string]*symbolonv1.LabelValues, path ...any) {
	for _, key := range sortedKeys(labels) {
		at := append(slices.Clone(path), key)
		if c.add(v.key(key, ns), at...) {
			continue
		}
		for _, value := range labels[key].GetValues() {
			c.add(v.value(key, value), append(slices.Clone(at), value)...)
		}
	}
}

func (c *checker) declaredSelector(v vocabulary, ns, name string, s *symbolonv1.Selector) {
	for i, t := range s.GetTerms() {
		for _, cl := range t.GetClauses() {
			key := cl.GetKey()
			at := []any{name, i, key}
			if c.add(v.key(key, ns), at...) {
				continue
			}
			switch op := cl.GetOperator().(type) {
			case *symbolonv1.Clause_In:
				for _, value := range op.In.GetValues() {
					c.add(v.value(key, value), append(slices.Clone(at), value)...)
				}
			case *symbolonv1.Clause_Not:
				for _, value := range op.Not.GetValues() {
					c.add(v.value(key, value), append(slices.Clone(at), "not", value)...)
				}
			case *symbolonv1.Clause_Prefix:
				c.add(v.prefix(key, op.Prefix), append(slices.Clone(at), "prefix")...)
			}
		}
	}
}
