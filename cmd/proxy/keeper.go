package main

import (
	"context"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/internal/handover"
)

// keepDelay gathers new SVIDs, which come in crowds, into one snapshot. Policy does
// not wait: a policy that was in force must not be followed by an older one.
const keepDelay = 500 * time.Millisecond

// slots are the names of the snapshot in the service manager's store. There are two,
// so that the next one is there before the last one goes.
var slots = [2]string{"snapshot-0", "snapshot-1"}

// keeper keeps a fresh snapshot with the service manager, and makes those that one
// process passes to the next.
type keeper struct {
	store handover.Store
	log   *zap.Logger
	build func() (*handover.Snapshot, error)

	dirty chan struct{}

	mu     sync.Mutex
	slot   int // of the last snapshot
	serial uint64
	known  bool // slot is where the last process has left its own
	begun  bool
	active bool // this process is the one that keeps
}

func newKeeper(store handover.Store, log *zap.Logger, build func() (*handover.Snapshot, error)) *keeper {
	return &keeper{store: store, log: log, build: build, dirty: make(chan struct{}, 1)}
}

// run keeps until ctx ends: at once, when it is told, and at the end.
func (k *keeper) run(ctx context.Context) {
	k.mu.Lock()
	k.active = k.store.Available()
	k.mu.Unlock()
	k.save()
	for {
		select {
		case <-ctx.Done():
			k.save()
			k.mu.Lock()
			k.active = false
			k.mu.Unlock()
			return
		case <-k.dirty:
		}
		select {
		case <-ctx.Done():
		case <-time.After(keepDelay):
			k.save()
		}
	}
}

// changed tells that SVIDs are others.
func (k *keeper) changed() {
	select {
	case k.dirty <- struct{}{}:
	default:
	}
}

// save replaces what the service manager has. If that fails, it shall have nothing:
// the next process would decide by something older than this one.
func (k *keeper) save() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.active {
		return
	}
	if !k.begun { // what of earlier processes is in the way
		k.begun = true
		if k.known {
			_ = k.store.Remove(slots[1-k.slot])
		} else {
			k.removeAll()
		}
	}
	f, err := k.sealed(1 - k.slot)
	if err == nil {
		err = put(k.store, f)
		_ = f.Close()
	}
	if err != nil {
		k.log.Error("what is known is not kept: after a restart nothing is allowed until the controller has answered", zap.Error(err))
		k.removeAll()
		return
	}
	_ = k.store.Remove(slots[k.slot]) // an error would have shown already
	k.slot = 1 - k.slot
}

// forget takes everything out of the store, for a host that is none any more.
func (k *keeper) forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.active = false
	k.removeAll()
}

func (k *keeper) removeAll() {
	for _, name := range slots {
		if err := k.store.Remove(name); err != nil && !errors.Is(err, handover.ErrNoStore) {
			k.log.Error("an older snapshot stays with the service manager", zap.Error(err))
		}
	}
}

// succeeds says where the last process has left its snapshot.
func (k *keeper) succeeds(slot int, serial uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.slot, k.serial, k.known = slot, max(serial, k.serial), true
}

// position is what the next process must know to replace this one's snapshot.
func (k *keeper) position() []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	return binary.BigEndian.AppendUint64([]byte{byte(k.slot)}, k.serial)
}

// takePosition reads position's.
func (k *keeper) takePosition(b []byte) error {
	if len(b) != 9 || int(b[0]) >= len(slots) {
		return fmt.Errorf("handover: a position of %d bytes", len(b))
	}
	k.succeeds(int(b[0]), binary.BigEndian.Uint64(b[1:]))
	return nil
}

// pass is a snapshot for the next process, under the name that the store knows the
// last one by. The caller closes it.
func (k *keeper) pass() (*os.File, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.sealed(k.slot)
}

// sealed is a new snapshot; the caller holds the lock and closes it.
func (k *keeper) sealed(slot int) (*os.File, error) {
	s, err := k.build()
	if err != nil {
		return nil, err
	}
	defer s.Wipe()
	k.serial++
	s.Serial = k.serial
	data, err := s.Marshal()
	if err != nil {
		return nil, err
	}
	defer clear(data)
	return handover.Seal(slots[slot], data)
}

func put(store handover.Store, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = store.Put(f.Name(), int(fd)) }); err != nil {
		return err
	}
	return inner
}

// snapshot is what the proxy knows now.
func (d *daemonParts) snapshot() (*handover.Snapshot, error) {
	host := d.host.cred.Load()
	s := &handover.Snapshot{Header: handover.Header{
		Created: time.Now(), TrustDomain: host.TrustDomain.Name(), HostID: host.HostID,
		Controller: d.cfg.Controller.Address, Instance: d.cfg.Socket, InKeyring: d.host.inKeyring.Load(),
	}}
	var err error
	if g := d.generation.Load(); g != nil {
		if s.Policy, err = proto.Marshal(g); err != nil {
			return nil, fmt.Errorf("policy: %w", err)
		}
	}
	if s.Host, err = host.Marshal(); err != nil {
		return nil, err
	}
	if s.Workloads, err = identity.MarshalKept(d.kept()); err != nil {
		return nil, err
	}
	return s, nil
}

func parseRoots(bundle [][]byte) ([]*x509.Certificate, error) {
	var roots []*x509.Certificate
	for _, der := range bundle {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("bundle: %w", err)
		}
		roots = append(roots, c)
	}
	return roots, nil
}
