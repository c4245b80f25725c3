package policydb

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// clauses are what the keys can say of an endpoint: for each key that it has, that it
// has one of its values. Where none applies, a workload is its SPIFFE ID.
func (g *suggester) clauses(e *Endpoint) []*symbolonv1.Clause {
	var out []*symbolonv1.Clause
	add := func(key string) {
		var values []string
		for _, a := range e.Attributes.Of(key) {
			if g.words.key(key, g.Namespace) == nil && g.words.value(key, a.Value) == nil && checkValue(a.Value) == nil {
				values = append(values, a.Value)
			}
		}
		if len(values) > 0 {
			out = append(out, &symbolonv1.Clause{Key: key, Operator: &symbolonv1.Clause_In{In: &symbolonv1.Values{Values: values}}})
		}
	}
	for _, key := range g.keysOf(e) {
		add(key)
	}
	switch {
	case e.External != "":
	case len(out) == 0:
		add("spiffe.id")
	case e.Foreign && !slices.Contains(g.options.Keys, "spiffe.trust_domain"):
		// What a label means to others is not what it means here.
		add("spiffe.trust_domain")
	}
	return out
}

// keysOf are the keys to say something with: those chosen, or all labels that it has.
func (g *suggester) keysOf(e *Endpoint) []string {
	if len(g.options.Keys) > 0 {
		return slices.Compact(slices.Sorted(slices.Values(g.options.Keys)))
	}
	has := make(map[string]bool)
	for _, a := range e.Attributes {
		if isLabel(a.Key) {
			has[a.Key] = true
		}
	}
	return slices.Sorted(maps.Keys(has))
}

// term selects an endpoint, and what is the same to the keys. A narrow one asks besides
// that the chosen keys which it lacks be missing.
func (g *suggester) term(e *Endpoint, narrow bool) *symbolonv1.Term {
	t := &symbolonv1.Term{Clauses: g.clauses(e)}
	if narrow {
		keys := g.options.Keys
		if len(keys) == 0 {
			keys = sortedKeys(g.words)
		}
		for _, key := range keys {
			if len(e.Attributes.Of(key)) == 0 {
				t.Clauses = append(t.Clauses, &symbolonv1.Clause{Key: key, Operator: &symbolonv1.Clause_Exists{Exists: false}})
			}
		}
	}
	slices.SortFunc(t.Clauses, func(a, b *symbolonv1.Clause) int { return cmp.Compare(a.GetKey(), b.GetKey()) })
	return t
}

// A grant is a policy in the making: every subject may reach every object on every port.
// Its three parts are sets of texts, sorted.
type grant struct {
	parts [3][]string // subjects, objects, ports
	edges []int
}

// policies makes the fewest that it finds. Two rules that differ in one part only are
// one: that allows no more than both. The order of the parts to merge by matters, so
// all six are tried.
func (g *suggester) policies(edges []Edge) []SuggestedPolicy {
	var atoms []grant
	for i := range edges {
		e := &edges[i]
		narrow := g.clash(g.term(&e.From, false), g.term(&e.To, false), e) != nil
		atoms = append(atoms, grant{[3][]string{
			{g.text(g.term(&e.From, narrow))}, {g.text(g.term(&e.To, narrow))}, {fmt.Sprintf("%s/%05d", e.Protocol, e.Port)},
		}, []int{i}})
	}
	var best []grant
	for n, order := range [][3]int{{2, 0, 1}, {2, 1, 0}, {0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}} {
		if rules := mergeGrants(atoms, order); n == 0 || len(rules) < len(best) {
			best = rules
		}
	}
	for i := range best {
		for _, part := range [...]int{0, 1} {
			best[i].parts[part] = g.widest(best[i].parts[part])
		}
	}
	best = g.needed(best, edges)
	taken := make(map[string]bool)
	out := make([]SuggestedPolicy, len(best))
	for i, r := range best {
		out[i] = SuggestedPolicy{Resource: g.resource(&r, taken)}
		for _, e := range r.edges {
			out[i].Edges = append(out[i].Edges, edges[e])
		}
	}
	return out
}

// text names a term in maps, and keeps it.
func (g *suggester) text(t *symbolonv1.Term) string {
	s := flowTerm(t)
	g.terms[s] = t
	return s
}

// mergeGrants merges along one part after another, until nothing changes. Rules that are
// the same in all parts are one.
func mergeGrants(atoms []grant, order [3]int) []grant {
	rules := slices.Clone(atoms)
	for {
		before := len(rules)
		for _, part := range order {
			rules = mergeAlong(rules, part)
		}
		if len(rules) == before {
			slices.SortFunc(rules, func(a, b grant) int {
				return cmp.Or(slices.Compare(a.parts[0], b.parts[0]), slices.Compare(a.parts[1], b.parts[1]), slices.Compare(a.parts[2], b.parts[2]))
			})
			return rules
		}
	}
}

// mergeAlong puts together the rules that have the two other parts in common.
func mergeAlong(rules []grant, part int) []grant {
	byRest := make(map[string]int)
	var out []grant
	for _, r := range rules {
		var rest []string
		for i, p := range r.parts {
			if i != part {
				rest = append(rest, strings.Join(p, "\x00"))
			}
		}
		key := strings.Join(rest, "\x01")
		i, ok := byRest[key]
		if !ok {
			byRest[key] = len(out)
			out = append(out, r)
			continue
		}
		union := slices.Concat(out[i].parts[part], r.parts[part])
		slices.Sort(union)
		out[i].parts[part] = slices.Compact(union)
		out[i].edges = slices.Sorted(slices.Values(slices.Concat(out[i].edges, r.edges)))
	}
	return out
}

// widest leaves out the terms that ask for all that another asks for, and more.
func (g *suggester) widest(texts []string) []string {
	asks := func(a, b *symbolonv1.Term) bool { // a for all that b does
		return !slices.ContainsFunc(b.GetClauses(), func(c *symbolonv1.Clause) bool {
			return !slices.ContainsFunc(a.GetClauses(), func(x *symbolonv1.Clause) bool { return proto.Equal(x, c) })
		})
	}
	var out []string
	for _, t := range texts {
		wider := func(u string) bool { return u != t && asks(g.terms[t], g.terms[u]) }
		if !slices.ContainsFunc(texts, wider) {
			out = append(out, t)
		}
	}
	return out
}

// needed leaves out rules of which every edge is another's too, and counts each edge
// with every rule that it is an edge of.
func (g *suggester) needed(rules []grant, edges []Edge) []grant {
	covers := make([]int, len(edges)) // how many rules
	for i := range rules {
		r := &rules[i]
		r.edges = nil
		for j := range edges {
			if g.matches(r, &edges[j]) {
				r.edges = append(r.edges, j)
				covers[j]++
			}
		}
	}
	// The smallest first: a large one that stays makes more of them superfluous.
	order := make([]int, len(rules))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(len(rules[a].edges), len(rules[b].edges)) })
	drop := make(map[int]bool)
	for _, i := range order {
		if !slices.ContainsFunc(rules[i].edges, func(e int) bool { return covers[e] < 2 }) {
			drop[i] = true
			for _, e := range rules[i].edges {
				covers[e]--
			}
		}
	}
	var out []grant
	for i, r := range rules {
		if !drop[i] {
			out = append(out, r)
		}
	}
	return out
}

func (g *suggester) matches(r *grant, e *Edge) bool {
	return slices.Contains(r.parts[2], fmt.Sprintf("%s/%05d", e.Protocol, e.Port)) &&
		slices.ContainsFunc(r.parts[0], func(t string) bool { return matchTerm(g.terms[t], e.From.Attributes) }) &&
		slices.ContainsFunc(r.parts[1], func(t string) bool { return matchTerm(g.terms[t], e.To.Attributes) })
}

// resource makes a policy of a rule.
func (g *suggester) resource(r *grant, taken map[string]bool) *symbolonv1.Resource {
	p := &symbolonv1.Policy{Verb: symbolonv1.Verb_VERB_ALLOW, Subject: g.selector(r.parts[0]), Object: g.selector(r.parts[1])}
	for _, text := range r.parts[2] {
		protocol, digits, _ := strings.Cut(text, "/")
		n, _ := strconv.ParseUint(digits, 10, 16)
		if last := len(p.Ports) - 1; last >= 0 && p.Ports[last].GetProtocol() == protocol && p.Ports[last].GetLast()+1 == uint32(n) {
			p.Ports[last].Last++ // neighbours: the range has no port more than was seen
			continue
		}
		p.Ports = append(p.Ports, &symbolonv1.PortRange{Protocol: protocol, First: uint32(n), Last: uint32(n)})
	}
	base := "learned-" + slug(p.GetSubject()) + "-to-" + slug(p.GetObject())
	name := base
	for n := 2; taken[name] || g.snapshot.Get(KindPolicy, g.Namespace, name) != nil; n++ {
		name = fmt.Sprintf("%s-%d", base, n)
	}
	taken[name] = true
	return &symbolonv1.Resource{Namespace: g.Namespace, Name: name, Kind: &symbolonv1.Resource_Policy{Policy: p}}
}

// selector is one of these terms. Terms that differ in the values of a lone key are one
// list of values.
func (g *suggester) selector(texts []string) *symbolonv1.Selector {
	s := &symbolonv1.Selector{}
	lone := make(map[string]*symbolonv1.Clause)
	for _, text := range texts {
		t := g.terms[text]
		if len(t.GetClauses()) == 1 && t.GetClauses()[0].GetIn() != nil {
			c := t.GetClauses()[0]
			if first := lone[c.GetKey()]; first != nil {
				all := slices.Sorted(slices.Values(slices.Concat(first.GetIn().GetValues(), c.GetIn().GetValues())))
				first.GetIn().Values = slices.Compact(all)
				continue
			}
			c = &symbolonv1.Clause{Key: c.GetKey(), Operator: &symbolonv1.Clause_In{In: &symbolonv1.Values{Values: slices.Clone(c.GetIn().GetValues())}}}
			lone[c.GetKey()] = c
			t = &symbolonv1.Term{Clauses: []*symbolonv1.Clause{c}}
		}
		s.Terms = append(s.Terms, t)
	}
	return s
}

// slug is a selector in the letters of a name.
func slug(s *symbolonv1.Selector) string {
	const most = 40
	var words []string
	more := false
	for i, t := range s.GetTerms() {
		for _, c := range t.GetClauses() {
			for j, v := range c.GetIn().GetValues() {
				if i == 0 && j == 0 {
					words = append(words, v)
				}
				more = more || i > 0 || j > 0
			}
		}
	}
	text := strings.ToLower(strings.Join(words, "-"))
	if i := strings.LastIndexByte(text, '/'); i >= 0 { // a SPIFFE ID: the workload's name
		text = text[i+1:]
	}
	text = strings.Trim(strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, text), "-")
	for strings.Contains(text, "--") {
		text = strings.ReplaceAll(text, "--", "-")
	}
	if len(text) > most {
		text = strings.TrimRight(text[:most], "-")
	}
	if text == "" {
		text = "some"
	}
	if more {
		text += "-and-more"
	}
	return text
}
