package policydb

import (
	"fmt"
	"slices"
	"strings"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// Explanation is a decision with its grounds.
type Explanation struct {
	Side     Side
	Decision Decision
	// Chain is what each namespace says where no policy does, from leaf to root:
	// "/acme/prod: default deny, protection encrypted".
	Chain []string
	// Candidates are all policies on the chain, in order of precedence: from the
	// root down, within a namespace by name.
	Candidates []Candidate
}

// Candidate is one policy and whether it matches.
type Candidate struct {
	Policy  string // "namespace/name"
	Matches bool
	// Failed is the first clause that does not hold, in words: `subject: app is "db",
	// want web`. Empty if all hold.
	Failed   string
	Verb     symbolonv1.Verb
	Mode     symbolonv1.Mode
	Fallback bool
}

// Explain decides as Decide does, and says why.
func (c *Compiled) Explain(side Side, q *Query, now time.Time) Explanation {
	e := Explanation{Side: side, Decision: c.Decide(side, q, now)}
	own, _ := q.side(side)
	ch := c.chains[own.Namespace]
	switch {
	case own.External != "":
		e.Chain = []string{own.External + ": an External has no policy of its own"}
		return e
	case ch == nil:
		e.Chain = []string{own.Namespace + ": the namespace, or one above it, is not known"}
		return e
	}
	for _, ns := range slices.Backward(ch.path) {
		e.Chain = append(e.Chain, c.says[ns])
	}
	for _, l := range ch.levels {
		for i := l.first * wordBits; i < l.end*wordBits; i++ {
			p := &c.policies[i]
			if p.source == nil {
				break
			}
			failed := c.failed(p, l.own, q, now)
			mode := symbolonv1.Mode_MODE_ENFORCE
			if p.observe {
				mode = symbolonv1.Mode_MODE_OBSERVE
			}
			e.Candidates = append(e.Candidates, Candidate{p.ref, failed == "", failed, p.verb, mode, p.fallback})
		}
	}
	return e
}

// says puts a namespace's own word in a line.
func says(path string, ns *symbolonv1.Namespace) string {
	d := nameOf(defaults, ns.GetDefault())
	if d == "" {
		d = "inherit"
	}
	s := fmt.Sprintf("%s: default %s, protection %s", path, d, nameOf(protections, ns.GetProtection()))
	if ns.GetMode() == symbolonv1.Mode_MODE_LEARN {
		s += ", mode learn: what is denied passes, unless a deny from above does it"
	}
	return s
}

// failed is the first thing about p that does not hold, or "".
func (c *Compiled) failed(p *policy, own bool, q *Query, now time.Time) string {
	if !own && !p.propagate {
		return "propagate: it holds in its own namespace only"
	}
	if f := failedSelector("subject", p.source.GetSubject(), q.From.Attributes); f != "" {
		return f
	}
	if f := failedSelector("object", p.source.GetObject(), q.To.Attributes); f != "" {
		return f
	}
	if !p.ports.contains(transportOf(q.Protocol), q.Port) {
		return fmt.Sprintf("ports: %s/%d is not in %s", q.Protocol, q.Port, formatPortList(p.source.GetPorts()))
	}
	if f := failedWhere(p, q); f != "" {
		return f
	}
	if !p.expires.IsZero() && !now.Before(p.expires) {
		return "expires: it expired at " + p.expires.UTC().Format(time.RFC3339)
	}
	if p.window != nil && !c.timeless && !p.window.active(now) {
		return fmt.Sprintf("when: %s is not in %s", now.In(p.window.location).Format("Mon 15:04"), formatWindow(p.source.GetWhen()))
	}
	return ""
}

func failedWhere(p *policy, q *Query) string {
	for _, w := range []struct {
		name string
		keys []string
		want bool
	}{{"same", p.same, true}, {"different", p.different, false}} {
		for _, key := range w.keys {
			from, to := q.From.Attributes.Of(key), q.To.Attributes.Of(key)
			switch {
			case len(from) == 0:
				return fmt.Sprintf("where: the subject has no %s", key)
			case len(to) == 0:
				return fmt.Sprintf("where: the object has no %s", key)
			case shares(from, to) != w.want:
				return fmt.Sprintf("where: %s is %s and %s, want %s", key, values(from), values(to), w.name)
			}
		}
	}
	return ""
}

// failedSelector is the first condition of the first alternative that fails, and
// how many alternatives there are.
func failedSelector(name string, s *symbolonv1.Selector, attrs identity.Attributes) string {
	if matchSelector(s, attrs) {
		return ""
	}
	for _, t := range s.GetTerms() {
		for _, cl := range t.GetClauses() {
			if matchClause(cl, attrs) {
				continue
			}
			out := name + ": " + failedClause(cl, attrs)
			if n := len(s.GetTerms()); n > 1 {
				out += fmt.Sprintf(" (the first of %d alternatives; none matches)", n)
			}
			return out
		}
	}
	return name + ": it selects nothing"
}

func failedClause(c *symbolonv1.Clause, attrs identity.Attributes) string {
	of := attrs.Of(c.GetKey())
	if op, ok := c.GetOperator().(*symbolonv1.Clause_Exists); ok && !op.Exists {
		return fmt.Sprintf("%s is %s, want none", c.GetKey(), values(of))
	}
	if len(of) == 0 {
		return fmt.Sprintf("there is no %s", c.GetKey())
	}
	want := ""
	switch op := c.GetOperator().(type) {
	case *symbolonv1.Clause_In:
		want = quoted(op.In.GetValues())
	case *symbolonv1.Clause_Not:
		want = "not " + quoted(op.Not.GetValues())
	case *symbolonv1.Clause_Prefix:
		want = "prefix " + printable(op.Prefix)
	}
	return fmt.Sprintf("%s is %s, want %s", c.GetKey(), values(of), want)
}

func values(of identity.Attributes) string {
	out := make([]string, len(of))
	for i, a := range of {
		out[i] = a.Value
	}
	return quoted(out)
}

func quoted(vs []string) string {
	const most = 8
	var out []string
	for i, v := range vs {
		if i == most {
			out = append(out, fmt.Sprintf("or %d more", len(vs)-most))
			break
		}
		out = append(out, printable(v))
	}
	return strings.Join(out, ", ")
}
