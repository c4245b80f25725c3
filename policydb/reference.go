package policydb

import (
	"cmp"
	"slices"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// Reference judges as Decide does, rule by rule, policy by policy, with nothing
// prepared and nothing kept. It is what fuzzing holds Decide against; Until is left
// out. The resources are those that Compile would take.
func Reference(resources []*symbolonv1.Resource, side Side, q *Query, now time.Time) Decision {
	d := referenceVerdict(resources, side, q, now, false)
	own, _ := q.side(side)
	fromAbove := d.Reason == symbolonv1.Reason_REASON_POLICY && !slices.ContainsFunc(resources, func(r *symbolonv1.Resource) bool {
		return r.GetPolicy() != nil && r.GetNamespace() == own.Namespace && RefOf(r) == d.Policy
	})
	if !d.Allow && !fromAbove && d.Reason != symbolonv1.Reason_REASON_NO_POLICY && referenceLearns(resources, own.Namespace) {
		deny := false
		d.Allow, d.Reason, d.WouldAllow = true, symbolonv1.Reason_REASON_LEARN, &deny
		d.Policy, d.WouldPolicy = "", d.Policy
		return d
	}
	if w := referenceVerdict(resources, side, q, now, true); w.Allow != d.Allow {
		d.WouldAllow, d.WouldPolicy = &w.Allow, w.Policy
	}
	return d
}

func referenceLearns(resources []*symbolonv1.Resource, namespace string) bool {
	return slices.ContainsFunc(resources, func(r *symbolonv1.Resource) bool {
		return r.GetNamespace() == namespace && r.GetNamespaceKind().GetMode() == symbolonv1.Mode_MODE_LEARN
	})
}

func referenceVerdict(resources []*symbolonv1.Resource, side Side, q *Query, now time.Time, observed bool) Decision {
	own, other := q.side(side)
	d := Decision{Reason: symbolonv1.Reason_REASON_NO_POLICY, Protection: symbolonv1.Protection_PROTECTION_ENCRYPTED}
	if own.Namespace == "" || own.External != "" {
		return d
	}
	// The chain, with its defaults; a hole in it denies.
	allow := false
	for _, path := range chainOf(own.Namespace) {
		i := slices.IndexFunc(resources, func(r *symbolonv1.Resource) bool { return r.GetNamespaceKind() != nil && r.GetNamespace() == path })
		if i < 0 {
			return Decision{Reason: symbolonv1.Reason_REASON_NO_POLICY, Protection: symbolonv1.Protection_PROTECTION_ENCRYPTED}
		}
		ns := resources[i].GetNamespaceKind()
		if ns.GetDefault() == symbolonv1.Default_DEFAULT_ALLOW || ns.GetDefault() == symbolonv1.Default_DEFAULT_DENY {
			allow = ns.GetDefault() == symbolonv1.Default_DEFAULT_ALLOW
		}
		if ns.GetProtection() != symbolonv1.Protection_PROTECTION_UNSPECIFIED {
			d.Protection = ns.GetProtection()
		}
	}
	d.Allow, d.Reason = allow, symbolonv1.Reason_REASON_DEFAULT

	// What matches, in order of precedence: rule 3's, or rule 4's for fallbacks.
	var matching []*symbolonv1.Resource
	for _, r := range resources {
		if p := r.GetPolicy(); p != nil && within(own.Namespace, r.GetNamespace()) &&
			(p.GetPropagate() || r.GetNamespace() == own.Namespace) &&
			(observed || p.GetMode() != symbolonv1.Mode_MODE_OBSERVE) && referenceMatches(p, q, now) {
			matching = append(matching, r)
		}
	}
	slices.SortFunc(matching, func(a, b *symbolonv1.Resource) int {
		return cmp.Or(cmp.Compare(depth(a.GetNamespace()), depth(b.GetNamespace())), cmp.Compare(a.GetName(), b.GetName()))
	})
	var decides, fallsBack, obliges *symbolonv1.Resource
	for _, r := range matching {
		p := r.GetPolicy()
		if p.GetWithEncrypt() || p.GetVerb() == symbolonv1.Verb_VERB_ENCRYPT {
			obliges = cmp.Or(obliges, r)
		}
		d.Log = d.Log || p.GetWithLog() || p.GetVerb() == symbolonv1.Verb_VERB_LOG
		deny := p.GetVerb() == symbolonv1.Verb_VERB_DENY
		if !deny && p.GetVerb() != symbolonv1.Verb_VERB_ALLOW {
			continue
		}
		at := &decides
		if p.GetFallback() {
			at = &fallsBack
		}
		same := *at != nil && (*at).GetNamespace() == r.GetNamespace()
		beats := same && deny && (*at).GetPolicy().GetVerb() == symbolonv1.Verb_VERB_ALLOW
		if *at == nil || beats || p.GetFallback() && !same {
			*at = r
		}
	}
	if decides != nil {
		d.Reason = symbolonv1.Reason_REASON_POLICY
	} else if fallsBack != nil {
		d.Reason = symbolonv1.Reason_REASON_FALLBACK
	}
	if r := cmp.Or(decides, fallsBack); r != nil {
		d.Allow, d.Policy = r.GetPolicy().GetVerb() == symbolonv1.Verb_VERB_ALLOW, RefOf(r)
	}
	if obliges != nil {
		d.Protection = symbolonv1.Protection_PROTECTION_ENCRYPTED
	}
	if other.External != "" {
		d.Protection = symbolonv1.Protection_PROTECTION_UNSPECIFIED
		if d.Allow && obliges != nil {
			d.Allow, d.Reason, d.Policy = false, symbolonv1.Reason_REASON_ENCRYPTION_UNAVAILABLE, RefOf(obliges)
		}
	}
	return d
}

func referenceMatches(p *symbolonv1.Policy, q *Query, now time.Time) bool {
	if !matchSelector(p.GetSubject(), q.From.Attributes) || !matchSelector(p.GetObject(), q.To.Attributes) {
		return false
	}
	inPorts := func(r *symbolonv1.PortRange) bool {
		return r.GetProtocol() == q.Protocol && r.GetFirst() <= uint32(q.Port) && uint32(q.Port) <= r.GetLast()
	}
	if len(p.GetPorts()) > 0 && !slices.ContainsFunc(p.GetPorts(), inPorts) {
		return false
	}
	compare := func(key string) (both, common bool) {
		for _, a := range q.From.Attributes.Of(key) {
			for _, b := range q.To.Attributes.Of(key) {
				both, common = true, common || a.Value == b.Value
			}
		}
		return both, common
	}
	for _, key := range p.GetWhereSame() {
		if _, common := compare(key); !common {
			return false
		}
	}
	for _, key := range p.GetWhereDifferent() {
		if both, common := compare(key); !both || common {
			return false
		}
	}
	if p.GetExpires() != nil && !now.Before(p.GetExpires().AsTime()) {
		return false
	}
	return p.GetWhen() == nil || referenceOpen(p.GetWhen(), now)
}

// referenceOpen asks for each minute of the last day in turn whether a window
// started then that still runs: slow, and without a case for midnight.
func referenceOpen(w *symbolonv1.Window, now time.Time) bool {
	loc, err := time.LoadLocation(w.GetTimezone())
	if err != nil {
		return false
	}
	t := now.In(loc)
	start, end := int(w.GetStartMinute()), int(w.GetEndMinute())
	if start == 0 && end == 0 {
		end = minutesPerDay
	}
	length := (end - start + minutesPerDay - 1) % minutesPerDay // minutes after the first
	day, minute := (int(t.Weekday())+6)%7, t.Hour()*60+t.Minute()
	for back := 0; back <= length; back++ {
		if minute == start && (w.GetDays() == 0 || w.GetDays()&(1<<day) != 0) {
			return true
		}
		if minute--; minute < 0 {
			minute, day = minutesPerDay-1, (day+6)%7
		}
	}
	return false
}
