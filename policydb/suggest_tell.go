package policydb

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

const (
	maxExamples = 3
	// maxTold bounds the edges listed with a policy, and those not covered.
	maxTold = 20
	// maxLearnedTests bounds the tests of denials.
	maxLearnedTests = 10
)

// beyond counts for each policy the pairs of known ends that it allows and that were
// not seen.
func (g *suggester) beyond() {
	for i := range g.Policies {
		p := &g.Policies[i]
		policy := p.Resource.GetPolicy()
		seen := make(map[[2]string]bool)
		for _, e := range p.Edges {
			seen[[2]string{describeEndpoint(&e.From), describeEndpoint(&e.To)}] = true
		}
		var objects []int
		texts := make([]string, len(g.options.Known))
		for j := range g.options.Known {
			k := &g.options.Known[j]
			texts[j] = describeEndpoint(&k.Endpoint)
			if matchSelector(policy.GetObject(), k.Attributes) {
				objects = append(objects, j)
			}
		}
		for a := range g.options.Known {
			from := &g.options.Known[a]
			if !matchSelector(policy.GetSubject(), from.Attributes) {
				continue
			}
			for _, b := range objects {
				to := &g.options.Known[b]
				if from.Namespace != g.Namespace && to.Namespace != g.Namespace || seen[[2]string{texts[a], texts[b]}] {
					continue
				}
				p.New++
				if len(p.Examples) < maxExamples {
					p.Examples = append(p.Examples, fmt.Sprintf("%s to %s", printable(from.Name), printable(to.Name)))
				}
			}
		}
	}
}

// test makes a PolicyTest of what is covered and of what was denied. A test speaks of
// ends in its own namespace, with no more than the labels named, so one that does not
// hold there is left out.
func (g *suggester) test(c *Compiled) *symbolonv1.Resource {
	c.openWindows()
	t := &symbolonv1.PolicyTest{}
	add := func(from, to *Endpoint, protocol string, port uint16, allow bool, by, name string) {
		x := &symbolonv1.PolicyTest_Test{
			Name: name, From: g.labels(from), To: g.labels(to), ExpectAllow: allow, By: by,
			Port: &symbolonv1.PortRange{Protocol: protocol, First: uint32(port), Last: uint32(port)},
		}
		named := from.External == "" && len(x.From) > 0 && to.External == "" && len(x.To) > 0
		if from.External != "" {
			x.From, x.FromExternal, named = nil, from.External, len(x.To) > 0
		} else if to.External != "" {
			x.To, x.ToExternal, named = nil, to.External, len(x.From) > 0
		}
		same := func(y *symbolonv1.PolicyTest_Test) bool { return y.GetName() == name }
		if named && !slices.ContainsFunc(t.Tests, same) && c.test(g.Namespace, x, g.options.Now) == "" {
			t.Tests = append(t.Tests, x)
		}
	}
	for _, p := range g.Policies {
		e := &p.Edges[0]
		add(&e.From, &e.To, e.Protocol, e.Port, true, RefOf(p.Resource), fmt.Sprintf("%s on %s/%d", p.Resource.GetName(), e.Protocol, e.Port))
		// The way back was not seen.
		add(&e.To, &e.From, e.Protocol, e.Port, false, "", fmt.Sprintf("not back from %s on %s/%d", p.Resource.GetName(), e.Protocol, e.Port))
	}
	for i := range g.denied {
		if e := &g.denied[i]; i < maxLearnedTests {
			add(&e.From, &e.To, e.Protocol, e.Port, false, "", fmt.Sprintf("what was denied stays denied, %d", i+1))
		}
	}
	if len(t.Tests) == 0 {
		return nil
	}
	name := "learned"
	for n := 2; g.snapshot.Get(KindPolicyTest, g.Namespace, name) != nil; n++ {
		name = fmt.Sprintf("learned-%d", n)
	}
	return &symbolonv1.Resource{Namespace: g.Namespace, Name: name, Kind: &symbolonv1.Resource_PolicyTest{PolicyTest: t}}
}

// labels are what the selectors can go by, as a test names it.
func (g *suggester) labels(e *Endpoint) map[string]*symbolonv1.LabelValues {
	out := make(map[string]*symbolonv1.LabelValues)
	for _, c := range g.clauses(e) {
		out[c.GetKey()] = &symbolonv1.LabelValues{Values: c.GetIn().GetValues()}
	}
	return out
}

// YAML is the suggestion as a file to read, edit and apply: every policy under a comment
// that says what it rests on. Nothing of what workloads say of themselves can end a
// comment.
func (g *Suggestion) YAML() []byte {
	var b bytes.Buffer
	say := func(format string, args ...any) { fmt.Fprintf(&b, "# "+format+"\n", args...) }
	say("Suggested for %s: %s. Of the edges seen, allowed already: %d; denied, and denied further on: %d; not covered: %d.",
		g.Namespace, counted(len(g.Policies), "policy", "policies"), g.Already, g.Denied, len(g.Uncovered))
	for i, u := range g.Uncovered {
		if i == maxTold {
			say("and %d more", len(g.Uncovered)-i)
			break
		}
		say("NOT COVERED: %s", describeEdge(&u.Edge))
		say("  %s", u.Why)
	}
	g.tellExternals(&b, say)
	for i, p := range g.Policies {
		if i > 0 {
			b.WriteString("---\n")
		}
		say("Covers %s:", counted(len(p.Edges), "edge", "edges"))
		for j := range p.Edges {
			if j == maxTold {
				say("- and %d more", len(p.Edges)-j)
				break
			}
			say("- %s", describeEdge(&p.Edges[j]))
		}
		if p.New == 0 {
			say("Allows nothing beyond, among the workloads known.")
		} else {
			say("Would newly allow %s not seen: %s%s.", counted(p.New, "pair", "pairs"), strings.Join(p.Examples, ", "),
				map[bool]string{true: ", ..."}[p.New > len(p.Examples)])
		}
		b.Write(FormatYAML(p.Resource))
	}
	if g.Test != nil {
		if len(g.Policies) > 0 {
			b.WriteString("---\n")
		}
		b.Write(FormatYAML(g.Test))
	}
	return b.Bytes()
}

// describeEdge is an edge in a line.
func describeEdge(e *Edge) string {
	s := fmt.Sprintf("%s to %s, %s/%d: %s, %s to %s", describeEnd(&e.From, e.FromAddress.String()), describeEnd(&e.To, e.ToAddress.String()),
		e.Protocol, e.Port, counted(e.Connections, "connection", "connections"), stamp(e.First), stamp(e.Last))
	if e.AddressOnly || e.From.External != "" || e.To.External != "" || e.unknown() {
		s += "; RESTS ON ADDRESSES ONLY"
	}
	return s
}

func counted[N int | uint64](n N, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04Z") }

func describeEnd(e *Endpoint, address string) string {
	if !e.known() {
		return address
	}
	return describeEndpoint(e)
}

// describeEndpoint tells endpoints apart that policy can tell apart: by their SPIFFE ID
// where there is one.
func describeEndpoint(e *Endpoint) string {
	if id := e.Attributes.Get("spiffe.id"); id != "" && e.External == "" {
		return quote(id)
	}
	if e.External != "" {
		return quote(e.External)
	}
	var parts []string
	for _, a := range e.Attributes {
		if isLabel(a.Key) {
			parts = append(parts, quote(a.Key)+"="+quote(a.Value))
		}
	}
	at := quote(e.Namespace)
	if e.Foreign {
		at = quote(e.Attributes.Get("spiffe.trust_domain"))
	}
	return "{" + strings.Join(parts, " ") + "}@" + at
}
