package controller

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/zap"

	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
	"github.com/symbolon/symbolon/controller/ca"
	"github.com/symbolon/symbolon/controller/instance"
	"github.com/symbolon/symbolon/controller/store"
)

// Bounds of messages, bytes. Headers are bounded for everybody.
const (
	maxAdminMessage = 64 << 20
	maxProxyMessage = 4 << 20
	maxEnrolMessage = 64 << 10
	maxHeader       = 16 << 10
)

const (
	headerTimeout = 10 * time.Second // also bounds the TLS handshake
	idleTimeout   = 2 * time.Minute
	unaryTimeout  = 2 * time.Minute
	// operatorTimeout is what a call of an operator's may take, once he is known: an apply
	// of 100,000 policies needs its time on a busy machine.
	operatorTimeout = 10 * time.Minute
	// A connection on which nothing arrives for so long is probed, and given up.
	pingAfter, pingTimeout = 10 * time.Second, 5 * time.Second
	shutdownTimeout        = 10 * time.Second
	janitorEvery           = 10 * time.Minute
)

// Options are what a Server gets from its surroundings. The zero value works.
type Options struct {
	Logger  *zap.Logger
	Version string
	// Now is the clock of certificates, tokens and policies; nil: time.Now.
	Now func() time.Time
}

// Server is a controller. New opens everything, Serve runs it, Close ends it.
type Server struct {
	cfg     Config
	opts    Options
	log     *zap.Logger
	started time.Time

	store       store.Store
	ca          *ca.CA
	upstream    *upstreamSPIRE // nil: the root is ours, or the operator's
	tokenKeys   *ca.TokenKeys
	nonces      nonces
	believed    *believed
	rotating    sync.Mutex // orders the steps of the root's rotation
	policies    *policies
	hosts       *hosts
	inventory   *inventory
	hub         *hub
	peers       *peers
	revocations *revocations
	edges       *edgeBook
	flows       *flowRing
	scans       *scanBook
	pop         []popAuthority
	// clouds believe instance documents, and cloudAdmissions say what hosts become by each.
	clouds          []instance.Authority
	cloudAdmissions []AdmissionConfig
	enrolLimit      *limiter
	issueLimit      *hostLimits
	renewLimit      *hostLimits
	adminToken      [sha256.Size]byte
	// claimsToken is for composers.
	claimsToken [sha256.Size]byte
	ownBundle   *ownBundle
	followers   *followers

	// federation and bundleEndpoint serve the own bundle; nil: not served.
	federation     net.Listener
	bundleEndpoint *http.Server

	listener net.Listener
	http     *http.Server
	ready    atomic.Bool
	stopping chan struct{}
	stop     sync.Once
	work     context.Context // of workers; ends after the last call
	endWork  context.CancelFunc
	workers  sync.WaitGroup
}

// New opens the store and the CA, makes at the first start what is missing (the
// CA, the root namespace, admin.token, ca.pem), and listens.
func New(ctx context.Context, cfg Config, opts Options) (_ *Server, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if opts.Logger == nil {
		opts.Logger = zap.NewNop()
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	s := &Server{
		cfg: cfg, opts: opts, log: opts.Logger, started: opts.Now(),
		flows: newFlowRing(), enrolLimit: newLimiter(), stopping: make(chan struct{}),
		nonces:     newNonces(),
		believed:   newBelieved(),
		issueLimit: newHostLimits(issueRate, issueBurst), renewLimit: newHostLimits(renewRate, renewBurst),
	}
	if s.store, err = store.Open(cfg.storeFile()); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = s.store.Close()
		}
	}()
	if s.upstream, err = s.openUpstream(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.upstream.close()
		}
	}()
	var external ca.External
	if s.upstream != nil {
		external = s.upstream
	}
	s.ca, err = ca.Open(ctx, s.store, ca.Config{
		External:    external,
		TrustDomain: cfg.trustDomain(), KeyFile: cfg.keyFile(),
		TTL: cfg.CA.SVIDTTL, RotateEvery: cfg.CA.RotateEvery, Now: opts.Now,
		UpstreamCert: cfg.CA.UpstreamCertFile, UpstreamKey: cfg.CA.UpstreamKeyFile,
		NextCert: cfg.CA.NextCertFile, NextKey: cfg.CA.NextKeyFile,
	})
	if err != nil {
		return nil, err
	}
	if s.pop, err = openPoP(cfg.Enrolment.X509PoP); err != nil {
		return nil, err
	}
	if s.clouds, s.cloudAdmissions, err = openClouds(&s.cfg.Enrolment.Cloud); err != nil {
		return nil, err
	}
	if s.tokenKeys, err = s.ca.OpenTokenKeys(ctx); err != nil {
		return nil, err
	}
	if s.adminToken, err = openToken("admin token", cfg.adminTokenFile()); err != nil {
		return nil, err
	}
	if s.claimsToken, err = openToken("claims token", cfg.claimsTokenFile()); err != nil {
		return nil, err
	}
	if err := s.writeRoots(); err != nil {
		return nil, err
	}
	s.hosts = &hosts{store: s.store}
	if s.policies, err = openPolicies(ctx, s.store, s.hosts, s.bundle, opts.Now); err != nil {
		return nil, err
	}
	if s.inventory, err = openInventory(ctx, s.store, opts.Now); err != nil {
		return nil, err
	}
	if s.revocations, err = openRevocations(ctx, s.store, opts.Now); err != nil {
		return nil, err
	}
	if s.edges, err = openEdges(ctx, s.store, cfg.Edges, cfg.trustDomain(), opts.Now); err != nil {
		return nil, err
	}
	if s.scans, err = openScans(ctx, s.store, cfg.CA.SVIDTTL, opts.Now); err != nil {
		return nil, err
	}
	s.policies.db.TrustDomain = cfg.TrustDomain
	s.policies.tokenKeys = s.tokenKeys.Public
	s.hub = newHub(opts.Now, s.policies.distribution())
	enrolled, _, err := s.hosts.list(ctx)
	if err != nil {
		return nil, err
	}
	s.peers = newPeers(s.log, enrolled)
	if err := s.federate(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && s.federation != nil {
			_ = s.federation.Close()
		}
	}()
	if s.listener, err = net.Listen("tcp", cfg.Listen); err != nil {
		return nil, fmt.Errorf("controller: %w", err)
	}
	s.http = s.newHTTP()
	s.work, s.endWork = context.WithCancel(context.WithoutCancel(ctx))
	return s, nil
}

// Addr is where it listens.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

func (s *Server) newHTTP() *http.Server {
	mux := http.NewServeMux()
	mux.Handle(symbolonv1connect.NewEnrolmentServiceHandler(enrolmentService{s},
		connect.WithReadMaxBytes(maxEnrolMessage), connect.WithRequestGate(s.enrolGate)))
	mux.Handle(symbolonv1connect.NewProxyServiceHandler(proxyService{s},
		connect.WithReadMaxBytes(maxProxyMessage), connect.WithRequestGate(s.hostGate),
		// A generation is encoded once for many hosts; compressing it for each would cost
		// far more than that saves.
		connect.WithCompressMinBytes(math.MaxInt)))
	mux.Handle(symbolonv1connect.NewAdminServiceHandler(adminService{s},
		connect.WithReadMaxBytes(maxAdminMessage), connect.WithRequestGate(s.adminGate)))
	mux.Handle(symbolonv1connect.NewClaimsServiceHandler(claimsService{s},
		connect.WithReadMaxBytes(maxEnrolMessage), connect.WithRequestGate(s.claimsGate)))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !s.ready.Load() {
			http.Error(w, "not ready", http.StatusServiceUnavailable)
			return
		}
		_, _ = io.WriteString(w, "ok\n")
	})
	mux.HandleFunc("GET /ca.pem", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/x-pem-file")
		_, _ = w.Write(encodePEM(s.ca.Roots()))
	})

	names, addresses := serverNames(s.listener.Addr().String(), s.cfg.Advertise)
	config := &tls.Config{
		MinVersion:     tls.VersionTLS13,
		NextProtos:     []string{"h2", "http/1.1"},
		GetCertificate: s.ca.ServerCertificate(names, addresses).Get,
		// Asked for, not required, and not verified by crypto/tls, whose rules are not
		// SPIFFE's: verifyPeer does it.
		ClientAuth:       tls.RequestClientCert,
		VerifyConnection: s.verifyPeer,
	}
	config.GetConfigForClient = s.withClientCAs(config.Clone())
	return &http.Server{
		Handler: withCall(mux, map[string]bool{
			symbolonv1connect.ProxyServiceSessionProcedure:    true,
			symbolonv1connect.AdminServiceWatchFlowsProcedure: true,
		}),
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		HTTP2:             &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout, WriteByteTimeout: pingTimeout + pingAfter},
		ErrorLog:          zap.NewStdLog(s.log.Named("http")),
		TLSConfig:         config,
	}
}

// Serve answers until ctx ends, then lets calls finish, within 10 seconds, and
// closes everything. It returns nil after such an end.
func (s *Server) Serve(ctx context.Context) error {
	s.workers.Go(func() { s.inventory.run(s.work, func(err error) { s.log.Error("inventory", zap.Error(err)) }) })
	s.workers.Go(func() { s.edges.run(s.work, func(err error) { s.log.Error("edges", zap.Error(err)) }) })
	s.workers.Go(func() { s.janitor(s.work) })
	s.workers.Go(func() { s.followHosts(s.work) })
	s.workers.Go(func() { s.followScans(s.work) })
	s.workers.Go(func() { s.followers.run(s.work) })
	if s.upstream != nil {
		s.workers.Go(func() { s.followUpstream(s.work) })
	}

	served := make(chan error, 2)
	go func() { served <- s.http.ServeTLS(s.listener, "", "") }()
	if s.bundleEndpoint != nil {
		go func() { served <- s.bundleEndpoint.ServeTLS(s.federation, "", "") }()
	}
	s.ready.Store(true)
	s.log.Info("serving", zap.Stringer("address", s.Addr()), zap.String("trust_domain", s.cfg.TrustDomain),
		zap.Uint64("generation", s.policies.snapshot().Generation()), zap.String("ca_pin", s.ca.Pin()))
	var err error
	select {
	case <-ctx.Done():
	case err = <-served:
		if errors.Is(err, http.ErrServerClosed) { // by Close
			err = nil
		}
	}
	return errors.Join(err, s.Close())
}

// Close ends sessions and watches, waits for calls, and closes the store. It may be
// called without Serve, and again.
func (s *Server) Close() (err error) {
	s.stop.Do(func() {
		s.ready.Store(false)
		close(s.stopping)
		s.hub.close(errShuttingDown)
		s.peers.close()
		ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
		defer cancel()
		if err = s.http.Shutdown(ctx); err != nil {
			err = errors.Join(err, s.http.Close())
		}
		_ = s.listener.Close() // for a server that never served
		if s.bundleEndpoint != nil {
			err = errors.Join(err, s.bundleEndpoint.Close())
			_ = s.federation.Close()
		}
		s.endWork()
		s.workers.Wait()
		s.upstream.close()
		err = errors.Join(err, s.store.Close())
	})
	return err
}

// Run is New and Serve. ready, if not nil, is called once the port is open.
func Run(ctx context.Context, cfg Config, opts Options, ready func(*Server)) error {
	s, err := New(ctx, cfg, opts)
	if err != nil {
		return err
	}
	if ready != nil {
		ready(s)
	}
	return s.Serve(ctx)
}

// janitor forgets what is past, and renews the intermediate in time.
func (s *Server) janitor(ctx context.Context) {
	tick := time.NewTicker(janitorEvery)
	defer tick.Stop()
	for {
		s.inventory.prune(nil)
		s.edges.prune(s.policies.hasPolicy)
		_, pruned := s.revocations.prune(ctx)
		if err := errors.Join(s.sweepTokens(ctx), s.scans.sweep(ctx), s.renewIntermediate(ctx), s.renewTokenKeys(ctx), pruned); err != nil && ctx.Err() == nil {
			s.log.Error("housekeeping", zap.Error(err))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// renewIntermediate does so in time; below SPIRE that is followUpstream's.
func (s *Server) renewIntermediate(ctx context.Context) error {
	if s.upstream != nil {
		return nil
	}
	return s.ca.Renew(ctx)
}

// followHosts cuts the sessions of hosts that are removed, whoever removed them, and
// keeps the addresses of those that are there.
func (s *Server) followHosts(ctx context.Context) {
	for ctx.Err() == nil {
		all, rev, err := s.store.List(ctx, hostPrefix)
		for _, kv := range all {
			err = errors.Join(err, s.peers.follow(kv))
		}
		if err == nil {
			err = s.forgetRemoved(ctx)
		}
		if err != nil {
			if ctx.Err() == nil {
				s.log.Error("follow hosts", zap.Error(err))
			}
			return
		}
		for event, err := range s.store.Watch(ctx, hostPrefix, rev) {
			if errors.Is(err, store.ErrCompacted) {
				break // list again
			}
			if err != nil {
				return
			}
			if event.Deleted {
				s.forgetHost(strings.TrimPrefix(event.Key, hostPrefix))
			} else if err := s.peers.follow(event.KV); err != nil {
				s.log.Error("follow hosts", zap.Error(err))
			}
		}
	}
}

// forgetRemoved looks for hosts whose removal was not seen.
func (s *Server) forgetRemoved(ctx context.Context) error {
	for _, id := range append(s.hub.seen(), s.inventory.hosts()...) {
		_, _, err := s.hosts.get(ctx, id)
		if errors.Is(err, store.ErrNotFound) {
			s.forgetHost(id)
		} else if err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) forgetHost(id string) {
	s.hub.remove(id)
	s.peers.set(id, nil)
	s.inventory.removeHost(id)
	s.issueLimit.forget(id)
	s.renewLimit.forget(id)
}
