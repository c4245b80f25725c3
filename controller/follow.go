package controller

import (
	"context"
	"crypto/x509"
	"errors"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/federation"
	"github.com/symbolon/symbolon/policydb"
)

// errNoEndpoint: there is nobody to ask.
var errNoEndpoint = errors.New("the TrustDomain has no endpoint")

// errReplacedMeanwhile: somebody has changed or deleted the TrustDomain.
var errReplacedMeanwhile = errors.New("the TrustDomain has been changed meanwhile")

// followers ask the endpoints of other trust domains, each in its own time. A change of
// a TrustDomain ends its follower and starts another.
type followers struct {
	server *Server
	web    *x509.CertPool // verifies https_web endpoints; nil: the system's

	mu     sync.Mutex
	byName map[string]*follower
}

// follower is one TrustDomain that has an endpoint.
type follower struct {
	resource *symbolonv1.Resource
	endpoint federation.Endpoint
	stop     context.CancelFunc
	over     <-chan struct{}
	poke     chan chan error // to fetch now

	mu     sync.Mutex
	health fetchHealth
}

// fetchHealth is how fetching goes.
type fetchHealth struct {
	err   error     // of the last attempt
	since time.Time // of the first failure in a row; zero: it did not fail
	next  time.Time
}

// run keeps a follower for every TrustDomain with an endpoint until ctx ends, and waits
// for all.
func (f *followers) run(ctx context.Context) {
	var running sync.WaitGroup
	defer running.Wait()
	for {
		want, changed := f.server.hub.wanted(true)
		f.sync(ctx, &running, want.snapshot)
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (f *followers) sync(ctx context.Context, running *sync.WaitGroup, s *policydb.Snapshot) {
	f.mu.Lock()
	defer f.mu.Unlock()
	want := make(map[string]*symbolonv1.Resource)
	for _, r := range s.List(policydb.KindTrustDomain, "/") {
		if r.GetTrustDomain().GetEndpoint() != "" {
			want[r.GetName()] = r
		}
	}
	for name, w := range f.byName {
		if r := want[name]; r == nil || !sameEndpoint(r, w.resource) {
			w.stop()
			delete(f.byName, name)
		}
	}
	for name, r := range want {
		if f.byName[name] != nil {
			continue
		}
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			continue // an apply has checked it
		}
		w := &follower{
			resource: r, poke: make(chan chan error),
			endpoint: federation.Endpoint{TrustDomain: td, URL: r.GetTrustDomain().GetEndpoint()},
		}
		if id := r.GetTrustDomain().GetEndpointId(); id != "" {
			if w.endpoint.ID, err = spiffeid.FromString(id); err != nil {
				continue // the same
			}
		}
		var own context.Context
		own, w.stop = context.WithCancel(ctx)
		w.over = own.Done()
		f.byName[name] = w
		running.Go(func() { f.follow(own, w) })
	}
}

// follow fetches when it is time, or when it is asked to.
func (f *followers) follow(ctx context.Context, w *follower) {
	failures := 0
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		var asked chan error
		select {
		case <-ctx.Done():
			return
		case asked = <-w.poke:
		case <-timer.C:
		}
		pause, err := f.fetch(ctx, w)
		if ctx.Err() != nil {
			err = ctx.Err()
		} else if err != nil {
			failures++
			pause = federation.RetryAfter(failures)
		} else {
			failures = 0
		}
		w.note(err, f.server.opts.Now(), pause)
		timer.Reset(pause)
		if asked != nil {
			asked <- err
		}
		if err != nil && failures == 1 {
			f.server.log.Warn("the bundle of a trust domain is not fetched; the last one stays in force",
				zap.String("trust_domain", w.resource.GetName()), zap.Error(err))
		}
	}
}

// fetch asks once, and puts the answer into force.
func (f *followers) fetch(ctx context.Context, w *follower) (time.Duration, error) {
	name := w.resource.GetName()
	var known x509bundle.Source
	if b := f.server.policies.trustBundle(name); b != nil {
		known = b.Bundle
	}
	got, err := federation.Fetch(ctx, w.endpoint, known, f.web)
	if err != nil {
		return 0, err
	}
	published, err := f.server.policies.keepServed(ctx, w.resource, got)
	if err != nil {
		return 0, err
	}
	if published != nil {
		f.server.hub.publish(published)
		sequence, _ := got.SequenceNumber()
		f.server.log.Info("the bundle of a trust domain has changed", zap.String("trust_domain", name),
			zap.Int("roots", len(got.X509Authorities())), zap.Uint64("sequence", sequence))
	}
	return federation.RefreshAfter(got), nil
}

func (w *follower) note(err error, now time.Time, pause time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		w.health.since = time.Time{}
	} else if w.health.err == nil {
		w.health.since = now
	}
	w.health.err, w.health.next = err, now.Add(pause)
}

// health is how fetching the bundle of a trust domain goes; zero: nobody does.
func (f *followers) health(name string) fetchHealth {
	f.mu.Lock()
	w := f.byName[name]
	f.mu.Unlock()
	if w == nil {
		return fetchHealth{}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.health
}

// refresh has a bundle fetched now, and waits for it.
// Errors: errNoEndpoint, errReplacedMeanwhile, those of federation.Fetch, ctx's.
func (f *followers) refresh(ctx context.Context, r *symbolonv1.Resource) error {
	if r.GetTrustDomain().GetEndpoint() == "" {
		return errNoEndpoint
	}
	done := make(chan error, 1)
	for asked := false; !asked; {
		f.mu.Lock()
		w := f.byName[r.GetName()]
		f.mu.Unlock()
		if w == nil || !sameEndpoint(w.resource, r) { // applied just now
			select {
			case <-time.After(publishDelay):
				continue
			case <-ctx.Done():
				return ctx.Err()
			case <-f.server.stopping:
				return errShuttingDown
			}
		}
		select {
		case w.poke <- done:
			asked = true
		case <-w.over:
			return errReplacedMeanwhile
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
