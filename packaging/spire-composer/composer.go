package main

import (
	"context"
	"errors"
	"io/fs"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	credentialcomposerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/symbolon/symbolon/identity"
)

// composer implements SPIRE's CredentialComposer. What it does not implement (CAs,
// servers, agents, JWT-SVIDs), SPIRE issues as ever.
type composer struct {
	credentialcomposerv1.UnimplementedCredentialComposerServer
	configv1.UnimplementedConfigServer

	log hclog.Logger
	// current is nil before anything was ever heard of the controller.
	current atomic.Pointer[snapshot]

	mu   sync.Mutex
	stop func() // the refresher; nil: none
}

var (
	_ credentialcomposerv1.CredentialComposerServer = (*composer)(nil)
	_ configv1.ConfigServer                         = (*composer)(nil)
)

// SetLogger is called by the SDK.
func (c *composer) SetLogger(log hclog.Logger) { c.log = log }

// Configure begins with the claims that an earlier run has left, and asks for newer
// ones from then on. It does not wait for them. Errors: InvalidArgument.
func (c *composer) Configure(_ context.Context, req *configv1.ConfigureRequest) (*configv1.ConfigureResponse, error) {
	cfg, err := configure(req.GetHclConfiguration())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if _, err := readToken(cfg.TokenFile); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stop != nil {
		c.stop()
	}
	last, err := load(cfg.SnapshotFile)
	switch {
	case err == nil:
		c.current.Store(last)
		c.log.Info("claims of an earlier run in force", "generation", last.generation, "profiles", len(last.profiles))
	case !errors.Is(err, fs.ErrNotExist):
		c.log.Error("the claims of an earlier run are not used", "error", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	r := &refresher{cfg: cfg, log: c.log, use: c.current.Store}
	running.Go(func() { r.run(ctx) })
	c.stop = func() { cancel(); running.Wait() }
	return &configv1.ConfigureResponse{}, nil
}

// Validate checks a configuration without using it.
func (c *composer) Validate(_ context.Context, req *configv1.ValidateRequest) (*configv1.ValidateResponse, error) {
	if _, err := configure(req.GetHclConfiguration()); err != nil {
		return &configv1.ValidateResponse{Notes: []string{err.Error()}}, nil
	}
	return &configv1.ValidateResponse{Valid: true}, nil
}

// Close is called by the SDK.
func (c *composer) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stop != nil {
		c.stop()
		c.stop = nil
	}
	return nil
}

// ComposeWorkloadX509SVID adds the claims of the workload's ID. Whatever goes wrong,
// SPIRE gets an answer: without the extension the certificate says nothing of labels,
// and the policy of whoever sees it falls back on what it knows of the ID.
func (c *composer) ComposeWorkloadX509SVID(_ context.Context, req *credentialcomposerv1.ComposeWorkloadX509SVIDRequest) (resp *credentialcomposerv1.ComposeWorkloadX509SVIDResponse, err error) {
	defer func() {
		if p := recover(); p != nil {
			c.log.Error("composing panicked; the certificate gets no claims", "spiffe_id", req.GetSpiffeId(), "panic", p)
			resp, err = &credentialcomposerv1.ComposeWorkloadX509SVIDResponse{Attributes: req.GetAttributes()}, nil
		}
	}()
	attributes := req.GetAttributes()
	if attributes == nil {
		attributes = &credentialcomposerv1.X509SVIDAttributes{}
	}
	out := &credentialcomposerv1.ComposeWorkloadX509SVIDResponse{Attributes: attributes}
	id, err := spiffeid.FromString(req.GetSpiffeId())
	if err != nil {
		c.log.Error("not a SPIFFE ID; the certificate gets no claims", "spiffe_id", req.GetSpiffeId(), "error", err)
		return out, nil
	}
	claims := c.current.Load().claims(id)
	if len(claims) == 0 {
		return out, nil
	}
	ext, err := identity.MarshalClaims(claims)
	if err != nil {
		c.log.Error("too much for a certificate; it gets no claims: let Profiles give this ID fewer labels", "spiffe_id", id.String(), "error", err)
		return out, nil
	}
	oid := ext.Id.String()
	for _, e := range attributes.GetExtraExtensions() {
		if e.GetOid() == oid {
			c.log.Error("another composer has given claims already; they are left as they are", "spiffe_id", id.String())
			return out, nil
		}
	}
	attributes.ExtraExtensions = append(attributes.ExtraExtensions, &credentialcomposerv1.X509Extension{Oid: oid, Value: ext.Value})
	return out, nil
}
