package policydb

import (
	"fmt"
	"slices"
	"strings"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// What Lint finds. Each is valid, and hardly what was meant.
const (
	// LintShadowed: another policy always decides first, or says the same already.
	LintShadowed = "shadowed"
	// LintDuplicate: two policies say the same.
	LintDuplicate = "duplicate"
	// LintNarrowsParent: a deny below an allow that decides before it (rule 3).
	LintNarrowsParent = "narrows-parent"
	// LintTooBroad: an allow that hardly asks for anything.
	LintTooBroad = "too-broad"
	// LintNeverMatches: conditions that exclude each other, or no workload can meet.
	LintNeverMatches = "never-matches"
	// LintNoKnownWorkload: a label that no Profile and no External gives.
	LintNoKnownWorkload = "no-known-workload"
	// LintExpired: it is as if deleted.
	LintExpired = "expired"
	// LintWeakProfile: a Profile by a program that any user may run.
	LintWeakProfile = "weak-profile"
	// LintForeignLabel: an allow that workloads of another trust domain can meet by what
	// they may claim.
	LintForeignLabel = "foreign-label"
	// LintPrivateName: a name that leads into private networks, or should and does not.
	LintPrivateName = "private-name"
	// LintBareName: a name without a dot.
	LintBareName = "bare-name"
	// LintOverlappingNames: a name that is taken out of another External's wildcard.
	LintOverlappingNames = "overlapping-names"
	// LintNotCompared: there are too many policies to compare each with each.
	LintNotCompared = "not-compared"
)

const (
	lintWarning = symbolonv1.LintSeverity_LINT_SEVERITY_WARNING
	lintError   = symbolonv1.LintSeverity_LINT_SEVERITY_ERROR
)

// maxFindings bounds those that are listed; the rest is counted.
const maxFindings = 1000

// Finding is one thing that Lint has to say of one resource.
type Finding struct {
	Code     string
	Severity symbolonv1.LintSeverity
	// Key is the resource's, Other that of the policy that it is about, if any.
	Key, Other Key
	// The place, the words, and in Hint the remedy. Line is 0 where no file is known.
	SyntaxError
}

// Lint looks at a set of resources, of which documents may have come from files, for
// what is valid and hardly meant. With documents it reports only what is about one of
// them. Findings are in the order of listings; omitted counts those beyond 1000.
func Lint(s *Snapshot, documents []Document, now time.Time) (findings []Finding, omitted int) {
	return lintBelow(s, documents, "", now)
}

func lintBelow(s *Snapshot, documents []Document, namespace string, now time.Time) (findings []Finding, omitted int) {
	if namespace == "" {
		namespace = "/"
	}
	l := &linter{namespace: namespace, snapshot: s, now: now, given: s.givenLabels(), documents: make(map[Key]*Document, len(documents))}
	l.words.snapshot = s
	for i := range documents {
		l.documents[KeyOf(documents[i].Resource)] = &documents[i]
	}
	for _, r := range s.List("", namespace) {
		l.alone(r)
	}
	l.outside()
	l.compare()
	slices.SortStableFunc(l.findings, func(a, b found) int { return compareKeys(a.Key, b.Key) })
	for _, f := range l.findings {
		if len(findings) == maxFindings {
			omitted++
			continue
		}
		findings = append(findings, l.locate(f))
	}
	return findings, omitted
}

type linter struct {
	snapshot  *Snapshot
	namespace string // only what is in it or below
	now       time.Time
	given     *givenLabels
	documents map[Key]*Document
	words     vocabularies
	findings  []found
}

// found is a Finding whose place is still a path: to look it up means to parse.
type found struct {
	Finding
	resource *symbolonv1.Resource
	path     []any
}

func (l *linter) add(code string, severity symbolonv1.LintSeverity, r *symbolonv1.Resource, other Key, path []any, remedy, format string, args ...any) {
	f := found{Finding{Code: code, Severity: severity, Key: KeyOf(r), Other: other}, r, path}
	if len(l.documents) > 0 && l.documents[f.Key] == nil && l.documents[other] == nil {
		return
	}
	f.Message, f.Hint = fmt.Sprintf(format, args...), remedy
	l.findings = append(l.findings, f)
}

// locate finds a finding's place in its file, if it came from one.
func (l *linter) locate(f found) Finding {
	if doc := l.documents[f.Key]; doc != nil {
		f.SyntaxError = doc.at(problem{f.path, mistake{f.Message, f.Hint}}).SyntaxError
	}
	return f.Finding
}

var theName = []any{"name", theValue{}}

// alone looks at one resource by itself.
func (l *linter) alone(r *symbolonv1.Resource) {
	if l.documents[KeyOf(r)] != nil {
		for _, x := range checkVocabulary(r, l.words.of(r.GetNamespace())) {
			l.add(LintNeverMatches, lintError, r, Key{}, x.path, x.hint, "%s", x.message)
		}
	}
	switch k := r.GetKind().(type) {
	case *symbolonv1.Resource_NamespaceKind:
		if k.NamespaceKind.GetDefault() == symbolonv1.Default_DEFAULT_ALLOW && k.NamespaceKind.GetMode() == symbolonv1.Mode_MODE_ENFORCE {
			l.add(LintTooBroad, lintWarning, r, Key{}, []any{"default", theValue{}},
				"write default: deny, and allow what is needed", "whatever no policy speaks of is allowed")
		}
	case *symbolonv1.Resource_Profile:
		if key := anybodysProgram(k.Profile); key != "" {
			l.add(LintWeakProfile, lintWarning, r, Key{}, []any{"match", key}, "match os.user, proc.uid or proc.unit too",
				"it matches on %s without a user: whoever may run that file can make it do anything (LD_PRELOAD), under this name", key)
		}
	case *symbolonv1.Resource_Policy:
		if l.expired(k.Policy) {
			l.add(LintExpired, lintWarning, r, Key{}, []any{"expires", theValue{}}, "delete it, or give it another time",
				"it expired at %s", k.Policy.GetExpires().AsTime().UTC().Format(time.RFC3339))
			return
		}
		l.matchable(r, k.Policy)
		l.broad(r, k.Policy)
		l.foreign(r, k.Policy)
	}
}

func (l *linter) expired(p *symbolonv1.Policy) bool {
	return p.GetExpires() != nil && !l.now.Before(p.GetExpires().AsTime())
}

// broad tells of an allow to or from anybody, on any port.
func (l *linter) broad(r *symbolonv1.Resource, p *symbolonv1.Policy) {
	if p.GetVerb() != symbolonv1.Verb_VERB_ALLOW || p.GetMode() == symbolonv1.Mode_MODE_OBSERVE || !everyPort(p.GetPorts()) {
		return
	}
	const remedy = "name the workloads, or the ports"
	switch subject, object := p.GetSubject().GetAny(), p.GetObject().GetAny(); {
	case subject && object:
		l.add(LintTooBroad, lintWarning, r, Key{}, []any{"subject", theValue{}}, remedy, "it allows anybody to reach anybody, on every port")
	case subject:
		l.add(LintTooBroad, lintWarning, r, Key{}, []any{"subject", theValue{}}, remedy,
			"it lets anybody in, on every port, clients without a proxy that are some External too")
	case object:
		l.add(LintTooBroad, lintWarning, r, Key{}, []any{"object", theValue{}}, remedy,
			"it lets out to anybody, on every port, to every External too")
	}
}

// everyPort tells whether a list of ports leaves out nothing of TCP.
func everyPort(ports []*symbolonv1.PortRange) bool {
	return len(ports) == 0 || slices.ContainsFunc(ports, func(r *symbolonv1.PortRange) bool {
		return r.GetProtocol() == protocols[0] && r.GetFirst() == 1 && r.GetLast() == maxPort
	})
}

// matchable tells of conditions that nobody can meet, and that nobody known does.
func (l *linter) matchable(r *symbolonv1.Resource, p *symbolonv1.Policy) {
	for _, key := range p.GetWhereSame() {
		if slices.Contains(p.GetWhereDifferent(), key) {
			l.add(LintNeverMatches, lintError, r, Key{}, []any{"where"}, "keep one of the two",
				"where asks for %s to be the same and to be different", key)
			return
		}
	}
	root := l.snapshot.Get(KindNamespace, "/", "").GetNamespaceKind().GetAttributes()
	for _, side := range []struct {
		name     string
		selector *symbolonv1.Selector
	}{{"subject", p.GetSubject()}, {"object", p.GetObject()}} {
		terms := side.selector.GetTerms()
		impossible := 0
		for _, t := range terms {
			if excludesAll(t, root) != "" {
				impossible++
			}
		}
		if impossible > 0 && impossible == len(terms) {
			key := excludesAll(terms[0], root)
			l.add(LintNeverMatches, lintError, r, Key{}, []any{side.name, 0, key}, "leave one of the values out of not, or write {exists: false}",
				"%s excludes every value that %s may have", side.name, key)
			return
		}
		if missing := l.given.missing(side.selector); missing != "" {
			l.add(LintNoKnownWorkload, lintWarning, r, Key{}, []any{side.name, theValue{}}, "give the label in a Profile or an External, or correct it",
				"%s matches no known workload: none of %d Profiles and %d Externals gives %s", side.name, l.given.profiles, l.given.externals, missing)
		}
	}
	if why := contradictory(p); why != "" {
		l.add(LintNeverMatches, lintError, r, Key{}, []any{"where"}, "change where, or the condition", "%s", why)
	}
}

// excludesAll names a key of which a term excludes every value that there can be:
// those that the root's vocabulary, which holds everywhere, leaves.
func excludesAll(t *symbolonv1.Term, root map[string]*symbolonv1.AttributeRule) string {
	for _, c := range t.GetClauses() {
		vs := root[c.GetKey()].GetValues()
		if not := c.GetNot(); not != nil && len(vs) > 0 && subset(vs, not.GetValues()) {
			return c.GetKey()
		}
	}
	return ""
}

// contradictory says why where and the selectors exclude each other, in each pair of
// their alternatives; "" if in some they do not.
func contradictory(p *symbolonv1.Policy) string {
	terms := func(s *symbolonv1.Selector) []*symbolonv1.Term {
		if s.GetAny() {
			return []*symbolonv1.Term{{}}
		}
		return s.GetTerms()
	}
	why := ""
	for _, s := range terms(p.GetSubject()) {
		for _, o := range terms(p.GetObject()) {
			x := contradiction(p, s, o)
			if x == "" {
				return ""
			}
			why = x
		}
	}
	return why
}

func contradiction(p *symbolonv1.Policy, subject, object *symbolonv1.Term) string {
	for _, key := range slices.Concat(p.GetWhereSame(), p.GetWhereDifferent()) {
		for _, side := range []struct {
			name string
			term *symbolonv1.Term
		}{{"subject", subject}, {"object", object}} {
			if c := clauseOf(side.term, key); c != nil && absent(c) {
				return fmt.Sprintf("where compares %s, which the %s must not have", key, side.name)
			}
		}
	}
	for _, key := range p.GetWhereDifferent() {
		a, b := clauseOf(subject, key).GetIn().GetValues(), clauseOf(object, key).GetIn().GetValues()
		if len(a) == 1 && slices.Equal(a, b) {
			return fmt.Sprintf("where asks for %s to be different, but both sides must have %s", key, printable(a[0]))
		}
	}
	return ""
}

func clauseOf(t *symbolonv1.Term, key string) *symbolonv1.Clause {
	for _, c := range t.GetClauses() {
		if c.GetKey() == key {
			return c
		}
	}
	return nil
}

// absent tells exists: false.
func absent(c *symbolonv1.Clause) bool {
	e, ok := c.GetOperator().(*symbolonv1.Clause_Exists)
	return ok && !e.Exists
}

func subset(vs, of []string) bool {
	return !slices.ContainsFunc(vs, func(v string) bool { return !slices.Contains(of, v) })
}

// LintCandidate lints what is in force as changed by documents, and only what is about
// them; without documents, all that is in force; of either, a namespace (empty: the
// root) and what is below it. What is wrong with the documents
// themselves is an error, but for words that are not in the vocabulary: those are
// findings. Errors: *ValidationErrors.
func (db *DB) LintCandidate(documents []Document, namespace string) (findings []Finding, omitted int, err error) {
	p := db.candidate(documents)
	for _, step := range []func(){func() { p.checkAlone(documents) }, func() { p.apply(nil) }, p.checkTree} {
		if step(); !p.ok() {
			return nil, 0, &p.errs
		}
	}
	findings, omitted = lintBelow(p.candidate, documents, namespace, db.Now())
	return findings, omitted, nil
}

// String is a finding in several lines, as of a SyntaxError, with its code in front.
func (f *Finding) String() string {
	e := f.SyntaxError
	e.Message = f.Code + ": " + e.Message
	if e.Line == 0 {
		e.Message = f.Key.String() + ": " + e.Message
	}
	return strings.TrimSpace(e.Error())
}
