package spire

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/internal/agent"
)

// watch is one process's life at the agent.
type watch struct {
	source   *Source
	workload *identity.Workload
	out      chan identity.Update

	// attested is what the agent said last; nil: nothing that is of use.
	attested *attested
	// own is the bundle of the earlier run, for as long as the agent has sent none.
	own *x509bundle.Bundle
	// last is what was sent, nil if it was withdrawn; failed: beside an error.
	last     *identity.Credential
	failed   bool
	failures int
}

// run sends the last word itself, and returns.
func (w *watch) run(ctx context.Context) {
	for ctx.Err() == nil {
		pin, err := identity.PinProcess(w.workload)
		if err == nil {
			w.restore()
			err = w.follow(ctx, pin)
			pin.Close()
		}
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, identity.ErrEnded):
			w.send(identity.Update{Err: err})
			return
		case errors.Is(err, identity.ErrChanged):
			// What was attested is not what runs, whatever else changes until it is
			// attested anew.
			w.attested, w.own = nil, nil
			w.withdraw(err)
		default:
			w.fail(err)
		}
		w.failures++
		select {
		case <-ctx.Done():
		case <-time.After(agent.Pause(w.failures)):
		}
	}
}

// restore begins with the SVID of an earlier run, the first time. That was for this
// very process and program, or the key would be another. Of its bundles only its own
// trust domain's is believed until the agent answers.
func (w *watch) restore() {
	kept, ok := w.source.Claim(w.workload)
	if !ok || kept.Bundles == nil {
		return
	}
	if own, ok := kept.Bundles.Get(kept.SVID.ID.TrustDomain()); ok {
		w.attested, w.own = &attested{svid: kept.SVID}, own
		w.judge(w.source.roots.Current(), false)
	}
}

// follow has the process attested, and goes by what the agent says, until the process
// is not what was pinned any more: identity.ErrEnded, ErrChanged, or the system's error.
func (w *watch) follow(ctx context.Context, pin *identity.Pin) error {
	state := w.source.roots.Current()
	check := time.NewTicker(checkEvery)
	defer check.Stop()
	current := w.source.attest(ctx, w.workload, pin)
	defer func() {
		if current != nil {
			current.close()
		}
	}()
	retry := time.NewTimer(0)
	retry.Stop()
	defer retry.Stop()
	for {
		var answers <-chan answer
		if current != nil {
			answers = current.answers
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-pin.Ended():
			return identity.ErrEnded
		case <-check.C:
			if err := pin.Check(); err != nil {
				return err
			}
			if w.last == nil && !w.failed {
				w.judge(state, true)
			}
		case <-retry.C:
			if current == nil {
				current = w.source.attest(ctx, w.workload, pin)
			}
		case a := <-answers:
			if a.err == nil {
				w.failures = 0
				w.heard(a, state)
				continue
			}
			if errors.Is(a.err, identity.ErrEnded) || errors.Is(a.err, identity.ErrChanged) {
				return a.err
			}
			current.close()
			current = nil
			w.failures++
			if errors.Is(a.err, identity.ErrWithdrawn) {
				w.attested = nil
				w.withdraw(a.err)
			} else {
				w.fail(a.err)
			}
			retry.Reset(agent.Pause(w.failures))
		case <-state.Changed():
			was := state
			state = w.source.roots.Current()
			if state.Reissues != was.Reissues && current != nil {
				current.close()
				current = w.source.attest(ctx, w.workload, pin)
			}
			w.judge(state, false)
		}
	}
}

// heard takes an answer of the agent's.
func (w *watch) heard(a answer, state agent.State) {
	said, err := w.source.identityOf(a.word)
	if w.attested = said; err != nil {
		w.withdraw(err)
		return
	}
	w.judge(state, false)
}

// judge makes the credential of what was attested and the bundles of now. The agent's
// bundles may come a moment later than its first SVID: that is an error only to
// somebody whose patience has ended.
func (w *watch) judge(state agent.State, impatient bool) {
	if w.attested == nil {
		return
	}
	svid := w.attested.svid
	if w.attested.bundles != nil {
		state.Agent = w.attested.bundles
	}
	if state.Agent == nil {
		if w.own == nil && !impatient {
			return
		}
		if w.own != nil {
			state.Agent = x509bundle.NewSet(w.own)
		}
	}
	set, err := state.For(svid.ID.TrustDomain(), w.attested.federates)
	if err == nil {
		_, err = identity.Verify(svid.Chain, set, time.Now())
	}
	switch {
	case errors.Is(err, identity.ErrWithdrawn):
		w.withdraw(err)
		return
	case err != nil && w.last != nil && set != nil && !verifies(w.last.SVID, set):
		w.withdraw(err) // its roots are gone
		return
	case err != nil: // its bundle may be on the way
		w.fail(err)
		return
	}
	if w.last != nil && agent.Same(w.last.Bundles, set) {
		set = w.last.Bundles
		if same(w.last.SVID, svid) {
			if w.failed {
				w.failed = false
				w.send(identity.Update{Credential: w.last})
			}
			return
		}
	}
	w.last, w.failed = &identity.Credential{SVID: svid, Bundles: set}, false
	w.send(identity.Update{Credential: w.last})
}

// same: the same certificates, and so the same key.
func same(a, b *identity.SVID) bool {
	return slices.EqualFunc(a.Chain, b.Chain, (*x509.Certificate).Equal)
}

func verifies(svid *identity.SVID, set *x509bundle.Set) bool {
	_, err := identity.Verify(svid.Chain, set, time.Now())
	return err == nil
}

// fail leaves the last credential as it is. If there is none it says so, since the
// reader may have missed that it was withdrawn.
func (w *watch) fail(err error) {
	if w.last == nil {
		w.withdraw(err)
		return
	}
	w.failed = true
	w.send(identity.Update{Credential: w.last, Err: err})
}

// withdraw takes it away.
func (w *watch) withdraw(err error) {
	if !errors.Is(err, identity.ErrWithdrawn) {
		err = fmt.Errorf("%w: %w", identity.ErrWithdrawn, err)
	}
	w.last, w.failed = nil, true
	w.send(identity.Update{Err: err})
}

// send replaces what a slow reader has not taken. It is the only sender.
func (w *watch) send(u identity.Update) {
	select {
	case <-w.out:
	default:
	}
	w.out <- u
}
