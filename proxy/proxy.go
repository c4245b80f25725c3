package proxy

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/token"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/policydb"
	"github.com/symbolon/symbolon/proxy/loop"
	"github.com/symbolon/symbolon/redirect"
)

// Resolver finds the workload behind a socket; identity.Resolver is the real one.
type Resolver interface {
	Resolve(ctx context.Context, s identity.Socket) (*identity.Workload, error)
	// Known is Resolve without waiting; not ok: that may know more.
	Known(s identity.Socket) (w *identity.Workload, ok bool)
}

// Credentials gives a workload's valid credential, waiting for a first one until
// ctx ends; identity.Manager is the real one.
type Credentials interface {
	Get(ctx context.Context, w *identity.Workload) (*identity.Credential, error)
	// Known is Get without waiting; not ok: that may know more.
	Known(w *identity.Workload) (c *identity.Credential, ok bool)
	// Pin keeps a workload's credential fresh until unpin; now is what it is.
	Pin(w *identity.Workload) (now *identity.Credential, unpin func())
}

// Timeouts bound each phase before bytes flow.
type Timeouts struct {
	// Setup is everything from accept to the verdict.
	Setup time.Duration
	// Connect is one TCP connect, Handshake TLS and Open.
	Connect, Handshake time.Duration
	// Quiet is how long a client without a proxy may say nothing before it counts
	// as one that waits for the server to speak first.
	Quiet time.Duration
	// Drain is how long open connections have to end when the proxy stops.
	Drain time.Duration
}

// DefaultTimeouts are what the configuration starts from.
var DefaultTimeouts = Timeouts{
	Setup:     30 * time.Second,
	Connect:   10 * time.Second,
	Handshake: 10 * time.Second,
	Quiet:     200 * time.Millisecond,
	Drain:     10 * time.Second,
}

// Options are what a Proxy is made of. The caller closes what it opened, after Run
// has returned.
type Options struct {
	// Host is this host's id, for records.
	Host string
	// Outbound and Inbound are the listeners that the kernel redirects to. Run
	// closes them.
	Outbound, Inbound []*net.TCPListener
	// KeepAlive, if enabled, is set on accepted connections: listeners that another
	// process has opened do not know it.
	KeepAlive net.KeepAliveConfig

	Diag        *redirect.Diag
	Conntrack   *redirect.Conntrack
	Cgroups     *redirect.Cgroups  // nil on a machine without cgroup v2
	Connects    *redirect.Connects // nil where the kernel keeps no connect records
	Workloads   Resolver
	Credentials Credentials
	Names       NameSource // nil: no address has one
	// Tokens checks clients' tokens; SetTokenKeys gives it keys. Nil: one of its own.
	Tokens  *token.Verifier
	Records flow.Sink
	Edges   flow.EdgeSink // nil: none
	Log     *zap.Logger

	// Admin is the proxy's own page, which local programs may reach; zero: none.
	Admin netip.AddrPort

	Timeouts Timeouts
	Limits   Limits
	// Descriptors is how many the process may have; 0: its RLIMIT_NOFILE.
	Descriptors int
	TLS         mtls.Options
	// NoReuse gives every connection a tunnel of its own.
	NoReuse bool
	// Idle bounds how long connections may rest.
	Idle Idle
	// Loops is how many event loops carry open connections; 0: one a processor. A busy
	// one keeps a processor of the Go scheduler's to itself, so GOMAXPROCS should be
	// larger by as many.
	Loops int
	// PreserveSource connects to local applications from their client's address.
	PreserveSource bool
	// Now is the clock of decisions and certificates; nil: time.Now.
	Now func() time.Time
}

// verifiedChains is how many peers' certificate chains are remembered as verified.
const verifiedChains = 16384

// Proxy serves the connections of one host.
type Proxy struct {
	host              string
	admin             netip.AddrPort
	outboundListeners []*net.TCPListener
	inboundListeners  []*net.TCPListener
	keepAlive         net.KeepAliveConfig
	diag              *redirect.Diag
	conntrack         *redirect.Conntrack
	cgroups           *redirect.Cgroups
	connects          *redirect.Connects
	workloads         Resolver
	credentials       Credentials
	names             NameSource
	records           flow.Sink
	edges             flow.EdgeSink
	log               *zap.Logger
	timeouts          Timeouts
	now               func() time.Time

	policy  atomic.Pointer[policydb.Compiled]
	applied atomic.Pointer[applied]
	hostEnd atomic.Pointer[mtls.Endpoint]
	tokens  *token.Verifier
	tls     mtls.Options
	parties parties
	table   table
	pool    pool
	lot     lot
	asides  asides
	peers   peers
	// strangers bounds inbound connections before they are authorized, by source;
	// callers outbound ones, by user.
	strangers gate[netip.Prefix]
	callers   gate[uint32]
	// What limits bound further: all connections, each workload's, descriptors.
	limits      Limits
	open        atomic.Int64
	seats       seats
	descriptors *descriptors
	quotas      quotas
	strain      strain
	noReuse     bool
	// preserveSource is Options.PreserveSource.
	preserveSource bool
	// accepting ends when the proxy begins to stop: nothing new is waited for.
	accepting     context.Context
	stopAccepting context.CancelFunc
	local         localAddresses
	metrics       *metrics
	// loops carry the open connections; conns counts everything that is under way.
	nLoops int
	crew   *crew
	idle   Idle
	loops  *loop.Loops
	conns  sync.WaitGroup
}

// New prepares a proxy. It serves nothing before Run, and denies everything before
// SetPolicy.
func New(o Options) *Proxy {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Timeouts == (Timeouts{}) {
		o.Timeouts = DefaultTimeouts
	}
	if o.Limits == (Limits{}) {
		o.Limits = DefaultLimits
	}
	o.TLS.Now = o.Now
	p := &Proxy{}
	o.TLS.Admit = p.admitPeer
	if o.TLS.Verified == nil {
		o.TLS.Verified = identity.NewVerifiedCache(verifiedChains)
	}
	*p = Proxy{
		host: o.Host, admin: o.Admin, outboundListeners: o.Outbound, inboundListeners: o.Inbound, keepAlive: o.KeepAlive,
		diag: o.Diag, conntrack: o.Conntrack, cgroups: o.Cgroups, connects: o.Connects,
		workloads: o.Workloads, credentials: o.Credentials, names: o.Names, records: o.Records, edges: o.Edges, log: o.Log,
		timeouts: o.Timeouts, now: o.Now, tls: o.TLS,
		parties: parties{options: o.TLS},
	}
	if p.tokens = o.Tokens; p.tokens == nil {
		p.tokens = token.NewVerifier()
	}
	p.noReuse, p.preserveSource, p.idle = o.NoReuse, o.PreserveSource, o.Idle
	if p.nLoops = o.Loops; p.nLoops <= 0 {
		p.nLoops = runtime.GOMAXPROCS(0)
	}
	p.limits, p.descriptors = o.Limits, newDescriptors(o.Descriptors)
	p.strangers.name, p.strangers.each, p.strangers.all = limitPerSource, p.limits.HandshakesPerSource, p.limits.Handshakes
	p.callers.name, p.callers.each, p.callers.all = limitPerUser, p.limits.HandshakesPerUser, p.limits.Handshakes
	p.accepting, p.stopAccepting = context.WithCancel(context.Background())
	p.metrics = newMetrics(p)
	return p
}

// applied is the policy in force, as it came.
type applied struct {
	resources []*symbolonv1.Resource
	at        time.Time
}

// SetPolicy compiles a generation and puts it in force, for new connections at once
// and for live ones before it returns: those that it denies are cut. On error
// everything stays as it was.
func (p *Proxy) SetPolicy(resources []*symbolonv1.Resource, generation uint64) error {
	c, err := policydb.Compile(resources, generation)
	if err != nil {
		return err
	}
	if p.names != nil { // first, so that nobody asks for what is not looked up yet
		p.names.Want(c.Names())
	}
	publish := func() {
		p.policy.Store(c)
		p.applied.Store(&applied{resources, p.now()})
	}
	if n := p.table.setPolicy(c, publish, p.now()); n > 0 {
		p.log.Info("connections cut by a new policy", zap.Int("connections", n), zap.Uint64("generation", c.Generation()))
	}
	return nil
}

// Generation is that of the policy in force; 0: none.
func (p *Proxy) Generation() uint64 {
	if c := p.policy.Load(); c != nil {
		return c.Generation()
	}
	return 0
}

// SetHostCredential is what refusals for ports without a workload are signed with.
func (p *Proxy) SetHostCredential(c *identity.Credential) {
	p.hostEnd.Store(mtls.NewEndpoint(c, p.tls))
}

func (p *Proxy) hostEndpoint() *mtls.Endpoint { return p.hostEnd.Load() }

// CredentialChanged puts a workload's newer credential in use, and judges its live
// connections again: its claims may be others. nil: it has none any more, so they end.
func (p *Proxy) CredentialChanged(key identity.Key, c *identity.Credential) {
	if c == nil {
		if w := p.parties.withdraw(key); w != nil {
			if n := p.table.changed(w, p.now()); n > 0 {
				p.log.Info("connections cut, since their workload has no identity any more", zap.Int("connections", n), zap.Stringer("spiffe_id", w.principal().ID))
			}
		}
		return
	}
	if w := p.parties.update(key, c); w != nil {
		if n := p.table.changed(w, p.now()); n > 0 {
			p.log.Info("connections cut by a workload's new credential", zap.Int("connections", n), zap.Stringer("spiffe_id", w.principal().ID))
		}
		p.table.renewed(w)
	}
}

// WorkloadDropped lets go of a workload whose credential is not kept any more.
func (p *Proxy) WorkloadDropped(key identity.Key) { p.parties.forget(key) }

// Addresses are the host's own, as text.
func (p *Proxy) Addresses() []string { return p.local.list(p.now()) }

// Run serves until ctx ends; then it accepts no more, gives open connections
// Timeouts.Drain to end, and cuts the rest. The error is that of a listener that
// failed; nil after ctx has ended.
func (p *Proxy) Run(ctx context.Context) error {
	p.crew = newCrew()
	defer p.crew.close()
	loops, err := loop.Start(p.nLoops, p.crew.run)
	if err != nil {
		return err
	}
	p.loops = loops
	defer loops.Close()
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var accepting sync.WaitGroup
	outbound, inbound, err := p.acceptors()
	if err != nil {
		return err
	}
	failed := make(chan error, len(outbound)+len(inbound))
	listen := func(ls []acceptor, reporter symbolonv1.Reporter, serve func(context.Context, *socket)) {
		for _, l := range ls {
			accepting.Go(func() {
				if err := p.accept(l, func(c *socket) {
					if full := p.admit(c); full != nil {
						p.refuse(c, reporter, full)
						return
					}
					p.conns.Add(1)
					serve(serving, c)
				}); err != nil {
					failed <- err
				}
			})
		}
	}
	listen(outbound, symbolonv1.Reporter_REPORTER_CLIENT, p.outbound)
	listen(inbound, symbolonv1.Reporter_REPORTER_SERVER, p.inbound)
	var sweeping sync.WaitGroup
	sweeping.Go(func() { p.sweep(serving) })
	sweeping.Go(func() { p.watchStrain(serving) })

	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	for _, l := range append(outbound, inbound...) {
		_ = l.Close()
	}
	p.stopAccepting()
	accepting.Wait()
	p.pool.close() // no connection will come that could use a tunnel again
	p.lot.close()
	p.drain()
	stop()
	p.conns.Wait()
	sweeping.Wait()
	return err
}

// acceptors prepares the listeners. Inbound ones give their connections to the runtime:
// each begins with waiting for a first byte, and mostly a handshake.
func (p *Proxy) acceptors() (outbound, inbound []acceptor, err error) {
	for _, l := range p.outboundListeners {
		if p.tls.StockTLS { // goroutines carry everything
			outbound = append(outbound, &listener{l, p.keepAlive})
			continue
		}
		b, err := bare(l, p.keepAlive)
		if err != nil {
			return nil, nil, fmt.Errorf("listener %s: %w", l.Addr(), err)
		}
		outbound = append(outbound, b)
	}
	if p.tls.FastOpen {
		if missing := redirect.FastOpenMissing(); missing != "" {
			p.log.Warn("tunnel.fast_open has no effect, or only half", zap.String("missing", missing))
		}
	}
	for _, l := range p.inboundListeners {
		if err := redirect.AcceptFastOpen(l, p.tls.FastOpen); err != nil && p.tls.FastOpen {
			return nil, nil, fmt.Errorf("listener %s: %w; tunnel.fast_open: false does without", l.Addr(), err)
		}
		inbound = append(inbound, &listener{l, p.keepAlive})
	}
	return outbound, inbound, nil
}

func (p *Proxy) drain() {
	done := make(chan struct{})
	go func() { p.conns.Wait(); close(done) }()
	timer := time.NewTimer(p.timeouts.Drain)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		p.table.endAll(symbolonv1.Reason_REASON_SHUTTING_DOWN)
	}
}

func (p *Proxy) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			p.table.askAll(p.now())
			p.table.sweep(p.now())
			p.parties.prune(p.now())
			p.pool.sweep(p.now())
			p.lot.sweep(p.now())
			p.sweepIdle(p.now())
		}
	}
}
