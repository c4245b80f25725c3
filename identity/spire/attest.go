package spire

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/internal/agent"
)

// answer is one message of the agent about a process, or why there are no more.
type answer struct {
	message *delegatedidentityv1.SubscribeToX509SVIDsResponse
	err     error
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
		err := s.stream(ctx, w, pin, func(m *delegatedidentityv1.SubscribeToX509SVIDsResponse) {
			select {
			case answers <- answer{message: m}:
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

type svidStream = delegatedidentityv1.DelegatedIdentity_SubscribeToX509SVIDsClient

func (s *Source) stream(ctx context.Context, w *identity.Workload, pin *identity.Pin, deliver func(*delegatedidentityv1.SubscribeToX509SVIDsResponse)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, m, err := s.first(ctx, cancel, w, pin)
	if err != nil {
		return err
	}
	for {
		deliver(m)
		if m, err = stream.Recv(); err != nil {
			return explain(s.socket, err)
		}
	}
}

// first asks, and returns the first answer, if the process was the workload from
// before the question until after the answer.
func (s *Source) first(ctx context.Context, cancel context.CancelFunc, w *identity.Workload, pin *identity.Pin) (svidStream, *delegatedidentityv1.SubscribeToX509SVIDsResponse, error) {
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
	stream, err := s.client.SubscribeToX509SVIDs(ctx, &delegatedidentityv1.SubscribeToX509SVIDsRequest{Pid: int32(w.Key.Process.PID)})
	var m *delegatedidentityv1.SubscribeToX509SVIDsResponse
	if err == nil {
		m, err = stream.Recv()
	}
	if !late.Stop() {
		err = errors.Join(errSilent, err)
	}
	if err != nil {
		return nil, nil, explain(s.socket, err)
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
	return stream, m, nil
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

// identityOf is the SVID of the workload that an answer is about, and the trust domains
// it federates with. Errors: identity.ErrWithdrawn.
func (s *Source) identityOf(m *delegatedidentityv1.SubscribeToX509SVIDsResponse) (*identity.SVID, []spiffeid.TrustDomain, error) {
	offers := make([]agent.Offer, 0, len(m.GetX509Svids()))
	for _, x := range m.GetX509Svids() {
		id := x.GetX509Svid().GetId()
		parsed, err := spiffeid.FromString("spiffe://" + id.GetTrustDomain() + id.GetPath())
		if err != nil {
			return nil, nil, fmt.Errorf("%w: the agent offers a malformed ID: %w", identity.ErrWithdrawn, err)
		}
		offers = append(offers, agent.Offer{ID: parsed, Hint: x.GetX509Svid().GetHint()})
	}
	i, err := s.rule.Choose(offers)
	if err != nil {
		return nil, nil, err
	}
	x := m.GetX509Svids()[i]
	raw, err := x509svid.ParseRaw(bytes.Join(x.GetX509Svid().GetCertChain(), nil), x.GetX509SvidKey())
	if err != nil {
		return nil, nil, fmt.Errorf("%w: the SVID of %s cannot be read: %w", identity.ErrWithdrawn, offers[i].ID, err)
	}
	if raw.ID != offers[i].ID {
		return nil, nil, fmt.Errorf("%w: the agent says %s, the certificate %s", identity.ErrWithdrawn, offers[i].ID, raw.ID)
	}
	svid, err := identity.NewSVID(raw.Certificates, raw.PrivateKey)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", identity.ErrWithdrawn, err)
	}
	var federates []spiffeid.TrustDomain
	for _, name := range m.GetFederatesWith() {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			continue // nothing that an ID could be of
		}
		federates = append(federates, td)
	}
	return svid, federates, nil
}
