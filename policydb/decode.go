package policydb

import (
	"maps"
	"slices"
	"time"

	"github.com/goccy/go-yaml/ast"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// The words of the schema.
var (
	namespaceModes = map[string]symbolonv1.Mode{"enforce": symbolonv1.Mode_MODE_ENFORCE, "learn": symbolonv1.Mode_MODE_LEARN}
	policyModes    = map[string]symbolonv1.Mode{"enforce": symbolonv1.Mode_MODE_ENFORCE, "observe": symbolonv1.Mode_MODE_OBSERVE}
	defaults       = map[string]symbolonv1.Default{
		"deny": symbolonv1.Default_DEFAULT_DENY, "allow": symbolonv1.Default_DEFAULT_ALLOW, "inherit": symbolonv1.Default_DEFAULT_INHERIT,
	}
	protections = map[string]symbolonv1.Protection{
		"encrypted":     symbolonv1.Protection_PROTECTION_ENCRYPTED,
		"authenticated": symbolonv1.Protection_PROTECTION_AUTHENTICATED,
		"inherit":       symbolonv1.Protection_PROTECTION_UNSPECIFIED,
	}
	verbs = map[string]symbolonv1.Verb{
		"allow": symbolonv1.Verb_VERB_ALLOW, "deny": symbolonv1.Verb_VERB_DENY,
		"encrypt": symbolonv1.Verb_VERB_ENCRYPT, "log": symbolonv1.Verb_VERB_LOG,
	}
	outcomes = map[string]bool{"allow": true, "deny": false}
	// testedReasons are those that a PolicyTest can ask for.
	testedReasons = map[string]symbolonv1.Reason{
		"policy": symbolonv1.Reason_REASON_POLICY, "fallback": symbolonv1.Reason_REASON_FALLBACK,
		"default": symbolonv1.Reason_REASON_DEFAULT, "encryption-unavailable": symbolonv1.Reason_REASON_ENCRYPTION_UNAVAILABLE,
	}
)

// schema says which keys a kind has besides kind, namespace and name, and how to
// read them into r.
type schema struct {
	keys     []string
	required []string
	// hints are for keys that people write from habit.
	hints  map[string]string
	decode func(d *decoder, r *symbolonv1.Resource, e map[string]entry)
}

var schemas = map[string]schema{
	KindNamespace: {
		keys:     []string{"mode", "default", "protection", "attributes"},
		required: []string{"mode"},
		hints:    map[string]string{"labels": `the labels that may be used are under "attributes"`},
		decode:   (*decoder).namespace,
	},
	KindProfile: {
		keys:     []string{"match", "workload", "labels", "claims"},
		required: []string{"match"},
		decode:   (*decoder).profile,
	},
	KindPolicy: {
		keys: []string{"subject", "verb", "object", "where", "ports", "with", "when", "expires", "mode", "fallback", "propagate"},
		hints: map[string]string{
			"encrypt":  `write "with: [encrypt]", or "verb: encrypt" to oblige without allowing`,
			"log":      `write "with: [log]", or "verb: log" to oblige without allowing`,
			"action":   `the word is "verb"`,
			"from":     `the word is "subject"`,
			"to":       `the word is "object"`,
			"port":     `the word is "ports", and its value a list`,
			"priority": "there are no priorities: a parent namespace overrules, and deny beats allow",
		},
		required: []string{"subject", "verb", "object"},
		decode:   (*decoder).policy,
	},
	KindExternal: {
		keys:     []string{"labels", "addresses"},
		required: []string{"addresses"},
		hints:    addressHints,
		decode:   (*decoder).external,
	},
	KindService: {
		keys:     []string{"addresses"},
		required: []string{"addresses"},
		hints:    addressHints,
		decode:   (*decoder).service,
	},
	KindPolicyTest: {
		keys:     []string{"tests"},
		required: []string{"tests"},
		decode:   (*decoder).policyTest,
	},
	KindTrustDomain: {
		keys: []string{"endpoint", "profile", "endpoint_id", "bundle", "claims"},
		hints: map[string]string{
			"url":          `the word is "endpoint"`,
			"trust_domain": `the trust domain is the "name"`,
			"labels":       `the keys that it may assert are under "claims"`,
		},
		decode: (*decoder).trustDomain,
	},
}

var addressHints = map[string]string{
	"cidrs": `it belongs under "addresses"`,
	"fqdns": `it belongs under "addresses"`,
	"ports": `it belongs under "addresses"`,
}

// resource reads a document's body.
func (d *decoder) resource(body ast.Node) *symbolonv1.Resource {
	all, ok := entries(body)
	if !ok {
		d.report(start(body), `start with "kind: Policy" or another kind`, "a document is a map, not %s", describe(body))
		return nil
	}
	i := slices.IndexFunc(all, func(e entry) bool { return e.key == "kind" })
	if i < 0 {
		d.report(start(body), oneOf(kinds), "the document has no kind")
		return nil
	}
	kind, ok := d.str(orNull(all[i].value, all[i]), "kind")
	if !ok {
		return nil
	}
	sc, ok := schemas[kind]
	if !ok {
		d.report(start(all[i].value), didYouMean(kind, kinds), "unknown kind %s", printable(kind))
		return nil
	}
	common := []string{"kind", "name"}
	required := append([]string{"name"}, sc.required...)
	hints := sc.hints
	if kind == KindNamespace {
		hints = maps.Clone(hints)
		hints["namespace"] = `a Namespace has its whole path in "name": /acme/prod`
	} else {
		common = append(common, "namespace")
		required = append([]string{"namespace"}, required...)
	}
	keys := append(common, sc.keys...)
	e := d.known(all, "key", kind, keys, hints)
	for _, key := range required {
		// A key that was misspelt is one mistake, not two.
		given := func(x entry) bool {
			return x.key == key || !slices.Contains(keys, x.key) && nearest(x.key, keys) == key
		}
		if !slices.ContainsFunc(all, given) {
			d.report(all[i].token, missingHint(kind, key), "the %s has no %s", kind, key)
		}
	}
	r := &symbolonv1.Resource{}
	if x, ok := e["name"]; ok {
		r.Name, _ = d.str(x.value, "name")
	}
	if x, ok := e["namespace"]; ok {
		r.Namespace, _ = d.str(x.value, "namespace")
	}
	sc.decode(d, r, e)
	return r
}

// orNull lets str report a missing value at the key that lacks it.
func orNull(n ast.Node, e entry) ast.Node {
	if n == nil {
		return ast.Null(e.token)
	}
	return n
}

func missingHint(kind, key string) string {
	switch {
	case key == "namespace" && kind == KindTrustDomain:
		return `add "namespace: /": a TrustDomain stands in the root`
	case key == "namespace":
		return `add "namespace:" with a path such as /acme/prod`
	case kind == KindNamespace && key == "mode":
		return `add "mode: enforce": there is no default`
	case key == "subject" || key == "object":
		return `add "` + key + `:" with a selector such as {app: web}, or the word any`
	case key == "verb":
		return oneOf(slices.Collect(maps.Keys(verbs)))
	}
	return ""
}

func (d *decoder) namespace(r *symbolonv1.Resource, e map[string]entry) {
	r.Namespace, r.Name = r.Name, ""
	ns := &symbolonv1.Namespace{}
	r.Kind = &symbolonv1.Resource_NamespaceKind{NamespaceKind: ns}
	if x, ok := e["mode"]; ok {
		ns.Mode = word(d, x, namespaceModes)
	}
	if x, ok := e["default"]; ok {
		ns.Default = word(d, x, defaults)
	} else if r.Namespace != "/" {
		ns.Default = symbolonv1.Default_DEFAULT_INHERIT
	}
	if x, ok := e["protection"]; ok {
		ns.Protection = word(d, x, protections)
	}
	if x, ok := e["attributes"]; ok {
		all, isMap := entries(x.value)
		if !isMap {
			d.report(start(x.value), "write {app: {}, env: {values: [dev, prod]}}", "attributes is %s, want a map", describe(x.value))
		}
		ns.Attributes = make(map[string]*symbolonv1.AttributeRule, len(all))
		for _, a := range all {
			ns.Attributes[a.key] = d.attributeRule(a)
		}
		if len(ns.Attributes) == 0 {
			ns.Attributes = nil
		}
	}
}

func (d *decoder) attributeRule(a entry) *symbolonv1.AttributeRule {
	rule := &symbolonv1.AttributeRule{}
	all, ok := entries(orNull(a.value, a))
	if !ok {
		d.report(a.token, "write {} for any value, or {values: [a, b]}", "the rule of attribute %s is %s, want a map", a.key, describe(a.value))
		return rule
	}
	if x, ok := d.known(all, "key", "an attribute's rule", []string{"values"}, nil)["values"]; ok {
		rule.Values = canonical(d.stringList(x, "value"))
	}
	return rule
}

// stringList reads a list that must be written as one.
func (d *decoder) stringList(e entry, what string) []string {
	var out []string
	for _, n := range d.list(e, false) {
		if s, ok := d.str(n, what); ok {
			out = append(out, s)
		}
	}
	return out
}

// canonical sorts and removes repetitions; nil stays nil.
func canonical(s []string) []string {
	slices.Sort(s)
	return slices.Compact(s)
}

func (d *decoder) profile(r *symbolonv1.Resource, e map[string]entry) {
	p := &symbolonv1.Profile{}
	r.Kind = &symbolonv1.Resource_Profile{Profile: p}
	if x, ok := e["match"]; ok {
		p.Match = d.term(x.value, "match")
	}
	if x, ok := e["workload"]; ok {
		p.Workload, _ = d.str(x.value, "workload")
		if p.Workload == "" {
			d.report(start(x.value), "leave it out for a profile that gives labels only", "workload is empty")
		}
	}
	if x, ok := e["labels"]; ok {
		p.Labels = d.labels(x)
	}
	if x, ok := e["claims"]; ok {
		p.Claims = canonical(d.stringList(x, "claim"))
	}
}

// labels reads a map of a key to a value or a list of values.
func (d *decoder) labels(e entry) map[string]*symbolonv1.LabelValues {
	all, ok := entries(e.value)
	if !ok || len(all) == 0 {
		d.report(start(e.value), "write {app: web}", "%s is %s, want a map of labels", e.key, describeEmpty(e.value))
		return nil
	}
	out := make(map[string]*symbolonv1.LabelValues, len(all))
	for _, l := range all {
		l.value = orNull(l.value, l)
		if vs := canonical(d.strs(l, "value")); len(vs) > 0 {
			out[l.key] = &symbolonv1.LabelValues{Values: vs}
		}
	}
	return out
}

func describeEmpty(n ast.Node) string {
	if all, ok := entries(n); ok && len(all) == 0 {
		return "an empty map"
	}
	return describe(n)
}

func (d *decoder) external(r *symbolonv1.Resource, e map[string]entry) {
	x := &symbolonv1.External{Addresses: d.addresses(e)}
	r.Kind = &symbolonv1.Resource_External{External: x}
	if l, ok := e["labels"]; ok {
		x.Labels = d.labels(l)
	}
}

func (d *decoder) service(r *symbolonv1.Resource, e map[string]entry) {
	r.Kind = &symbolonv1.Resource_Service{Service: &symbolonv1.Service{Addresses: d.addresses(e)}}
}

func (d *decoder) addresses(e map[string]entry) *symbolonv1.Addresses {
	out := &symbolonv1.Addresses{}
	x, ok := e["addresses"]
	if !ok {
		return out
	}
	all, ok := entries(x.value)
	if !ok {
		d.report(start(x.value), "write {cidrs: [203.0.113.0/24]}", "addresses is %s, want a map", describe(x.value))
		return out
	}
	a := d.known(all, "key", "addresses", []string{"cidrs", "fqdns", "ports", "private"}, nil)
	if x, ok := a["cidrs"]; ok {
		out.Cidrs = canonical(d.stringList(x, "cidr"))
	}
	if x, ok := a["fqdns"]; ok {
		out.Fqdns = canonical(d.stringList(x, "fqdn"))
	}
	if x, ok := a["ports"]; ok {
		out.Ports = d.ports(x)
	}
	if x, ok := a["private"]; ok {
		out.Private = d.boolean(x)
	}
	return out
}

func (d *decoder) ports(e entry) []*symbolonv1.PortRange {
	var out []*symbolonv1.PortRange
	for _, n := range d.list(e, false) {
		if p := d.port(n); p != nil {
			out = append(out, p)
		}
	}
	return sortPorts(out)
}

func (d *decoder) port(n ast.Node) *symbolonv1.PortRange {
	s, ok := d.str(n, "port")
	if !ok {
		return nil
	}
	p, message, hint := parsePorts(s)
	if p == nil {
		d.report(start(n), hint, "%s", message)
	}
	return p
}

// timestamp reads RFC 3339.
func (d *decoder) timestamp(e entry) *timestamppb.Timestamp {
	s, ok := d.str(e.value, e.key)
	if !ok {
		return nil
	}
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil || !timestamppb.New(t).IsValid() {
		d.report(start(e.value), "write 2027-01-01T00:00:00Z", "%s %s is not a time in RFC 3339", e.key, printable(s))
		return nil
	}
	return timestamppb.New(t)
}
