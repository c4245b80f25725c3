package policydb

import (
	"cmp"
	"fmt"
	"math/bits"
	"slices"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// A PolicyTest asks what the policies of its namespace's chain make of two
// endpoints, each taken to be in that namespace, or an External of the chain. It must not pass at noon and fail
// at midnight, so windows count as open; what has expired is gone. It asks what the
// policies say, so a namespace in learn is judged as if it were enforced.

// runTests runs the PolicyTests of every namespace that the change touches, and of
// those below, against the candidate. Failures become errors.
func (p *planner) runTests(now time.Time) {
	touched := make(map[string]bool)
	for _, c := range p.Changes {
		if c.Type != symbolonv1.ChangeType_CHANGE_TYPE_UNCHANGED {
			touched[c.Key().Namespace] = true
		}
	}
	tests := p.candidate.List(KindPolicyTest, "/")
	tests = slices.DeleteFunc(tests, func(r *symbolonv1.Resource) bool {
		return !slices.ContainsFunc(chainOf(r.GetNamespace()), func(ns string) bool { return touched[ns] })
	})
	if len(tests) == 0 {
		return
	}
	c, err := p.candidate.compileFor(tests)
	if err != nil {
		p.errs.add(&ValidationError{SyntaxError: SyntaxError{Message: err.Error()}})
		return
	}
	for _, r := range tests {
		for i, t := range r.GetPolicyTest().GetTests() {
			failure := c.test(r.GetNamespace(), t, now)
			p.TestResults = append(p.TestResults, &symbolonv1.TestResult{
				Test: RefOf(r) + ": " + t.GetName(), Passed: failure == "", Message: failure,
			})
			if failure != "" {
				p.fail(r, problem{[]any{"tests", i, "name", theValue{}}, mistake{fmt.Sprintf("test %s failed: %s", printable(t.GetName()), failure), ""}})
			}
		}
	}
}

// TestCase is one test of a PolicyTest, run.
type TestCase struct {
	// PolicyTest is what it is part of, Name its own.
	PolicyTest Key
	Name       string
	// Failure is what was wanted and what came; empty if it passed.
	Failure string
	// File and Line are where it is written, if that is known.
	File string
	Line int
	// Of one that failed: where; and of the first 200, both sides' decisions, each with
	// the first 20 candidates that match or have the other verdict.
	Protocol string
	Port     uint16
	Sides    []Explanation
}

// Test runs all PolicyTests of a namespace (empty: the root) and below, against what
// is in force as changed by documents, whatever has failed before. Windows count as
// open. Errors: *ValidationErrors, for documents that are wrong in themselves.
func (db *DB) Test(documents []Document, namespace string) ([]TestCase, error) {
	p := db.candidate(documents)
	if !p.check(documents, nil) {
		return nil, &p.errs
	}
	if namespace == "" {
		namespace = "/"
	}
	tests := p.candidate.List(KindPolicyTest, namespace)
	c, err := p.candidate.compileFor(tests)
	if err != nil {
		return nil, fmt.Errorf("compile: %w", err)
	}
	now := db.Now()
	grounds := maxGrounds
	var out []TestCase
	for _, r := range tests {
		doc := p.documents[KeyOf(r)]
		for i, t := range r.GetPolicyTest().GetTests() {
			failure, q := c.testAt(r.GetNamespace(), t, now)
			x := TestCase{PolicyTest: KeyOf(r), Name: t.GetName(), Failure: failure}
			if failure != "" {
				x.Protocol, x.Port = q.Protocol, q.Port
				if grounds--; grounds >= 0 {
					for _, side := range q.Judges() {
						x.Sides = append(x.Sides, c.grounds(side, q, now))
					}
				}
				if doc != nil {
					at := doc.at(problem{[]any{"tests", i, "name", theValue{}}, mistake{}})
					x.File, x.Line = at.File, at.Line
				}
			}
			out = append(out, x)
		}
	}
	return out, nil
}

// Grounds are long: of many failures only the first are told why, and not of all
// policies of a large chain.
const maxGrounds, maxCandidates = 200, 20

// grounds is Explain without what nobody would have expected to decide.
func (c *Compiled) grounds(side Side, q *Query, now time.Time) Explanation {
	e := c.Explain(side, q, now)
	all := e.Candidates
	e.Candidates = nil
	for _, x := range all {
		other := x.Verb == symbolonv1.Verb_VERB_ALLOW && !e.Decision.Allow || x.Verb == symbolonv1.Verb_VERB_DENY && e.Decision.Allow
		if (x.Matches || other) && len(e.Candidates) < maxCandidates {
			e.Candidates = append(e.Candidates, x)
		}
	}
	return e
}

// compileFor compiles what stands on the chains of the tests' namespaces.
func (s *Snapshot) compileFor(tests []*symbolonv1.Resource) (*Compiled, error) {
	seen := make(map[string]bool)
	var resources []*symbolonv1.Resource
	for _, t := range tests {
		for _, ns := range chainOf(t.GetNamespace()) {
			if !seen[ns] {
				seen[ns] = true
				resources = append(resources, s.in(ns)...)
			}
		}
	}
	c, err := Compile(resources, s.generation)
	if err == nil {
		c.openWindows()
		c.enforceAll()
	}
	return c, err
}

// test returns what is wrong, or "".
func (c *Compiled) test(namespace string, t *symbolonv1.PolicyTest_Test, now time.Time) string {
	failure, _ := c.testAt(namespace, t, now)
	return failure
}

// testAt returns with it the last question asked: the one that failed. A test on a range of
// ports, or on any, must hold for each of them; with an External as the server, for each
// of those that the External has.
func (c *Compiled) testAt(namespace string, t *symbolonv1.PolicyTest_Test, now time.Time) (failure string, q *Query) {
	q = &Query{
		From: Endpoint{Namespace: namespace, Attributes: identity.AttributesFromProto(t.GetFrom())},
		To:   Endpoint{Namespace: namespace, Attributes: identity.AttributesFromProto(t.GetTo())},
	}
	ranges := []*symbolonv1.PortRange{t.GetPort()}
	if t.GetPort() == nil {
		ranges = ranges[:0]
		for _, protocol := range protocols {
			ranges = append(ranges, &symbolonv1.PortRange{Protocol: protocol, First: 1, Last: maxPort})
		}
	}
	for _, end := range []struct {
		*Endpoint
		external string
	}{{&q.From, t.GetFromExternal()}, {&q.To, t.GetToExternal()}} {
		if end.external == "" {
			continue
		}
		x := c.declared[end.external]
		if x == nil {
			return "there is no External " + end.external + " here", q
		}
		*end.Endpoint = Endpoint{External: end.external, Attributes: identity.AttributesFromProto(x.GetLabels())}
		if end.Endpoint == &q.To {
			if ranges = portsIn(ranges, x.GetAddresses().GetPorts()); len(ranges) == 0 {
				return fmt.Sprintf("External %s does not have the port", end.external), q
			}
		}
	}
	for _, r := range ranges {
		for _, port := range c.portsToTry(q, r) {
			q.Protocol, q.Port = r.GetProtocol(), port
			if failure := c.testPort(q, t, now); failure != "" {
				return fmt.Sprintf("at %s/%d %s", q.Protocol, q.Port, failure), q
			}
		}
	}
	return "", q
}

// portsIn is what ranges and ports (none: all) have in common.
func portsIn(ranges, ports []*symbolonv1.PortRange) []*symbolonv1.PortRange {
	if len(ports) == 0 {
		return ranges
	}
	var out []*symbolonv1.PortRange
	for _, r := range ranges {
		for _, p := range ports {
			first, last := max(r.GetFirst(), p.GetFirst()), min(r.GetLast(), p.GetLast())
			if r.GetProtocol() == p.GetProtocol() && first <= last {
				out = append(out, &symbolonv1.PortRange{Protocol: r.GetProtocol(), First: first, Last: last})
			}
		}
	}
	return out
}

func (c *Compiled) testPort(q *Query, t *symbolonv1.PolicyTest_Test, now time.Time) string {
	var sides []Decision
	allow, protection := true, symbolonv1.Protection_PROTECTION_UNSPECIFIED
	for _, side := range q.Judges() {
		d := c.Decide(side, q, now)
		sides, allow, protection = append(sides, d), allow && d.Allow, max(protection, d.Protection)
	}
	got := describeSides(sides)
	// What decides is of a side with the verdict that counts.
	decides := func(is func(*Decision) bool) bool {
		return slices.ContainsFunc(sides, func(d Decision) bool { return d.Allow == allow && is(&d) })
	}
	if allow != t.GetExpectAllow() {
		return fmt.Sprintf("want %s, got %s", nameOf(outcomes, t.GetExpectAllow()), got)
	}
	by, reason := t.GetBy(), t.GetReason()
	if by != "" && !decides(func(d *Decision) bool { return d.Policy == by }) {
		return fmt.Sprintf("want %s by %s, got %s", nameOf(outcomes, allow), by, got)
	}
	if reason != symbolonv1.Reason_REASON_UNSPECIFIED && !decides(func(d *Decision) bool { return d.Reason == reason && (by == "" || d.Policy == by) }) {
		return fmt.Sprintf("want %s with reason %s, got %s", nameOf(outcomes, allow), nameOf(testedReasons, reason), got)
	}
	if encrypted := protection == symbolonv1.Protection_PROTECTION_ENCRYPTED; t.Encrypted != nil && t.GetEncrypted() != encrypted {
		return fmt.Sprintf("want encrypted: %t, got %t", t.GetEncrypted(), encrypted)
	}
	return ""
}

// describeSides names the verdict that counts: the first denial, or the allow.
func describeSides(sides []Decision) string {
	d := sides[0]
	for _, x := range sides {
		if !x.Allow {
			d = x
			break
		}
	}
	by := "default"
	if d.Policy != "" {
		by = d.Policy
	}
	if d.Reason == symbolonv1.Reason_REASON_ENCRYPTION_UNAVAILABLE {
		by += ", which obliges to encrypt: encryption-unavailable"
	}
	return fmt.Sprintf("%s by %s", nameOf(outcomes, d.Allow), by)
}

// portsToTry is one port of each part of r on which the policies whose selectors
// match q cannot differ.
func (c *Compiled) portsToTry(q *Query, r *symbolonv1.PortRange) []uint16 {
	out := []uint16{uint16(r.GetFirst())}
	ch := c.chains[cmp.Or(q.From.Namespace, q.To.Namespace)]
	if ch == nil {
		return out
	}
	protocol := transportOf(r.GetProtocol())
	subjects, objects := c.subjectBits(q.From.Attributes), c.objectBits(q.To.Attributes)
	for _, l := range ch.levels {
		both(subjects, objects, l.span, func(i uint32, w uint64) {
			for ; w != 0; w &= w - 1 {
				for _, p := range c.policies[i*wordBits+uint32(bits.TrailingZeros64(w))].ports {
					if p.protocol != protocol {
						continue
					}
					for _, edge := range []uint32{uint32(p.first), uint32(p.last) + 1} {
						if edge > r.GetFirst() && edge <= r.GetLast() {
							out = append(out, uint16(edge))
						}
					}
				}
			}
		})
	}
	slices.Sort(out)
	return slices.Compact(out)
}
