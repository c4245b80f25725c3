package policydb

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// ErrNoNamespace: a suggestion was asked for where there is no namespace.
var ErrNoNamespace = errors.New("there is no such namespace")

// SuggestOptions say what a suggestion is made for, and of what.
type SuggestOptions struct {
	// Namespace gets the policies. Edges count where one of their ends is in it.
	Namespace string
	// Keys are the attribute keys that selectors may use; empty: every label.
	Keys []string
	// Known are the workloads and Externals that there are: what the policies would
	// allow among them, beyond what was seen, is told.
	Known []Known
	Now   time.Time
}

// Known is a workload or an External, and its name for people.
type Known struct {
	Name string
	Endpoint
}

// Suggestion is policies that cover what was seen. It is the same for the same edges,
// in whatever order.
type Suggestion struct {
	Namespace string
	Policies  []SuggestedPolicy
	// Covered counts the edges that the policies were made for, each once.
	Covered int
	// Already counts the edges that the policies in force allow.
	Already int
	// Uncovered are the edges that no suggested policy allows, each with its reason.
	Uncovered []Uncovered
	// Externals are for the bare addresses among Uncovered.
	Externals []SuggestedExternal
	// Denied counts the edges that were denied; no suggested policy allows one.
	Denied int
	// Test is a PolicyTest that the suggestion passes; nil if there is nothing to test.
	Test *symbolonv1.Resource
}

// SuggestedPolicy is one, and what it rests on.
type SuggestedPolicy struct {
	Resource *symbolonv1.Resource
	Edges    []Edge
	// New counts the pairs of known workloads that it would allow and that were not
	// seen; Examples names a few.
	New      int
	Examples []string
}

// Uncovered is an edge that was let through and would be denied.
type Uncovered struct {
	Edge
	Why string
}

// Resources are what an apply of the suggestion consists of.
func (g *Suggestion) Resources() []*symbolonv1.Resource {
	var out []*symbolonv1.Resource
	for _, p := range g.Policies {
		out = append(out, p.Resource)
	}
	if g.Test != nil {
		out = append(out, g.Test)
	}
	return out
}

type transportPort struct {
	protocol string
	port     uint16
}

// suggester is a suggestion under way.
type suggester struct {
	*Suggestion
	snapshot *Snapshot
	options  SuggestOptions
	words    vocabulary
	denied   []Edge
	byPort   map[transportPort][]int     // places in denied
	terms    map[string]*symbolonv1.Term // by their text
}

// Suggest makes policies out of edges: as few as merging finds, that allow every edge
// which was allowed and can be told apart from those that were denied. Nothing is
// widened but by leaving out keys: what a policy matches is what was seen, as far as
// the keys can tell. An edge that was seen both ways counts as it was seen last.
// Errors: ErrNoNamespace, a key outside the vocabulary, ErrUnreadable.
func (s *Snapshot) Suggest(edges []Edge, o SuggestOptions) (*Suggestion, error) {
	if s.Get(KindNamespace, o.Namespace, "") == nil {
		return nil, fmt.Errorf("%w: %s", ErrNoNamespace, o.Namespace)
	}
	g := &suggester{
		Suggestion: &Suggestion{Namespace: o.Namespace},
		snapshot:   s, options: o, terms: make(map[string]*symbolonv1.Term), byPort: make(map[transportPort][]int),
		words: (&vocabularies{snapshot: s}).of(o.Namespace),
	}
	for _, key := range o.Keys {
		if m := g.words.key(key, o.Namespace); m != nil {
			return nil, fmt.Errorf("key %s: %s", printable(key), m.message)
		}
	}
	inForce, err := s.compileAsEnforced(nil)
	if err != nil {
		return nil, err
	}
	var open []Edge
	for _, e := range g.distinct(edges) {
		switch {
		case !e.Allowed:
			at := transportPort{e.Protocol, e.Port}
			g.byPort[at] = append(g.byPort[at], len(g.denied))
			g.denied = append(g.denied, e)
		case inForce.allows(&e, o.Namespace, o.Now):
			g.Already++
		default:
			open = append(open, e)
		}
	}
	g.Denied = len(g.denied)
	open = g.keep(open, g.nameless)
	// A policy above may deny whatever is said here: what it does is seen by trying.
	for {
		g.Policies = g.policies(open)
		c, err := s.compileAsEnforced(g.Resources())
		if err != nil {
			return nil, err
		}
		left := g.keep(open, func(e *Edge) string { return c.denies(e, o.Namespace, o.Now) })
		if len(left) == len(open) {
			g.Covered = len(open) + g.alsoCovered(c)
			g.Test = g.test(c)
			g.externals()
			g.beyond()
			return g.Suggestion, nil
		}
		open = left
	}
}

// alsoCovered finds the edges that no policy was made for and that one allows: the
// other values of their keys are another edge's.
func (g *suggester) alsoCovered(c *Compiled) (found int) {
	g.Uncovered = slices.DeleteFunc(g.Uncovered, func(u Uncovered) bool {
		if !c.allows(&u.Edge, g.Namespace, g.options.Now) {
			return false
		}
		found++
		for i := range g.Policies {
			p := &g.Policies[i]
			x := p.Resource.GetPolicy()
			inPort := func(r *symbolonv1.PortRange) bool {
				return r.GetProtocol() == u.Protocol && r.GetFirst() <= uint32(u.Port) && uint32(u.Port) <= r.GetLast()
			}
			if matchSelector(x.GetSubject(), u.From.Attributes) && matchSelector(x.GetObject(), u.To.Attributes) && slices.ContainsFunc(x.GetPorts(), inPort) {
				p.Edges = append(p.Edges, u.Edge)
				slices.SortFunc(p.Edges, func(a, b Edge) int { return compareSeen(&a, &b) })
			}
		}
		return true
	})
	slices.SortFunc(g.Uncovered, func(a, b Uncovered) int { return compareSeen(&a.Edge, &b.Edge) })
	return found
}

// keep returns the edges of which why finds nothing to say; the others are Uncovered.
func (g *suggester) keep(edges []Edge, why func(*Edge) string) []Edge {
	var out []Edge
	for _, e := range edges {
		if w := why(&e); w != "" {
			g.Uncovered = append(g.Uncovered, Uncovered{e, w})
		} else {
			out = append(out, e)
		}
	}
	return out
}

// compileAsEnforced is the set with more, as if no namespace were in learn.
func (s *Snapshot) compileAsEnforced(more []*symbolonv1.Resource) (*Compiled, error) {
	c, err := Compile(append(s.All(), more...), s.generation)
	if err == nil {
		c.enforceAll()
	}
	return c, err
}

// sides are those of the edge that a namespace's policies judge.
func (e *Edge) sides(namespace string) []Side {
	var out []Side
	if e.From.Namespace == namespace {
		out = append(out, Client)
	}
	if e.To.Namespace == namespace {
		out = append(out, Server)
	}
	return out
}

func (c *Compiled) allows(e *Edge, namespace string, now time.Time) bool {
	return c.denies(e, namespace, now) == ""
}

// denies says why a namespace's side of an edge is denied; "": it is not.
func (c *Compiled) denies(e *Edge, namespace string, now time.Time) string {
	if e.unknown() {
		return "an end without identity or External is let through by learn alone"
	}
	q := &Query{From: e.From, To: e.To, Protocol: e.Protocol, Port: e.Port}
	for _, side := range e.sides(namespace) {
		d := c.Decide(side, q, now)
		switch {
		case d.Allow:
		case d.Reason == symbolonv1.Reason_REASON_ENCRYPTION_UNAVAILABLE:
			return d.Policy + " obliges to encrypt, and the other side is an External"
		case d.Policy != "":
			return d.Policy + " denies it"
		default:
			return "nothing allows it"
		}
	}
	return ""
}

// unknown: one end is no more than an address.
func (e *Edge) unknown() bool {
	return !e.From.known() || !e.To.known()
}

func (p *Endpoint) known() bool { return p.Namespace != "" || p.External != "" || p.Foreign }

// nameless says what keeps an edge's ends from being selected.
func (g *suggester) nameless(e *Edge) string {
	for _, end := range []struct {
		*Endpoint
		address string
	}{{&e.From, e.FromAddress.String()}, {&e.To, e.ToAddress.String()}} {
		switch {
		case !end.known():
			return "it rests on the address " + end.address + " alone: make an External for it"
		case len(g.clauses(end.Endpoint)) > 0:
		case end.External != "":
			return "External " + end.External + " has none of the labels: give it one"
		default:
			return "an end has none of the labels, and no SPIFFE ID"
		}
	}
	from, to := g.term(&e.From, false), g.term(&e.To, false)
	if g.clash(from, to, e) == nil {
		return ""
	}
	from, to = g.term(&e.From, true), g.term(&e.To, true)
	if d := g.clash(from, to, e); d != nil {
		return "the keys cannot tell it from one that was denied: " + describeEdge(d)
	}
	return ""
}

// clash is an edge that was denied and that a policy on these terms would allow.
func (g *suggester) clash(from, to *symbolonv1.Term, e *Edge) *Edge {
	for _, i := range g.byPort[transportPort{e.Protocol, e.Port}] {
		d := &g.denied[i]
		if matchTerm(from, d.From.Attributes) && matchTerm(to, d.To.Attributes) {
			return d
		}
	}
	return nil
}

// distinct are the edges that have to do with the namespace, each once, in order: what
// was seen both ways is what it was last.
func (g *suggester) distinct(edges []Edge) []Edge {
	var out []Edge
	for _, e := range edges {
		if len(e.sides(g.options.Namespace)) > 0 && (e.Protocol == "tcp" || e.Protocol == "udp") {
			out = append(out, e)
		}
	}
	slices.SortFunc(out, compareEdges)
	// What went one way is put together first: what is left of the other way is all of it.
	merged := out[:0]
	for _, e := range out {
		if n := len(merged); n > 0 && compareEdges(merged[n-1], e) == 0 {
			merged[n-1].merge(&e)
			continue
		}
		merged = append(merged, e)
	}
	last := merged[:0]
	for _, e := range merged {
		n := len(last)
		if n == 0 || !sameEdge(&last[n-1], &e) {
			last = append(last, e)
		} else if e.Last.After(last[n-1].Last) { // compareEdges puts what was denied first
			last[n-1] = e
		}
	}
	return last
}

// merge adds more of the same edge.
func (e *Edge) merge(more *Edge) {
	e.Connections += more.Connections
	e.Encrypted, e.AddressOnly = e.Encrypted && more.Encrypted, e.AddressOnly || more.AddressOnly
	if more.First.Before(e.First) {
		e.First = more.First
	}
	if more.Last.After(e.Last) {
		e.Last = more.Last
	}
}

// compareEdges orders by what policy sees, then what was denied before what was
// allowed, so that in a draw it stays denied.
func compareEdges(a, b Edge) int {
	return cmp.Or(compareSeen(&a, &b), compareBools(a.Allowed, b.Allowed))
}

func compareBools(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

func compareSeen(a, b *Edge) int {
	return cmp.Or(
		compareEndpoints(&a.From, &b.From), compareEndpoints(&a.To, &b.To),
		a.FromAddress.Compare(b.FromAddress), a.ToAddress.Compare(b.ToAddress),
		cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port),
	)
}

func sameEdge(a, b *Edge) bool { return compareSeen(a, b) == 0 }

func compareEndpoints(a, b *Endpoint) int {
	return cmp.Or(
		cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.External, b.External), compareBools(a.Foreign, b.Foreign),
		slices.CompareFunc(a.Attributes, b.Attributes, func(x, y identity.Attribute) int {
			return cmp.Or(cmp.Compare(x.Key, y.Key), cmp.Compare(x.Value, y.Value))
		}),
	)
}
