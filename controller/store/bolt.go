package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

const (
	dirMode  = 0o700
	fileMode = 0o600
	// lockTimeout is how long Open waits for another process to let go of the file.
	lockTimeout = time.Second
)

var (
	bucketKeys = []byte("keys")
	bucketMeta = []byte("meta")
	keyRev     = []byte("revision")
	keyFormat  = []byte("format")
	// format is that of the file's contents: keys hold an 8-byte big-endian
	// revision, then the value.
	format = []byte("symbolon-store-1")
)

// Bolt is the store of a single controller: one file, nothing to install.
type Bolt struct {
	path string
	db   *bolt.DB

	// write orders commits with the publication of their events.
	write sync.Mutex
	// gate lets Close wait for running calls.
	gate   sync.RWMutex
	closed bool
	done   chan struct{}

	history *history
}

var _ Store = (*Bolt)(nil)

// Open opens or makes the file at path, and reads all of it once, so that damage
// shows at the start and not in the middle of a day. A directory that does not
// exist is made with mode 0700, the file with 0600.
// Errors: ErrLocked, ErrCorrupt, ErrNoSpace.
func Open(path string) (*Bolt, error) {
	if err := os.MkdirAll(filepath.Dir(path), dirMode); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	if st, err := os.Stat(path); err == nil && st.Mode().Perm()&^fileMode != 0 {
		if err := os.Chmod(path, fileMode); err != nil {
			return nil, fmt.Errorf("store: tighten permissions: %w", err)
		}
	}
	b := &Bolt{path: path, done: make(chan struct{})}
	var rev int64
	err := b.guard(func() error {
		db, err := bolt.Open(path, fileMode, &bolt.Options{Timeout: lockTimeout})
		if err != nil {
			return err
		}
		b.db = db
		if err := db.Update(prepare); err != nil {
			return err
		}
		return db.View(func(tx *bolt.Tx) error {
			rev = revision(tx)
			return tx.Bucket(bucketKeys).ForEach(func(k, v []byte) error {
				_, err := decode(k, v)
				return err
			})
		})
	})
	if err != nil {
		if b.db != nil {
			_ = b.guard(b.db.Close)
		}
		return nil, err
	}
	b.history = newHistory(rev)
	return b, nil
}

// prepare makes the buckets of a new file, and refuses one that is not ours.
func prepare(tx *bolt.Tx) error {
	meta, err := tx.CreateBucketIfNotExists(bucketMeta)
	if err != nil {
		return err
	}
	if _, err := tx.CreateBucketIfNotExists(bucketKeys); err != nil {
		return err
	}
	switch have := meta.Get(keyFormat); {
	case have == nil:
		return meta.Put(keyFormat, format)
	case string(have) != string(format):
		return fmt.Errorf("%w: format %q, this version reads %q", ErrCorrupt, have, format)
	}
	return nil
}

func revision(tx *bolt.Tx) int64 {
	v := tx.Bucket(bucketMeta).Get(keyRev)
	if len(v) != 8 {
		return 0
	}
	return int64(binary.BigEndian.Uint64(v))
}

func decode(k, v []byte) (KV, error) {
	if len(v) < 8 {
		return KV{}, fmt.Errorf("%w: key %q has %d bytes, want 8 or more", ErrCorrupt, k, len(v))
	}
	return KV{
		Key:         string(k),
		Value:       append([]byte{}, v[8:]...),
		ModRevision: int64(binary.BigEndian.Uint64(v)),
	}, nil
}

// guard names the errors, and turns the panics and page faults of reading a
// damaged or truncated map into one.
func (b *Bolt) guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %s: %v", ErrCorrupt, b.path, p)
		}
	}()
	err = f()
	switch {
	case err == nil:
		return nil
	case errors.Is(err, bolterrors.ErrTimeout):
		return fmt.Errorf("%w: %s", ErrLocked, b.path)
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrChecksum),
		errors.Is(err, bolterrors.ErrVersionMismatch), errors.Is(err, bolterrors.ErrInvalidMapping):
		return fmt.Errorf("%w: %s: %w", ErrCorrupt, b.path, err)
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w: %s: %w", ErrNoSpace, b.path, err)
	case errors.Is(err, ErrCorrupt), errors.Is(err, ErrNotFound), errors.Is(err, ErrInvalid),
		errors.Is(err, errCondition), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	}
	return fmt.Errorf("store: %s: %w", b.path, err)
}

// enter admits one call; the caller defers the returned function.
func (b *Bolt) enter(ctx context.Context) (leave func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	b.gate.RLock()
	if b.closed {
		b.gate.RUnlock()
		return nil, ErrClosed
	}
	return b.gate.RUnlock, nil
}

// Get implements Store.
func (b *Bolt) Get(ctx context.Context, key string) (kv KV, err error) {
	leave, err := b.enter(ctx)
	if err != nil {
		return KV{}, err
	}
	defer leave()
	err = b.guard(func() error {
		return b.db.View(func(tx *bolt.Tx) error {
			v := tx.Bucket(bucketKeys).Get([]byte(key))
			if v == nil {
				return fmt.Errorf("%w: %s", ErrNotFound, key)
			}
			kv, err = decode([]byte(key), v)
			return err
		})
	})
	return kv, err
}

// List implements Store.
func (b *Bolt) List(ctx context.Context, prefix string) (kvs []KV, rev int64, err error) {
	leave, err := b.enter(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer leave()
	err = b.guard(func() error {
		return b.db.View(func(tx *bolt.Tx) error {
			rev = revision(tx)
			c := tx.Bucket(bucketKeys).Cursor()
			for k, v := c.Seek([]byte(prefix)); k != nil && strings.HasPrefix(string(k), prefix); k, v = c.Next() {
				kv, err := decode(k, v)
				if err != nil {
					return err
				}
				kvs = append(kvs, kv)
			}
			return nil
		})
	})
	return kvs, rev, err
}

// errCondition rolls a transaction back whose condition does not hold.
var errCondition = errors.New("condition does not hold")

// Txn implements Store.
func (b *Bolt) Txn(ctx context.Context, conds []Cond, ops []Op) (rev int64, ok bool, err error) {
	if err := checkOps(ops); err != nil {
		return 0, false, err
	}
	leave, err := b.enter(ctx)
	if err != nil {
		return 0, false, err
	}
	defer leave()
	b.write.Lock()
	defer b.write.Unlock()
	var events []Event
	err = b.guard(func() error {
		return b.db.Update(func(tx *bolt.Tx) error {
			rev = revision(tx)
			keys := tx.Bucket(bucketKeys)
			for _, c := range conds {
				var have int64
				if v := keys.Get([]byte(c.Key)); len(v) >= 8 {
					have = int64(binary.BigEndian.Uint64(v))
				}
				if have != c.ModRevision {
					return errCondition
				}
			}
			events, err = apply(keys, ops, rev+1)
			if err != nil || len(events) == 0 {
				return err
			}
			rev++
			return tx.Bucket(bucketMeta).Put(keyRev, binary.BigEndian.AppendUint64(nil, uint64(rev)))
		})
	})
	if errors.Is(err, errCondition) {
		return rev, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	if len(events) > 0 {
		b.history.add(rev, events)
	}
	return rev, true, nil
}

func checkOps(ops []Op) error {
	seen := make(map[string]struct{}, len(ops))
	for _, op := range ops {
		if op.Key == "" || len(op.Key) > bolt.MaxKeySize {
			return fmt.Errorf("%w: key of %d bytes", ErrInvalid, len(op.Key))
		}
		if len(op.Value) > MaxValue {
			return fmt.Errorf("%w: value of %s has %d bytes, the limit is %d", ErrInvalid, op.Key, len(op.Value), MaxValue)
		}
		if _, twice := seen[op.Key]; twice {
			return fmt.Errorf("%w: key %s twice in one transaction", ErrInvalid, op.Key)
		}
		seen[op.Key] = struct{}{}
	}
	return nil
}

func apply(keys *bolt.Bucket, ops []Op, rev int64) ([]Event, error) {
	events := make([]Event, 0, len(ops))
	for _, op := range ops {
		k := []byte(op.Key)
		if op.Delete {
			if keys.Get(k) == nil {
				continue
			}
			if err := keys.Delete(k); err != nil {
				return nil, err
			}
			events = append(events, Event{KV: KV{Key: op.Key, ModRevision: rev}, Deleted: true})
			continue
		}
		v := append(binary.BigEndian.AppendUint64(make([]byte, 0, 8+len(op.Value)), uint64(rev)), op.Value...)
		if err := keys.Put(k, v); err != nil {
			return nil, err
		}
		events = append(events, Event{KV: KV{Key: op.Key, Value: v[8:], ModRevision: rev}})
	}
	return events, nil
}

// Watch implements Store.
func (b *Bolt) Watch(ctx context.Context, prefix string, after int64) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		for {
			events, upTo, more, err := b.history.since(prefix, after)
			if err != nil {
				yield(Event{}, err)
				return
			}
			for _, e := range events {
				e.Value = append([]byte{}, e.Value...)
				if !yield(e, nil) {
					return
				}
			}
			after = upTo
			select {
			case <-more:
			case <-b.done:
				yield(Event{}, ErrClosed)
				return
			case <-ctx.Done():
				yield(Event{}, ctx.Err())
				return
			}
		}
	}
}

// Snapshot implements Store; the format is a bbolt file, which Open opens.
func (b *Bolt) Snapshot(ctx context.Context, w io.Writer) error {
	leave, err := b.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	return b.guard(func() error {
		return b.db.View(func(tx *bolt.Tx) error {
			_, err := tx.WriteTo(w)
			return err
		})
	})
}

// Close implements Store.
func (b *Bolt) Close() error {
	b.gate.Lock()
	defer b.gate.Unlock()
	if b.closed {
		return nil
	}
	b.closed = true
	close(b.done)
	return b.guard(b.db.Close)
}
