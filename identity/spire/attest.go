package spire

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/internal/agent"
)

// answer is one word of the agent about a process, or why there are no more.
type answer struct {
	word *word
	err  error
}

// attestation is a subscription to the SVIDs of one process, as it was attested.
type attestation struct {
	answers <-chan answer
	cancel  context.CancelFunc
	ended   <-chan struct{}
}

func (a *attestation) close() {
	a.cancel()
	<-a.ended
}

// attest has pin's process attested. The last answer has an error: the agent's; or
// identity.ErrEnded or ErrChanged, if what the agent has seen may not be the workload.
func (s *Source) attest(ctx context.Context, w *identity.Workload, pin *identity.Pin) *attestation {
	ctx, cancel := context.WithCancel(ctx)
	answers, ended := make(chan answer), make(chan struct{})
	go func() {
		defer close(ended)
		defer cancel()
		err := s.stream(ctx, w, pin, func(m *word) {
			select {
			case answers <- answer{word: m}:
			case <-ctx.Done():
			}
		})
		select {
		case answers <- answer{err: err}:
		case <-ctx.Done():
		}
	}()
	return &attestation{answers, cancel, ended}
}

func (s *Source) stream(ctx context.Context, w *identity.Workload, pin *identity.Pin, deliver func(*word)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	next, m, err := s.first(ctx, cancel, w, pin)
	if err != nil {
		return err
	}
	for {
		deliver(m)
		if m, err = next(); err != nil {
			return s.api.explain(err)
		}
	}
}

// first asks, and returns the first answer, if the process was the workload from
// before the question until after the answer.
func (s *Source) first(ctx context.Context, cancel context.CancelFunc, w *identity.Workload, pin *identity.Pin) (next func() (*word, error), m *word, err error) {
	release, err := s.slots.Acquire(ctx, w.Key.UID)
	if err != nil {
		return nil, nil, err
	}
	defer release()
	executed, unwatch, err := s.watch(ctx, w, pin)
	if err != nil {
		return nil, nil, err
	}
	defer unwatch()
	// Only now: before it was watched, it could have become another.
	if err := pin.Check(); err != nil {
		return nil, nil, err
	}
	late := time.AfterFunc(firstAnswer, cancel)
	if next, err = s.api.attest(ctx, w.Key.Process.PID); err == nil {
		m, err = next()
	}
	if !late.Stop() {
		err = errors.Join(errSilent, err)
	}
	if err != nil {
		return nil, nil, s.api.explain(err)
	}
	if err := pin.Check(); err != nil {
		return nil, nil, err
	}
	switch did, err := executed.Executed(); {
	case err != nil:
		return nil, nil, err
	case did:
		return nil, nil, fmt.Errorf("%w: it executed a program while it was attested", identity.ErrChanged)
	}
	return next, m, nil
}

// watch begins to watch pin's process, when its user has the descriptors left for it: one who
// has processes of thousands of threads attested waits for himself.
func (s *Source) watch(ctx context.Context, w *identity.Workload, pin *identity.Pin) (executed *identity.ExecWatch, end func(), err error) {
	n, err := pin.Threads()
	if err != nil {
		return nil, nil, err
	}
	n += newThreads
	release, err := s.watched.AcquireN(ctx, w.Key.UID, int64(n))
	if err != nil {
		return nil, nil, err
	}
	if executed, err = pin.WatchExec(n); err != nil {
		release()
		return nil, nil, err
	}
	return executed, func() { executed.Close(); release() }, nil
}

// attested is what a workload was attested as.
type attested struct {
	svid *identity.SVID
	// federates are the trust domains that its entry federates with.
	federates []spiffeid.TrustDomain
	// bundles go with svid; nil: the agent's, which are for all.
	bundles *x509bundle.Set
}

// identityOf is what m says that its workload is. Errors: identity.ErrWithdrawn.
func (s *Source) identityOf(m *word) (*attested, error) {
	offers := make([]agent.Offer, 0, len(m.offers))
	for _, x := range m.offers {
		parsed, err := spiffeid.FromString(x.id)
		if err != nil {
			return nil, fmt.Errorf("%w: the agent offers a malformed ID: %w", identity.ErrWithdrawn, err)
		}
		offers = append(offers, agent.Offer{ID: parsed, Hint: x.hint})
	}
	i, err := s.rule.Choose(offers)
	if err != nil {
		return nil, err
	}
	id, x := offers[i].ID, m.offers[i]
	raw, err := x509svid.ParseRaw(x.chain, x.key)
	if err != nil {
		return nil, fmt.Errorf("%w: the SVID of %s cannot be read: %w", identity.ErrWithdrawn, id, err)
	}
	if raw.ID != id {
		return nil, fmt.Errorf("%w: the agent says %s, the certificate %s", identity.ErrWithdrawn, id, raw.ID)
	}
	a := &attested{}
	if a.svid, err = identity.NewSVID(raw.Certificates, raw.PrivateKey); err != nil {
		return nil, fmt.Errorf("%w: %w", identity.ErrWithdrawn, err)
	}
	for _, name := range m.federates {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			continue // nothing that an ID could be of
		}
		a.federates = append(a.federates, td)
	}
	if m.bundled {
		// Of a domain whose bundle cannot be read there is none, and nobody is believed by it.
		a.bundles, _ = bundleSet(m.federated)
		own, _ := bundleSet(map[string][]byte{id.TrustDomain().IDString(): x.bundle})
		for _, b := range own.Bundles() {
			a.bundles.Add(b)
		}
	}
	return a, nil
}
