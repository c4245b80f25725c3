package policydb

import (
	"cmp"
	"slices"
	"strings"

	"github.com/goccy/go-yaml/ast"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func (d *decoder) policy(r *symbolonv1.Resource, e map[string]entry) {
	p := &symbolonv1.Policy{Mode: symbolonv1.Mode_MODE_ENFORCE}
	r.Kind = &symbolonv1.Resource_Policy{Policy: p}
	if x, ok := e["subject"]; ok {
		p.Subject = d.selector(x)
	}
	if x, ok := e["object"]; ok {
		p.Object = d.selector(x)
	}
	if x, ok := e["verb"]; ok {
		p.Verb = word(d, x, verbs)
	}
	if x, ok := e["where"]; ok {
		p.WhereSame, p.WhereDifferent = d.where(x)
	}
	if x, ok := e["ports"]; ok {
		p.Ports = d.ports(x)
	}
	if x, ok := e["with"]; ok {
		for _, n := range d.list(x, false) {
			s, ok := d.str(n, "obligation")
			switch {
			case !ok:
			case s == "encrypt":
				p.WithEncrypt = true
			case s == "log":
				p.WithLog = true
			default:
				d.report(start(n), didYouMean(s, []string{"encrypt", "log"}), "unknown obligation %s", printable(s))
			}
		}
	}
	if x, ok := e["when"]; ok {
		p.When = d.when(x)
	}
	if x, ok := e["expires"]; ok {
		p.Expires = d.timestamp(x)
	}
	if x, ok := e["mode"]; ok {
		p.Mode = word(d, x, policyModes)
	}
	if x, ok := e["fallback"]; ok {
		p.Fallback = d.boolean(x)
	}
	if x, ok := e["propagate"]; ok {
		p.Propagate = d.boolean(x)
	}
}

// selector reads a map (one term), a list of maps (several), or the word any.
func (d *decoder) selector(e entry) *symbolonv1.Selector {
	const want = `write {app: web}, [{app: web}, {app: api}], or the word any`
	switch v := e.value.(type) {
	case *ast.StringNode:
		if v.Value == "any" {
			return &symbolonv1.Selector{Any: true}
		}
	case *ast.MappingNode, *ast.MappingValueNode:
		return &symbolonv1.Selector{Terms: []*symbolonv1.Term{d.term(v, e.key)}}
	case *ast.SequenceNode:
		if len(v.Values) == 0 {
			d.report(v.GetToken(), "for everybody write the word any", "%s is an empty list, which selects nothing or everything", e.key)
			return nil
		}
		s := &symbolonv1.Selector{}
		for _, n := range v.Values {
			if _, ok := entries(n); !ok {
				d.report(start(n), want, "%s: an alternative is %s, want a map", e.key, describe(n))
				continue
			}
			s.Terms = append(s.Terms, d.term(n, e.key))
		}
		return s
	}
	d.report(start(e.value), want, "%s is %s, want a selector", e.key, describe(e.value))
	return nil
}

// term reads a map of keys to conditions, all of which must hold.
func (d *decoder) term(n ast.Node, what string) *symbolonv1.Term {
	all, ok := entries(n)
	if !ok {
		d.report(start(n), "write {app: web}", "%s is %s, want a map", what, describe(n))
		return nil
	}
	if len(all) == 0 {
		hint := "for everybody write the word any"
		if what == "match" {
			hint = "write what the workload must be: {proc.exe: /usr/sbin/nginx}"
		}
		d.report(start(n), hint, "%s is an empty map, which selects nothing or everything", what)
		return nil
	}
	t := &symbolonv1.Term{}
	for _, e := range all {
		if c := d.clause(e); c != nil {
			t.Clauses = append(t.Clauses, c)
		}
	}
	// A map has no order; the canonical one is by key.
	slices.SortFunc(t.Clauses, func(a, b *symbolonv1.Clause) int { return cmp.Compare(a.GetKey(), b.GetKey()) })
	return t
}

var operators = []string{"not", "prefix", "exists"}

var operatorHints = map[string]string{
	"in":     "a list is any of its values: [a, b]",
	"values": "a list is any of its values: [a, b]",
	"regex":  "there are no regular expressions; there is {prefix: p}",
	"match":  "there are no regular expressions; there is {prefix: p}",
}

// clause reads one condition: a value, a list of values, or {operator: operand}.
func (d *decoder) clause(e entry) *symbolonv1.Clause {
	c := &symbolonv1.Clause{Key: e.key}
	all, isMap := entries(orNull(e.value, e))
	if !isMap {
		e.value = orNull(e.value, e)
		vs := canonical(d.strs(e, "value"))
		if len(vs) == 0 {
			return nil
		}
		c.Operator = &symbolonv1.Clause_In{In: &symbolonv1.Values{Values: vs}}
		return c
	}
	if len(all) != 1 {
		t := start(e.value)
		if len(all) > 1 {
			t = all[1].token
		}
		d.report(t, "one of {not: [..]}, {prefix: p}, {exists: true}, or a value or list without an operator",
			"the condition on %s has %d operators, want one", e.key, len(all))
		return nil
	}
	op := d.known(all, "operator", "a condition", operators, operatorHints)
	for name, x := range op {
		switch name {
		case "not":
			vs := canonical(d.stringList(x, "value"))
			if len(vs) == 0 {
				return nil
			}
			c.Operator = &symbolonv1.Clause_Not{Not: &symbolonv1.Values{Values: vs}}
		case "prefix":
			s, ok := d.str(x.value, "prefix")
			if !ok {
				return nil
			}
			c.Operator = &symbolonv1.Clause_Prefix{Prefix: s}
		case "exists":
			c.Operator = &symbolonv1.Clause_Exists{Exists: d.boolean(x)}
		}
		return c
	}
	return nil
}

func (d *decoder) where(e entry) (same, different []string) {
	all, ok := entries(e.value)
	if !ok || len(all) == 0 {
		d.report(start(e.value), "write {same: [env]}", "where is %s, want a map", describeEmpty(e.value))
		return nil, nil
	}
	w := d.known(all, "comparison", "where", []string{"same", "different"}, nil)
	if x, ok := w["same"]; ok {
		same = canonical(d.stringList(x, "key"))
	}
	if x, ok := w["different"]; ok {
		different = canonical(d.stringList(x, "key"))
	}
	return same, different
}

func (d *decoder) when(e entry) *symbolonv1.Window {
	w := &symbolonv1.Window{}
	all, ok := entries(e.value)
	if !ok || len(all) == 0 {
		d.report(start(e.value), `write {days: mon-fri, hours: "08:00-12:00", timezone: Europe/Oslo}`,
			"when is %s, want a map", describeEmpty(e.value))
		return w
	}
	k := d.known(all, "key", "when", []string{"days", "hours", "timezone"}, nil)
	if x, ok := k["days"]; ok {
		if s, ok := d.str(x.value, "days"); ok {
			days, message, hint := parseDays(s)
			if message != "" {
				d.report(start(x.value), hint, "%s", message)
			}
			w.Days = days
		}
	}
	if x, ok := k["hours"]; ok {
		if s, ok := d.str(x.value, "hours"); ok {
			from, to, message, hint := parseHours(s)
			if message != "" {
				d.report(start(x.value), hint, "%s", message)
			}
			w.StartMinute, w.EndMinute = from, to
		}
	}
	if x, ok := k["timezone"]; ok {
		w.Timezone, _ = d.str(x.value, "timezone")
	} else if !slices.ContainsFunc(all, func(e entry) bool { return e.key == "timezone" }) {
		d.report(e.token, `add "timezone: Europe/Oslo", or UTC`, "when has no timezone")
	}
	return w
}

func (d *decoder) policyTest(r *symbolonv1.Resource, e map[string]entry) {
	t := &symbolonv1.PolicyTest{}
	r.Kind = &symbolonv1.Resource_PolicyTest{PolicyTest: t}
	x, ok := e["tests"]
	if !ok {
		return
	}
	for _, n := range d.list(x, false) {
		all, ok := entries(n)
		if !ok {
			d.report(start(n), "write {name: .., from: {..}, to: {..}, port: tcp/443, expect: allow}", "a test is %s, want a map", describe(n))
			continue
		}
		t.Tests = append(t.Tests, d.test(n, all))
	}
}

func (d *decoder) test(n ast.Node, all []entry) *symbolonv1.PolicyTest_Test {
	e := d.known(all, "key", "a test", []string{"name", "from", "to", "port", "expect", "by", "encrypted", "reason"}, map[string]string{
		"subject": `the word is "from"`, "object": `the word is "to"`, "ports": `the word is "port", and its value one range or any`,
	})
	for _, key := range []string{"name", "from", "to", "port", "expect"} {
		if !slices.ContainsFunc(all, func(x entry) bool { return x.key == key }) {
			hint := ""
			if key == "port" {
				hint = `add "port: tcp/443", or "port: any"`
			}
			d.report(start(n), hint, "the test has no %s", key)
		}
	}
	t := &symbolonv1.PolicyTest_Test{}
	if x, ok := e["name"]; ok {
		t.Name, _ = d.str(x.value, "name")
	}
	if x, ok := e["from"]; ok {
		t.From, t.FromExternal = d.testEnd(x)
	}
	if x, ok := e["to"]; ok {
		t.To, t.ToExternal = d.testEnd(x)
	}
	if x, ok := e["port"]; ok {
		if s, isString := x.value.(*ast.StringNode); !isString || s.Value != "any" {
			t.Port = d.port(x.value)
		}
	}
	if x, ok := e["expect"]; ok {
		t.ExpectAllow = word(d, x, outcomes)
	}
	if x, ok := e["by"]; ok {
		t.By, _ = d.str(x.value, "by")
		if t.By == "" {
			d.report(start(x.value), "leave it out if any policy may decide", "by is empty")
		}
	}
	if x, ok := e["encrypted"]; ok {
		b := d.boolean(x)
		t.Encrypted = &b
	}
	if x, ok := e["reason"]; ok {
		t.Reason = word(d, x, testedReasons)
	}
	return t
}

// testEnd is a workload's attributes, or the name of an External.
func (d *decoder) testEnd(e entry) (labels map[string]*symbolonv1.LabelValues, external string) {
	if s, ok := e.value.(*ast.StringNode); ok {
		if !strings.HasPrefix(s.Value, "/") {
			d.report(s.GetToken(), "write {app: web}, or an External such as /acme/card-processor", "%s is %s, want a map of labels, or an External's namespace and name", e.key, printable(s.Value))
		}
		return nil, s.Value
	}
	return d.labels(e), ""
}
