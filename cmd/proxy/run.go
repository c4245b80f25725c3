package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
	"github.com/symbolon/symbolon/controller/enrol"
	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/containers"
	"github.com/symbolon/symbolon/identity/token"
	"github.com/symbolon/symbolon/internal/handover"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/proxy"
	"github.com/symbolon/symbolon/proxy/names"
	"github.com/symbolon/symbolon/redirect"
)

const (
	rulesEvery  = 10 * time.Second
	usersEvery  = 2 * time.Second  // how late a change of a user's groups counts
	rulesNever  = 1000 * time.Hour // only what keeps those of a host that fails open
	reportGrace = 2 * time.Second
	adminHeader = 5 * time.Second
	adminIdle   = time.Minute
)

// daemonParts are what run puts together. Each has an owner here, who closes it.
type daemonParts struct {
	cfg      proxy.Config
	log      *zap.Logger
	loops    int
	rules    *redirect.Rules
	owners   string // how clients are found
	host     *host
	resolver *identity.Resolver
	source   source
	manager  *identity.Manager
	tokens   *token.Verifier
	names    *names.Names
	runtimes *containers.Containers // nil: none is asked
	proxy    *proxy.Proxy
	session  *proxy.Session
	reports  *flow.Reporter

	sourceStatus func() any // nil: the source has none beyond its workloads'

	kernel *kernel
	page   *net.TCPListener // metrics and health; nil: none
	// generation is the policy in force, as it came; nil: none.
	generation atomic.Pointer[symbolonv1.Generation]
	foreign    map[spiffeid.TrustDomain][]*x509.Certificate // of the generation in force; apply's alone
	keeper     *keeper
	requests   chan os.Signal // to hand over
	unused     []string       // names of what was inherited and is not needed

	tell        sync.Mutex
	predecessor *handover.Control // the process that handed over, and drains; nil: none
}

// run is the daemon: rules first, so that nothing passes unprotected while the rest
// comes up; then the host's identity; then the listeners.
func run(ctx context.Context, cfg proxy.Config) (err error) {
	log, err := logger(cfg.LogLevel)
	if err != nil {
		return err
	}
	defer func() { _ = log.Sync() }()
	requests := make(chan os.Signal, 1)
	signal.Notify(requests, syscall.SIGHUP, syscall.SIGUSR2)
	defer signal.Stop(requests)
	inherited, err := handover.Inherit()
	if err != nil {
		return err
	}
	defer inherited.Close()
	raiseDescriptorLimit(log)
	loops := runtime.GOMAXPROCS(0)
	runtime.GOMAXPROCS(2 * loops) // an event loop takes one of them, see proxy.Options

	rulesConfig, err := cfg.Rules()
	if err != nil {
		return err
	}
	d := &daemonParts{cfg: cfg, log: log, loops: loops, requests: requests, predecessor: inherited.Control}
	if d.rules, err = redirect.NewRules(rulesConfig); err != nil {
		return err
	}
	if err := d.rules.Install(ctx); err != nil {
		return err
	}
	for _, w := range d.rules.Warnings() {
		log.Warn("the rules protect less than they could", zap.String("why", w))
	}
	d.host = &host{cfg: cfg, log: log, asked: make(chan struct{}, 1)}
	left := d.host.openEstate(inherited, log)
	if err := d.host.join(ctx, left); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	return d.serve(ctx, rulesConfig, inherited, left)
}

func (d *daemonParts) serve(ctx context.Context, rulesConfig redirect.Config, inherited *handover.Inherited, left *estate) error {
	kernel, err := openKernel(rulesConfig, d.cfg.Redirect.Owner, inherited, d.log)
	if err != nil {
		return err
	}
	defer kernel.close()
	d.kernel, d.owners = kernel, kernel.owners()
	if errors.Is(kernel.noConnects, redirect.ErrNoConnects) {
		d.log.Warn("clients that exit at once will be denied where policy asks for their executable", zap.Error(kernel.noConnects))
	}
	resolver, closeSource, err := d.openSource()
	if err != nil {
		return err
	}
	defer closeSource()
	records, closeRecords, err := d.sinks()
	if err != nil {
		return err
	}
	defer closeRecords()

	d.resolver = resolver
	d.manager = identity.NewManager(d.source)
	defer d.manager.Close()
	defer d.askRuntimes(resolver)()
	timeouts := proxy.DefaultTimeouts
	timeouts.Drain, timeouts.Quiet = d.cfg.DrainTimeout, d.cfg.QuietTimeout
	admin, _ := netip.ParseAddrPort(d.cfg.Admin) // validated; zero if none
	d.names = names.New(names.Options{Dial: redirect.Dialer(redirect.MarkControl, redirect.DefaultKeepAlive).DialContext, Log: d.log})
	d.proxy = proxy.New(proxy.Options{
		Host: d.host.cred.Load().HostID, Outbound: kernel.outbound, Inbound: kernel.inbound, KeepAlive: redirect.DefaultKeepAlive,
		Diag: kernel.diag, Conntrack: kernel.conntrack, Cgroups: kernel.cgroups, Connects: kernel.connects,
		Workloads: resolver, Credentials: d.manager, Tokens: d.tokens, Names: d.names, Records: records, Edges: d.reports, Log: d.log,
		Admin: admin, Timeouts: timeouts, Limits: d.cfg.Limits, TLS: mtls.Options{StockTLS: d.cfg.Tunnel.RecordLayer == "stock", Curves: d.cfg.Tunnel.Curves(), FastOpen: d.cfg.Tunnel.FastOpen},
		Idle: proxy.Idle{Open: d.cfg.Tunnel.IdleTimeout, HalfClosed: d.cfg.Tunnel.HalfCloseTimeout}, NoReuse: !d.cfg.Tunnel.Reuse,
		Loops: d.loops, PreserveSource: d.cfg.Redirect.PreserveSource,
	})
	d.keeper = newKeeper(handover.ManagerStore(), d.log, d.snapshot)
	d.manager.Subscribe(d.proxy.CredentialChanged)
	d.manager.Subscribe(func(identity.Key, *identity.Credential) { d.keeper.changed() })
	d.manager.SubscribeDropped(d.proxy.WorkloadDropped)
	d.host.changed = d.hostChanged
	d.hostChanged(d.host.cred.Load())
	d.session = &proxy.Session{
		Client: func() symbolonv1connect.ProxyServiceClient { return d.host.client() },
		Hello: func() *symbolonv1.Hello {
			return &symbolonv1.Hello{Version: version, Generation: d.proxy.Generation(), Addresses: d.proxy.Addresses(), BundleVersion: d.bundleVersion()}
		},
		Bundle:  d.bundleVersion,
		Apply:   d.fromController,
		Peers:   d.setPeers,
		Revoked: d.revokedByController,
		Reissue: d.reissue,
		Log:     d.log,
	}
	d.restore(left)
	page, err := d.pageListener(inherited)
	if err != nil {
		return err
	}
	d.page = page
	d.unused = inherited.Names()
	inherited.Close()
	if err := d.awaitGo(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	closeAdmin, err := d.serveAdmin()
	if err != nil {
		return err
	}
	closeAPI, err := d.serveWorkloadAPI()
	if err != nil {
		closeAdmin()
		return err
	}
	d.keepListeners(kernel)
	return d.work(ctx, func() { closeAPI(); closeAdmin() })
}

// work runs every part until ctx ends, the proxy fails or another process has taken
// over, and waits for all.
func (d *daemonParts) work(ctx context.Context, closeServers func()) error {
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	ctx, removed := context.WithCancelCause(ctx)
	defer removed(nil)
	u := &duties{
		rules: duty{run: func(ctx context.Context) { d.watchRules(ctx, rulesEvery) }},
		beats: duty{run: func(ctx context.Context) { d.watchRules(ctx, rulesNever) }},
		rest: []*duty{
			{run: func(ctx context.Context) {
				if err := d.session.Run(ctx); err != nil {
					removed(err)
				}
			}},
			{run: d.host.renew}, {run: d.keeper.run}, {run: d.notifyReady},
		},
	}
	u.start(background)
	var parts sync.WaitGroup
	parts.Go(func() { d.reports.Run(background, reportGrace) })

	serving, stopServing := context.WithCancel(ctx)
	parts.Go(func() { tidyMemory(background) })
	defer paceCollections()()
	parts.Go(func() {
		d.resolver.WatchUsers(background, usersEvery, func() { d.manager.Refresh(d.resolver.Refresh) })
	})
	parts.Go(func() { d.names.Run(background) })
	if limit := d.cfg.Tunnel.PeerTimeout; limit > 0 {
		parts.Go(func() {
			d.kernel.diag.WatchVanished(background, limit, func(err error) { d.log.Warn("vanished peers are not found", zap.Error(err)) })
		})
	}
	successor := make(chan *handover.Next, 1)
	parts.Go(func() {
		next := d.succeed(serving, background, u)
		successor <- next
		if next != nil {
			closeServers()
			stopServing()
			d.follow(next.Control)
		}
	})
	err := d.proxy.Run(serving) // drains after its context has ended
	stopServing()
	next := <-successor
	if next == nil {
		_ = d.keeper.store.Notify(daemon.SdNotifyStopping)
	} else {
		_ = next.Control.Close()
	}
	u.stop()
	stop()
	parts.Wait()
	closeServers()
	return errors.Join(err, d.leave(ctx, next != nil))
}

// leave puts the host in order for the time after this process.
func (d *daemonParts) leave(ctx context.Context, succeeded bool) (err error) {
	if succeeded {
		return nil // all of it is the next one's
	}
	_ = os.Remove(d.cfg.Socket)
	if path := d.cfg.Identity.ServeWorkloadAPI; path != "" {
		_ = os.Remove(path)
	}
	if cause := context.Cause(ctx); errors.Is(cause, proxy.ErrRemoved) {
		// The next start enrols anew, if there is a fresh join token.
		d.keeper.forget()
		err = errors.Join(cause, forget(d.cfg.Socket))
	}
	if d.cfg.Redirect.OnExit == "open" {
		return errors.Join(err, d.rules.Remove(context.WithoutCancel(ctx), nil))
	}
	d.log.Info("stopped; protected connections are refused until the proxy runs again ('symbolon-proxy cleanup' removes the rules)")
	return err
}

// fromController puts a generation in force here, in the process that drains, and where
// the next process finds it.
func (d *daemonParts) fromController(g *symbolonv1.Generation) error {
	d.received(g)
	err := d.apply(g)
	d.host.keepNewest() // before the controller hears of it
	if err != nil {
		return err
	}
	d.tellPredecessor(handover.Policy, g)
	return nil
}

// apply puts a generation in force.
func (d *daemonParts) apply(g *symbolonv1.Generation) error {
	roots, err := parseRoots(g.GetBundle())
	if err != nil {
		return err
	}
	// Whatever becomes of the rest: withdrawn roots must not be believed, and the controller
	// may be about to come with new ones.
	d.host.trust(roots, g.GetBundleVersion())
	own := d.host.cred.Load().TrustDomain
	foreign, err := foreignBundles(g, own)
	if err != nil {
		return err
	}
	if peers := g.GetPeers(); len(peers) > 0 { // first, lest learn pass by a proxy that is known
		d.proxy.SetPeers(peers)
	}
	if err := d.proxy.SetTokenKeys(d.host.cred.Load().TrustDomain, g.GetTokenKeys()); err != nil {
		return err
	}
	if d.cfg.Identity.Source != proxy.SourceController {
		d.proxy.SetHostNamespace(cmp.Or(g.GetHostNamespace(), d.host.cred.Load().Namespace, "/"))
	}
	if err := d.proxy.SetPolicy(g.GetResources(), g.GetNumber()); err != nil {
		return err
	}
	d.source.SetBundle(own, d.host.cred.Load().Roots)
	d.federate(foreign)
	g.Revocations = d.proxy.Revocations().Proto() // it may say nothing of them
	d.generation.Store(g)
	d.keeper.save() // before the controller hears of it
	d.log.Info("policy in force", zap.Uint64("generation", g.GetNumber()), zap.Int("resources", len(g.GetResources())))
	return nil
}

// bundleVersion is that of the roots that are believed.
func (d *daemonParts) bundleVersion() uint64 { return d.host.cred.Load().BundleVersion }

// setPeers puts other addresses in force, and where the next process finds them. Only
// the session calls it and apply, in turn.
func (d *daemonParts) setPeers(addresses [][]byte) {
	d.proxy.SetPeers(addresses)
	if was := d.generation.Load(); was != nil {
		next := shallow(was)
		next.Peers = addresses
		d.generation.Store(next)
		d.keeper.changed()
	}
}

func (d *daemonParts) hostChanged(c *enrol.HostCredential) {
	d.source.SetBundle(c.TrustDomain, c.Roots)
	cred, err := hostCredential(c)
	if err != nil {
		d.log.Error("host SVID", zap.Error(err))
		return
	}
	d.proxy.SetHostCredential(cred)
	d.keeper.changed()
}

func (d *daemonParts) watchRules(ctx context.Context, every time.Duration) {
	err := d.rules.Watch(ctx, every, func(drift []string, err error) {
		if err != nil {
			d.log.Error("rules not verified or not repaired", zap.Strings("drift", drift), zap.Error(err))
			return
		}
		d.log.Warn("rules had been changed by somebody else, and are repaired", zap.Strings("drift", drift))
	})
	if err != nil && ctx.Err() == nil {
		d.log.Error("rules are not watched", zap.Error(err))
	}
}

// notifyReady tells systemd when connections are served: rules and a policy.
func (d *daemonParts) notifyReady(ctx context.Context) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for d.ready() != nil {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
	_ = d.keeper.store.Notify(daemon.SdNotifyReady, "STATUS=Serving.")
	d.log.Info("ready")
	d.notifyStatus(ctx, tick.C)
}

// notifyStatus tells systemd in words when the proxy is near its limits, and when it
// is not any more.
func (d *daemonParts) notifyStatus(ctx context.Context, tick <-chan time.Time) {
	strained := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick:
		}
		switch err := d.ready(); {
		case err != nil && !strained:
			_ = d.keeper.store.Notify("STATUS=Not ready: " + oneLine(err))
		case err == nil && strained:
			_ = d.keeper.store.Notify("STATUS=Serving.")
		}
		strained = d.ready() != nil
	}
}

func (d *daemonParts) ready() error {
	if d.proxy.Generation() == 0 {
		return errors.New("no policy has arrived from the controller yet")
	}
	return d.proxy.Ready()
}

// sinks are the flow file and the controller.
func (d *daemonParts) sinks() (flow.Sink, func(), error) {
	d.reports = flow.NewReporter(func(ctx context.Context, r *symbolonv1.ReportFlowsRequest) error {
		_, err := d.host.client().ReportFlows(ctx, connect.NewRequest(r))
		switch connect.CodeOf(err) {
		case connect.CodeInvalidArgument, connect.CodeInternal, connect.CodeResourceExhausted:
			return fmt.Errorf("%w: %w", flow.ErrUnacceptable, err)
		}
		return err
	})
	var out io.Writer
	closeFile := func() {}
	switch d.cfg.Flows {
	case "":
		return d.reports, closeFile, nil
	case "-":
		out = os.Stdout
	default:
		f, err := os.OpenFile(d.cfg.Flows, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
		if err != nil {
			return nil, nil, fmt.Errorf("flows: %w", err)
		}
		out, closeFile = f, func() { _ = f.Close() }
	}
	w := flow.NewWriter(out, func(err error) { d.log.Error("flow records are not written", zap.Error(err)) })
	return flow.Tee{w, d.reports}, func() { w.Close(); closeFile() }, nil
}

// serveAdmin opens the metrics page and the debug socket.
func (d *daemonParts) serveAdmin() (stop func(), err error) {
	reg := prometheus.NewRegistry()
	reg.MustRegister(d.proxy, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	public := proxy.AdminHandler(reg, d.ready)
	private := d.proxy.DebugHandler(public, proxy.Debug{Identities: d.debugIdentities, Rules: d.debugRules, Status: d.debugStatus})
	socket, err := d.debugListener()
	if err != nil {
		return nil, err
	}
	var serving sync.WaitGroup
	var servers []*http.Server
	serve := func(l net.Listener, h http.Handler) {
		s := &http.Server{Handler: h, ReadHeaderTimeout: adminHeader, IdleTimeout: adminIdle, ErrorLog: zap.NewStdLog(d.log)}
		servers = append(servers, s)
		serving.Go(func() { _ = s.Serve(l) }) // ErrServerClosed
	}
	serve(socket, private)
	if d.page != nil {
		serve(d.page, public)
	}
	return sync.OnceFunc(func() {
		for _, s := range servers {
			_ = s.Close()
		}
		serving.Wait()
	}), nil
}

// debugListener opens the debug socket, which only root can open.
func (d *daemonParts) debugListener() (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(d.cfg.Socket), 0o755); err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	// It is of a run that was killed, or of the one that has just handed over.
	if err := os.Remove(d.cfg.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("socket: %w", err)
	}
	// The mode must hold from the first moment on, and nothing else makes files now.
	mask := syscall.Umask(0o177)
	socket, err := net.ListenUnix("unix", &net.UnixAddr{Name: d.cfg.Socket, Net: "unix"})
	syscall.Umask(mask)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	socket.SetUnlinkOnClose(false) // the name may be the next process's by then
	return socket, nil
}

// pageName is what the page's listener is handed over as. It does not wait with the
// service manager: who asks for health shall hear that nobody is there.
const pageName = "page"

// pageListener takes over or opens the page's listener; nil where no page is wanted.
func (d *daemonParts) pageListener(inherited *handover.Inherited) (*net.TCPListener, error) {
	if d.cfg.Admin == "" {
		return nil, nil
	}
	l, err := listen(inherited, d.log, pageName, d.cfg.Admin)
	if err != nil {
		return nil, fmt.Errorf("admin: %w", err)
	}
	return l, nil
}

// debugIdentities are the workloads in use; a Status encodes without its key.
func (d *daemonParts) debugIdentities() any { return d.manager.Snapshot() }

func (d *daemonParts) debugRules() any {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	drift, err := d.rules.Verify(ctx)
	out := map[string]any{"drift": drift, "warnings": d.rules.Warnings(), "ipv6": d.rules.IPv6(), "on_exit": d.cfg.Redirect.OnExit, "owner": d.owners}
	if err != nil {
		out["error"] = err.Error()
	}
	return out
}

func (d *daemonParts) debugStatus() any {
	c := d.host.cred.Load()
	out := map[string]any{
		"version": version, "host_id": c.HostID, "namespace": c.Namespace, "trust_domain": c.TrustDomain.Name(),
		"host_svid_not_after": c.NotAfter(), "controller": d.cfg.Controller.Address,
		"controller_connected": d.session.Connected(), "generation": d.proxy.Generation(), "flows_lost": d.reports.Lost(),
		"identity_source": d.cfg.Identity.Source, "revocations": d.proxy.Revocations().Len(),
		"bundle_version": c.BundleVersion, "host_svid_since": c.Chain[0].NotBefore, "host_svid_renewal": c.RotateAt, "svids": svidAges(d.manager.Snapshot()),
		"fast_open": fastOpen(d.cfg.Tunnel.FastOpen), "container_runtimes": d.runtimeStatus(),
	}
	d.addAges(out)
	if d.sourceStatus != nil {
		out["identity"] = d.sourceStatus()
	}
	return out
}

func logger(level string) (*zap.Logger, error) {
	l, err := zapcore.ParseLevel(level)
	if err != nil {
		return nil, err
	}
	c := zap.NewProductionConfig()
	c.Level, c.Sampling = zap.NewAtomicLevelAt(l), nil
	c.EncoderConfig.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	c.DisableStacktrace = true
	return c.Build()
}
