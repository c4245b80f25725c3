package controller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/policydb"
)

// policies is the working set, and behind it the store: they change together, one
// generation at a time. The store first: what is not durable is not in force.
type policies struct {
	store store.Store
	hosts *hosts
	// bundle is the roots that hosts are to believe, and their version.
	bundle func() ([][]byte, uint64)
	// tokenKeys are the keys that hosts believe tokens by.
	tokenKeys func() []*symbolonv1.TokenKey

	mu       sync.Mutex // orders changes
	db       *policydb.DB
	state    state
	stateRev int64
	history  *history
	serial   uint64 // of the last distribution
	// served is what the endpoints of other trust domains have served last, by name.
	served map[string]*trustBundle

	compileMu sync.Mutex
	compiled  *policydb.Compiled
}

// openPolicies loads the set, or makes the root namespace in an empty store.
func openPolicies(ctx context.Context, st store.Store, h *hosts, bundle func() ([][]byte, uint64), now func() time.Time) (*policies, error) {
	p := &policies{store: st, hosts: h, bundle: bundle, db: policydb.NewDB(), tokenKeys: func() []*symbolonv1.TokenKey { return nil }}
	p.db.Now = now
	if bundle == nil {
		p.bundle = func() ([][]byte, uint64) { return nil, 0 }
	}
	kv, err := st.Get(ctx, keyState)
	if errors.Is(err, store.ErrNotFound) {
		if err := createRoot(ctx, st); err != nil {
			return nil, err
		}
		kv, err = st.Get(ctx, keyState)
	}
	if err != nil {
		return nil, fmt.Errorf("policies: %w", err)
	}
	if err := getJSON(kv, &p.state); err != nil {
		return nil, fmt.Errorf("policies: %w", err)
	}
	p.stateRev = kv.ModRevision
	kvs, _, err := st.List(ctx, resourcePrefix)
	if err != nil {
		return nil, fmt.Errorf("policies: %w", err)
	}
	resources := make([]*symbolonv1.Resource, len(kvs))
	for i, kv := range kvs {
		if resources[i], err = getResource(kv); err != nil {
			return nil, fmt.Errorf("policies: %w", err)
		}
	}
	if err := p.db.Load(resources, p.state.Generation); err != nil {
		return nil, fmt.Errorf("policies: %w", err)
	}
	if p.served, err = loadTrustBundles(ctx, st); err != nil {
		return nil, fmt.Errorf("policies: %w", err)
	}
	if p.history, err = openHistory(ctx, st, p.state.Generation, now()); err != nil {
		return nil, fmt.Errorf("policies: %w", err)
	}
	return p, nil
}

// createRoot is generation 1: nobody may do anything, and what will be allowed is
// encrypted.
func createRoot(ctx context.Context, st store.Store) error {
	root, err := putResource(&symbolonv1.Resource{
		Namespace: "/",
		Kind: &symbolonv1.Resource_NamespaceKind{NamespaceKind: &symbolonv1.Namespace{
			Mode:       symbolonv1.Mode_MODE_ENFORCE,
			Default:    symbolonv1.Default_DEFAULT_DENY,
			Protection: symbolonv1.Protection_PROTECTION_ENCRYPTED,
		}},
	})
	if err != nil {
		return fmt.Errorf("policies: %w", err)
	}
	first, err := putJSON(keyState, state{Generation: 1, ProfilesGeneration: 1})
	if err != nil {
		return fmt.Errorf("policies: %w", err)
	}
	if _, _, err := st.Txn(ctx, []store.Cond{{Key: keyState}}, []store.Op{root, first}); err != nil {
		return fmt.Errorf("policies: %w", err)
	}
	return nil
}

func (p *policies) snapshot() *policydb.Snapshot { return p.db.Snapshot() }

func (p *policies) hasNamespace(ns string) bool {
	return p.snapshot().Get(policydb.KindNamespace, ns, "") != nil
}

// distribution is the set as it is now, to be published.
func (p *policies) distribution() *distribution {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.distributionLocked()
}

func (p *policies) distributionLocked() *distribution {
	p.serial++
	s := p.db.Snapshot()
	bundle, version := p.bundle()
	return &distribution{
		snapshot: s, serial: p.serial, profilesGeneration: p.state.ProfilesGeneration, bundle: bundle, bundleVersion: version,
		bundles: p.trustBundlesLocked(s), tokenKeys: p.tokenKeys(),
	}
}

// change is a request to change the set.
type change struct {
	upserts []policydb.Document
	deletes []policydb.Key
	// prune deletes what the namespaces among the upserts hold beyond them.
	prune bool
	// rollback, if not 0, is the generation to go back to, in place of the above.
	rollback uint64
	// base, if not 0, is the generation that must be in force.
	base   uint64
	dryRun bool
	strict bool
	// actor and message are for the history.
	actor, message string
}

// apply checks a change and puts it into force: all of it, as one generation, or
// nothing. It returns what changed and the generation in force then; published is
// nil if nothing did.
// Errors: *policydb.ValidationErrors, policydb.ErrConflict, errOccupied, errNotKept,
// the store's.
func (p *policies) apply(ctx context.Context, c change) (plan *policydb.Plan, generation uint64, published *distribution, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.base != 0 && c.base != p.state.Generation {
		return nil, 0, nil, fmt.Errorf("%w: generation %d is in force, not %d", policydb.ErrConflict, p.state.Generation, c.base)
	}
	if c.rollback != 0 {
		if c.upserts, c.deletes, err = p.rollback(ctx, c.rollback); err != nil {
			return nil, 0, nil, err
		}
	}
	if c.prune {
		c.deletes = append(c.deletes, p.db.Snapshot().Beyond(c.upserts)...)
	}
	plan, err = p.db.Plan(c.upserts, c.deletes, c.strict)
	if err != nil {
		return nil, 0, nil, err
	}
	next := p.state
	next.Generation++
	ops, profiles, deleted, err := planOps(plan)
	if err != nil {
		return nil, 0, nil, err
	}
	if profiles {
		next.ProfilesGeneration = next.Generation
	}
	if len(deleted) > 0 {
		p.hosts.membership.Lock()
		defer p.hosts.membership.Unlock()
		if err := p.checkVacant(ctx, deleted); err != nil {
			return nil, 0, nil, err
		}
	}
	if c.dryRun || len(ops) == 0 {
		return plan, p.state.Generation, nil, nil
	}
	op, err := putJSON(keyState, next)
	if err != nil {
		return nil, 0, nil, err
	}
	kept, records, err := p.history.add(generationRecord{
		Generation: next.Generation, Time: p.db.Now(), Actor: c.actor, Message: c.message, RollbackOf: c.rollback,
	}, plan.Changes)
	if err != nil {
		return nil, 0, nil, err
	}
	ops = append(ops, kept...)
	forget, domains := forgetServed(plan.Changes)
	ops = append(ops, forget...)
	rev, ok, err := p.store.Txn(ctx, []store.Cond{{Key: keyState, ModRevision: p.stateRev}}, append(ops, op))
	if err != nil {
		return nil, 0, nil, err
	}
	if !ok {
		return nil, 0, nil, policydb.ErrConflict
	}
	p.state, p.stateRev, p.history.records = next, rev, records
	for _, domain := range domains {
		delete(p.served, domain)
	}
	if err := p.db.Commit(plan, next.Generation); err != nil {
		return nil, 0, nil, err
	}
	return plan, next.Generation, p.distributionLocked(), nil
}

// rollback is what has to change for the set to be as it was. p.mu is held.
func (p *policies) rollback(ctx context.Context, generation uint64) (upserts []policydb.Document, deletes []policydb.Key, err error) {
	was, err := p.history.back(ctx, generation)
	if err != nil {
		return nil, nil, err
	}
	snapshot := p.db.Snapshot()
	for key, r := range was {
		now := snapshot.Get(key.Kind, key.Namespace, key.Name)
		switch {
		case r != nil && !proto.Equal(r, now):
			upserts = append(upserts, policydb.Document{Resource: r})
		case r == nil && now != nil:
			deletes = append(deletes, key)
		}
	}
	return upserts, deletes, nil
}

// planOps is a plan as changes of the store; whether Profiles are among them, and
// which namespaces go.
func planOps(plan *policydb.Plan) (ops []store.Op, profiles bool, deleted []string, err error) {
	for _, c := range plan.Changes {
		key := c.Key()
		switch c.Type {
		case symbolonv1.ChangeType_CHANGE_TYPE_UNCHANGED:
			continue
		case symbolonv1.ChangeType_CHANGE_TYPE_DELETED:
			ops = append(ops, store.Delete(resourceKey(key)))
			if key.Kind == policydb.KindNamespace {
				deleted = append(deleted, key.Namespace)
			}
		default:
			op, err := putResource(c.Resource)
			if err != nil {
				return nil, false, nil, err
			}
			ops = append(ops, op)
		}
		profiles = profiles || key.Kind == policydb.KindProfile
	}
	return ops, profiles, deleted, nil
}

// errOccupied: a namespace that is to go has hosts in it.
var errOccupied = errors.New("namespace has hosts")

func (p *policies) checkVacant(ctx context.Context, namespaces []string) error {
	hosts, _, err := p.hosts.list(ctx)
	if err != nil {
		return err
	}
	for _, ns := range namespaces {
		for _, h := range hosts {
			if h.Namespace == ns {
				return fmt.Errorf("%w: %s has host %s (%s); remove the host first", errOccupied, ns, h.ID, h.Hostname)
			}
		}
	}
	return nil
}

// forExplain is the whole set compiled, at most once per generation.
func (p *policies) forExplain() (*policydb.Compiled, error) {
	s := p.snapshot()
	p.compileMu.Lock()
	defer p.compileMu.Unlock()
	if p.compiled == nil || p.compiled.Generation() != s.Generation() {
		c, err := policydb.Compile(s.All(), s.Generation())
		if err != nil {
			return nil, err
		}
		p.compiled = c
	}
	return p.compiled, nil
}

// maxErrorText bounds what an error says, bytes: clients bound what they read.
const maxErrorText = 32 << 10

// parseFiles parses all files, or says what is wrong in as many of them as fit.
// Errors: invalid_argument.
func parseFiles(files []*symbolonv1.SourceFile) ([]policydb.Document, error) {
	var docs []policydb.Document
	var text strings.Builder
	failed := 0
	for _, f := range files {
		parsed, err := policydb.Parse(f.GetName(), f.GetContent())
		if err == nil {
			docs = append(docs, parsed...)
			continue
		}
		failed++
		if text.Len() < maxErrorText {
			fmt.Fprintln(&text, err)
		}
	}
	if failed == 0 {
		return docs, nil
	}
	return nil, refused(connect.CodeInvalidArgument, strings.TrimSpace(text.String()))
}

// refused is an error whose text is bounded.
func refused(code connect.Code, text string) error {
	if len(text) > maxErrorText {
		text = strings.ToValidUTF8(text[:maxErrorText], "") + "\n… and more"
	}
	return connect.NewError(code, errors.New(text))
}
