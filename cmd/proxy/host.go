package main

import (
	"context"
	"crypto/x509"
	"errors"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
	"github.com/symbolon/symbolon/controller/enrol"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/cloud"
	"github.com/symbolon/symbolon/internal/keyring"
	"github.com/symbolon/symbolon/proxy"
	"github.com/symbolon/symbolon/redirect"
)

const (
	// maxMessage bounds what the controller may send at once, bytes.
	maxMessage = 64 << 20
	retryFirst = time.Second
	retryMax   = time.Minute
)

// host is this machine as the controller knows it: its credential, kept fresh, and
// a client that always uses the newest.
type host struct {
	cfg  proxy.Config
	log  *zap.Logger
	cred atomic.Pointer[enrol.HostCredential]
	mu   sync.Mutex // orders changes of cred
	api  atomic.Pointer[controllerAPI]
	// inKeyring: the newest credential is kept there; saved is the last that was.
	inKeyring atomic.Bool
	saved     atomic.Pointer[enrol.HostCredential]
	// asked has room for one word: the SVID is to be renewed now.
	asked chan struct{}
	// changed hears of each new credential.
	changed func(*enrol.HostCredential)
}

type controllerAPI struct {
	symbolonv1connect.ProxyServiceClient
	transport *http.Transport
}

// keyName names the kept credential; a machine may run several proxies, one a
// network namespace, which differ by their sockets.
func keyName(socket string) string { return "symbolon:host:" + socket }

func forget(socket string) error { return keyring.Remove(keyName(socket)) }

// kept is the credential that an earlier run has left in the kernel.
func (h *host) kept() (*enrol.HostCredential, error) {
	b, err := keyring.Load(keyName(h.cfg.Socket))
	if err != nil {
		return nil, err
	}
	defer clear(b)
	return enrol.Unmarshal(b)
}

// join takes the credential that an earlier run left, or enrols.
func (h *host) join(ctx context.Context, left *estate) error {
	c, err := h.kept()
	if left != nil {
		c, err = left.host, nil
	}
	switch {
	case err == nil:
		h.use(c)
		h.log.Info("host identity taken over from an earlier run", zap.String("host_id", c.HostID), zap.Time("not_after", c.NotAfter()))
		return nil
	case !errors.Is(err, keyring.ErrNotFound) && !errors.Is(err, keyring.ErrUnavailable):
		h.log.Warn("the kept host identity is of no use", zap.Error(err))
	}
	for pause := retryFirst; ; pause = min(2*pause, retryMax) {
		c, err := h.enrol(ctx)
		if err == nil {
			h.use(c)
			h.log.Info("host enrolled", zap.String("host_id", c.HostID), zap.String("namespace", c.Namespace), zap.Stringer("trust_domain", c.TrustDomain))
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !transient(err) {
			return err
		}
		h.log.Warn("cannot enrol yet", zap.String("controller", h.cfg.Controller.Address), zap.Error(err))
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(rand.N(pause)):
		}
	}
}

// transient: it may help to try again, with the same token.
func transient(err error) bool {
	if errors.Is(err, cloud.ErrUnavailable) {
		return true
	}
	var c *connect.Error
	return errors.As(err, &c) && (c.Code() == connect.CodeUnavailable || c.Code() == connect.CodeDeadlineExceeded || c.Code() == connect.CodeResourceExhausted)
}

// use puts c in force and in the kernel's keeping. Newer roots that came otherwise, while
// the controller's answer was on its way, stay.
func (h *host) use(c *enrol.HostCredential) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if was := h.cred.Load(); was != nil && was.TrustDomain == c.TrustDomain && !supersedes(c.Roots, c.BundleVersion, was) {
		c = c.WithRoots(was.Roots, was.BundleVersion)
	}
	h.put(c)
	h.inKeyring.Store(h.keep(c))
	h.saved.Store(c)
}

// trust puts the roots that the controller has sent in force, unless newer ones are. The
// kernel's keeping hears of it from keepNewest.
func (h *host) trust(roots []*x509.Certificate, version uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if was := h.cred.Load(); supersedes(roots, version, was) {
		h.log.Info("other roots are believed", zap.Int("roots", len(roots)), zap.Uint64("bundle_version", version))
		h.put(was.WithRoots(roots, version))
	}
}

// supersedes tells whether roots are newer than what was, and not the same in another order.
func supersedes(roots []*x509.Certificate, version uint64, was *enrol.HostCredential) bool {
	same := len(roots) == len(was.Roots) && !slices.ContainsFunc(roots, func(r *x509.Certificate) bool {
		return !slices.ContainsFunc(was.Roots, r.Equal)
	})
	return len(roots) > 0 && version >= was.BundleVersion && (version > was.BundleVersion || !same)
}

// keepNewest puts the newest credential in the kernel's keeping if it is not there. A
// process that drains leaves that to the one that has taken over.
func (h *host) keepNewest() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c := h.cred.Load(); h.saved.Load() != c {
		h.inKeyring.Store(h.keep(c))
		h.saved.Store(c)
	}
}

// put puts c in force; the caller holds the lock.
func (h *host) put(c *enrol.HostCredential) {
	transport := c.Transport(redirect.Dialer(redirect.MarkControl, redirect.DefaultKeepAlive))
	client := symbolonv1connect.NewProxyServiceClient(&http.Client{Transport: transport},
		"https://"+h.cfg.Controller.Address, connect.WithGRPC(), connect.WithReadMaxBytes(maxMessage))
	h.cred.Store(c)
	if old := h.api.Swap(&controllerAPI{client, transport}); old != nil {
		old.transport.CloseIdleConnections()
	}
	if h.changed != nil {
		h.changed(c)
	}
}

// keep puts c in the kernel's keeping.
func (h *host) keep(c *enrol.HostCredential) bool {
	kept, err := c.Marshal()
	if err != nil {
		h.log.Error("the host identity cannot be kept", zap.Error(err))
		return false
	}
	defer clear(kept)
	if err := keyring.Save(keyName(h.cfg.Socket), kept, time.Until(c.NotAfter())); err != nil {
		h.log.Warn("the host identity is not in the kernel's keyring: without a service manager that keeps it, the next start needs a new join token", zap.Error(err))
		return false
	}
	return true
}

// client is the newest.
func (h *host) client() symbolonv1connect.ProxyServiceClient { return h.api.Load() }

// endpoint is the host's credential in the form that tunnels take.
func hostCredential(c *enrol.HostCredential) (*identity.Credential, error) {
	svid, err := c.SVID()
	if err != nil {
		return nil, err
	}
	return &identity.Credential{SVID: svid, Bundles: x509bundle.NewSet(x509bundle.FromX509Authorities(c.TrustDomain, c.Roots))}, nil
}

// renew replaces the host's SVID in time, until ctx ends.
func (h *host) renew(ctx context.Context) {
	pause, due := retryFirst, false
	for {
		c := h.cred.Load()
		wait := time.Until(c.RotateAt)
		if due || wait < 0 {
			wait = rand.N(pause)
			pause = min(2*pause, retryMax)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		case <-h.asked:
		}
		next, err := c.Renew(ctx, h.client())
		if err != nil {
			h.log.Warn("host SVID not renewed", zap.Time("not_after", c.NotAfter()), zap.Error(err))
			due = true
			continue
		}
		pause, due = retryFirst, false
		h.use(next)
	}
}

// renewNow has renew do so without waiting for the time.
func (h *host) renewNow() {
	select {
	case h.asked <- struct{}{}:
	default: // it is asked already
	}
}

// newest is the ProxyService client of the newest host credential, for those who
// keep one client.
type newest struct{ h *host }

func (n newest) IssueSVID(ctx context.Context, r *connect.Request[symbolonv1.IssueSVIDRequest]) (*connect.Response[symbolonv1.IssueSVIDResponse], error) {
	return n.h.client().IssueSVID(ctx, r)
}

func (n newest) IssueToken(ctx context.Context, r *connect.Request[symbolonv1.IssueTokenRequest]) (*connect.Response[symbolonv1.IssueTokenResponse], error) {
	return n.h.client().IssueToken(ctx, r)
}

func (n newest) RenewHost(ctx context.Context, r *connect.Request[symbolonv1.RenewHostRequest]) (*connect.Response[symbolonv1.RenewHostResponse], error) {
	return n.h.client().RenewHost(ctx, r)
}

func (n newest) Session(ctx context.Context) *connect.BidiStreamForClient[symbolonv1.SessionRequest, symbolonv1.SessionResponse] {
	return n.h.client().Session(ctx)
}

func (n newest) ReportFlows(ctx context.Context, r *connect.Request[symbolonv1.ReportFlowsRequest]) (*connect.Response[symbolonv1.ReportFlowsResponse], error) {
	return n.h.client().ReportFlows(ctx, r)
}
