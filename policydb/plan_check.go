package policydb

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// changed are the resources that the plan creates or updates.
func (p *planner) changed() []*symbolonv1.Resource {
	var out []*symbolonv1.Resource
	for _, c := range p.Changes {
		if c.Resource != nil && c.Type != symbolonv1.ChangeType_CHANGE_TYPE_UNCHANGED {
			out = append(out, c.Resource)
		}
	}
	return out
}

// checkWords holds labels and values against the vocabulary: of what the change
// names, and of all that stands below a namespace whose vocabulary it changes.
func (p *planner) checkWords() {
	check := make(map[Key]*symbolonv1.Resource)
	for _, c := range p.Changes {
		if c.Resource == nil {
			continue
		}
		check[c.Key()] = c.Resource
		if c.Previous == nil || KindOf(c.Resource) != KindNamespace {
			continue
		}
		before := &symbolonv1.Namespace{Attributes: c.Previous.GetNamespaceKind().GetAttributes()}
		after := &symbolonv1.Namespace{Attributes: c.Resource.GetNamespaceKind().GetAttributes()}
		if !proto.Equal(before, after) {
			for _, r := range p.candidate.List("", c.Resource.GetNamespace()) {
				check[KeyOf(r)] = r
			}
		}
	}
	// In the order of listings, so that the same errors are told each time.
	keys := make([]Key, 0, len(check))
	for k := range check {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, compareKeys)
	for _, k := range keys {
		for _, x := range checkVocabulary(check[k], p.words.of(k.Namespace)) {
			p.fail(check[k], x)
		}
	}
}

// checkOverlaps refuses two Externals of one namespace that claim the same network
// and port: an address would have two sets of labels. One network within another is
// fine: the longer prefix wins.
func (p *planner) checkOverlaps() {
	done := make(map[string]bool)
	for _, r := range p.changed() {
		if r.GetExternal() == nil || done[r.GetNamespace()] {
			continue
		}
		done[r.GetNamespace()] = true
		type claim struct {
			by    *symbolonv1.Resource
			ports portSet
		}
		claims := make(map[netip.Prefix][]claim)
		for _, x := range p.candidate.collect(indexID+"_prefix", exactlyKind{KindExternal, r.GetNamespace()}) {
			ports, err := compilePorts(x.GetExternal().GetAddresses().GetPorts())
			if err != nil {
				p.fail(x, problem{[]any{"addresses", "ports"}, mistake{err.Error(), ""}})
				continue
			}
			for _, s := range x.GetExternal().GetAddresses().GetCidrs() {
				prefix, m := parsePrefix(s)
				if m != nil {
					p.fail(x, problem{[]any{"addresses", "cidrs", s}, *m})
					continue
				}
				for _, other := range claims[prefix] {
					if other.ports.overlaps(ports) {
						p.fail(x, problem{[]any{"addresses", "cidrs", s}, mistake{
							fmt.Sprintf("%s is claimed by External %s too", s, RefOf(other.by)),
							"give each its own networks or ports; a longer prefix within a shorter one is fine",
						}})
					}
				}
				claims[prefix] = append(claims[prefix], claim{x, ports})
			}
		}
	}
}

// checkDeciders refuses tests that want a policy to decide which is not on their
// namespace's chain, or speak of an External that is not: they could never pass.
func (p *planner) checkDeciders() {
	for _, r := range p.changed() {
		for i, t := range r.GetPolicyTest().GetTests() {
			for _, x := range []struct{ key, kind, word, ref string }{
				{"by", KindPolicy, "policy", t.GetBy()}, {"from", KindExternal, KindExternal, t.GetFromExternal()}, {"to", KindExternal, KindExternal, t.GetToExternal()},
			} {
				if x.ref == "" {
					continue
				}
				if refs := p.onChain(x.kind, r.GetNamespace()); !slices.Contains(refs, x.ref) {
					p.fail(r, problem{[]any{"tests", i, x.key, x.ref}, mistake{
						fmt.Sprintf("no %s %s holds in %s", x.word, printable(x.ref), r.GetNamespace()), didYouMean(x.ref, refs),
					}})
				}
			}
		}
	}
}

// onChain are the Refs of a kind's resources in a namespace and those above.
func (p *planner) onChain(kind, namespace string) (refs []string) {
	for _, ns := range chainOf(namespace) {
		for _, x := range p.candidate.collect(indexID+"_prefix", exactlyKind{kind, ns}) {
			refs = append(refs, RefOf(x))
		}
	}
	return refs
}

// maxWarnings bounds the warnings listed one by one.
const maxWarnings = 50

// warn tells of what is allowed but hardly meant: selectors that no Profile or
// External can satisfy, policies that have expired already, and Profiles that any
// user can fit.
func (p *planner) warn(now time.Time) {
	var given *givenLabels
	omitted := 0
	add := func(format string, args ...any) {
		if len(p.Warnings) >= maxWarnings {
			omitted++
			return
		}
		p.Warnings = append(p.Warnings, fmt.Sprintf(format, args...))
	}
	for _, r := range p.changed() {
		if key := anybodysProgram(r.GetProfile()); key != "" {
			add("%s matches on %s without a user: whoever may run that file can make it do anything (LD_PRELOAD), under this name; match os.user, proc.uid or proc.unit too",
				KeyOf(r), key)
		}
		policy := r.GetPolicy()
		if policy == nil {
			continue
		}
		if e := policy.GetExpires(); e != nil && !now.Before(e.AsTime()) {
			add("%s expired at %s", KeyOf(r), e.AsTime().UTC().Format(time.RFC3339))
		}
		if given == nil {
			given = p.candidate.givenLabels()
		}
		for _, s := range []struct {
			name     string
			selector *symbolonv1.Selector
		}{{"subject", policy.GetSubject()}, {"object", policy.GetObject()}} {
			if missing := given.missing(s.selector); missing != "" {
				add("%s: %s matches no known workload: none of %d Profiles and %d Externals gives %s",
					KeyOf(r), s.name, given.profiles, given.externals, missing)
			}
		}
	}
	if omitted > 0 {
		p.Warnings = append(p.Warnings, fmt.Sprintf("and %d more warnings", omitted))
	}
}

// anybodysProgram names the key by which a Profile gives a name or labels to an
// executable, whoever runs it; "" if it asks for a user, a system unit or a container
// as well. That a user is not another one, or that there is one, asks for none.
func anybodysProgram(p *symbolonv1.Profile) string {
	if p.GetWorkload() == "" && len(p.GetLabels()) == 0 {
		return ""
	}
	program := ""
	for _, c := range p.GetMatch().GetClauses() {
		if c.GetIn() == nil && c.GetPrefix() == "" {
			continue
		}
		switch c.GetKey() {
		case "os.user", "os.group", "proc.uid", "proc.unit", "container.id":
			return ""
		case "proc.exe", "proc.exe_sha256":
			program = cmp.Or(program, c.GetKey())
		}
	}
	return program
}

// givenLabels is every label that some Profile or External gives. Where it stands
// does not matter: a policy may speak of workloads of other namespaces.
type givenLabels struct {
	profiles, externals int
	values              map[string]map[string]bool
	// foreign are the claims that other trust domains may assert, with any value.
	foreign foreignClaims
}

func (s *Snapshot) givenLabels() *givenLabels {
	g := &givenLabels{values: make(map[string]map[string]bool), foreign: make(foreignClaims)}
	for _, r := range s.List(KindTrustDomain, "/") {
		g.foreign[r.GetName()] = newClaimSet(r.GetTrustDomain())
	}
	add := func(labels map[string]*symbolonv1.LabelValues) {
		for k, vs := range labels {
			if g.values[k] == nil {
				g.values[k] = make(map[string]bool)
			}
			for _, v := range vs.GetValues() {
				g.values[k][v] = true
			}
		}
	}
	for _, r := range s.List(KindProfile, "/") {
		g.profiles++
		add(r.GetProfile().GetLabels())
	}
	for _, r := range s.List(KindExternal, "/") {
		g.externals++
		add(r.GetExternal().GetLabels())
	}
	return g
}

// missing names a label that keeps every term of s from matching: the first term's,
// or "" if some term can match.
func (g *givenLabels) missing(s *symbolonv1.Selector) string {
	first := ""
	for _, t := range s.GetTerms() {
		m := g.missingTerm(t)
		if m == "" {
			return ""
		}
		if first == "" {
			first = m
		}
	}
	return first
}

func (g *givenLabels) missingTerm(t *symbolonv1.Term) string {
	for _, c := range t.GetClauses() {
		key := c.GetKey()
		if !isLabel(key) || g.foreign.any(key) {
			continue
		}
		ok := true
		want := key
		switch op := c.GetOperator().(type) {
		case *symbolonv1.Clause_In:
			ok = slices.ContainsFunc(op.In.GetValues(), func(v string) bool { return g.values[key][v] })
			want += "=" + strings.Join(op.In.GetValues(), "|")
		case *symbolonv1.Clause_Prefix:
			ok = false
			for v := range g.values[key] {
				ok = ok || strings.HasPrefix(v, op.Prefix)
			}
			want += "=" + op.Prefix + "…"
		case *symbolonv1.Clause_Not:
			ok = len(g.values[key]) > 0
		case *symbolonv1.Clause_Exists:
			ok = !op.Exists || len(g.values[key]) > 0
		}
		if !ok {
			return want
		}
	}
	return ""
}
