package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
)

const (
	// issueTimeout bounds one request to the controller.
	issueTimeout = 10 * time.Second
	// maxIssuing is how many requests a host makes at a time, so that a change of
	// Profiles is no storm, and maxIssuingPerUser how many of those for one user.
	maxIssuing, maxIssuingPerUser = 8, 4
	// userRate and userBurst bound, per second, the requests for one user's
	// workloads, well below what the controller grants a host: one who runs a program
	// under thousands of names leaves the others' services theirs. Root's are not
	// bounded: nobody else has workloads under that uid.
	userRate, userBurst = 20, 200
	// pacedUsers bounds the memory for it; beyond, a user starts afresh.
	pacedUsers = 1024
	// clockCheck is how soon a step of the clock is noticed.
	clockCheck = time.Minute
)

// ControllerSource gets SVIDs from the controller's CA. Each workload has a key of
// its own, made here, never stored and never sent; a new one at every rotation.
// Safe for concurrent use. It owns no goroutines beyond those of Watch.
type ControllerSource struct {
	client symbolonv1connect.ProxyServiceClient
	slots  *shares

	mu    sync.Mutex
	state sourceState
	paces *lru.Cache[uint32, *rate.Limiter] // by uid

	Estate
}

// sourceState is what all workloads depend on. A new one replaces it.
type sourceState struct {
	bundles  *x509bundle.Set // never changed in place; nil: not known yet
	reissues uint64
	retries  uint64
	changed  chan struct{} // closed when this state is no more the last
}

// NewControllerSource issues nothing before SetBundle was called: there would be
// nothing to check an answer by.
func NewControllerSource(client symbolonv1connect.ProxyServiceClient) *ControllerSource {
	return &ControllerSource{
		client: client,
		slots:  newShares(maxIssuing, maxIssuingPerUser),
		paces:  newLRU[uint32, *rate.Limiter](pacedUsers),
		state:  sourceState{changed: make(chan struct{})},
	}
}

// SetBundle replaces the roots of one trust domain; none removes it. Workloads get
// a credential with the new bundles, and a new SVID if theirs does not verify by
// them any more.
func (s *ControllerSource) SetBundle(td spiffeid.TrustDomain, roots []*x509.Certificate) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := x509bundle.NewSet()
	if s.state.bundles != nil {
		next = x509bundle.NewSet(s.state.bundles.Bundles()...)
	}
	if len(roots) == 0 {
		if !next.Has(td) {
			return
		}
		next.Remove(td)
	} else {
		b := x509bundle.FromX509Authorities(td, slices.Clone(roots))
		if was, ok := next.Get(td); ok && was.Equal(b) {
			return
		}
		next.Add(b)
	}
	s.replace(sourceState{bundles: next, reissues: s.state.reissues, retries: s.state.retries})
}

// Reissue asks for all SVIDs anew, at once: names, labels or claims may have
// changed.
func (s *ControllerSource) Reissue() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.replace(sourceState{bundles: s.state.bundles, reissues: s.state.reissues + 1, retries: s.state.retries})
}

// Retry asks once more, at once, for the SVIDs that could not be had: what was in the
// way may be gone.
func (s *ControllerSource) Retry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.replace(sourceState{bundles: s.state.bundles, reissues: s.state.reissues, retries: s.state.retries + 1})
}

func (s *ControllerSource) replace(next sourceState) {
	next.changed = make(chan struct{})
	was := s.state
	s.state = next
	close(was.changed)
}

func (s *ControllerSource) current() sourceState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// Watch implements Source. Its goroutine ends with ctx; the channel's end says so.
func (s *ControllerSource) Watch(ctx context.Context, w *Workload) <-chan Update {
	out := make(chan Update, 1)
	go func() {
		defer close(out)
		watch := &controllerWatch{source: s, workload: w, out: out}
		watch.run(ctx)
	}()
	return out
}

// controllerWatch is one workload's life at the controller.
type controllerWatch struct {
	source   *ControllerSource
	workload *Workload
	out      chan Update

	last     *Credential
	failures int
}

func (w *controllerWatch) run(ctx context.Context) {
	state := w.source.current()
	for state.bundles == nil {
		select {
		case <-ctx.Done():
			return
		case <-state.changed:
			state = w.source.current()
		}
	}
	if svid := w.source.restored(w.workload, state.bundles); svid != nil {
		// Good until there is a newer one. That is asked for at once: what the
		// controller has to say of the workload may be something else by now.
		w.last = &Credential{SVID: svid, Bundles: state.bundles}
		w.send(Update{Credential: w.last})
	}
	for ctx.Err() == nil {
		pause := w.issue(ctx, state)
		if state = w.wait(ctx, state, pause); ctx.Err() != nil {
			return
		}
	}
}

// issue gets one SVID, reports it, and returns how long it is good for.
func (w *controllerWatch) issue(ctx context.Context, state sourceState) time.Duration {
	svid, rotateAt, err := w.source.issue(ctx, w.workload, state.bundles)
	if ctx.Err() != nil {
		return 0
	}
	if err != nil {
		w.failures++
		w.send(Update{w.last, err})
		return retryPause(w.failures, w.last != nil, err)
	}
	w.failures = 0
	w.last = &Credential{SVID: svid, Bundles: state.bundles}
	w.send(Update{Credential: w.last})
	return rotationPause(time.Now(), rotateAt, svid.NotAfter())
}

// wait returns when the next SVID is due. New bundles take effect at once, with the
// SVID that there is: withdrawn roots must not be believed until a request succeeds.
func (w *controllerWatch) wait(ctx context.Context, state sourceState, pause time.Duration) sourceState {
	// By the wall clock, as certificates are: timers do not count the time that a
	// machine was suspended.
	due := time.Now().Round(0).Add(pause)
	timer := time.NewTimer(min(pause, clockCheck))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return state
		case <-timer.C:
			left := due.Sub(time.Now().Round(0))
			if left <= 0 {
				return w.source.current()
			}
			timer.Reset(min(left, clockCheck))
			continue
		case <-state.changed:
		}
		was := state
		state = w.source.current()
		if w.last == nil {
			w.failures = 0
			return state
		}
		if state.bundles != was.bundles {
			w.last = &Credential{SVID: w.last.SVID, Bundles: state.bundles}
			w.send(Update{Credential: w.last})
			// After a failure, a word from the controller is the time to try again.
			if _, err := Verify(w.last.SVID.Chain, state.bundles, time.Now()); err != nil || w.failures > 0 {
				return state
			}
		}
		if state.reissues != was.reissues || state.retries != was.retries && w.failures > 0 {
			w.failures = 0
			return state
		}
	}
}

// send replaces what a slow reader has not taken. It is the only sender.
func (w *controllerWatch) send(u Update) {
	select {
	case <-w.out:
	default:
	}
	w.out <- u
}

// pace waits until a user may have another SVID asked for.
func (s *ControllerSource) pace(ctx context.Context, uid uint32) error {
	if uid == 0 {
		return nil
	}
	s.mu.Lock()
	l, ok := s.paces.Get(uid)
	if !ok {
		l = rate.NewLimiter(userRate, userBurst)
		s.paces.Add(uid, l)
	}
	s.mu.Unlock()
	return l.Wait(ctx)
}

// issue makes a key, has it signed and checks the answer as if a stranger had
// given it.
func (s *ControllerSource) issue(ctx context.Context, w *Workload, bundles *x509bundle.Set) (*SVID, time.Time, error) {
	if err := s.pace(ctx, w.Key.UID); err != nil {
		return nil, time.Time{}, err
	}
	release, err := s.slots.acquire(ctx, w.Key.UID)
	if err != nil {
		return nil, time.Time{}, err
	}
	defer release()
	ctx, cancel := context.WithTimeout(ctx, issueTimeout)
	defer cancel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("workload key: %w", err)
	}
	// Only the public key counts; the name is the controller's to give.
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("certificate request: %w", err)
	}
	answer, err := s.client.IssueSVID(ctx, connect.NewRequest(&symbolonv1.IssueSVIDRequest{
		Csr:        csr,
		Attributes: w.Attributes.Proto(),
	}))
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("issue SVID: %w", err)
	}
	issued := answer.Msg.GetSvid()
	chain, err := parseChain(issued.GetChain())
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("issued SVID: %w", err)
	}
	if !key.PublicKey.Equal(chain[0].PublicKey) {
		return nil, time.Time{}, fmt.Errorf("issued SVID: %w: it is for another key", ErrMalformedSVID)
	}
	if _, err := Verify(chain, bundles, time.Now()); err != nil {
		return nil, time.Time{}, fmt.Errorf("issued SVID: %w", err)
	}
	svid, err := NewSVID(chain, key)
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("issued SVID: %w", err)
	}
	var rotateAt time.Time
	if t := issued.GetRotateAt(); t.IsValid() {
		rotateAt = t.AsTime()
	}
	return svid, rotateAt, nil
}

func parseChain(ders [][]byte) ([]*x509.Certificate, error) {
	if len(ders) == 0 || len(ders) > maxChain {
		return nil, fmt.Errorf("%w: %d certificates", ErrMalformedSVID, len(ders))
	}
	chain := make([]*x509.Certificate, len(ders))
	for i, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, errors.Join(ErrMalformedSVID, err)
		}
		chain[i] = c
	}
	return chain, nil
}
