package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/enrol"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/internal/handover"
	"github.com/symbolon/symbolon/internal/keyring"
)

// estate is what an earlier process has left: its snapshot, opened and checked.
type estate struct {
	header    handover.Header
	slot      int
	policy    *symbolonv1.Generation // nil: it had none
	workloads []identity.Kept
	host      *enrol.HostCredential
}

// openEstate takes the snapshots among what was inherited, and opens the newest; nil
// if there is none that is of use. What is wrong with one is a warning: the proxy
// then starts as if there were none.
func (h *host) openEstate(in *handover.Inherited, log *zap.Logger) *estate {
	var newest *handover.Snapshot
	var newestSlot int
	for slot, name := range slots {
		for f := in.Take(name); f != nil; f = in.Take(name) {
			s, err := readSnapshot(f)
			_ = f.Close()
			switch {
			case err != nil:
				log.Warn("what an earlier run left is not used", zap.String("descriptor", name), zap.Error(err))
			case newest == nil || s.Serial > newest.Serial:
				if newest != nil {
					newest.Wipe()
				}
				newest, newestSlot = s, slot
			default:
				s.Wipe()
			}
		}
	}
	if newest == nil {
		return nil
	}
	defer newest.Wipe()
	e, err := h.check(newest)
	if err != nil {
		log.Warn("what an earlier run left is not used", zap.Stringer("snapshot", newest), zap.Error(err))
		return nil
	}
	e.slot = newestSlot
	log.Info("taken over from an earlier run", zap.Stringer("snapshot", newest),
		zap.Uint64("generation", e.policy.GetNumber()), zap.Int("svids", len(e.workloads)))
	return e
}

func readSnapshot(f *os.File) (*handover.Snapshot, error) {
	data, err := handover.Unseal(f)
	if err != nil {
		return nil, err
	}
	s, err := handover.UnmarshalSnapshot(data)
	if err != nil {
		clear(data)
	}
	return s, err
}

var errOthers = errors.New("it is not this proxy's")

// check opens a snapshot. It is of use to the same host at the same controller only,
// and for as long as the host's SVID is valid: a policy cannot come back that is
// older than that. What was removed from the keyring ('symbolon-proxy forget') counts
// as removed here, too.
func (h *host) check(s *handover.Snapshot) (*estate, error) {
	if s.Controller != h.cfg.Controller.Address || s.Instance != h.cfg.Socket {
		return nil, fmt.Errorf("%w: controller %s, socket %s", errOthers, s.Controller, s.Instance)
	}
	e := &estate{header: s.Header}
	kept, err := h.kept()
	switch {
	case err == nil:
		e.host = kept
	case errors.Is(err, keyring.ErrNotFound) && s.InKeyring:
		return nil, errors.New("the host's identity was removed from the keyring")
	default:
		if e.host, err = enrol.Unmarshal(s.Host); err != nil {
			return nil, err
		}
	}
	if e.host.HostID != s.HostID || e.host.TrustDomain.Name() != s.TrustDomain {
		return nil, fmt.Errorf("%w: host %s of %s; this is %s of %s", errOthers, s.HostID, s.TrustDomain, e.host.HostID, e.host.TrustDomain.Name())
	}
	if len(s.Policy) > 0 {
		e.policy = new(symbolonv1.Generation)
		if err := proto.Unmarshal(s.Policy, e.policy); err != nil {
			return nil, fmt.Errorf("policy: %w", err)
		}
	}
	if e.workloads, err = identity.UnmarshalKept(s.Workloads, time.Now()); err != nil {
		return nil, err
	}
	return e, nil
}

// restore puts in force what an earlier process left.
func (d *daemonParts) restore(e *estate) {
	if e == nil {
		return
	}
	d.keeper.succeeds(e.slot, e.header.Serial)
	d.source.Restore(e.workloads)
	if e.policy == nil {
		return
	}
	if err := d.applyKept(e.policy); err != nil {
		d.log.Warn("the policy that an earlier run left is not used", zap.Error(err))
	}
}

// awaitGo, in a process that another one has started to take over, tells that one
// when everything is prepared, and returns when it may begin. That the other one
// has gone is a reason to begin, too. In any other process it returns at once.
func (d *daemonParts) awaitGo(ctx context.Context) error {
	c := d.predecessor
	if c == nil {
		return nil
	}
	if err := d.ready(); err != nil {
		return fmt.Errorf("cannot take over: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	err := c.Send(handover.Ready, nil)
	for err == nil {
		var m handover.Message
		var payload []byte
		if m, payload, err = c.Receive(time.Time{}); err != nil {
			break
		}
		switch m {
		case handover.Go:
			return d.keeper.takePosition(payload)
		case handover.Policy:
			if err := d.applyPassed(payload); err != nil {
				return fmt.Errorf("cannot take over: %w", err)
			}
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	d.log.Warn("the process that was to hand over has gone", zap.Error(err))
	return nil
}

func (d *daemonParts) applyPassed(payload []byte) error {
	g := new(symbolonv1.Generation)
	if err := proto.Unmarshal(payload, g); err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	return d.applyKept(g)
}

// applyKept puts in force what another process of this host had in force: first what is
// revoked, whatever becomes of the rest.
func (d *daemonParts) applyKept(g *symbolonv1.Generation) error {
	if r := g.GetRevocations(); r != nil {
		if err := d.revoke(r); err != nil {
			d.log.Error("not all of what is revoked is understood", zap.Error(err))
		}
	}
	return d.apply(g)
}

// tellPredecessor passes on what the controller says to the process that drains.
func (d *daemonParts) tellPredecessor(m handover.Message, g *symbolonv1.Generation) {
	d.tell.Lock()
	defer d.tell.Unlock()
	if d.predecessor == nil {
		return
	}
	var payload []byte
	var err error
	if g != nil {
		payload, err = proto.Marshal(g)
	}
	if err == nil {
		err = d.predecessor.Send(m, payload)
	}
	if err != nil { // it has drained
		_ = d.predecessor.Close()
		d.predecessor = nil
	}
}

// keepListeners gives the listeners to the service manager, and takes from it what
// no process needs any more.
func (d *daemonParts) keepListeners(k *kernel) {
	if !d.keeper.store.Available() {
		return
	}
	for name, l := range k.listeners {
		if err := d.keeper.store.PutListener(name, l); err != nil {
			d.log.Warn("a listener is not kept across restarts", zap.String("listener", name), zap.Error(err))
		}
	}
	for _, name := range d.unused {
		if !slices.Contains(slots[:], name) && k.listeners[name] == nil {
			_ = d.keeper.store.Remove(name)
		}
	}
}
