package proxy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/redirect"
)

// partyIdle is how long a workload's endpoint is kept without a connection.
const partyIdle = 30 * time.Minute

// maxParties bounds those without connections.
const maxParties = 8192

// party is a workload of this host, as connections know it: its newest credential,
// and the endpoint made from it.
type party struct {
	key      identity.Key
	current  atomic.Pointer[mtls.Endpoint]
	lastUsed atomic.Int64 // Unix seconds
	open     atomic.Int64 // live connections
	// former is the credential before current, which somebody may still bring who asked
	// for it earlier. Guarded by the lock of parties.
	former *identity.Credential
	// withdrawn: the workload's source says that it has no identity any more.
	withdrawn atomic.Bool
	host      *atomic.Pointer[string] // parties.host; nil in tests
	place     atomic.Pointer[placed]
	// workload is who it was found to be last. Guarded by the lock of parties.
	workload *identity.Workload
}

func (w *party) principal() *identity.Principal {
	return w.current.Load().Credential().Principal()
}

// expires is when the certificate that a new connection presents ends.
func (w *party) expires() time.Time { return w.current.Load().Credential().SVID.NotAfter() }

// still tells whether a tunnel that presented e's SVID speaks for what the workload
// is now: same name, same claims. A newer certificate alone changes nothing.
func (w *party) still(e *mtls.Endpoint) bool {
	was, is := e.Credential().Principal(), w.principal()
	return was == is || was.ID == is.ID && was.Issuer == is.Issuer && slices.Equal(was.Attributes, is.Attributes)
}

// parties finds each workload's party. Safe for concurrent use.
type parties struct {
	options mtls.Options
	mu      sync.Mutex
	byKey   map[identity.Key]*party
	// host is the host's namespace; nil: workloads are where their IDs say.
	host atomic.Pointer[string]
}

// get returns the party of a workload, with cred as its credential, unless that was replaced
// since it was asked for: it must undo neither what came after it nor a withdrawal.
func (s *parties) get(of *identity.Workload, cred *identity.Credential, now time.Time) *party {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := of.Key
	w := s.byKey[key]
	if w == nil {
		if s.byKey == nil {
			s.byKey = make(map[identity.Key]*party)
		}
		if len(s.byKey) >= maxParties {
			s.makeRoom()
		}
		w = &party{key: key, host: &s.host}
		s.byKey[key] = w
	}
	w.workload = of
	if cred != w.former {
		w.use(cred, s.options)
	}
	w.lastUsed.Store(now.Unix())
	return w
}

// use makes cred the party's, unless it is already: a new endpoint has no tickets,
// and tunnels of the old one are not reused.
func (w *party) use(cred *identity.Credential, o mtls.Options) {
	e := w.current.Load()
	if e == nil || e.Credential() != cred {
		if e != nil {
			w.former = e.Credential()
		}
		w.current.Store(mtls.NewEndpoint(cred, o))
		w.withdrawn.Store(false)
	}
}

// update replaces a known party's credential; nil: nobody uses it.
func (s *parties) update(key identity.Key, cred *identity.Credential) *party {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.byKey[key]
	if w != nil {
		w.use(cred, s.options)
	}
	return w
}

// withdraw takes a known party's credential from it, until it gets another one; nil:
// nobody uses it.
func (s *parties) withdraw(key identity.Key) *party {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.byKey[key]
	if w != nil {
		w.withdrawn.Store(true)
	}
	return w
}

// forget lets go of a party that has no live connection.
func (s *parties) forget(key identity.Key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w := s.byKey[key]; w != nil && w.open.Load() == 0 {
		delete(s.byKey, key)
	}
}

// keep counts a live connection of w's, so that it is not forgotten. If it was, while the
// connection came about, it is there again, for whoever withdraws its identity to find. Where
// another one is in its place by now, nobody would find this one: its identity is withdrawn.
// It returns which workload it is.
func (s *parties) keep(w *party) *identity.Workload {
	s.mu.Lock()
	defer s.mu.Unlock()
	w.open.Add(1)
	switch s.byKey[w.key] {
	case w:
	case nil:
		if s.byKey == nil {
			s.byKey = make(map[identity.Key]*party)
		}
		s.byKey[w.key] = w
	default:
		w.withdrawn.Store(true)
	}
	return w.workload
}

// makeRoom forgets a party without connections; there is no order among them. What
// is lost is its tickets.
func (s *parties) makeRoom() {
	for k, w := range s.byKey {
		if w.open.Load() == 0 {
			delete(s.byKey, k)
			return
		}
	}
}

// prune forgets parties that have no connection and had none recently.
func (s *parties) prune(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, w := range s.byKey {
		if w.open.Load() == 0 && now.Unix()-w.lastUsed.Load() > int64(partyIdle/time.Second) {
			delete(s.byKey, k)
		}
	}
}

// hold keeps the credentials of a live connection's local workloads, two at most, fresh
// until release: their claims may change while it lasts.
func (p *Proxy) hold(parties ...*party) held {
	var h held
	for i, w := range parties {
		of := p.parties.keep(w)
		now, unpin := p.credentials.Pin(of)
		h[i].party, h[i].unpin = w, unpin
		if now == nil || now != w.current.Load().Credential() {
			// It was dropped while the connection came about, and what was said of it since
			// was said to nobody. Or it is just being renewed: then this is done twice.
			p.conns.Go(func() { p.confirm(of) })
		}
	}
	return h
}

// held is what hold keeps: of one workload, or both ends of a local connection.
type held [2]struct {
	party *party
	unpin func()
}

func (h *held) release(now time.Time) {
	for _, k := range h {
		if k.party != nil {
			k.party.open.Add(-1)
			k.party.lastUsed.Store(now.Unix())
			k.unpin()
		}
	}
}

// confirm asks what w's credential is by now, and has its party judged by that; without one,
// or without an answer in time, its connections end. A process that has ended is not
// withdrawn: what it sent last is still under way.
func (p *Proxy) confirm(w *identity.Workload) {
	ctx, cancel := context.WithTimeout(context.Background(), p.timeouts.Setup)
	defer cancel()
	for {
		now, err := p.credentials.Get(ctx, w)
		if errors.Is(err, identity.ErrEnded) || errors.Is(err, identity.ErrClosed) {
			return
		}
		p.CredentialChanged(w.Key, now)
		// What came meanwhile may have been told before that, and been undone by it.
		if again, _ := p.credentials.Get(ctx, w); again == now {
			return
		}
	}
}

// client tells who called whom on an outbound connection, and which process it was, if
// the kernel recorded that.
func (p *Proxy) client(c redirect.Accepted) (redirect.Tuple, *redirect.Caller, error) {
	if p.connects == nil {
		tuple, err := p.conntrack.ClientTuple(c)
		return tuple, nil, err
	}
	r, err := p.connects.Caller(c)
	if errors.Is(err, redirect.ErrNoCaller) {
		tuple, err := p.conntrack.ClientTuple(c)
		return tuple, nil, err
	}
	if err != nil {
		return redirect.Tuple{}, nil, err
	}
	if r.Fits(c) {
		return r.Tuple, &r, nil
	}
	tuple, err := p.conntrack.ClientTuple(c)
	if err == nil && tuple != r.Tuple {
		err = fmt.Errorf("the connection from %s has the connect record of one from %s", tuple, r.Tuple)
	}
	return tuple, &r, err
}

// caller is the socket of whoever made the connection that was accepted as c: by the
// kernel's record of the connect call, or else by who has the socket now.
func (p *Proxy) caller(c syscall.Conn, tuple redirect.Tuple, r *redirect.Caller) (identity.Socket, error) {
	if r != nil {
		p.metrics.owners.WithLabelValues("connect_record").Inc()
		return p.recorded(r)
	}
	p.metrics.owners.WithLabelValues("sock_diag").Inc()
	owner, err := p.diag.Owner(tuple.Src, tuple.Dst)
	if err != nil {
		return identity.Socket{}, err
	}
	// Whoever resets frees the port, and another program may connect from there at
	// once. While ours is open, nobody can have.
	if err := redirect.StillOpen(c); err != nil {
		return identity.Socket{}, err
	}
	return p.socket(owner)
}

// recorded is the socket of a caller on record.
func (p *Proxy) recorded(r *redirect.Caller) (identity.Socket, error) {
	s, err := p.socket(r.Socket)
	if err != nil {
		return s, err
	}
	c := &identity.Caller{
		PID: r.PID, Start: r.Start,
		RealUID: r.RealUID, UID: r.UID, ActingRealUID: r.ActingRealUID, ActingUID: r.ActingUID,
		CgroupID: r.CgroupID, CgroupPath: s.CgroupPath,
		Exe: identity.FileID(r.Exe),
	}
	if c.CgroupID != s.CgroupID {
		c.CgroupPath, err = p.cgroupPath(c.CgroupID)
	}
	s.Caller = c
	return s, err
}

// socket is what identity is told of a socket.
func (p *Proxy) socket(o redirect.SocketOwner) (identity.Socket, error) {
	path, err := p.cgroupPath(o.CgroupID)
	s := identity.Socket{UID: o.UID, Inode: o.Inode, CgroupID: o.CgroupID, CgroupPath: path, Trusted: o.Reliable()}
	if o.State == redirect.StateListen {
		s.Listener = o.Cookie
	}
	return s, err
}

// cgroupPath is "" where there is no such cgroup any more, or none at all.
func (p *Proxy) cgroupPath(id uint64) (string, error) {
	if p.cgroups == nil || id == 0 {
		return "", nil
	}
	path, err := p.cgroups.Path(id)
	if errors.Is(err, redirect.ErrCgroupGone) {
		return "", nil
	}
	return path, err
}

// identify finds the workload behind a listening socket and its credential.
// Errors carry UNKNOWN_WORKLOAD, NO_IDENTITY or REVOKED.
func (p *Proxy) identify(ctx context.Context, owner redirect.SocketOwner) (*party, error) {
	s, err := p.socket(owner)
	if err != nil {
		return nil, deny(symbolonv1.Reason_REASON_UNKNOWN_WORKLOAD, err)
	}
	return p.identifySocket(ctx, s)
}

// identifySocket is identify for any socket.
func (p *Proxy) identifySocket(ctx context.Context, s identity.Socket) (*party, error) {
	w, err := p.workloads.Resolve(ctx, s)
	if err != nil {
		return nil, deny(symbolonv1.Reason_REASON_UNKNOWN_WORKLOAD, err)
	}
	cred, err := p.credentials.Get(ctx, w)
	if err != nil {
		return nil, deny(symbolonv1.Reason_REASON_NO_IDENTITY, fmt.Errorf("no SVID for %s: %w", w.Attributes.Get("proc.exe"), err))
	}
	me := p.parties.get(w, cred, p.now())
	// Whoever withdraws it from now on finds the party; before, it shows here.
	if _, err := p.credentials.Get(ctx, w); err != nil {
		return nil, deny(symbolonv1.Reason_REASON_NO_IDENTITY, fmt.Errorf("no SVID for %s: %w", w.Attributes.Get("proc.exe"), err))
	}
	cred = me.current.Load().Credential()
	if err := p.refuseRevoked(cred.SVID, me.known(p.policy.Load())); err != nil {
		return nil, err
	}
	return me, nil
}
