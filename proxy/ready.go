package proxy

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

const (
	// At notReadyAt per cent of a limit the proxy says that it is not ready, before it
	// has to refuse anything; below readyAgainAt of all it is ready again.
	notReadyAt, readyAgainAt = 90, 80
	// acceptTrouble is how long a failure to accept counts.
	acceptTrouble = 5 * time.Second
	// strainEvery is how often the limits are looked at.
	strainEvery = 200 * time.Millisecond
)

// errStrained: the proxy is near a limit.
var errStrained = errors.New("near a limit")

// strain is how near the proxy is to its limits, with hysteresis. Safe for
// concurrent use.
type strain struct {
	mu     sync.Mutex
	now    error // why it is not ready; nil: it is
	failed atomic.Int64
	why    atomic.Pointer[error] // of failed
}

// acceptFailed notes that a listener could not accept.
func (s *strain) acceptFailed(err error, now time.Time) {
	s.why.Store(&err)
	s.failed.Store(now.UnixNano())
}

// use is how much of a limit is taken.
type use struct {
	limit       string
	taken, most int
}

func (u use) over(percent int) bool { return u.most > 0 && u.taken*100 >= u.most*percent }

func (u use) String() string {
	return fmt.Sprintf("limits.%s: %d of %d are taken", u.limit, u.taken, u.most)
}

// judge brings the state up to date, and tells whether it has changed.
func (s *strain) judge(uses []use, now time.Time) (changed bool, state error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := notReadyAt
	if s.now != nil {
		at = readyAgainAt
	}
	var why []string
	for _, u := range uses {
		if u.over(at) {
			why = append(why, u.String())
		}
	}
	if since := now.Sub(time.Unix(0, s.failed.Load())); since >= 0 && since < acceptTrouble {
		why = append(why, "connections cannot be accepted: "+(*s.why.Load()).Error())
	}
	was := s.now
	s.now = nil
	if len(why) > 0 {
		s.now = fmt.Errorf("%w: %s", errStrained, strings.Join(why, "; "))
	}
	return (was == nil) != (s.now == nil), s.now
}

// Ready is nil, or says why the proxy should be given no more to do: it is near one
// of its limits, or cannot accept. It serves all the same what comes.
func (p *Proxy) Ready() error {
	p.strain.mu.Lock()
	defer p.strain.mu.Unlock()
	return p.strain.now
}

func (p *Proxy) uses() []use {
	uses := []use{
		{limitConnections, int(p.open.Load()), p.limits.Connections},
		{limitDescriptors, p.descriptors.sample(), p.descriptors.limit},
	}
	for _, n := range []int{p.strangers.size(), p.callers.size()} {
		uses = append(uses, use{limitHandshakes, n, p.limits.Handshakes})
	}
	return uses
}

// watchStrain keeps Ready up to date until ctx ends.
func (p *Proxy) watchStrain(ctx context.Context) {
	tick := time.NewTicker(strainEvery)
	defer tick.Stop()
	for {
		switch changed, state := p.strain.judge(p.uses(), p.now()); {
		case changed && state != nil:
			p.log.Warn("not ready for more", zap.Error(state))
		case changed:
			p.log.Info("ready for more again")
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
