package controller

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/policydb"
)

// How much of the past is kept. Whichever bound is met first, the oldest generation
// goes; the newest is always kept.
const (
	maxHistory      = 100
	maxHistoryBytes = 64 << 20
	// historyChunk keeps each value well below store.MaxValue.
	historyChunk = 512 << 10
	// maxMessage bounds the reason that somebody gives for a change, bytes.
	maxMessage = 1 << 10
)

// errNotKept: the history does not reach back to a generation.
var errNotKept = errors.New("not kept")

// history is what undoes the last generations, one by one: of each resource that a
// generation changed, how it was before. So it costs what changes cost, however many
// resources there are. It is guarded by policies.mu.
type history struct {
	store store.Store
	// records are of generations without a gap, up to the one in force, oldest first.
	records []generationRecord
}

// generationRecord says when, by whom and why, and where the undo is.
type generationRecord struct {
	Generation uint64    `json:"generation"`
	Time       time.Time `json:"time"`
	Actor      string    `json:"actor"`
	Message    string    `json:"message,omitempty"`
	RollbackOf uint64    `json:"rollback_of,omitempty"`
	Created    uint32    `json:"created,omitempty"`
	Updated    uint32    `json:"updated,omitempty"`
	Deleted    uint32    `json:"deleted,omitempty"`
	// Chunks and Bytes are of the undo; none where history begins.
	Chunks int `json:"chunks,omitempty"`
	Bytes  int `json:"bytes,omitempty"`
}

func (r *generationRecord) key() string { return fmt.Sprintf("%s%016x", historyPrefix, r.Generation) }

func (r *generationRecord) chunkKey(i int) string {
	return fmt.Sprintf("%s%016x/%06x", undoPrefix, r.Generation, i)
}

func (r *generationRecord) proto() *symbolonv1.PolicyGeneration {
	return &symbolonv1.PolicyGeneration{
		Generation: r.Generation, Time: timestamppb.New(r.Time), Actor: r.Actor, Message: r.Message,
		RollbackOf: r.RollbackOf, Created: r.Created, Updated: r.Updated, Deleted: r.Deleted,
	}
}

// openHistory reads the records. One that does not lead up to the generation in force
// (an older version has written since) is of no use: history begins anew.
func openHistory(ctx context.Context, st store.Store, generation uint64, now time.Time) (*history, error) {
	h := &history{store: st}
	kvs, _, err := st.List(ctx, historyPrefix)
	if err != nil {
		return nil, fmt.Errorf("history: %w", err)
	}
	for _, kv := range kvs {
		var r generationRecord
		if err := getJSON(kv, &r); err != nil {
			return nil, fmt.Errorf("history: %w", err)
		}
		h.records = append(h.records, r)
	}
	if h.reaches(generation) {
		return h, nil
	}
	var ops []store.Op
	for _, r := range h.records {
		ops = append(ops, r.remove()...)
	}
	first := generationRecord{Generation: generation, Time: now, Actor: "controller", Message: "history begins"}
	op, err := putJSON(first.key(), first)
	if err != nil {
		return nil, fmt.Errorf("history: %w", err)
	}
	// The record of this very generation may be among those that go.
	ops = append(slices.DeleteFunc(ops, func(o store.Op) bool { return o.Key == op.Key }), op)
	if _, _, err := st.Txn(ctx, nil, ops); err != nil {
		return nil, fmt.Errorf("history: %w", err)
	}
	h.records = []generationRecord{first}
	return h, nil
}

// reaches tells whether the records are without a gap and end at a generation.
func (h *history) reaches(generation uint64) bool {
	n := len(h.records)
	for i, r := range h.records {
		if r.Generation != generation-uint64(n-1-i) {
			return false
		}
	}
	return n > 0
}

func (r *generationRecord) remove() []store.Op {
	ops := []store.Op{store.Delete(r.key())}
	for i := range r.Chunks {
		ops = append(ops, store.Delete(r.chunkKey(i)))
	}
	return ops
}

// add is a new record as changes of the store, and the records as they are then.
func (h *history) add(r generationRecord, changes []policydb.Change) (ops []store.Op, records []generationRecord, err error) {
	undo, err := encodeUndo(changes)
	if err != nil {
		return nil, nil, err
	}
	for _, c := range changes {
		switch c.Type {
		case symbolonv1.ChangeType_CHANGE_TYPE_CREATED:
			r.Created++
		case symbolonv1.ChangeType_CHANGE_TYPE_UPDATED:
			r.Updated++
		case symbolonv1.ChangeType_CHANGE_TYPE_DELETED:
			r.Deleted++
		}
	}
	r.Bytes = len(undo)
	for chunk := range slices.Chunk(undo, historyChunk) {
		ops = append(ops, store.Put(r.chunkKey(r.Chunks), chunk))
		r.Chunks++
	}
	op, err := putJSON(r.key(), r)
	if err != nil {
		return nil, nil, err
	}
	ops = append(ops, op)
	records = append(slices.Clone(h.records), r)
	size := 0
	for _, x := range records {
		size += x.Bytes
	}
	for len(records) > 1 && (len(records) > maxHistory || size > maxHistoryBytes) {
		size -= records[0].Bytes
		ops = append(ops, records[0].remove()...)
		records = records[1:]
	}
	return ops, records, nil
}

// past is resources as they were: nil where there was none.
type past map[policydb.Key]*symbolonv1.Resource

// find is the record of a generation.
// Errors: errNotKept.
func (h *history) find(generation uint64) (*generationRecord, error) {
	for i := range h.records {
		if h.records[i].Generation == generation {
			return &h.records[i], nil
		}
	}
	first, last := h.records[0].Generation, h.records[len(h.records)-1].Generation
	return nil, fmt.Errorf("generation %d is %w: the history has %d to %d", generation, errNotKept, first, last)
}

// back is what was other than now at the end of a generation: all that later ones
// changed, as it was. Errors: errNotKept, the store's.
func (h *history) back(ctx context.Context, generation uint64) (past, error) {
	if _, err := h.find(generation); err != nil {
		return nil, err
	}
	was := make(past)
	for _, r := range slices.Backward(h.records) {
		if r.Generation == generation {
			break
		}
		if err := h.undo(ctx, &r, was); err != nil {
			return nil, err
		}
	}
	return was, nil
}

// undo puts into was how things were before a generation.
func (h *history) undo(ctx context.Context, r *generationRecord, was past) error {
	data := make([]byte, 0, r.Bytes)
	for i := range r.Chunks {
		kv, err := h.store.Get(ctx, r.chunkKey(i))
		if err != nil {
			return fmt.Errorf("history of generation %d: %w", r.Generation, err)
		}
		data = append(data, kv.Value...)
	}
	if err := decodeUndo(data, was); err != nil {
		return fmt.Errorf("%w: history of generation %d: %w", store.ErrCorrupt, r.Generation, err)
	}
	return nil
}

// The undo of a generation is a row of records: kind, namespace and name, each after
// its length, and the resource as it was after its length plus one; 0: there was none.

func encodeUndo(changes []policydb.Change) ([]byte, error) {
	var b []byte
	for _, c := range changes {
		if c.Type == symbolonv1.ChangeType_CHANGE_TYPE_UNCHANGED {
			continue
		}
		key := c.Key()
		for _, s := range []string{key.Kind, key.Namespace, key.Name} {
			b = append(binary.AppendUvarint(b, uint64(len(s))), s...)
		}
		if c.Previous == nil {
			b = binary.AppendUvarint(b, 0)
			continue
		}
		r, err := proto.MarshalOptions{Deterministic: true}.Marshal(c.Previous)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
		b = append(binary.AppendUvarint(b, uint64(len(r))+1), r...)
	}
	return b, nil
}

var errTruncated = errors.New("it ends too early")

func decodeUndo(b []byte, was past) error {
	length := func() (uint64, error) {
		n, size := binary.Uvarint(b)
		if size <= 0 {
			return 0, errTruncated
		}
		b = b[size:]
		return n, nil
	}
	take := func(n uint64) ([]byte, error) {
		if n > uint64(len(b)) {
			return nil, errTruncated
		}
		out := b[:n]
		b = b[n:]
		return out, nil
	}
	for len(b) > 0 {
		var parts [3]string
		for i := range parts {
			n, err := length()
			if err != nil {
				return err
			}
			s, err := take(n)
			if err != nil {
				return err
			}
			parts[i] = string(s)
		}
		key := policydb.Key{Kind: parts[0], Namespace: parts[1], Name: parts[2]}
		n, err := length()
		if err != nil {
			return err
		}
		if n == 0 {
			was[key] = nil
			continue
		}
		data, err := take(n - 1)
		if err != nil {
			return err
		}
		r := &symbolonv1.Resource{}
		if err := proto.Unmarshal(data, r); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
		if policydb.KeyOf(r) != key {
			return fmt.Errorf("%s stands under %s", policydb.KeyOf(r), key)
		}
		was[key] = r
	}
	return nil
}

// checkMessage bounds what somebody gives as a reason: it is shown on terminals.
func checkMessage(s string) error {
	if len(s) > maxMessage {
		return invalidf("message is %d bytes long, at most %d are kept", len(s), maxMessage)
	}
	if !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return unicode.IsControl(r) && r != '\n' }) {
		return invalidf("message holds control characters")
	}
	return nil
}
