// Package store keeps the controller's state: a small ordered map of keys to
// bytes with revisions, transactions and watches.
//
// The contract is the part of etcd's that a controller needs, so that one machine
// can do without etcd (Open, on a bbolt file) and a cluster can use it, under the
// same code. Package storetest holds every implementation to the contract.
//
// A revision counts the transactions that changed something, from 1. Each key
// remembers the revision of its last change; 0 stands for "does not exist".
package store

import (
	"context"
	"errors"
	"io"
	"iter"
)

// MaxValue is the largest value that every implementation takes: etcd's default
// request limit is 1.5 MiB, keys and framing included.
const MaxValue = 1 << 20

var (
	// ErrNotFound: the key does not exist.
	ErrNotFound = errors.New("store: key not found")
	// ErrCompacted: the events after the asked revision are no longer all known.
	// List again, and watch from the revision that it returns.
	ErrCompacted = errors.New("store: revision compacted")
	// ErrClosed: the store was closed.
	ErrClosed = errors.New("store: closed")
	// ErrCorrupt: the data cannot be read. Restore a snapshot.
	ErrCorrupt = errors.New("store: corrupt")
	// ErrNoSpace: the disk is full. Nothing was changed.
	ErrNoSpace = errors.New("store: no space left")
	// ErrLocked: another process has the store open.
	ErrLocked = errors.New("store: in use by another process")
	// ErrInvalid: the call itself is wrong, such as an empty or a repeated key.
	ErrInvalid = errors.New("store: invalid")
)

// KV is one key as of one revision.
type KV struct {
	Key         string
	Value       []byte
	ModRevision int64
}

// Cond holds if the key was last changed in exactly this revision; 0: if it does
// not exist.
type Cond struct {
	Key         string
	ModRevision int64
}

// Op is one change of a transaction; make it with Put or Delete.
type Op struct {
	Key    string
	Value  []byte
	Delete bool
}

// Put sets a key.
func Put(key string, value []byte) Op { return Op{Key: key, Value: value} }

// Delete removes a key; of one that does not exist, it changes nothing.
func Delete(key string) Op { return Op{Key: key, Delete: true} }

// Event is one change of one key. ModRevision is the revision of the change; a
// deletion has no value.
type Event struct {
	KV
	Deleted bool
}

// Store is safe for concurrent use. Values are the caller's to keep: they are
// copies, in both directions. Every method returns ErrClosed after Close.
type Store interface {
	// Get returns one key, or ErrNotFound.
	Get(ctx context.Context, key string) (KV, error)
	// List returns the keys with the prefix ("" for all), in byte order, and the
	// revision of the whole store that this is a consistent view of.
	List(ctx context.Context, prefix string) ([]KV, int64, error)
	// Txn applies all ops if all conds hold, and returns the store's revision after
	// it. ok is false, and nothing changed, if a condition did not hold. On an error
	// nothing changed. A key may stand in at most one op. When Txn returns, the
	// change is durable and visible.
	Txn(ctx context.Context, conds []Cond, ops []Op) (rev int64, ok bool, err error)
	// Watch yields the events of keys with the prefix in revisions greater than
	// after, in order, and blocks for more until ctx ends or the caller breaks. Its
	// last element may be an error: ErrCompacted, ErrClosed or ctx's.
	Watch(ctx context.Context, prefix string, after int64) iter.Seq2[Event, error]
	// Snapshot writes a consistent copy, in the implementation's own format, while
	// the store goes on working.
	Snapshot(ctx context.Context, w io.Writer) error
	// Close ends all watches and waits for running calls.
	Close() error
}
