package policydb

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// Change is what a plan does to one resource.
type Change struct {
	Type symbolonv1.ChangeType
	// Resource is the new form; nil if deleted. Previous is the old; nil if created.
	Resource, Previous *symbolonv1.Resource
}

// Key is the changed resource's.
func (c *Change) Key() Key {
	if c.Resource != nil {
		return KeyOf(c.Resource)
	}
	return KeyOf(c.Previous)
}

// Plan is a change that was found good, on the snapshot that it was made on.
type Plan struct {
	// Changes has one for each resource named, unchanged ones included, in the order
	// of listings.
	Changes []Change
	// Warnings are lines for people.
	Warnings []string
	// TestResults are of all PolicyTests that the change could touch; all passed.
	TestResults []*symbolonv1.TestResult

	base, candidate *Snapshot
}

// planner gathers what is wrong with a change.
type planner struct {
	*Plan
	errs ValidationErrors
	// documents are the upserts by key, for the places of errors.
	documents map[Key]*Document
	words     vocabularies
	own       string // trust domain
}

// Plan checks a change against the current set: each resource alone, the tree of
// namespaces, the vocabulary, and the PolicyTests of every touched namespace and of
// those below. Nothing changes before Commit. With strict, warnings are errors.
// Errors: *ValidationErrors.
func (db *DB) Plan(upserts []Document, deletes []Key, strict bool) (*Plan, error) {
	p := db.candidate(upserts)
	if !p.check(upserts, deletes) {
		return nil, &p.errs
	}
	p.warn(db.Now())
	if strict {
		for _, w := range p.Warnings {
			p.errs.add(&ValidationError{SyntaxError: SyntaxError{Message: w, Hint: "a warning, refused because of strict"}})
		}
	}
	p.runTests(db.Now())
	if !p.ok() {
		p.errs.TestResults = p.TestResults
		return nil, &p.errs
	}
	return p.Plan, nil
}

// candidate starts a plan on what is in force.
func (db *DB) candidate(upserts []Document) *planner {
	base := db.Snapshot()
	p := &planner{
		Plan:      &Plan{base: base, candidate: &Snapshot{mem: base.mem.Snapshot(), generation: base.generation}},
		documents: make(map[Key]*Document, len(upserts)),
		own:       db.TrustDomain,
	}
	p.words.snapshot = p.candidate
	return p
}

// check makes the candidate, and tells whether it is valid.
func (p *planner) check(upserts []Document, deletes []Key) bool {
	p.checkAlone(upserts)
	if !p.ok() {
		return false
	}
	p.apply(deletes)
	if !p.ok() {
		return false
	}
	p.checkTree()
	if !p.ok() {
		return false
	}
	p.checkWords()
	p.checkOverlaps()
	p.checkNames()
	p.checkDeciders()
	return p.ok()
}

// ok tells whether nothing is wrong so far. If something is, it puts it in order.
func (p *planner) ok() bool {
	slices.SortStableFunc(p.errs.Errors, func(a, b *ValidationError) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return len(p.errs.Errors) == 0
}

// fail reports a problem of a resource, with its place if it is part of the change.
func (p *planner) fail(r *symbolonv1.Resource, x problem) {
	if doc := p.documents[KeyOf(r)]; doc != nil && len(p.errs.Errors) < maxErrors {
		p.errs.add(doc.at(x))
		return
	}
	p.errs.add((&Document{Resource: r}).at(x))
}

// checkAlone checks each resource by itself, and that each comes once.
func (p *planner) checkAlone(upserts []Document) {
	z := make(zones)
	for i := range upserts {
		doc := &upserts[i]
		for _, x := range checkResource(doc.Resource, z) {
			p.errs.add(doc.at(x))
		}
		if doc.Resource.GetTrustDomain() != nil && doc.Resource.GetName() == p.own {
			p.errs.add(doc.at(problem{[]any{"name", theValue{}}, mistake{
				fmt.Sprintf("%s is this controller's own trust domain", p.own), "leave it out: its workloads are known; a TrustDomain is another one's",
			}}))
		}
		key := KeyOf(doc.Resource)
		if first := p.documents[key]; first != nil {
			m := fmt.Sprintf("%s is there twice", key)
			if first.File != "" {
				m += fmt.Sprintf(": first at %s:%d", first.File, first.Line)
			}
			p.errs.add(doc.at(problem{[]any{"name", theValue{}}, mistake{m, ""}}))
			continue
		}
		p.documents[key] = doc
	}
}

// apply makes the candidate, and lists the changes.
func (p *planner) apply(deletes []Key) {
	w := p.candidate.mem.Txn(true)
	defer w.Abort()
	for _, key := range slices.SortedFunc(maps.Keys(p.documents), compareKeys) {
		r := p.documents[key].Resource
		c := Change{Type: symbolonv1.ChangeType_CHANGE_TYPE_CREATED, Resource: r, Previous: p.base.Get(key.Kind, key.Namespace, key.Name)}
		switch {
		case c.Previous == nil:
		case proto.Equal(c.Previous, r):
			c.Type = symbolonv1.ChangeType_CHANGE_TYPE_UNCHANGED
		default:
			c.Type = symbolonv1.ChangeType_CHANGE_TYPE_UPDATED
		}
		p.Changes = append(p.Changes, c)
		if err := w.Insert(table, r); err != nil {
			p.fail(r, problem{mistake: mistake{err.Error(), ""}})
		}
	}
	seen := make(map[Key]bool)
	for _, key := range deletes {
		old := p.base.Get(key.Kind, key.Namespace, key.Name)
		problem := ""
		switch {
		case old == nil:
			problem = "it cannot be deleted: there is none"
		case p.documents[key] != nil:
			problem = "it cannot be applied and deleted at once"
		case key == Key{Kind: KindNamespace, Namespace: "/"}:
			problem = "the root cannot be deleted"
		}
		if problem != "" {
			p.errs.add(&ValidationError{Resource: key.String(), SyntaxError: SyntaxError{Message: problem}})
			continue
		}
		if seen[key] {
			continue
		}
		seen[key] = true
		p.Changes = append(p.Changes, Change{Type: symbolonv1.ChangeType_CHANGE_TYPE_DELETED, Previous: old})
		if err := w.Delete(table, old); err != nil {
			p.errs.add(&ValidationError{Resource: key.String(), SyntaxError: SyntaxError{Message: err.Error()}})
		}
	}
	w.Commit()
	slices.SortStableFunc(p.Changes, func(a, b Change) int { return compareKeys(a.Key(), b.Key()) })
}

// checkTree: the root is there, every namespace stands in one that is, and every
// resource too; none is deleted from under what it holds.
func (p *planner) checkTree() {
	exists := func(ns string) bool { return p.candidate.Get(KindNamespace, ns, "") != nil }
	if !exists("/") {
		p.errs.add(&ValidationError{SyntaxError: SyntaxError{
			Message: "there is no root Namespace", Hint: `apply "kind: Namespace, name: /, mode: enforce, default: deny" first`,
		}})
	}
	var names []string
	for _, r := range p.candidate.List(KindNamespace, "/") {
		names = append(names, r.GetNamespace())
	}
	for _, c := range p.Changes {
		r := c.Resource
		switch {
		case r == nil && c.Key().Kind == KindNamespace:
			if left := p.candidate.List("", c.Key().Namespace); len(left) > 0 {
				p.fail(c.Previous, problem{mistake: mistake{
					fmt.Sprintf("the namespace cannot be deleted: it still holds %s", describeKeys(left)), "delete what it holds in the same change",
				}})
			}
		case r == nil:
		case KindOf(r) == KindNamespace:
			if parent := parentPath(r.GetNamespace()); parent != "" && !exists(parent) {
				p.fail(r, problem{[]any{"name", theValue{}}, mistake{
					fmt.Sprintf("Namespace %s stands in %s, which does not exist", r.GetNamespace(), parent), didYouMean(parent, names),
				}})
			}
		case !exists(r.GetNamespace()):
			p.fail(r, problem{[]any{"namespace", theValue{}}, mistake{
				fmt.Sprintf("namespace %s does not exist", r.GetNamespace()), didYouMean(r.GetNamespace(), names),
			}})
		}
	}
}

// describeKeys names a few of many.
func describeKeys(rs []*symbolonv1.Resource) string {
	const most = 3
	var out []string
	for i, r := range rs {
		if i == most {
			out = append(out, fmt.Sprintf("%d more", len(rs)-most))
			break
		}
		out = append(out, KeyOf(r).String())
	}
	return strings.Join(out, ", ")
}

// Snapshots are the set that the plan was made on, and the set that it would make,
// which has no generation of its own yet.
func (p *Plan) Snapshots() (base, candidate *Snapshot) { return p.base, p.candidate }
