package serve

import (
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/symbolon/symbolon/identity"
)

// FetchX509SVID streams the caller's SVID with its key, and bundles.
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return follow(s, stream, svidResponse)
}

// FetchX509Bundles streams the bundles that the caller may judge others by.
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return follow(s, stream, func(c *identity.Credential) (*workload.X509BundlesResponse, error) {
		res := &workload.X509BundlesResponse{Bundles: make(map[string][]byte)}
		for _, b := range c.Bundles.Bundles() {
			res.Bundles[b.TrustDomain().IDString()] = concat(b.X509Authorities())
		}
		return res, nil
	})
}

// follow sends what respond makes of the caller's credentials, one after the other,
// for as long as it has one and is what it was.
func follow[T any](s *Server, stream grpc.ServerStreamingServer[T], respond func(*identity.Credential) (*T, error)) error {
	ctx := stream.Context()
	x, err := callerOf(ctx)
	if err != nil {
		return err
	}
	updates := s.source.Watch(ctx, x.workload)
	check := time.NewTicker(checkEvery)
	defer check.Stop()
	first := time.NewTimer(firstAnswer)
	defer first.Stop()
	var sent *identity.Credential
	for {
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-x.pin.Ended():
			return denied(identity.ErrEnded)
		case <-first.C:
			return status.Error(codes.Unavailable, "the source of SVIDs does not answer")
		case <-check.C:
			if err := x.check(); err != nil {
				return denied(err)
			}
			if sent != nil && !time.Now().Before(sent.SVID.NotAfter()) {
				return status.Errorf(codes.Unavailable, "%s has expired, and there is no newer SVID", sent.SVID.ID)
			}
		case u, ok := <-updates:
			switch {
			case !ok:
				return status.FromContextError(ctx.Err()).Err()
			case errors.Is(u.Err, identity.ErrWithdrawn), errors.Is(u.Err, identity.ErrEnded):
				return denied(u.Err)
			case u.Credential == nil || u.Credential == sent:
				if u.Err != nil && sent == nil {
					return status.Errorf(codes.Unavailable, "no SVID: %v", u.Err)
				}
				continue
			}
			first.Stop()
			// The last look before a key leaves.
			if err := x.check(); err != nil {
				return denied(err)
			}
			res, err := respond(u.Credential)
			if err != nil {
				return status.Error(codes.Internal, err.Error())
			}
			if err := stream.Send(res); err != nil {
				return err
			}
			sent = u.Credential
		}
	}
}

// denied is how the Workload API says that there is no identity, or none any more.
func denied(err error) error {
	return status.Errorf(codes.PermissionDenied, "no identity issued: %v", err)
}

func svidResponse(c *identity.Credential) (*workload.X509SVIDResponse, error) {
	key, err := x509.MarshalPKCS8PrivateKey(c.SVID.Key)
	if err != nil {
		return nil, fmt.Errorf("private key of %s: %w", c.SVID.ID, err)
	}
	own, err := c.Bundles.GetX509BundleForTrustDomain(c.SVID.ID.TrustDomain())
	if err != nil {
		return nil, err
	}
	res := &workload.X509SVIDResponse{
		Svids: []*workload.X509SVID{{
			SpiffeId: c.SVID.ID.String(), X509Svid: concat(c.SVID.Chain), X509SvidKey: key, Bundle: concat(own.X509Authorities()),
		}},
		FederatedBundles: make(map[string][]byte),
	}
	for _, b := range c.Bundles.Bundles() {
		if b.TrustDomain() != own.TrustDomain() {
			res.FederatedBundles[b.TrustDomain().IDString()] = concat(b.X509Authorities())
		}
	}
	return res, nil
}

func concat(certs []*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, c.Raw...)
	}
	return out
}
