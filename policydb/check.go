package policydb

import (
	"cmp"
	"fmt"
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
		c.add(checkNamespacePath(r.GetNamespace()), "name", theValue{})
		if r.GetName() != "" {
			c.failf([]any{"name"}, "", "a Namespace has a path and no name beside it")
		}
	} else {
		c.add(checkNamespacePath(r.GetNamespace()), "namespace", theValue{})
		c.add(checkName(r.GetName()), "name", theValue{})
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
		c.addresses(k.External.GetAddresses(), false)
	case *symbolonv1.Resource_Service:
		c.addresses(k.Service.GetAddresses(), true)
	case *symbolonv1.Resource_PolicyTest:
		c.policyTest(k.PolicyTest)
	case *symbolonv1.Resource_TrustDomain:
		c.trustDomain(r)
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
	case *symbolonv1.Resource_TrustDomain:
		return unknown(k.TrustDomain)
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
			c.failf([]any{"default", theValue{}}, `write "default: deny"`, "the root has nothing to inherit its default from")
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
		case strings.HasPrefix(key, "spiffe.") && key != "spiffe.id" && key != "spiffe.trust_domain":
			c.failf([]any{"match", key}, didYouMean(key, []string{"spiffe.id", "spiffe.trust_domain"}), "%s is not an attribute", printable(key))
		}
	}
	c.profileByID(p)
	if p.GetWorkload() == "" && len(p.GetLabels()) == 0 && len(p.GetClaims()) == 0 {
		c.failf(nil, "give it a workload, labels or claims", "the profile gives nothing")
	}
	if p.GetWorkload() != "" {
		c.add(checkWorkloadName(p.GetWorkload()), "workload", theValue{})
	}
	c.labels("labels", p.GetLabels())
	for _, claim := range p.GetClaims() {
		c.claim(claim)
	}
}

// profileByID checks what holds of profiles that look at SPIFFE IDs alone.
func (c *checker) profileByID(p *symbolonv1.Profile) {
	for _, cl := range p.GetMatch().GetClauses() {
		if !strings.HasPrefix(cl.GetKey(), "spiffe.") {
			return
		}
	}
	switch {
	case len(p.GetMatch().GetClauses()) == 0:
	case !ByID(p):
		c.failf([]any{"match"}, "name an ID, a prefix of IDs or a trust domain", "match says only which SPIFFE IDs it is not for: any stranger would fit")
	case p.GetWorkload() != "":
		c.failf([]any{"workload"}, "leave it out", "a workload that is matched by its SPIFFE ID has its name already")
	}
}

// claim is a dotted key, or "prefix.*".
func (c *checker) claim(claim string) {
	key := claim
	if prefix, ok := strings.CutSuffix(claim, ".*"); ok {
		key = prefix + ".x"
	}
	path := []any{"claims", claim}
	switch {
	case isLabel(key):
		c.failf(path, "leave it out: labels are always claims", "claim %s has no source", printable(claim))
	case strings.HasPrefix(key, "spiffe."):
		c.failf(path, "leave it out: it is read from the certificate itself", "claim %s cannot be asserted", printable(claim))
	default:
		c.add(checkAttributeKey(key), path...)
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

func (c *checker) policyTest(t *symbolonv1.PolicyTest) {
	if len(t.GetTests()) == 0 {
		c.failf([]any{"tests"}, "", "there are no tests")
	}
	for i, x := range t.GetTests() {
		if x.GetName() == "" {
			c.failf([]any{"tests", i, "name"}, "", "the test has no name")
		}
		for _, side := range []struct {
			name, external string
			labels         map[string]*symbolonv1.LabelValues
		}{{"from", x.GetFromExternal(), x.GetFrom()}, {"to", x.GetToExternal(), x.GetTo()}} {
			switch {
			case side.external != "" && len(side.labels) > 0:
				c.failf([]any{"tests", i, side.name}, "", "%s is an External and attributes at once", side.name)
			case side.external == "" && len(side.labels) == 0:
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
		if x.GetFromExternal() != "" && x.GetToExternal() != "" {
			c.failf([]any{"tests", i, "to"}, "give one of them attributes", "both ends are Externals: neither has a side that judges")
		}
		if external := cmp.Or(x.GetFromExternal(), x.GetToExternal()); external != "" && x.GetEncrypted() {
			c.failf([]any{"tests", i, "encrypted"}, "expect deny, with reason: encryption-unavailable, if that is meant", "nothing can be encrypted to or from an External")
		}
		switch r := x.GetReason(); {
		case r != symbolonv1.Reason_REASON_UNSPECIFIED && nameOf(testedReasons, r) == "":
			c.failf([]any{"tests", i, "reason"}, "", "a test cannot ask for reason %s", r)
		case r == symbolonv1.Reason_REASON_ENCRYPTION_UNAVAILABLE && x.GetExpectAllow():
			c.failf([]any{"tests", i, "reason"}, "write expect: deny", "what cannot be encrypted is denied")
		case r == symbolonv1.Reason_REASON_DEFAULT && x.GetBy() != "":
			c.failf([]any{"tests", i, "reason"}, "leave one of them out", "a default is decided by no policy")
		}
	}
}
