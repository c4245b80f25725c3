package policydb

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-memdb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// DB is the working set: one Snapshot at a time, replaced whole. Safe for
// concurrent use.
type DB struct {
	// Now is the clock by which PolicyTests see what has expired; time.Now by
	// default. Set it before use.
	Now func() time.Time
	// TrustDomain is the controller's own, which no TrustDomain may be; empty: any
	// may. Set it before use.
	TrustDomain string

	current atomic.Pointer[Snapshot]
	commit  sync.Mutex
}

// NewDB is an empty working set of generation 0.
func NewDB() *DB {
	db := &DB{Now: time.Now}
	db.current.Store(emptySnapshot())
	return db
}

// Snapshot is the set as it is now.
func (db *DB) Snapshot() *Snapshot { return db.current.Load() }

// Load replaces the whole set, at start-up, by what was stored. Each resource is
// checked alone (the set was checked as a whole when it was applied).
// Errors: *ValidationErrors; then nothing changes.
func (db *DB) Load(resources []*symbolonv1.Resource, generation uint64) error {
	errs := &ValidationErrors{}
	z := make(zones)
	s := emptySnapshot()
	w := s.mem.Txn(true)
	defer w.Abort()
	for _, r := range resources {
		doc := &Document{Resource: r}
		for _, p := range checkResource(r, z) {
			errs.add(doc.at(p))
		}
		if old, err := w.First(table, indexID, KeyOf(r)); err != nil {
			return err
		} else if old != nil {
			errs.add(doc.at(problem{mistake: mistake{"it is there twice", ""}}))
		}
		if err := w.Insert(table, r); err != nil {
			return err
		}
	}
	if len(errs.Errors) > 0 {
		return errs
	}
	w.Commit()
	s.generation = generation
	db.commit.Lock()
	defer db.commit.Unlock()
	db.current.Store(s)
	return nil
}

// Commit puts a plan into force under a generation number, greater than the one
// before. Errors: ErrConflict, if another plan was committed since p was made.
func (db *DB) Commit(p *Plan, generation uint64) error {
	db.commit.Lock()
	defer db.commit.Unlock()
	base := db.current.Load()
	if base != p.base {
		return ErrConflict
	}
	if generation <= base.generation {
		return fmt.Errorf("generation %d does not follow %d", generation, base.generation)
	}
	db.current.Store(&Snapshot{mem: p.candidate.mem, generation: generation})
	return nil
}

// Snapshot is an immutable view of the set. Resources that it returns are shared:
// read them only. Safe for concurrent use.
type Snapshot struct {
	mem        *memdb.MemDB
	generation uint64
}

func emptySnapshot() *Snapshot {
	mem, err := memdb.NewMemDB(dbSchema)
	if err != nil {
		panic(err) // the schema is a constant
	}
	return &Snapshot{mem: mem}
}

// Generation is the number under which the set was put into force; 0: nothing was.
func (s *Snapshot) Generation() uint64 { return s.generation }

// Get returns a resource, or nil. A Namespace has an empty name.
func (s *Snapshot) Get(kind, namespace, name string) *symbolonv1.Resource {
	v, err := s.mem.Txn(false).First(table, indexID, Key{kind, namespace, name})
	if err != nil || v == nil {
		return nil
	}
	return v.(*symbolonv1.Resource)
}

// List returns the resources of a kind (empty: of all) in a namespace and below it
// (empty: everywhere), by namespace, kind and name.
func (s *Snapshot) List(kind, underNamespace string) []*symbolonv1.Resource {
	if underNamespace == "" {
		underNamespace = "/"
	}
	if kind == "" {
		out := s.collect(indexNamespace+"_prefix", under(underNamespace))
		slices.SortFunc(out, func(a, b *symbolonv1.Resource) int { return compareKeys(KeyOf(a), KeyOf(b)) })
		return out
	}
	return s.collect(indexID+"_prefix", underKind{kind, underNamespace})
}

// All is everything, in the same order.
func (s *Snapshot) All() []*symbolonv1.Resource { return s.List("", "") }

// Beyond lists what the namespaces that docs declare hold and docs do not: what they
// would have to delete to be all there is. Namespaces themselves are not among it.
func (s *Snapshot) Beyond(docs []Document) []Key {
	named := make(map[Key]bool, len(docs))
	for _, d := range docs {
		named[KeyOf(d.Resource)] = true
	}
	var out []Key
	for key := range named {
		if key.Kind != KindNamespace {
			continue
		}
		for _, r := range s.in(key.Namespace) {
			if k := KeyOf(r); k.Kind != KindNamespace && !named[k] {
				out = append(out, k)
			}
		}
	}
	slices.SortFunc(out, compareKeys)
	return out
}

// in lists what stands in one namespace itself, the Namespace included.
func (s *Snapshot) in(namespace string) []*symbolonv1.Resource {
	return s.collect(indexNamespace+"_prefix", exactly(namespace))
}

func (s *Snapshot) collect(index string, arg any) []*symbolonv1.Resource {
	it, err := s.mem.Txn(false).Get(table, index, arg)
	if err != nil {
		panic(err) // index and argument are constants of this file
	}
	var out []*symbolonv1.Resource
	for v := it.Next(); v != nil; v = it.Next() {
		out = append(out, v.(*symbolonv1.Resource))
	}
	return out
}

// VisibleTo is what a host enrolled in a namespace can need: all of its own
// namespace and of those below, and of those above what reaches down (Namespaces,
// Profiles, Externals, Services, and the Policies that propagate), and everybody's
// Profiles by SPIFFE ID: its workloads' peers are anywhere. PolicyTests are the
// controller's own.
func (s *Snapshot) VisibleTo(hostNamespace string) []*symbolonv1.Resource {
	var out []*symbolonv1.Resource
	for _, ns := range chainOf(parentPath(hostNamespace)) {
		for _, r := range s.in(ns) {
			if p := r.GetPolicy(); p != nil && !p.GetPropagate() || r.GetPolicyTest() != nil {
				continue
			}
			out = append(out, r)
		}
	}
	for _, r := range s.List(KindProfile, "/") {
		if ns := r.GetNamespace(); !within(ns, hostNamespace) && !within(hostNamespace, ns) && ByID(r.GetProfile()) {
			out = append(out, r)
		}
	}
	below := s.List("", hostNamespace)
	return append(out, slices.DeleteFunc(below, func(r *symbolonv1.Resource) bool { return r.GetPolicyTest() != nil })...)
}
