package policydb

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// externalLabel is what a suggested External is selected by.
const externalLabel = "ext"

// maxExternals bounds the Externals suggested, maxCIDRs the addresses in one.
const maxExternals, maxCIDRs = 20, 64

// SuggestedExternal is what bare addresses have in common that were seen with the same
// workloads on the same ports, and the policies that would allow what was seen. It is a
// comment of the suggestion, and no part of it: an address is no identity, and nobody
// but the operator knows whose it is.
type SuggestedExternal struct {
	External *symbolonv1.Resource
	Policies []*symbolonv1.Resource
	Edges    []Edge
	// Omitted counts the addresses that did not fit.
	Omitted int
}

// bareAddress is one address that was seen, and with whom on which ports.
type bareAddress struct {
	address netip.Addr
	client  bool
	own     map[string]*seenWith // by the term's text
	edges   []Edge
}

type seenWith struct {
	term  *symbolonv1.Term
	ports []transportPort
}

func compareTransportPorts(a, b transportPort) int {
	return cmp.Or(cmp.Compare(a.protocol, b.protocol), cmp.Compare(a.port, b.port))
}

// add notes one more edge with the address.
func (x *bareAddress) add(t *symbolonv1.Term, e *Edge) {
	text := string(appendTerm(nil, t))
	if x.own[text] == nil {
		x.own[text] = &seenWith{term: t}
	}
	w, p := x.own[text], transportPort{e.Protocol, e.Port}
	if i, had := slices.BinarySearchFunc(w.ports, p, compareTransportPorts); !had {
		w.ports = slices.Insert(w.ports, i, p)
	}
	x.edges = append(x.edges, *e)
}

// likeness is the same text for addresses that were seen with the same workloads, on the
// same ports each.
func (x *bareAddress) likeness() string {
	out := fmt.Sprint(x.client)
	for _, text := range slices.Sorted(maps.Keys(x.own)) {
		out += fmt.Sprintf(" %q %v", text, x.own[text].ports)
	}
	return out
}

// bareAddresses are those among the edges that nothing covers.
func (g *suggester) bareAddresses() []*bareAddress {
	type end struct {
		address netip.Addr
		client  bool
	}
	found := make(map[end]*bareAddress)
	for i := range g.Uncovered {
		e := &g.Uncovered[i].Edge
		for _, x := range []struct {
			end
			bare, own *Endpoint
		}{{end{e.ToAddress, false}, &e.To, &e.From}, {end{e.FromAddress, true}, &e.From, &e.To}} {
			if x.bare.known() || !x.address.IsValid() || x.own.Namespace != g.Namespace || len(g.clauses(x.own)) == 0 {
				continue
			}
			if found[x.end] == nil {
				found[x.end] = &bareAddress{address: x.address, client: x.client, own: make(map[string]*seenWith)}
			}
			found[x.end].add(g.term(x.own, false), e)
		}
	}
	return slices.SortedFunc(maps.Values(found), func(x, y *bareAddress) int {
		return cmp.Or(cmp.Compare(x.likeness(), y.likeness()), x.address.Compare(y.address))
	})
}

// externals groups the addresses that are alike.
func (g *suggester) externals() {
	all := g.bareAddresses()
	for len(all) > 0 {
		like := all[0].likeness()
		n := 1
		for n < len(all) && all[n].likeness() == like {
			n++
		}
		g.Externals = append(g.Externals, g.external(all[:n]))
		all = all[n:]
	}
}

// external is of addresses that are alike.
func (g *suggester) external(alike []*bareAddress) SuggestedExternal {
	var s SuggestedExternal
	first := alike[0]
	a := &symbolonv1.Addresses{}
	for i, x := range alike {
		s.Edges = append(s.Edges, x.edges...)
		if i >= maxCIDRs {
			s.Omitted++
			continue
		}
		a.Cidrs = append(a.Cidrs, netip.PrefixFrom(x.address, x.address.BitLen()).String())
	}
	slices.SortFunc(s.Edges, func(x, y Edge) int { return compareSeen(&x, &y) })
	name := g.externalName(first.client)
	outside := &symbolonv1.Selector{Terms: []*symbolonv1.Term{{Clauses: []*symbolonv1.Clause{{
		Key: externalLabel, Operator: &symbolonv1.Clause_In{In: &symbolonv1.Values{Values: []string{name}}},
	}}}}}
	// A policy for each set of ports: it allows no more than was seen.
	own := make(map[string]*symbolonv1.Selector)
	ports := make(map[string][]transportPort)
	for _, text := range slices.Sorted(maps.Keys(first.own)) {
		w := first.own[text]
		at := fmt.Sprint(w.ports)
		if own[at] == nil {
			own[at], ports[at] = &symbolonv1.Selector{}, w.ports
		}
		own[at].Terms = append(own[at].Terms, w.term)
	}
	var served []transportPort
	for i, at := range slices.Sorted(maps.Keys(own)) {
		policy := &symbolonv1.Policy{Verb: symbolonv1.Verb_VERB_ALLOW, Subject: own[at], Object: outside, Ports: portRanges(ports[at])}
		if first.client {
			policy.Subject, policy.Object = outside, own[at]
		}
		r := &symbolonv1.Resource{Namespace: g.Namespace, Name: name, Kind: &symbolonv1.Resource_Policy{Policy: policy}}
		if i > 0 {
			r.Name = fmt.Sprintf("%s.%d", name, i+1)
		}
		s.Policies = append(s.Policies, r)
		served = append(served, ports[at]...)
	}
	if !first.client { // a client's ports say nothing of what it calls
		slices.SortFunc(served, compareTransportPorts)
		a.Ports = portRanges(slices.Compact(served))
	}
	s.External = &symbolonv1.Resource{Namespace: g.Namespace, Name: name, Kind: &symbolonv1.Resource_External{External: &symbolonv1.External{
		Labels: map[string]*symbolonv1.LabelValues{externalLabel: {Values: []string{name}}}, Addresses: a,
	}}}
	return s
}

func portRanges(ports []transportPort) []*symbolonv1.PortRange {
	var out []*symbolonv1.PortRange
	for _, p := range ports {
		out = append(out, &symbolonv1.PortRange{Protocol: p.protocol, First: uint32(p.port), Last: uint32(p.port)})
	}
	return out
}

// externalName is one that no External and no Policy of the namespace has.
func (g *suggester) externalName(client bool) string {
	base := "learned-destination"
	if client {
		base = "learned-client"
	}
	for n := len(g.Externals) + 1; ; n++ {
		name := fmt.Sprintf("%s-%d", base, n)
		if g.snapshot.Get(KindExternal, g.Namespace, name) == nil && g.snapshot.Get(KindPolicy, g.Namespace, name) == nil &&
			!slices.ContainsFunc(g.Externals, func(s SuggestedExternal) bool { return s.External.GetName() == name }) {
			return name
		}
	}
}

// tellExternals writes them as comments.
func (g *Suggestion) tellExternals(b *bytes.Buffer, say func(format string, args ...any)) {
	for i, s := range g.Externals {
		if i == maxExternals {
			say("and %d more Externals", len(g.Externals)-i)
			break
		}
		say("")
		say("Addresses that proved nothing, seen with the same workloads on the same ports. If you know whose they")
		say("are, name them and uncomment (the label %s must be declared):", externalLabel)
		if s.Omitted > 0 {
			say("and %d addresses more", s.Omitted)
		}
		for j := range s.Edges {
			if j == maxTold {
				say("- and %d more", len(s.Edges)-j)
				break
			}
			say("- %s", describeEdge(&s.Edges[j]))
		}
		for _, r := range append([]*symbolonv1.Resource{s.External}, s.Policies...) {
			b.WriteString("#| ---\n")
			for line := range strings.Lines(string(FormatYAML(r))) {
				b.WriteString("#| " + line)
			}
		}
	}
}
