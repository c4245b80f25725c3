package controller

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/policydb"
)

// hosts are the enrolled ones, and the join tokens that make them.
type hosts struct {
	store store.Store
	// membership orders enrolment against the deletion of namespaces: a host is
	// never in one that does not exist.
	membership sync.Mutex
}

// get returns a host with the revision to condition a change on, or
// store.ErrNotFound.
func (h *hosts) get(ctx context.Context, id string) (*hostRecord, int64, error) {
	kv, err := h.store.Get(ctx, hostPrefix+id)
	if err != nil {
		return nil, 0, err
	}
	r := &hostRecord{}
	return r, kv.ModRevision, getJSON(kv, r)
}

// list returns all hosts by ID, and the revision to watch from.
func (h *hosts) list(ctx context.Context) ([]*hostRecord, int64, error) {
	return listJSON[hostRecord](ctx, h.store, hostPrefix)
}

// update changes a host that still exists; one that was removed stays removed.
// Errors: store.ErrNotFound.
func (h *hosts) update(ctx context.Context, id string, change func(*hostRecord)) error {
	for {
		r, rev, err := h.get(ctx, id)
		if err != nil {
			return err
		}
		change(r)
		op, err := putJSON(hostPrefix+id, r)
		if err != nil {
			return err
		}
		_, ok, err := h.store.Txn(ctx, []store.Cond{{Key: hostPrefix + id, ModRevision: rev}}, []store.Op{op})
		if err != nil || ok {
			return err
		}
	}
}

// remove deletes a host, and bars what it enrolled as: its certificate or its instance it
// has still. With readmit that may come in again, as a new host.
// Errors: store.ErrNotFound.
func (h *hosts) remove(ctx context.Context, id string, readmit bool) error {
	for {
		r, rev, err := h.get(ctx, id)
		if err != nil {
			return err
		}
		ops := []store.Op{store.Delete(hostPrefix + id)}
		for _, name := range r.identities() {
			op := store.Delete(identityKey(name))
			if !readmit {
				if op, err = putJSON(identityKey(name), identityRecord{Identity: name, HostID: id, Removed: true}); err != nil {
					return err
				}
			}
			ops = append(ops, op)
		}
		_, ok, err := h.store.Txn(ctx, []store.Cond{{Key: hostPrefix + id, ModRevision: rev}}, ops)
		if err != nil || ok {
			return err
		}
	}
}

// identities are the names of what is this host and no other.
func (r *hostRecord) identities() (names []string) {
	if r.Identity != "" {
		names = append(names, r.Identity)
	}
	if r.Names != "" {
		names = append(names, r.Names)
	}
	if name := instancePrefix + r.Instance; r.Instance != "" && name != r.Identity {
		names = append(names, name)
	}
	return names
}

var (
	errTokenUnknown = errors.New("join token unknown")
	errTokenUsed    = errors.New("join token already used")
	errTokenExpired = errors.New("join token expired")
	// errBarred: the host of an identity was removed.
	errBarred = errors.New("an operator has removed this host: enrol it with a new join token")
	// errNoNamespace: hosts of an identity would be in one that does not exist.
	errNoNamespace = errors.New("the namespace that hosts enrol in does not exist")
)

// admit makes or renews the host that an identity stands for. fresh fills it in; it gets
// the host that there is, or nil. barring are further names by which a removed host would be
// known. Errors: errBarred, errNoNamespace, those of fresh.
func (h *hosts) admit(ctx context.Context, identity string, fresh func(*hostRecord) (*hostRecord, error), barring ...string) (*hostRecord, error) {
	h.membership.Lock()
	defer h.membership.Unlock()
	key := identityKey(identity)
	for {
		known, revision := identityRecord{}, int64(0)
		kv, err := h.store.Get(ctx, key)
		switch {
		case err == nil:
			revision = kv.ModRevision
			if err := getJSON(kv, &known); err != nil {
				return nil, err
			}
		case !errors.Is(err, store.ErrNotFound):
			return nil, err
		}
		if known.Removed {
			return nil, errBarred
		}
		// What bars them is not there, and still not in the moment that the host is made.
		var conds []store.Cond
		for _, name := range barring {
			conds = append(conds, store.Cond{Key: identityKey(name)})
			if _, err := h.store.Get(ctx, identityKey(name)); err == nil {
				return nil, errBarred
			} else if !errors.Is(err, store.ErrNotFound) {
				return nil, err
			}
		}
		var was *hostRecord
		var wasRevision int64
		if known.HostID != "" {
			if was, wasRevision, err = h.get(ctx, known.HostID); errors.Is(err, store.ErrNotFound) {
				return nil, errBarred // removed this moment, and its identity with it
			} else if err != nil {
				return nil, err
			}
		}
		host, err := fresh(was)
		if err != nil {
			return nil, err
		}
		ns := resourceKey(policydb.Key{Kind: policydb.KindNamespace, Namespace: host.Namespace})
		namespace, err := h.store.Get(ctx, ns)
		if errors.Is(err, store.ErrNotFound) {
			return nil, fmt.Errorf("%w: %s", errNoNamespace, host.Namespace)
		}
		if err != nil {
			return nil, err
		}
		identified, err := putJSON(key, identityRecord{Identity: identity, HostID: host.ID})
		if err != nil {
			return nil, err
		}
		made, err := putJSON(hostPrefix+host.ID, host)
		if err != nil {
			return nil, err
		}
		unbound, ops, err := h.bind(ctx, host, identity, false)
		if err != nil {
			return nil, err
		}
		_, ok, err := h.store.Txn(ctx, append(append(conds, unbound...),
			store.Cond{Key: key, ModRevision: revision},
			store.Cond{Key: hostPrefix + host.ID, ModRevision: wasRevision},
			store.Cond{Key: ns, ModRevision: namespace.ModRevision},
		), append(ops, identified, made))
		if err != nil || ok {
			return host, err
		}
	}
}

// bind is the part of an enrolment that makes an instance this host and no other; none, if
// there is no instance, or it is what the host enrols as. A new join token brings back an
// instance whose host was removed, as it does any machine.
// Errors: errInstanceTaken, errBarred.
func (h *hosts) bind(ctx context.Context, host *hostRecord, identity string, byToken bool) ([]store.Cond, []store.Op, error) {
	name := instancePrefix + host.Instance
	if host.Instance == "" || name == identity {
		return nil, nil, nil
	}
	cond, known := store.Cond{Key: identityKey(name)}, identityRecord{}
	kv, err := h.store.Get(ctx, cond.Key)
	switch {
	case err == nil:
		cond.ModRevision = kv.ModRevision
		if err := getJSON(kv, &known); err != nil {
			return nil, nil, err
		}
	case !errors.Is(err, store.ErrNotFound):
		return nil, nil, err
	}
	if known.HostID != "" && known.HostID != host.ID {
		_, _, err := h.get(ctx, known.HostID)
		switch {
		case err == nil && !known.Removed:
			return nil, nil, fmt.Errorf("%w, %s: remove that one first ('symbolon host remove'), if it is no more", errInstanceTaken, known.HostID)
		case err != nil && !errors.Is(err, store.ErrNotFound):
			return nil, nil, err
		case !byToken:
			return nil, nil, errBarred
		}
	}
	bound, err := putJSON(cond.Key, identityRecord{Identity: name, HostID: host.ID})
	if err != nil {
		return nil, nil, err
	}
	return []store.Cond{cond}, []store.Op{bound}, nil
}

// spend makes the host that a token stands for, and marks the token used, in one
// transaction: of any number of tries at once, one wins. fresh checks the token
// against secret and clock, and fills in the host.
func (h *hosts) spend(ctx context.Context, tokenID string, fresh func(*tokenRecord) (*hostRecord, error)) (*hostRecord, error) {
	h.membership.Lock()
	defer h.membership.Unlock()
	for {
		kv, err := h.store.Get(ctx, tokenPrefix+tokenID)
		if errors.Is(err, store.ErrNotFound) {
			return nil, errTokenUnknown
		}
		if err != nil {
			return nil, err
		}
		token := &tokenRecord{}
		if err := getJSON(kv, token); err != nil {
			return nil, err
		}
		host, err := fresh(token)
		if err != nil {
			return nil, err
		}
		ns := resourceKey(policydb.Key{Kind: policydb.KindNamespace, Namespace: host.Namespace})
		namespace, err := h.store.Get(ctx, ns)
		if errors.Is(err, store.ErrNotFound) {
			return nil, fmt.Errorf("%w: its namespace %s was deleted", errTokenUnknown, host.Namespace)
		}
		if err != nil {
			return nil, err
		}
		token.UsedBy = host.ID
		spent, err := putJSON(kv.Key, token)
		if err != nil {
			return nil, err
		}
		made, err := putJSON(hostPrefix+host.ID, host)
		if err != nil {
			return nil, err
		}
		conds, ops, err := h.bind(ctx, host, "", true)
		if err != nil {
			return nil, err
		}
		_, ok, err := h.store.Txn(ctx, append(conds,
			store.Cond{Key: kv.Key, ModRevision: kv.ModRevision},
			store.Cond{Key: hostPrefix + host.ID},
			store.Cond{Key: ns, ModRevision: namespace.ModRevision},
		), append(ops, spent, made))
		if err != nil {
			return nil, err
		}
		if ok {
			return host, nil
		}
		// Somebody changed one of these: look again.
	}
}
