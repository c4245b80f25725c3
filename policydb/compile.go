package policydb

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// Compiled is a set of resources made ready to decide by: immutable, but for
// bounded caches. Safe for concurrent use.
//
// Every policy has a bit. The bits of one namespace stand together, in the order of
// names, and begin a new word; so a namespace is a range of words, and its
// precedence is order. For an identity two sets of bits are found once: policies
// whose subject it matches, and policies whose object it matches. A decision is the
// AND of the client's first set and the server's second, over the ranges of one
// namespace chain; ports, windows and comparisons are looked at on what survives. What came out is
// kept for the next connection that asks the same (answers.go).
type Compiled struct {
	generation uint64
	chains     map[string]*chain
	policies   []policy // by bit; those without a name pad a range to whole words
	rules      []rule   // of the policies, by bit
	// propagating marks the policies that hold below their own namespace.
	propagating []uint64
	subjects    matcher
	objects     matcher
	// keys are the attribute keys that selectors look at: what an identity is
	// reduced to before it is looked up.
	keys      map[string]struct{}
	known     identities
	says      map[string]string // of each namespace, for Explain
	externals map[string]*addressTable
	services  map[string]*addressTable
	foreign   foreignClaims
	byID      byID
	// declared are the Externals as they are written, by Ref.
	declared                    map[string]*symbolonv1.External
	externalNames, serviceNames map[string]*nameTable // by DNS name
	// observing: some policy is in observe mode, so that there are two verdicts.
	observing bool
	// timeless takes every window as open: PolicyTests must not depend on the hour.
	timeless bool
}

// policy is what is left to check when the selectors match.
type policy struct {
	ref             string
	verb            symbolonv1.Verb
	observe         bool
	fallback        bool
	propagate       bool
	encrypt, log    bool
	ports           portSet
	same, different []string
	window          *window
	expires         time.Time // zero: never
	source          *symbolonv1.Policy
}

// chain is the way from the root to one namespace.
type chain struct {
	path   []string // namespaces, from the root down
	levels []level  // from the root down, those without policies left out
	// What holds where no policy matches, and for all connections.
	allow      bool
	protection symbolonv1.Protection
	// learn: the namespace itself is in learn. The mode of those above says nothing of it.
	learn bool
}

func (ch *chain) namespace() string { return ch.path[len(ch.path)-1] }

// level is one namespace's policies: words of bits, from first to before end.
type level struct {
	span
	// own: the namespace judged itself; else an ancestor, of which only what
	// propagates holds.
	own bool
}

// Compile makes ready what a proxy received or the controller holds.
// Errors: ErrUnreadable, and duplicates; then nothing of the set may be used.
func Compile(resources []*symbolonv1.Resource, generation uint64) (*Compiled, error) {
	namespaces := make(map[string]*symbolonv1.Namespace)
	byNamespace := make(map[string][]policy)
	c := &Compiled{
		generation: generation,
		chains:     make(map[string]*chain),
		says:       make(map[string]string),
		externals:  make(map[string]*addressTable),
		services:   make(map[string]*addressTable),
		foreign:    make(foreignClaims),
		declared:   make(map[string]*symbolonv1.External),

		externalNames: make(map[string]*nameTable), serviceNames: make(map[string]*nameTable),
	}
	z := make(zones)
	seen := make(map[Key]struct{}, len(resources))
	for _, r := range resources {
		key := KeyOf(r)
		if key.Kind == "" || hasUnknown(r) {
			return nil, fmt.Errorf("%w: %s", ErrUnreadable, key)
		}
		if _, dup := seen[key]; dup {
			return nil, fmt.Errorf("%s is there twice", key)
		}
		seen[key] = struct{}{}
		var err error
		switch k := r.GetKind().(type) {
		case *symbolonv1.Resource_NamespaceKind:
			namespaces[r.GetNamespace()] = k.NamespaceKind
			c.says[r.GetNamespace()] = says(r.GetNamespace(), k.NamespaceKind)
			err = checkNamespace(r.GetNamespace(), k.NamespaceKind)
		case *symbolonv1.Resource_Policy:
			var p policy
			if p, err = compilePolicy(key, k.Policy, z); err == nil {
				byNamespace[r.GetNamespace()] = append(byNamespace[r.GetNamespace()], p)
			}
		case *symbolonv1.Resource_External:
			err = addAddresses(c.externals, c.externalNames, key, k.External.GetAddresses(), k.External.GetLabels())
			c.declared[key.Ref()] = k.External
		case *symbolonv1.Resource_Service:
			err = addAddresses(c.services, c.serviceNames, key, k.Service.GetAddresses(), nil)
		case *symbolonv1.Resource_TrustDomain:
			if r.GetNamespace() != "/" {
				err = errors.New("a TrustDomain below the root")
			}
			c.foreign[r.GetName()] = newClaimSet(k.TrustDomain)
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrUnreadable, key, err)
		}
	}
	levels := c.lay(byNamespace)
	for path := range namespaces {
		if ch := compileChain(path, namespaces, levels); ch != nil {
			c.chains[path] = ch
		}
	}
	c.index()
	c.byID = newByID(resources)
	return c, nil
}

// Generation is the number given to Compile.
func (c *Compiled) Generation() uint64 { return c.generation }

func compilePolicy(key Key, p *symbolonv1.Policy, z zones) (policy, error) {
	out := policy{
		ref:       key.Ref(),
		verb:      p.GetVerb(),
		observe:   p.GetMode() == symbolonv1.Mode_MODE_OBSERVE,
		fallback:  p.GetFallback(),
		propagate: p.GetPropagate(),
		encrypt:   p.GetWithEncrypt() || p.GetVerb() == symbolonv1.Verb_VERB_ENCRYPT,
		log:       p.GetWithLog() || p.GetVerb() == symbolonv1.Verb_VERB_LOG,
		same:      p.GetWhereSame(),
		different: p.GetWhereDifferent(),
		source:    p,
	}
	switch p.GetVerb() {
	case symbolonv1.Verb_VERB_ALLOW, symbolonv1.Verb_VERB_DENY, symbolonv1.Verb_VERB_ENCRYPT, symbolonv1.Verb_VERB_LOG:
	default:
		return out, fmt.Errorf("verb %s", p.GetVerb())
	}
	switch p.GetMode() {
	case symbolonv1.Mode_MODE_UNSPECIFIED, symbolonv1.Mode_MODE_ENFORCE, symbolonv1.Mode_MODE_OBSERVE:
	default:
		return out, fmt.Errorf("mode %s", p.GetMode())
	}
	for _, s := range []*symbolonv1.Selector{p.GetSubject(), p.GetObject()} {
		if err := checkReadable(s); err != nil {
			return out, err
		}
	}
	var err error
	if out.ports, err = compilePorts(p.GetPorts()); err != nil {
		return out, err
	}
	if w := p.GetWhen(); w != nil {
		if out.window, err = compileWindow(w, z); err != nil {
			return out, err
		}
	}
	if e := p.GetExpires(); e != nil {
		if err := e.CheckValid(); err != nil {
			return out, err
		}
		out.expires = e.AsTime()
	}
	return out, nil
}

// checkNamespace refuses what compileChain would have to guess at.
func checkNamespace(path string, ns *symbolonv1.Namespace) error {
	if m := checkNamespacePath(path); m != nil {
		return errors.New(m.message)
	}
	switch ns.GetMode() {
	case symbolonv1.Mode_MODE_UNSPECIFIED, symbolonv1.Mode_MODE_ENFORCE, symbolonv1.Mode_MODE_LEARN:
	default:
		return fmt.Errorf("mode %s", ns.GetMode())
	}
	if _, ok := symbolonv1.Default_name[int32(ns.GetDefault())]; !ok {
		return fmt.Errorf("default %s", ns.GetDefault())
	}
	if _, ok := symbolonv1.Protection_name[int32(ns.GetProtection())]; !ok {
		return fmt.Errorf("protection %s", ns.GetProtection())
	}
	return nil
}

// checkReadable refuses a selector whose meaning would have to be guessed.
func checkReadable(s *symbolonv1.Selector) error {
	if s.GetAny() == (len(s.GetTerms()) > 0) {
		return errors.New("a selector that is neither any nor a list of terms")
	}
	for _, t := range s.GetTerms() {
		if len(t.GetClauses()) == 0 {
			return errors.New("an empty term")
		}
		for _, cl := range t.GetClauses() {
			if cl.GetOperator() == nil {
				return fmt.Errorf("the condition on %s has no operator", printable(cl.GetKey()))
			}
		}
	}
	return nil
}

// lay gives each policy its bit, and says where each namespace's words are.
func (c *Compiled) lay(byNamespace map[string][]policy) map[string]level {
	paths := sortedKeys(byNamespace)
	slices.SortFunc(paths, comparePaths)
	levels := make(map[string]level, len(paths))
	for _, path := range paths {
		ps := byNamespace[path]
		slices.SortFunc(ps, func(a, b policy) int { return cmp.Compare(a.ref, b.ref) })
		first := len(c.policies) / wordBits
		c.policies = append(c.policies, ps...)
		if rest := len(c.policies) % wordBits; rest != 0 {
			c.policies = append(c.policies, make([]policy, wordBits-rest)...)
		}
		levels[path] = level{span: span{uint32(first), uint32(len(c.policies) / wordBits)}}
	}
	c.policies = slices.Clip(c.policies)
	c.propagating = make([]uint64, len(c.policies)/wordBits)
	c.rules = make([]rule, len(c.policies))
	for i := range c.policies {
		c.rules[i] = c.policies[i].rule()
		c.observing = c.observing || c.policies[i].observe
		if c.policies[i].propagate {
			c.propagating[i/wordBits] |= 1 << (i % wordBits)
		}
	}
	return levels
}

// compileChain is nil where a namespace on the way is not known: then nothing is
// decided there but denial.
func compileChain(path string, namespaces map[string]*symbolonv1.Namespace, levels map[string]level) *chain {
	ch := &chain{path: chainOf(path), protection: symbolonv1.Protection_PROTECTION_ENCRYPTED}
	for _, p := range ch.path {
		ns, ok := namespaces[p]
		if !ok {
			return nil
		}
		switch ns.GetDefault() {
		case symbolonv1.Default_DEFAULT_ALLOW:
			ch.allow = true
		case symbolonv1.Default_DEFAULT_DENY:
			ch.allow = false
		}
		if ns.GetProtection() != symbolonv1.Protection_PROTECTION_UNSPECIFIED {
			ch.protection = ns.GetProtection()
		}
		ch.learn = p == path && ns.GetMode() == symbolonv1.Mode_MODE_LEARN
		if l, ok := levels[p]; ok {
			l.own = p == path
			ch.levels = append(ch.levels, l)
		}
	}
	return ch
}
