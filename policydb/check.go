package policydb

import (
	"fmt"
	"net/netip"
	"strings"

	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// problem is a mistake in a resource and where in it: YAML keys (string), places in
// a list (int).
type problem struct {
	path []any
	mistake
}

// checker collects what is wrong with one resource.
type checker struct {
	problems []problem
	zones    zones
}

func (c *checker) add(m *mistake, path ...any) bool {
	if m == nil {
		return false
	}
	c.problems = append(c.problems, problem{path, *m})
	return true
}

func (c *checker) failf(path []any, hint, format string, args ...any) {
	c.problems = append(c.problems, problem{path, mistake{fmt.Sprintf(format, args...), hint}})
}

// checkResource checks what can be seen in one resource alone. It holds for those
// that came by the wire as for those from YAML: nothing is taken on trust.
func checkResource(r *symbolonv1.Resource, z zones) []problem {
	c := &checker{zones: z}
	kind := KindOf(r)
	if kind == "" || hasUnknown(r) {
		c.failf(nil, "a newer version may have written it", "%s", ErrUnreadable)
		return c.problems
	}
	if kind == KindNamespace {
		c.add(checkNamespacePath(r.GetNamespace()), "name")
		if r.GetName() != "" {
			c.failf([]any{"name"}, "", "a Namespace has a path and no name beside it")
		}
	} else {
		c.add(checkNamespacePath(r.GetNamespace()), "namespace")
		c.add(checkName(r.GetName()), "name")
	}
	switch k := r.GetKind().(type) {
	case *symbolonv1.Resource_NamespaceKind:
		c.namespace(r.GetNamespace(), k.NamespaceKind)
	case *symbolonv1.Resource_Profile:
		c.profile(k.Profile)
	case *symbolonv1.Resource_Policy:
		c.policy(k.Policy)
	case *symbolonv1.Resource_External:
		c.labels("labels", k.External.GetLabels())
		c.addresses(k.External.GetAddresses())
	case *symbolonv1.Resource_Service:
		c.addresses(k.Service.GetAddresses())
	case *symbolonv1.Resource_PolicyTest:
		c.policyTest(k.PolicyTest)
	}
	return c.problems
}

// hasUnknown tells whether a message holds fields of a newer schema, at any depth
// where one could change what a policy means.
func hasUnknown(r *symbolonv1.Resource) bool {
	unknown := func(m proto.Message) bool { return len(m.ProtoReflect().GetUnknown()) > 0 }
	term := func(t *symbolonv1.Term) bool {
		if unknown(t) {
			return true
		}
		for _, c := range t.GetClauses() {
			if unknown(c) {
				return true
			}
		}
		return false
	}
	selector := func(s *symbolonv1.Selector) bool {
		if unknown(s) {
			return true
		}
		for _, t := range s.GetTerms() {
			if term(t) {
				return true
			}
		}
		return false
	}
	ports := func(rs []*symbolonv1.PortRange) bool {
		for _, p := range rs {
			if unknown(p) {
				return true
			}
		}
		return false
	}
	if unknown(r) {
		return true
	}
	switch k := r.GetKind().(type) {
	case *symbolonv1.Resource_NamespaceKind:
		return unknown(k.NamespaceKind)
	case *symbolonv1.Resource_Profile:
		return unknown(k.Profile) || term(k.Profile.GetMatch())
	case *symbolonv1.Resource_Policy:
		p := k.Policy
		return unknown(p) || selector(p.GetSubject()) || selector(p.GetObject()) || unknown(p.GetWhen()) || ports(p.GetPorts())
	case *symbolonv1.Resource_External:
		return unknown(k.External) || unknown(k.External.GetAddresses()) || ports(k.External.GetAddresses().GetPorts())
	case *symbolonv1.Resource_Service:
		return unknown(k.Service) || unknown(k.Service.GetAddresses()) || ports(k.Service.GetAddresses().GetPorts())
	}
	return false
}

func (c *checker) namespace(path string, ns *symbolonv1.Namespace) {
	switch ns.GetMode() {
	case symbolonv1.Mode_MODE_ENFORCE, symbolonv1.Mode_MODE_LEARN:
	default:
		c.failf([]any{"mode"}, `add "mode: enforce": there is no default`, "the Namespace has no mode")
	}
	switch ns.GetDefault() {
	case symbolonv1.Default_DEFAULT_DENY, symbolonv1.Default_DEFAULT_ALLOW:
	case symbolonv1.Default_DEFAULT_INHERIT:
		if path == "/" {
			c.failf([]any{"default"}, `write "default: deny"`, "the root has nothing to inherit its default from")
		}
	default:
		if path == "/" {
			c.failf([]any{"default"}, `write "default: deny"`, "the root Namespace has no default")
		} else {
			c.failf([]any{"default"}, "", "the Namespace has no default")
		}
	}
	for _, key := range sortedKeys(ns.GetAttributes()) {
		if !isLabel(key) {
			c.failf([]any{"attributes", key}, "leave it out: what has a source needs no leave", "%s is not a label: it has a dot", printable(key))
			continue
		}
		if key == "" || c.add(checkLabelKey(key), "attributes", key) {
			if key == "" {
				c.failf([]any{"attributes", key}, "", "the label is empty")
			}
			continue
		}
		for _, v := range ns.GetAttributes()[key].GetValues() {
			c.add(checkValue(v), "attributes", key, "values")
		}
	}
}

func (c *checker) profile(p *symbolonv1.Profile) {
	if len(p.GetMatch().GetClauses()) == 0 {
		c.failf([]any{"match"}, "", "match is empty: the profile would fit every workload")
	}
	c.term([]any{"match"}, p.GetMatch())
	for _, cl := range p.GetMatch().GetClauses() {
		switch key := cl.GetKey(); {
		case key != "" && isLabel(key):
			c.failf([]any{"match", key}, "match looks at what has a source: host.*, cloud.*, os.*, proc.*, container.*, k8s.*, image.*",
				"label %s cannot be matched: profiles give labels", printable(key))
		case strings.HasPrefix(key, "spiffe."):
			c.failf([]any{"match", key}, "", "%s cannot be matched: it comes from the certificate that this profile is for", printable(key))
		}
	}
	if p.GetWorkload() == "" && len(p.GetLabels()) == 0 && len(p.GetClaims()) == 0 {
		c.failf(nil, "give it a workload, labels or claims", "the profile gives nothing")
	}
	if p.GetWorkload() != "" {
		c.add(checkWorkloadName(p.GetWorkload()), "workload")
	}
	c.labels("labels", p.GetLabels())
	for _, claim := range p.GetClaims() {
		c.claim(claim)
	}
}

// claim is a dotted key, or "prefix.*".
func (c *checker) claim(claim string) {
	key := claim
	if prefix, ok := strings.CutSuffix(claim, ".*"); ok {
		key = prefix + ".x"
	}
	path := []any{"claims"}
	switch {
	case isLabel(key):
		c.failf(path, "leave it out: labels are always claims", "claim %s has no source", printable(claim))
	case strings.HasPrefix(key, "spiffe."):
		c.failf(path, "leave it out: it is read from the certificate itself", "claim %s cannot be asserted", printable(claim))
	default:
		c.add(checkAttributeKey(key), path...)
	}
}

func (c *checker) policy(p *symbolonv1.Policy) {
	c.selector("subject", p.GetSubject())
	c.selector("object", p.GetObject())
	switch p.GetVerb() {
	case symbolonv1.Verb_VERB_ALLOW:
	case symbolonv1.Verb_VERB_DENY, symbolonv1.Verb_VERB_ENCRYPT, symbolonv1.Verb_VERB_LOG:
		if p.GetWithEncrypt() || p.GetWithLog() {
			c.failf([]any{"with"}, "obligations are what an allow carries; to oblige without allowing write verb: encrypt or verb: log",
				"with needs verb: allow")
		}
	default:
		c.failf([]any{"verb"}, "", "the Policy has no verb")
	}
	if p.GetFallback() && (p.GetVerb() == symbolonv1.Verb_VERB_ENCRYPT || p.GetVerb() == symbolonv1.Verb_VERB_LOG) {
		c.failf([]any{"fallback"}, "leave it out", "only allow and deny can be a fallback: obligations always hold")
	}
	switch p.GetMode() {
	case symbolonv1.Mode_MODE_UNSPECIFIED, symbolonv1.Mode_MODE_ENFORCE, symbolonv1.Mode_MODE_OBSERVE:
	default:
		c.failf([]any{"mode"}, "write enforce or observe", "a Policy cannot have this mode")
	}
	for _, w := range []struct {
		name string
		keys []string
	}{{"same", p.GetWhereSame()}, {"different", p.GetWhereDifferent()}} {
		for _, key := range w.keys {
			c.add(checkAttributeKey(key), "where", w.name)
		}
	}
	c.ports([]any{"ports"}, p.GetPorts())
	if w := p.GetWhen(); w != nil {
		c.window(w)
	}
	if e := p.GetExpires(); e != nil && !e.IsValid() {
		c.failf([]any{"expires"}, "", "expires is not a time")
	}
}

func (c *checker) window(w *symbolonv1.Window) {
	if err := checkWindow(w); err != nil {
		c.failf([]any{"when"}, "", "%s", err)
	} else if w.GetDays() == 0 && w.GetStartMinute() == 0 && w.GetEndMinute() == 0 {
		c.failf([]any{"when"}, "add days or hours, or leave when out", "when is always")
	}
	if _, err := c.zones.load(w.GetTimezone()); err != nil {
		c.failf([]any{"when", "timezone"}, "write a name of the IANA list, such as Europe/Oslo, or UTC", "%s", err)
	}
}

func (c *checker) selector(name string, s *symbolonv1.Selector) {
	switch {
	case s == nil || !s.GetAny() && len(s.GetTerms()) == 0:
		c.failf([]any{name}, "for everybody write the word any", "%s is empty", name)
	case s.GetAny() && len(s.GetTerms()) > 0:
		c.failf([]any{name}, "", "%s is any and a selector at once", name)
	}
	for i, t := range s.GetTerms() {
		if len(t.GetClauses()) == 0 {
			c.failf([]any{name, i}, "for everybody write the word any", "an alternative of %s is empty", name)
		}
		c.term([]any{name, i}, t)
	}
}

func (c *checker) term(path []any, t *symbolonv1.Term) {
	seen := make(map[string]bool, len(t.GetClauses()))
	for _, cl := range t.GetClauses() {
		at := append(append([]any(nil), path...), cl.GetKey())
		if seen[cl.GetKey()] {
			c.failf(at, "", "two conditions on %s", printable(cl.GetKey()))
		}
		seen[cl.GetKey()] = true
		c.add(checkAttributeKey(cl.GetKey()), at...)
		var values []string
		switch op := cl.GetOperator().(type) {
		case *symbolonv1.Clause_In:
			values = op.In.GetValues()
		case *symbolonv1.Clause_Not:
			values = op.Not.GetValues()
		case *symbolonv1.Clause_Prefix:
			if op.Prefix == "" {
				c.failf(at, "write {exists: true}", "the prefix is empty")
			}
			values = []string{op.Prefix}
		case *symbolonv1.Clause_Exists:
			continue
		default:
			c.failf(at, "a newer version may have written it", "%s: the condition has no operator", ErrUnreadable)
			continue
		}
		if len(values) == 0 {
			c.failf(at, "", "the condition has no values")
		}
		for _, v := range values {
			c.add(checkValue(v), at...)
		}
	}
}

func (c *checker) labels(name string, labels map[string]*symbolonv1.LabelValues) {
	for _, key := range sortedKeys(labels) {
		at := []any{name, key}
		switch {
		case !isLabel(key):
			c.failf(at, "labels have no dot", "%s cannot be given: what has a source comes from there only", printable(key))
		case key == "":
			c.failf(at, "", "the label is empty")
		default:
			c.add(checkLabelKey(key), at...)
		}
		if len(labels[key].GetValues()) == 0 {
			c.failf(at, "", "label %s has no value", printable(key))
		}
		for _, v := range labels[key].GetValues() {
			c.add(checkValue(v), at...)
		}
	}
}

func (c *checker) ports(path []any, rs []*symbolonv1.PortRange) {
	for _, r := range rs {
		if err := checkPorts(r); err != nil {
			c.failf(path, "", "%s", err)
		}
	}
}

func (c *checker) addresses(a *symbolonv1.Addresses) {
	if len(a.GetCidrs()) == 0 && len(a.GetFqdns()) == 0 {
		c.failf([]any{"addresses"}, "write {cidrs: [203.0.113.0/24]}", "there are no addresses")
	}
	for _, s := range a.GetCidrs() {
		_, m := parsePrefix(s)
		c.add(m, "addresses", "cidrs", s)
	}
	for _, s := range a.GetFqdns() {
		c.add(checkFQDN(s), "addresses", "fqdns", s)
	}
	c.ports([]any{"addresses", "ports"}, a.GetPorts())
}

// parsePrefix takes networks only: with a length, and no bits beyond it.
func parsePrefix(s string) (netip.Prefix, *mistake) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
			return p, wrong(fmt.Sprintf("write %s/%d", s, a.BitLen()), "%s has no prefix length", printable(s))
		}
		return p, wrong("write 203.0.113.0/24 or 2001:db8::/32", "%s is not a network", printable(s))
	}
	if p.Addr().Is4In6() {
		return p, wrong("write it as IPv4", "%s is an IPv4 network in IPv6 clothes", printable(s))
	}
	if p != p.Masked() {
		return p, wrong("did you mean "+p.Masked().String()+"?", "%s has bits set beyond its prefix length", printable(s))
	}
	return p, nil
}

// checkFQDN: a DNS name (RFC 1123), or "*." and one.
func checkFQDN(s string) *mistake {
	name := strings.TrimPrefix(s, "*.")
	if len(name) == 0 || len(name) > 253 {
		return wrong("", "%s is not a DNS name", printable(s))
	}
	for _, label := range strings.Split(name, ".") {
		ok := len(label) > 0 && len(label) <= 63 && label[0] != '-' && label[len(label)-1] != '-'
		for i := 0; i < len(label); i++ {
			b := label[i]
			ok = ok && (b >= 'a' && b <= 'z' || b >= '0' && b <= '9' || b == '-')
		}
		if !ok {
			return wrong("lower case, without a dot at the end; *. may stand in front", "%s is not a DNS name", printable(s))
		}
	}
	return nil
}

func (c *checker) policyTest(t *symbolonv1.PolicyTest) {
	if len(t.GetTests()) == 0 {
		c.failf([]any{"tests"}, "", "there are no tests")
	}
	for i, x := range t.GetTests() {
		if x.GetName() == "" {
			c.failf([]any{"tests", i, "name"}, "", "the test has no name")
		}
		for _, side := range []struct {
			name   string
			labels map[string]*symbolonv1.LabelValues
		}{{"from", x.GetFrom()}, {"to", x.GetTo()}} {
			if len(side.labels) == 0 {
				c.failf([]any{"tests", i, side.name}, "", "%s is empty", side.name)
			}
			for _, key := range sortedKeys(side.labels) {
				at := []any{"tests", i, side.name, key}
				c.add(checkAttributeKey(key), at...)
				for _, v := range side.labels[key].GetValues() {
					c.add(checkValue(v), at...)
				}
			}
		}
		if x.GetPort() != nil {
			c.ports([]any{"tests", i, "port"}, []*symbolonv1.PortRange{x.GetPort()})
		}
		if x.Encrypted != nil && !x.GetExpectAllow() {
			c.failf([]any{"tests", i, "encrypted"}, "leave it out", "what is denied is neither encrypted nor not")
		}
	}
}
