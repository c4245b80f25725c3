package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
	"github.com/symbolon/symbolon/identity"
)

// refresher keeps a composer's snapshot fresh.
type refresher struct {
	cfg *configuration
	log hclog.Logger
	// use puts a newer snapshot in force.
	use func(*snapshot)

	known *snapshot // of this run; nil: the controller has not answered yet
	away  bool      // the last attempt failed
}

// run asks until ctx ends.
func (r *refresher) run(ctx context.Context) {
	for ctx.Err() == nil {
		r.attempt(ctx)
		// Servers that were started together shall not ask together.
		pause := r.cfg.refresh/2 + rand.N(r.cfg.refresh)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// attempt asks once. It logs the first failure of a series, and its end.
func (r *refresher) attempt(ctx context.Context) {
	defer func() {
		if p := recover(); p != nil {
			r.log.Error("refreshing the claims panicked; the last ones stay in force", "panic", p)
		}
	}()
	next, err := r.ask(ctx)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		if !r.away {
			r.log.Warn("the Symbolon controller does not answer; the last claims stay in force", "controller", r.cfg.Controller, "error", err)
		}
		r.away = true
		return
	}
	if r.away {
		r.log.Info("the Symbolon controller answers again", "controller", r.cfg.Controller)
	}
	r.away = false
	if next == nil {
		return
	}
	r.known = next
	// Kept before it is in force: no start goes back behind what was in certificates already.
	if err := next.save(r.cfg.SnapshotFile); err != nil {
		r.log.Error("the claims are not kept for the next start", "error", err)
	}
	r.use(next)
	r.log.Info("claims in force", "generation", next.generation, "profiles", len(next.profiles))
}

// ask returns nil if nothing has changed.
func (r *refresher) ask(ctx context.Context) (*snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	token, err := readToken(r.cfg.TokenFile)
	if err != nil {
		return nil, err
	}
	api, err := r.cfg.client()
	if err != nil {
		return nil, err
	}
	defer api.CloseIdleConnections()
	client := symbolonv1connect.NewClaimsServiceClient(api, "https://"+r.cfg.Controller, connect.WithReadMaxBytes(maxSnapshot))
	req := connect.NewRequest(&symbolonv1.ListClaimProfilesRequest{})
	if r.known != nil {
		req.Msg.Generation, req.Msg.Digest = r.known.generation, r.known.digest
	}
	req.Header().Set("Authorization", "Bearer "+token)
	res, err := client.ListClaimProfiles(ctx, req)
	if err != nil {
		return nil, err
	}
	if res.Msg.GetUnchanged() {
		return nil, nil
	}
	return newSnapshot(res.Msg), nil
}

// client speaks to the controller and to nobody else: who cannot prove to be it, or
// points elsewhere, is not sent the token.
func (c *configuration) client() (*http.Client, error) {
	bundle, err := x509bundle.Load(c.trustDomain, c.CAFile)
	if err != nil {
		return nil, fmt.Errorf("ca_file: %w", err)
	}
	id, err := spiffeid.FromSegments(c.trustDomain, identity.ReservedPath, "controller")
	if err != nil {
		return nil, err
	}
	return &http.Client{
		Transport:     &http.Transport{TLSClientConfig: tlsconfig.TLSClientConfig(bundle, tlsconfig.AuthorizeID(id)), ForceAttemptHTTP2: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

func readToken(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("token_file: %w", err)
	}
	defer func() { _ = f.Close() }()
	b, err := readAll(f)
	if err != nil {
		return "", fmt.Errorf("token_file: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" || strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return "", errors.New("token_file: want one token on one line: a copy of the controller's claims.token")
	}
	return token, nil
}
