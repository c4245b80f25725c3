package proxy

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// Mostly all that a connection's beginning needs is there: its workload's credential, a
// policy, a tunnel that waits. Such a connection is quick: it is served by whoever has
// its news, the acceptor or an event loop, since to hand it to a goroutine and back costs
// as much as all the rest. As soon as something is to be waited for, what is left of it
// goes to a goroutine after all.

// errLater: what is left is in conn.rest, and may wait.
var errLater = errors.New("the rest may have to wait")

// errAsked: an Open is under way, and its Verdict goes on.
var errAsked = errors.New("asked")

// later runs f, which may wait: now, or where the connection is quick when goOn says so.
func (x *conn) later(ctx context.Context, f func(context.Context) error) error {
	if !x.quick {
		return f(ctx)
	}
	x.quick, x.rest = false, f
	return errLater
}

// goOn does what is left to do after a quick part of serving the accepted connection has
// returned err. One of p.conns is given back at its end.
func (x *conn) goOn(ctx context.Context, err error) {
	switch {
	case errors.Is(err, errAsked):
	case errors.Is(err, errLater):
		f := x.rest
		x.rest = nil
		x.p.crew.run(func() {
			defer x.p.conns.Done()
			x.serve(ctx, f)
		})
	case errors.Is(err, errRelaying):
		x.p.conns.Done()
	default:
		x.p.crew.run(func() { // a record, and perhaps a log that nobody reads
			defer x.p.conns.Done()
			x.ended(ctx, err)
		})
	}
}

// known is identifySocket without waiting; not ok: it has to, or there is none.
func (p *Proxy) known(s identity.Socket) (me *party, ok bool) {
	w, ok := p.workloads.Known(s)
	if !ok {
		return nil, false
	}
	cred, ok := p.credentials.Known(w)
	if !ok {
		return nil, false
	}
	me = p.parties.get(w, cred, p.now())
	if _, ok := p.credentials.Known(w); !ok { // withdrawn, see identifySocket
		return nil, false
	}
	cred = me.current.Load().Credential()
	return me, p.refuseRevoked(cred.SVID, me.known(p.policy.Load())) == nil
}

// asked is an Open on a tunnel that an event loop has. The loop goes on with it.
type asked struct {
	*outgoing
	ctx   context.Context // of the proxy: when it ends, nothing is waited for any more
	way   route
	relay *relay
	soon  *time.Timer // calls linger

	mu    sync.Mutex
	ended bool // the Verdict is there, or will never be
	// From linger on.
	watch *watch // nil: it was not called
	late  *time.Timer
	stop  func() bool
	why   atomic.Pointer[error] // nobody waits for the Verdict any more
}

// ask is again without waiting. errAsked, or not done.
func (o *outgoing) ask(ctx context.Context, r *relay, way route) error {
	a := &asked{outgoing: o, ctx: ctx, way: way, relay: r}
	// Mostly the Verdict is there long before: one timer, and no more.
	soon := min(patient, o.p.timeouts.Setup)
	a.soon = time.AfterFunc(soon, func() { a.linger(o.p.timeouts.Setup - soon) })
	r.tunnel.on.Await(a.answered)
	return errAsked
}

// linger looks after an Open whose Verdict takes its time: for as long as setup, unless
// the proxy stops or the application goes away before.
func (a *asked) linger(setup time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ended {
		return
	}
	// What follows may have begun when the Verdict comes, and go on when the connection has
	// been taken apart, for its bytes to flow. Then it comes to nothing.
	near, t := a.accepted, a.relay.tunnel
	giveUp := func(why error) {
		a.why.CompareAndSwap(nil, &why)
		_ = t.Close()
	}
	a.watch = a.relay.watch(0, func() { _ = t.Reset() })
	a.late = time.AfterFunc(setup, func() { giveUp(context.DeadlineExceeded) })
	a.stop = context.AfterFunc(a.ctx, func() {
		near.reset()
		giveUp(a.ctx.Err())
	})
}

// answered is called with the Verdict, mostly by the loop, or with why there is none.
func (a *asked) answered(m []byte, err error) {
	a.soon.Stop()
	a.mu.Lock()
	a.ended = true
	lingers := a.watch != nil
	a.mu.Unlock()
	if lingers {
		a.late.Stop()
		a.stop()
	}
	if why := a.why.Load(); why != nil {
		err = *why
	}
	v, err := a.relay.tunnel.TakeVerdict(m, err)
	if err == nil && (!lingers || a.watch.unneeded()) {
		a.goOn(a.ctx, a.opened(v))
		return
	}
	a.goOn(a.ctx, a.later(a.ctx, func(ctx context.Context) error { return a.slowly(ctx, v, err) }))
}

func (a *asked) opened(v *symbolonv1.Verdict) error {
	a.tunnelled(a.relay.tunnel.Conn)
	a.rec.Reused = true
	return a.outgoing.relay(a.relay, a.relay.tunnel.Conn, v)
}

// slowly goes on after a Verdict that took its time, or did not come.
func (a *asked) slowly(ctx context.Context, v *symbolonv1.Verdict, err error) error {
	t := a.relay.tunnel
	if a.watch != nil {
		if up := a.watch.stop(); up != nil {
			_ = t.Reset()
			return networkError(up)
		}
	}
	if err == nil {
		return a.opened(v)
	}
	_ = t.Close()
	if a.why.Load() != nil || !a.relay.unheard(err) {
		return err
	}
	// It stopped waiting just now.
	return a.serveTunnel(ctx, a.p.policy.Load(), a.me, a.tuple, true)
}
