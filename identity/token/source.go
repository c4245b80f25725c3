package token

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"connectrpc.com/connect"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

const (
	// issueTimeout bounds one request to the controller. A workload's first credential
	// waits for so long at most for its token.
	issueTimeout = 10 * time.Second
	// maxIssuing is how many requests a host makes at a time.
	maxIssuing = 8
	// retryFirst and retryMax bound the pause after a failure.
	retryFirst, retryMax = time.Second, time.Minute
	// nonceUse is how long a nonce is used: less than the controller believes it.
	nonceUse = 4 * time.Minute
	// handOver is what is left of an SVID with a token when the next one takes its place
	// without.
	handOver = time.Minute
)

// Issuer is the controller; symbolonv1connect.ProxyServiceClient is one.
type Issuer interface {
	IssueToken(context.Context, *connect.Request[symbolonv1.IssueTokenRequest]) (*connect.Response[symbolonv1.IssueTokenResponse], error)
}

// Source gives the credentials of another source their tokens, where the SVID carries
// no claims. A rotated SVID, whose token is another one, waits for it behind the one
// before, for as long as that is good. Without the controller the credentials come as
// they are. Safe for concurrent use.
type Source struct {
	of       identity.Source
	issuer   Issuer
	verifier *Verifier
	slots    chan struct{}

	mu     sync.Mutex
	nonce  []byte
	since  time.Time // of nonce
	change chan struct{}
}

// NewSource asks issuer for what verifier then believes.
func NewSource(of identity.Source, issuer Issuer, verifier *Verifier) *Source {
	return &Source{of: of, issuer: issuer, verifier: verifier, slots: make(chan struct{}, maxIssuing), change: make(chan struct{})}
}

// Renew asks for all tokens anew: Profiles have changed.
func (s *Source) Renew() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.change)
	s.change = make(chan struct{})
}

func (s *Source) changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.change
}

// Watch implements identity.Source.
func (s *Source) Watch(ctx context.Context, w *identity.Workload) <-chan identity.Update {
	out := make(chan identity.Update, 1)
	go func() {
		defer close(out)
		(&watch{source: s, workload: w, out: out}).run(ctx)
	}()
	return out
}

// watch is one workload's life.
type watch struct {
	source   *Source
	workload *identity.Workload
	out      chan identity.Update

	latest identity.Update // the other source's
	sent   identity.Update // ours
	any    bool            // something was sent
	// token is svid's.
	token    *identity.Token
	svid     *identity.SVID
	due      time.Time // of the next request
	failures int       // since the last token
	err      error     // of the last request
}

type answer struct {
	svid     *identity.SVID
	token    *identity.Token
	rotateAt time.Time
	err      error
}

func (w *watch) run(ctx context.Context) {
	updates := w.source.of.Watch(ctx, w.workload)
	again := w.source.changed()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	var asking chan answer // nil: nothing is under way
	defer func() {
		if asking != nil {
			<-asking
		}
	}()
	for {
		select {
		case u, ok := <-updates:
			if !ok {
				return
			}
			if w.wants(u) && (!w.wants(w.latest) || u.Credential.SVID != w.latest.Credential.SVID) {
				w.due, w.failures, w.err = time.Time{}, 0, nil
			}
			w.latest = u
		case a := <-asking:
			asking = nil
			w.answered(a)
		case <-again:
			again = w.source.changed()
			w.due = time.Time{}
		case <-timer.C:
		}
		if ctx.Err() != nil {
			continue // updates ends
		}
		if now := time.Now(); asking == nil && w.wants(w.latest) && !now.Before(w.due) {
			asking = make(chan answer, 1)
			go w.ask(ctx, w.latest.Credential.SVID, asking)
		}
		w.send()
		timer.Reset(w.pause())
	}
}

// wants tells whether a credential is one that a token belongs to.
func (w *watch) wants(u identity.Update) bool {
	return u.Credential != nil && !gone(u.Err) && u.Credential.SVID.Issuer == identity.FromNobody
}

func gone(err error) bool {
	return errors.Is(err, identity.ErrWithdrawn) || errors.Is(err, identity.ErrEnded)
}

func (w *watch) answered(a answer) {
	if !w.wants(w.latest) || a.svid != w.latest.Credential.SVID {
		return // for one that there is no more
	}
	if w.err = a.err; a.err != nil {
		pause := min(retryMax, retryFirst<<min(w.failures, 10))
		w.failures++
		w.due = time.Now().Add(pause/2 + rand.N(pause))
		return
	}
	w.token, w.svid, w.failures = a.token, a.svid, 0
	// The controller says when; never sooner than a moment, never beyond its end.
	now := time.Now()
	w.due = now.Add(min(max(a.rotateAt.Sub(now), retryFirst), max(a.token.NotAfter.Sub(now)*3/4, retryFirst)))
}

// pause is for how long there is nothing to do but what comes by itself.
func (w *watch) pause() time.Duration {
	at := time.Now().Add(time.Hour)
	if w.wants(w.latest) {
		if w.due.Before(at) {
			at = w.due
		}
		if held := w.sent.Credential; held != nil && held.SVID != w.latest.Credential.SVID {
			if end := held.SVID.NotAfter().Add(-handOver); end.Before(at) {
				at = end
			}
		}
	}
	return max(time.Until(at), 10*time.Millisecond)
}

// send replaces what a slow reader has not taken, if there is anything new.
func (w *watch) send() {
	u, ok := w.update()
	if !ok || w.any && u.Err == w.sent.Err && same(u.Credential, w.sent.Credential) { //nolint:errorlint // it is about the very same, not its kind
		return
	}
	if same(u.Credential, w.sent.Credential) {
		u.Credential = w.sent.Credential // another one would mean another endpoint
	}
	w.sent, w.any = u, true
	select {
	case <-w.out:
	default:
	}
	w.out <- u
}

func same(a, b *identity.Credential) bool {
	return a == b || a != nil && b != nil && *a == *b
}

// update is what holds now; false: it is to be waited for.
func (w *watch) update() (identity.Update, bool) {
	if !w.wants(w.latest) {
		return w.latest, w.any || w.latest != (identity.Update{})
	}
	now := w.latest.Credential
	err := w.latest.Err
	if err == nil {
		err = w.err
	}
	if w.svid == now.SVID {
		return identity.Update{Credential: &identity.Credential{SVID: now.SVID, Bundles: now.Bundles, Token: w.token}, Err: err}, true
	}
	if was := w.sent.Credential; w.any && w.holds(was) {
		return identity.Update{Credential: &identity.Credential{SVID: was.SVID, Bundles: now.Bundles, Token: was.Token}, Err: err}, true
	}
	return identity.Update{Credential: now, Err: err}, w.any || w.failures > 0
}

// holds tells whether a credential with a token is still as good as the newer one
// without.
func (w *watch) holds(was *identity.Credential) bool {
	now := time.Now()
	next := w.latest.Credential
	if was == nil || was.Token == nil || was.SVID.ID != next.SVID.ID || !now.Before(was.SVID.NotAfter().Add(-handOver)) {
		return false
	}
	_, err := identity.Verify(was.SVID.Chain, next.Bundles, now)
	return err == nil
}

// ask has one token issued.
func (w *watch) ask(ctx context.Context, svid *identity.SVID, done chan<- answer) {
	ctx, cancel := context.WithTimeout(ctx, issueTimeout)
	defer cancel()
	a := answer{svid: svid}
	select {
	case w.source.slots <- struct{}{}:
		a.token, a.rotateAt, a.err = w.source.issue(ctx, w.workload, svid)
		<-w.source.slots
	case <-ctx.Done():
		a.err = ctx.Err()
	}
	if a.err != nil {
		a.err = fmt.Errorf("no token for %s: %w", svid.ID, a.err)
	}
	done <- a
}

// issue proves that we hold svid's key, and checks the answer as if a stranger had given it.
func (s *Source) issue(ctx context.Context, w *identity.Workload, svid *identity.SVID) (*identity.Token, time.Time, error) {
	req := &symbolonv1.IssueTokenRequest{Attributes: w.Attributes.Proto()}
	for _, c := range svid.Chain {
		req.Chain = append(req.Chain, c.Raw)
	}
	for try := 0; ; try++ {
		nonce, err := s.freshNonce(ctx)
		if err != nil {
			return nil, time.Time{}, err
		}
		req.Nonce = nonce
		if req.Signature, err = Prove(svid.Key, nonce, svid.Chain[0]); err != nil {
			return nil, time.Time{}, err
		}
		res, err := s.issuer.IssueToken(ctx, connect.NewRequest(req))
		if err == nil {
			s.keepNonce(res.Msg.GetNonce())
			t, err := s.verifier.Take(res.Msg.GetToken(), svid, time.Now())
			if err != nil {
				return nil, time.Time{}, fmt.Errorf("the controller's answer: %w", err)
			}
			return t, res.Msg.GetRotateAt().AsTime(), nil
		}
		s.keepNonce(nil)
		// The nonce may be that of a controller which was restarted since.
		if connect.CodeOf(err) != connect.CodeFailedPrecondition || try > 0 {
			return nil, time.Time{}, err
		}
	}
}

func (s *Source) freshNonce(ctx context.Context) ([]byte, error) {
	s.mu.Lock()
	nonce, since := s.nonce, s.since
	s.mu.Unlock()
	if len(nonce) > 0 && time.Since(since) < nonceUse {
		return nonce, nil
	}
	res, err := s.issuer.IssueToken(ctx, connect.NewRequest(&symbolonv1.IssueTokenRequest{}))
	if err != nil {
		return nil, err
	}
	s.keepNonce(res.Msg.GetNonce())
	return res.Msg.GetNonce(), nil
}

func (s *Source) keepNonce(nonce []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nonce, s.since = nonce, time.Now()
}
