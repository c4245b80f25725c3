package controller

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/store"
)

const (
	// edgeWriteEvery gathers changes: edges are written behind, and a crash forgets at
	// most so much of their counts.
	edgeWriteEvery = 30 * time.Second
	// edgeWriteBatch bounds one transaction.
	edgeWriteBatch = 1000
	// edgeAddressShare is the part of a namespace's room that edges may take whose ends
	// have not all proved an identity: anybody can make those.
	edgeAddressShare = 4
)

// edgeRecord is an edge as kept.
type edgeRecord struct {
	id        [sha256.Size]byte
	namespace string
	from, to  *edgeEnd
	// edge is changed under the book's lock only; its From and To are 0 and 1.
	edge    *symbolonv1.Edge
	host    string // that reported it first; empty: nobody knows
	in      *edgeRoom
	element *list.Element
}

func (r *edgeRecord) key() string {
	key := edgePrefix + r.namespace + "|" + hex.EncodeToString(r.id[:16])
	if r.host != "" {
		key += "|" + r.host
	}
	return key
}

// policyHits counts what a policy decided.
type policyHits struct {
	Connections uint64    `json:"connections"`
	Last        time.Time `json:"last"`
}

// edgeBook is what hosts reported of who reached whom: in memory, and behind it in the
// store. It is bounded for each namespace; where there is no room, the host with the most
// edges there loses the one that was not seen for the longest.
type edgeBook struct {
	store     store.Store
	now       func() time.Time
	limit     int // edges for each namespace
	retention time.Duration

	mu         sync.Mutex
	records    map[[sha256.Size]byte]*edgeRecord
	namespaces map[string]*[2]*edgeRoom // 1: not all ends are proven
	ends       map[[sha256.Size]byte]*sharedEnd
	hits       map[string]*policyHits
	dirty      map[string]*edgeRecord // by key; nil: deleted
	dirtyHits  map[string]bool
	lost       uint64 // connections
	evicted    uint64
}

// sharedEnd is an end with the number of records that have it.
type sharedEnd struct {
	*edgeEnd
	uses int
}

// openEdges reads what was kept.
func openEdges(ctx context.Context, st store.Store, cfg EdgesConfig, td spiffeid.TrustDomain, now func() time.Time) (*edgeBook, error) {
	b := &edgeBook{
		store: st, now: now, limit: cfg.PerNamespace, retention: cfg.Retention,
		records: make(map[[sha256.Size]byte]*edgeRecord), namespaces: make(map[string]*[2]*edgeRoom),
		ends: make(map[[sha256.Size]byte]*sharedEnd), hits: make(map[string]*policyHits),
		dirty: make(map[string]*edgeRecord), dirtyHits: make(map[string]bool),
	}
	kvs, _, err := st.List(ctx, edgePrefix)
	if err != nil {
		return nil, fmt.Errorf("edges: %w", err)
	}
	stored := make([]takenEdge, len(kvs))
	for i, kv := range kvs {
		if stored[i], err = getEdge(kv, td); err != nil {
			return nil, fmt.Errorf("edges: %w", err)
		}
	}
	slices.SortFunc(stored, func(x, y takenEdge) int {
		return x.edge.GetLast().AsTime().Compare(y.edge.GetLast().AsTime())
	})
	for _, t := range stored {
		b.put(t)
	}
	clear(b.dirty)
	kvs, _, err = st.List(ctx, hitsPrefix)
	if err != nil {
		return nil, fmt.Errorf("edges: %w", err)
	}
	for _, kv := range kvs {
		h := &policyHits{}
		if err := getJSON(kv, h); err != nil {
			return nil, fmt.Errorf("edges: %w", err)
		}
		b.hits[kv.Key[len(hitsPrefix):]] = h
	}
	return b, nil
}

// add merges what a host reported. counts tells whether a policy is one that a
// namespace's workloads can have been judged by.
func (b *edgeBook) add(taken []takenEdge, lost uint64, counts func(policy, namespace string) bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lost = saturated(b.lost, lost)
	for _, t := range taken {
		b.put(t)
		// Each side counts what its own policies decided, or they would count twice.
		if t.edge.GetReporter() != symbolonv1.Reporter_REPORTER_SERVER {
			b.hit(t.edge.GetClientPolicy(), t, counts)
		}
		if t.edge.GetReporter() != symbolonv1.Reporter_REPORTER_CLIENT {
			b.hit(t.edge.GetServerPolicy(), t, counts)
		}
	}
}

func (b *edgeBook) hit(policy string, t takenEdge, counts func(policy, namespace string) bool) {
	namespace := t.namespace
	// A foreign end's path is no namespace of ours, or a host could count elsewhere.
	if policy == t.edge.GetServerPolicy() && t.edge.GetReporter() == symbolonv1.Reporter_REPORTER_LOCAL && !t.to.foreign {
		namespace = t.to.message.GetNamespace()
	}
	if policy == "" || t.edge.GetConnections() == 0 || !counts(policy, namespace) {
		return
	}
	h := b.hits[policy]
	if h == nil {
		h = &policyHits{}
		b.hits[policy] = h
	}
	h.Connections = saturated(h.Connections, t.edge.GetConnections())
	if last := t.edge.GetLast().AsTime(); last.After(h.Last) {
		h.Last = last
	}
	b.dirtyHits[policy] = true
}

// put merges one edge, or makes room for it.
func (b *edgeBook) put(t takenEdge) {
	id := edgeID(t)
	r := b.records[id]
	if r != nil {
		r.in.seen(r)
		b.dirty[r.key()] = r
		merge(r.edge, t.edge)
		return
	}
	rooms := b.namespaces[t.namespace]
	if rooms == nil {
		rooms = &[2]*edgeRoom{newEdgeRoom(), newEdgeRoom()}
		b.namespaces[t.namespace] = rooms
	}
	class, room := 0, b.limit
	t.edge.AddressOnly = !t.from.proven() || !t.to.proven()
	if t.edge.AddressOnly {
		class, room = 1, b.limit/edgeAddressShare
	}
	for rooms[class].size >= room {
		b.forget(rooms[class].leaves())
		b.evicted++
	}
	b.namespaces[t.namespace] = rooms // forget may have taken the last
	r = &edgeRecord{id: id, namespace: t.namespace, from: b.share(t.from), to: b.share(t.to), edge: t.edge, host: t.host}
	r.edge.From, r.edge.To = 0, 1
	rooms[class].add(r)
	b.records[id] = r
	b.dirty[r.key()] = r
}

func merge(e, more *symbolonv1.Edge) {
	e.Connections = saturated(e.GetConnections(), more.GetConnections())
	e.BytesSent = saturated(e.GetBytesSent(), more.GetBytesSent())
	e.BytesReceived = saturated(e.GetBytesReceived(), more.GetBytesReceived())
	if more.GetFirst().AsTime().Before(e.GetFirst().AsTime()) {
		e.First = more.GetFirst()
	}
	if more.GetLast().AsTime().After(e.GetLast().AsTime()) {
		e.Last = more.GetLast()
	}
	if more.GetExternalAddress() != "" {
		e.ExternalAddress = more.GetExternalAddress()
	}
}

// saturated adds without wrapping around: numbers may be a host's word.
func saturated(a, b uint64) uint64 { return a + min(b, math.MaxUint64-a) }

func (b *edgeBook) share(e *edgeEnd) *edgeEnd {
	s := b.ends[e.id]
	if s == nil {
		s = &sharedEnd{edgeEnd: e}
		b.ends[e.id] = s
	}
	s.uses++
	return s.edgeEnd
}

func (b *edgeBook) forget(r *edgeRecord) {
	r.in.remove(r)
	delete(b.records, r.id)
	b.dirty[r.key()] = nil
	for _, e := range []*edgeEnd{r.from, r.to} {
		s := b.ends[e.id]
		if s.uses--; s.uses == 0 {
			delete(b.ends, e.id)
		}
	}
	if rooms := b.namespaces[r.namespace]; rooms[0].size+rooms[1].size == 0 {
		delete(b.namespaces, r.namespace)
	}
}

// prune forgets edges that are too old, and the hits of policies that are no more.
func (b *edgeBook) prune(exists func(policy string) bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	oldest := b.now().Add(-b.retention)
	for _, r := range b.records {
		if r.edge.GetLast().AsTime().Before(oldest) {
			b.forget(r)
		}
	}
	for policy := range b.hits {
		if !exists(policy) {
			delete(b.hits, policy)
			b.dirtyHits[policy] = true
		}
	}
}

// edgeID is of what an edge is apart from counts and times.
func edgeID(t takenEdge) [sha256.Size]byte {
	e := t.edge
	h := sha256.New()
	h.Write(t.from.id[:])
	h.Write(t.to.id[:])
	for _, s := range []string{
		t.namespace, e.GetProtocol(), e.GetClientPolicy(), e.GetServerPolicy(), e.GetWouldVerdict(), e.GetWouldPolicy(),
	} {
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(s))))
		h.Write([]byte(s))
	}
	local := uint32(0)
	if e.GetLocal() {
		local = 1
	}
	for _, n := range []uint32{
		e.GetPort(), uint32(e.GetOutcome()), uint32(e.GetReason()), uint32(e.GetPeerReason()),
		uint32(e.GetProtection()), local, uint32(e.GetReporter()),
	} {
		h.Write(binary.BigEndian.AppendUint32(nil, n))
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// run writes changes behind, until ctx ends; then it writes the rest.
func (b *edgeBook) run(ctx context.Context, failed func(error)) {
	tick := time.NewTicker(edgeWriteEvery)
	defer tick.Stop()
	for ended := false; !ended; {
		select {
		case <-ctx.Done():
			ended = true
		case <-tick.C:
		}
		if err := b.flush(context.WithoutCancel(ctx)); err != nil {
			failed(err)
		}
	}
}

// flush writes what changed. What could not be written stays to be written later.
func (b *edgeBook) flush(ctx context.Context) error {
	b.mu.Lock()
	dirty, hits := b.dirty, b.dirtyHits
	b.dirty, b.dirtyHits = make(map[string]*edgeRecord), make(map[string]bool)
	var failure error
	ops := make([]store.Op, 0, len(dirty)+len(hits))
	add := func(op store.Op, err error) {
		if err != nil {
			failure = err
			return
		}
		ops = append(ops, op)
	}
	for key, r := range dirty {
		if r == nil {
			add(store.Delete(key), nil)
		} else {
			add(putEdge(r))
		}
	}
	for policy := range hits {
		if h := b.hits[policy]; h == nil {
			add(store.Delete(hitsPrefix+policy), nil)
		} else {
			add(putJSON(hitsPrefix+policy, h))
		}
	}
	b.mu.Unlock()
	for batch := range slices.Chunk(ops, edgeWriteBatch) {
		if _, _, err := b.store.Txn(ctx, nil, batch); err != nil {
			failure = err
			b.retry(batch, dirty)
		}
	}
	if failure != nil {
		return fmt.Errorf("edges: %w", failure)
	}
	return nil
}

// retry marks what could not be written, unless it has changed again meanwhile.
func (b *edgeBook) retry(batch []store.Op, dirty map[string]*edgeRecord) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, op := range batch {
		r, isEdge := dirty[op.Key]
		if !isEdge {
			b.dirtyHits[op.Key[len(hitsPrefix):]] = true
		} else if _, again := b.dirty[op.Key]; !again {
			b.dirty[op.Key] = r
		}
	}
}

func putEdge(r *edgeRecord) (store.Op, error) {
	v, err := proto.MarshalOptions{Deterministic: true}.Marshal(&symbolonv1.EdgeSet{
		Ends: []*symbolonv1.EdgeEnd{r.from.message, r.to.message}, Edges: []*symbolonv1.Edge{r.edge},
	})
	if err != nil {
		return store.Op{}, fmt.Errorf("%s: %w", r.key(), err)
	}
	return store.Put(r.key(), v), nil
}

// ownersOfEdge are the namespace and the host in a record's key.
func ownersOfEdge(key string) (namespace, host string) {
	namespace, rest, _ := strings.Cut(strings.TrimPrefix(key, edgePrefix), "|")
	_, host, _ = strings.Cut(rest, "|")
	return namespace, host
}

func getEdge(kv store.KV, td spiffeid.TrustDomain) (takenEdge, error) {
	set := &symbolonv1.EdgeSet{}
	err := proto.Unmarshal(kv.Value, set)
	if err == nil && (len(set.GetEnds()) != 2 || len(set.GetEdges()) != 1) {
		err = fmt.Errorf("%d ends and %d edges", len(set.GetEnds()), len(set.GetEdges()))
	}
	var t takenEdge
	t.namespace, t.host = ownersOfEdge(kv.Key)
	if err == nil {
		t.edge = set.GetEdges()[0]
		t.from, err = newEdgeEnd(set.GetEnds()[0], td)
	}
	if err == nil {
		t.to, err = newEdgeEnd(set.GetEnds()[1], td)
	}
	if err != nil {
		return t, fmt.Errorf("%w: %s: %w", store.ErrCorrupt, kv.Key, err)
	}
	return t, nil
}
