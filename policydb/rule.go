package policydb

import (
	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// rule is what a decision looks at of every policy whose selectors match, apart from
// the rest and small, so that four of them share a line of the processor's cache.
type rule struct {
	class class
	flags flags
	// The first inlinePorts ranges of the policy's ports; if it has more, further is
	// set and they are looked at there.
	nports uint8
	ports  [inlinePorts]portRange
}

const inlinePorts = 2

// class is what a policy says that matches.
type class uint8

const (
	silent class = iota // it obliges only
	denies
	allows
	fallbackDenies
	fallbackAllows
	classes = iota
)

type flags uint8

const (
	obliges flags = 1 << iota // to encrypt
	logs
	observes
	// further: there are conditions beyond inlined ports, or more ports.
	further
)

func (p *policy) rule() rule {
	r := rule{class: p.class()}
	set := func(f flags, is bool) {
		if is {
			r.flags |= f
		}
	}
	set(obliges, p.encrypt)
	set(logs, p.log)
	set(observes, p.observe)
	set(further, len(p.same)+len(p.different) > 0 || p.window != nil || !p.expires.IsZero() || len(p.ports) > inlinePorts)
	if len(p.ports) <= inlinePorts {
		r.nports = uint8(copy(r.ports[:], p.ports))
	}
	return r
}

func (p *policy) class() class {
	switch {
	case p.verb == symbolonv1.Verb_VERB_DENY && p.fallback:
		return fallbackDenies
	case p.verb == symbolonv1.Verb_VERB_DENY:
		return denies
	case p.verb == symbolonv1.Verb_VERB_ALLOW && p.fallback:
		return fallbackAllows
	case p.verb == symbolonv1.Verb_VERB_ALLOW:
		return allows
	}
	return silent
}

// open tells whether the inlined ports, if there are any, contain port.
func (r *rule) open(protocol transport, port uint16) bool {
	if r.nports == 0 {
		return true
	}
	for i := range r.ports[:r.nports&(2*inlinePorts-1)] {
		if p := &r.ports[i]; port >= p.first && port <= p.last && p.protocol == protocol {
			return true
		}
	}
	return false
}

// none is no policy's bit.
const none int32 = -1

// verdict gathers the matching policies of one side, from the root down and within
// a namespace by name, so that the first of a kind is the one to report.
type verdict struct {
	decided  int32 // the policy that decided, at the first level where one did
	fallback int32 // the one that decides else, at the deepest level where one matched
	encrypt  int32 // the first that obliges
	flags    flags
	// level has the first of each class at this level, until endLevel.
	level [classes]int32
}

func (v *verdict) begin() {
	v.decided, v.fallback, v.encrypt = none, none, none
	v.level = [classes]int32{none, none, none, none, none}
}

func (v *verdict) add(r *rule, bit int32) {
	v.flags |= r.flags
	if r.flags&obliges != 0 && v.encrypt == none {
		v.encrypt = bit
	}
	if at := &v.level[r.class%classes]; *at == none {
		*at = bit
	}
}

// endLevel applies rules 3 and 4: deny beats allow within a namespace; the first
// namespace from the root decides, the deepest falls back.
func (v *verdict) endLevel() {
	if v.decided == none {
		v.decided = either(v.level[denies], v.level[allows])
	}
	if f := either(v.level[fallbackDenies], v.level[fallbackAllows]); f != none {
		v.fallback = f
	}
	v.level = [classes]int32{none, none, none, none, none}
}

func either(a, b int32) int32 {
	if a != none {
		return a
	}
	return b
}
