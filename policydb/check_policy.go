package policydb

import symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"

func (c *checker) policy(p *symbolonv1.Policy) {
	c.selector("subject", p.GetSubject())
	c.selector("object", p.GetObject())
	switch p.GetVerb() {
	case symbolonv1.Verb_VERB_ALLOW:
	case symbolonv1.Verb_VERB_DENY, symbolonv1.Verb_VERB_ENCRYPT, symbolonv1.Verb_VERB_LOG:
		if p.GetWithEncrypt() || p.GetWithLog() {
			c.failf([]any{"with", theValue{}}, "obligations are what an allow carries; to oblige without allowing write verb: encrypt or verb: log",
				"with needs verb: allow")
		}
	default:
		c.failf([]any{"verb"}, "", "the Policy has no verb")
	}
	if p.GetFallback() && (p.GetVerb() == symbolonv1.Verb_VERB_ENCRYPT || p.GetVerb() == symbolonv1.Verb_VERB_LOG) {
		c.failf([]any{"fallback", theValue{}}, "leave it out", "only allow and deny can be a fallback: obligations always hold")
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
			c.add(checkAttributeKey(key), "where", w.name, key)
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
		c.failf([]any{"when", "timezone", theValue{}}, "write a name of the IANA list, such as Europe/Oslo, or UTC", "%s", err)
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
