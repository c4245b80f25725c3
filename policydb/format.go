package policydb

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"time"
	"unicode"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// FormatYAML writes r as one document in canonical form: keys in the order of the
// schema, maps sorted, what is as by default left out. Parse reads it back as r, if
// r is canonical itself, as all that Parse returns is.
func FormatYAML(r *symbolonv1.Resource) []byte {
	f := &formatter{}
	f.line("kind", KindOf(r))
	if KindOf(r) == KindNamespace {
		f.line("name", quote(r.GetNamespace()))
	} else {
		f.line("namespace", quote(r.GetNamespace()))
		f.line("name", quote(r.GetName()))
	}
	switch k := r.GetKind().(type) {
	case *symbolonv1.Resource_NamespaceKind:
		f.namespace(k.NamespaceKind)
	case *symbolonv1.Resource_Profile:
		f.profile(k.Profile)
	case *symbolonv1.Resource_Policy:
		f.policy(k.Policy)
	case *symbolonv1.Resource_External:
		if len(k.External.GetLabels()) > 0 {
			f.line("labels", flowLabels(k.External.GetLabels()))
		}
		f.addresses(k.External.GetAddresses())
	case *symbolonv1.Resource_Service:
		f.addresses(k.Service.GetAddresses())
	case *symbolonv1.Resource_PolicyTest:
		f.policyTest(k.PolicyTest)
	case *symbolonv1.Resource_TrustDomain:
		f.trustDomain(k.TrustDomain)
	}
	return f.Bytes()
}

type formatter struct{ bytes.Buffer }

// line writes a key and a value that is YAML already.
func (f *formatter) line(key, value string) { fmt.Fprintf(f, "%s: %s\n", key, value) }

func (f *formatter) namespace(ns *symbolonv1.Namespace) {
	f.line("mode", nameOf(namespaceModes, ns.GetMode()))
	if ns.GetDefault() != symbolonv1.Default_DEFAULT_UNSPECIFIED {
		f.line("default", nameOf(defaults, ns.GetDefault()))
	}
	if ns.GetProtection() != symbolonv1.Protection_PROTECTION_UNSPECIFIED {
		f.line("protection", nameOf(protections, ns.GetProtection()))
	}
	if len(ns.GetAttributes()) == 0 {
		return
	}
	f.WriteString("attributes:\n")
	for _, key := range sortedKeys(ns.GetAttributes()) {
		rule := "{}"
		if vs := ns.GetAttributes()[key].GetValues(); len(vs) > 0 {
			rule = "{values: " + flowList(vs) + "}"
		}
		f.line("  "+quote(key), rule)
	}
}

func (f *formatter) profile(p *symbolonv1.Profile) {
	f.line("match", flowTerm(p.GetMatch()))
	if p.GetWorkload() != "" {
		f.line("workload", quote(p.GetWorkload()))
	}
	if len(p.GetLabels()) > 0 {
		f.line("labels", flowLabels(p.GetLabels()))
	}
	if len(p.GetClaims()) > 0 {
		f.line("claims", flowList(p.GetClaims()))
	}
}

func (f *formatter) policy(p *symbolonv1.Policy) {
	f.selector("subject", p.GetSubject())
	f.line("verb", nameOf(verbs, p.GetVerb()))
	f.selector("object", p.GetObject())
	if len(p.GetWhereSame())+len(p.GetWhereDifferent()) > 0 {
		var parts []string
		if len(p.GetWhereSame()) > 0 {
			parts = append(parts, "same: "+flowList(p.GetWhereSame()))
		}
		if len(p.GetWhereDifferent()) > 0 {
			parts = append(parts, "different: "+flowList(p.GetWhereDifferent()))
		}
		f.line("where", "{"+strings.Join(parts, ", ")+"}")
	}
	if len(p.GetPorts()) > 0 {
		f.line("ports", flowPorts(p.GetPorts()))
	}
	if p.GetWithEncrypt() || p.GetWithLog() {
		var parts []string
		if p.GetWithEncrypt() {
			parts = append(parts, "encrypt")
		}
		if p.GetWithLog() {
			parts = append(parts, "log")
		}
		f.line("with", "["+strings.Join(parts, ", ")+"]")
	}
	if w := p.GetWhen(); w != nil {
		var parts []string
		if w.GetDays() != 0 {
			parts = append(parts, "days: "+quote(formatDays(w.GetDays())))
		}
		if w.GetStartMinute() != 0 || w.GetEndMinute() != 0 {
			parts = append(parts, "hours: "+quote(formatHours(w)))
		}
		parts = append(parts, "timezone: "+quote(w.GetTimezone()))
		f.line("when", "{"+strings.Join(parts, ", ")+"}")
	}
	if e := p.GetExpires(); e != nil {
		f.line("expires", e.AsTime().Format(time.RFC3339Nano))
	}
	if p.GetMode() == symbolonv1.Mode_MODE_OBSERVE {
		f.line("mode", "observe")
	}
	if p.GetFallback() {
		f.line("fallback", "true")
	}
	if p.GetPropagate() {
		f.line("propagate", "true")
	}
}

// selector writes one term on the key's line, several as a list.
func (f *formatter) selector(key string, s *symbolonv1.Selector) {
	switch {
	case s.GetAny():
		f.line(key, "any")
	case len(s.GetTerms()) == 1:
		f.line(key, flowTerm(s.GetTerms()[0]))
	default:
		f.WriteString(key + ":\n")
		for _, t := range s.GetTerms() {
			f.WriteString("- " + flowTerm(t) + "\n")
		}
	}
}

func (f *formatter) addresses(a *symbolonv1.Addresses) {
	var parts []string
	if len(a.GetCidrs()) > 0 {
		parts = append(parts, "cidrs: "+flowList(a.GetCidrs()))
	}
	if len(a.GetFqdns()) > 0 {
		parts = append(parts, "fqdns: "+flowList(a.GetFqdns()))
	}
	if len(a.GetPorts()) > 0 {
		parts = append(parts, "ports: "+flowPorts(a.GetPorts()))
	}
	if a.GetPrivate() {
		parts = append(parts, "private: true")
	}
	f.line("addresses", "{"+strings.Join(parts, ", ")+"}")
}

func (f *formatter) policyTest(t *symbolonv1.PolicyTest) {
	f.WriteString("tests:\n")
	for _, x := range t.GetTests() {
		port := "any"
		if x.GetPort() != nil {
			port = formatPorts(x.GetPort())
		}
		fmt.Fprintf(f, "- {name: %s, from: %s, to: %s, port: %s, expect: %s",
			quote(x.GetName()), testEnd(x.GetFrom(), x.GetFromExternal()), testEnd(x.GetTo(), x.GetToExternal()), port, nameOf(outcomes, x.GetExpectAllow()))
		if x.GetBy() != "" {
			f.WriteString(", by: " + quote(x.GetBy()))
		}
		if x.Encrypted != nil {
			fmt.Fprintf(f, ", encrypted: %t", x.GetEncrypted())
		}
		if x.GetReason() != symbolonv1.Reason_REASON_UNSPECIFIED {
			f.WriteString(", reason: " + nameOf(testedReasons, x.GetReason()))
		}
		f.WriteString("}\n")
	}
}

func testEnd(labels map[string]*symbolonv1.LabelValues, external string) string {
	if external != "" {
		return quote(external)
	}
	return flowLabels(labels)
}

func flowTerm(t *symbolonv1.Term) string {
	var parts []string
	for _, c := range t.GetClauses() {
		parts = append(parts, quote(c.GetKey())+": "+flowOperator(c))
	}
	return "{" + strings.Join(parts, ", ") + "}"
}

func flowOperator(c *symbolonv1.Clause) string {
	switch op := c.GetOperator().(type) {
	case *symbolonv1.Clause_In:
		return flowValues(op.In.GetValues())
	case *symbolonv1.Clause_Not:
		return "{not: " + flowList(op.Not.GetValues()) + "}"
	case *symbolonv1.Clause_Prefix:
		return "{prefix: " + quote(op.Prefix) + "}"
	case *symbolonv1.Clause_Exists:
		return fmt.Sprintf("{exists: %t}", op.Exists)
	}
	return "{}"
}

func flowLabels(m map[string]*symbolonv1.LabelValues) string {
	var parts []string
	for _, k := range sortedKeys(m) {
		parts = append(parts, quote(k)+": "+flowValues(m[k].GetValues()))
	}
	return "{" + strings.Join(parts, ", ") + "}"
}

// flowValues writes a lone value without brackets.
func flowValues(vs []string) string {
	if len(vs) == 1 {
		return quote(vs[0])
	}
	return flowList(vs)
}

func flowList(vs []string) string {
	out := make([]string, len(vs))
	for i, v := range vs {
		out[i] = quote(v)
	}
	return "[" + strings.Join(out, ", ") + "]"
}

func flowPorts(rs []*symbolonv1.PortRange) string { return "[" + formatPortList(rs) + "]" }

func nameOf[T comparable](set map[string]T, v T) string {
	for _, name := range sortedKeys(set) {
		if set[name] == v {
			return name
		}
	}
	return ""
}

var (
	// plain strings mean themselves to every reader of YAML: they start with a
	// letter or a slash, and hold nothing that YAML gives a meaning to.
	plain = regexp.MustCompile(`^[A-Za-z/][A-Za-z0-9_./@+-]*$`)
	// dotted numbers of four parts are no numbers.
	dotted = regexp.MustCompile(`^[0-9]{1,3}(\.[0-9]{1,3}){3}(/[0-9]{1,2})?$`)
	// words are the letters that some version of YAML takes for something else.
	words = regexp.MustCompile(`^(?i:y|n|yes|no|on|off|true|false|null)$`)
)

// quote writes s so that it is read as the string s.
func quote(s string) string {
	if plain.MatchString(s) && !words.MatchString(s) || dotted.MatchString(s) {
		return s
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(s); err != nil {
		return fmt.Sprintf("%q", s)
	}
	// JSON's escapes are YAML's (YAML 1.2.2 section 5.7). What is not printable is
	// escaped on top, so that no text steers a terminal.
	out := strings.TrimSuffix(b.String(), "\n")
	if !strings.ContainsFunc(out, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return out
	}
	var x strings.Builder
	for _, r := range out {
		switch {
		case unicode.IsPrint(r):
			x.WriteRune(r)
		case r > 0xffff:
			fmt.Fprintf(&x, `\U%08X`, r)
		default:
			fmt.Fprintf(&x, `\u%04X`, r)
		}
	}
	return x.String()
}
