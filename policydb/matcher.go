package policydb

import (
	"slices"
	"strconv"
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// matcher finds the policies whose subject (or object) an identity matches.
//
// Each distinct term is kept once, with the bits of the policies that have it. An
// index finds candidates: each term stands under one of its clauses, the one that
// the fewest share, and is looked at only if the identity has what that clause
// needs. The whole term then decides, each clause once: hits are never counted, so
// that a clause which matches in two ways is still one clause.
type matcher struct {
	terms   []term
	byValue map[identity.Attribute][]uint32 // clause: key is one of some values
	byKey   map[string][]uint32             // clause: key must be there
	rest    []uint32                        // only exists: false
	always  []uint64                        // bits of the policies for any; dense
}

type term struct {
	clauses []clause
	bits    []uint32
}

type operator uint8

const (
	opIn operator = iota
	opNot
	opPrefix
	opExists
	opMissing
)

type clause struct {
	key      string
	operator operator
	values   []string // of opPrefix the prefix alone
}

// index builds both matchers and the set of keys that they and comparisons look at.
func (c *Compiled) index() {
	c.keys = make(map[string]struct{})
	words := len(c.policies) / wordBits
	c.subjects.build(c.policies, words, (*symbolonv1.Policy).GetSubject, c.keys)
	c.objects.build(c.policies, words, (*symbolonv1.Policy).GetObject, c.keys)
	for i := range c.policies {
		for _, key := range slices.Concat(c.policies[i].same, c.policies[i].different) {
			c.keys[key] = struct{}{}
		}
	}
	c.known.nobody = &pointerEntry{known: new(known)}
}

func (m *matcher) build(policies []policy, words int, selector func(*symbolonv1.Policy) *symbolonv1.Selector, keys map[string]struct{}) {
	m.always = make([]uint64, words)
	m.byValue = make(map[identity.Attribute][]uint32)
	m.byKey = make(map[string][]uint32)
	distinct := make(map[string]uint32)
	var name []byte
	for bit := range policies {
		if policies[bit].source == nil {
			continue
		}
		s := selector(policies[bit].source)
		if s.GetAny() {
			m.always[bit/wordBits] |= 1 << (bit % wordBits)
		}
		for _, t := range s.GetTerms() {
			name = appendTerm(name[:0], t)
			i, ok := distinct[string(name)]
			if !ok {
				i = uint32(len(m.terms))
				distinct[string(name)] = i
				m.terms = append(m.terms, compileTerm(t))
			}
			m.terms[i].bits = append(m.terms[i].bits, uint32(bit))
		}
	}
	m.access(keys)
}

// appendTerm writes t so that equal terms, and only they, are written alike.
func appendTerm(b []byte, t *symbolonv1.Term) []byte {
	text := func(s string) {
		b = strconv.AppendInt(b, int64(len(s)), 10)
		b = append(append(b, ':'), s...)
	}
	for _, c := range t.GetClauses() {
		text(c.GetKey())
		switch op := c.GetOperator().(type) {
		case *symbolonv1.Clause_In:
			b = append(b, 'i')
			for _, v := range op.In.GetValues() {
				text(v)
			}
		case *symbolonv1.Clause_Not:
			b = append(b, 'n')
			for _, v := range op.Not.GetValues() {
				text(v)
			}
		case *symbolonv1.Clause_Prefix:
			b = append(b, 'p')
			text(op.Prefix)
		case *symbolonv1.Clause_Exists:
			b = strconv.AppendBool(append(b, 'e'), op.Exists)
		}
		b = append(b, ';')
	}
	return b
}

func compileTerm(t *symbolonv1.Term) term {
	var out term
	for _, c := range t.GetClauses() {
		x := clause{key: c.GetKey()}
		switch op := c.GetOperator().(type) {
		case *symbolonv1.Clause_In:
			x.operator, x.values = opIn, op.In.GetValues()
		case *symbolonv1.Clause_Not:
			x.operator, x.values = opNot, op.Not.GetValues()
		case *symbolonv1.Clause_Prefix:
			x.operator, x.values = opPrefix, []string{op.Prefix}
		case *symbolonv1.Clause_Exists:
			x.operator = opMissing
			if op.Exists {
				x.operator = opExists
			}
		}
		out.clauses = append(out.clauses, x)
	}
	return out
}

// access puts each term under the clause that the fewest terms share.
func (m *matcher) access(keys map[string]struct{}) {
	values, needs := make(map[identity.Attribute]int), make(map[string]int)
	for i := range m.terms {
		for _, c := range m.terms[i].clauses {
			keys[c.key] = struct{}{}
			if c.operator != opMissing {
				needs[c.key]++
			}
			if c.operator == opIn {
				for _, v := range c.values {
					values[identity.Attribute{Key: c.key, Value: v}]++
				}
			}
		}
	}
	for i := range m.terms {
		best, cost := -1, 0
		for j, c := range m.terms[i].clauses {
			n := needs[c.key]
			switch c.operator {
			case opMissing:
				continue
			case opIn:
				n = 0
				for _, v := range c.values {
					n += values[identity.Attribute{Key: c.key, Value: v}]
				}
			}
			if best < 0 || n < cost {
				best, cost = j, n
			}
		}
		if best < 0 {
			m.rest = append(m.rest, uint32(i))
			continue
		}
		c := m.terms[i].clauses[best]
		if c.operator != opIn {
			m.byKey[c.key] = append(m.byKey[c.key], uint32(i))
			continue
		}
		for _, v := range c.values {
			a := identity.Attribute{Key: c.key, Value: v}
			m.byValue[a] = append(m.byValue[a], uint32(i))
		}
	}
}

// match sets the bits of all policies that attrs match. dense is the caller's, of
// as many words as there are; what is in it is overwritten.
func (m *matcher) match(attrs identity.Attributes, dense []uint64) {
	copy(dense, m.always)
	for _, i := range m.rest {
		m.try(i, attrs, dense)
	}
	for i, a := range attrs {
		for _, t := range m.byValue[a] {
			m.try(t, attrs, dense)
		}
		if i > 0 && attrs[i-1].Key == a.Key {
			continue
		}
		for _, t := range m.byKey[a.Key] {
			m.try(t, attrs, dense)
		}
	}
}

func (m *matcher) try(i uint32, attrs identity.Attributes, dense []uint64) {
	t := &m.terms[i]
	for j := range t.clauses {
		if !t.clauses[j].matches(attrs) {
			return
		}
	}
	for _, bit := range t.bits {
		dense[bit/wordBits] |= 1 << (bit % wordBits)
	}
}

func (c *clause) matches(attrs identity.Attributes) bool {
	of := attrs.Of(c.key)
	switch c.operator {
	case opMissing:
		return len(of) == 0
	case opExists:
		return len(of) > 0
	case opIn:
		return c.holds(of)
	case opNot:
		return len(of) > 0 && !c.holds(of)
	case opPrefix:
		for i := range of {
			if strings.HasPrefix(of[i].Value, c.values[0]) {
				return true
			}
		}
	}
	return false
}

// holds tells whether one of the attribute's values is one of the clause's.
func (c *clause) holds(of identity.Attributes) bool {
	for i := range of {
		if slices.Contains(c.values, of[i].Value) {
			return true
		}
	}
	return false
}
