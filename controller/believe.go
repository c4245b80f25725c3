package controller

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"

	"connectrpc.com/connect"
	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/identity"
)

// maxBelieved is how many hosts' certificates are remembered; what is beyond is verified
// again with each call, which is slower and nothing else.
const maxBelieved = 16 << 10

// believed says by which version of the roots a certificate was verified last. A
// connection outlives its handshake, and may so outlive the root that vouched for it.
type believed struct {
	by *lru.Cache[[sha256.Size]byte, uint64]
}

func newBelieved() *believed {
	by, err := lru.New[[sha256.Size]byte, uint64](maxBelieved)
	if err != nil {
		panic(err) // only for a size below one
	}
	return &believed{by}
}

// refuseWithdrawnPeer ends what runs under a certificate of a root that is believed no
// more. Errors: unauthenticated.
func (s *Server) refuseWithdrawnPeer(ctx context.Context) error {
	_, version := s.ca.Trust()
	state := callOf(ctx).tls
	if version == 0 || state == nil || len(state.PeerCertificates) == 0 {
		return nil // the roots were never others, or nobody was believed
	}
	key := sha256.Sum256(state.PeerCertificates[0].Raw)
	if by, ok := s.believed.by.Get(key); ok && by == version {
		return nil
	}
	// The roots may be newer than the version by now: that costs another look. The other
	// way round, a withdrawn one would be believed.
	if _, err := identity.VerifySVID(state.PeerCertificates, s.ca.Bundle(), s.opts.Now()); err != nil {
		return connect.NewError(connect.CodeUnauthenticated, fmt.Errorf("the host SVID of this connection is not believed any more, connect anew: %w", err))
	}
	s.believed.by.Add(key, version)
	return nil
}

// withClientCAs makes the configuration of each connection, with the roots of that moment
// as a hint which certificates are wanted.
func (s *Server) withClientCAs(base *tls.Config) func(*tls.ClientHelloInfo) (*tls.Config, error) {
	var mu sync.Mutex
	var config *tls.Config
	var of uint64
	return func(*tls.ClientHelloInfo) (*tls.Config, error) {
		roots, version := s.ca.Trust()
		mu.Lock()
		defer mu.Unlock()
		if config == nil || of != version {
			next := base.Clone()
			next.ClientCAs = x509.NewCertPool()
			for _, root := range roots {
				next.ClientCAs.AddCert(root)
			}
			config, of = next, version
		}
		return config, nil
	}
}

// believes keeps which version of the roots a host has acknowledged: it may be away when
// that is asked, or this controller may have been restarted.
func (e *session) believes(ctx context.Context, version uint64) error {
	if e.host.Bundle == version {
		return nil
	}
	err := e.hosts.update(ctx, e.host.ID, func(h *hostRecord) { h.Bundle = version })
	if errors.Is(err, store.ErrNotFound) {
		return errRemoved(e.host.ID)
	}
	if err != nil {
		return e.internal("acknowledgement", err)
	}
	e.host.Bundle = version // this call's own copy
	return nil
}
