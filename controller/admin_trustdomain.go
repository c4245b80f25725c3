package controller

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/ca"
	"github.com/symbolon/symbolon/policydb"
)

// ListTrustDomains tells of one's own bundle and of the others'.
func (s adminService) ListTrustDomains(context.Context, *connect.Request[symbolonv1.ListTrustDomainsRequest]) (*connect.Response[symbolonv1.ListTrustDomainsResponse], error) {
	b, err := s.ownBundle.GetBundleForTrustDomain(s.cfg.trustDomain())
	if err != nil {
		return nil, s.internal("bundle", err)
	}
	own := &symbolonv1.TrustDomainStatus{Name: s.cfg.TrustDomain}
	if s.federation != nil {
		own.Endpoint = s.endpointURL()
		own.Profile = symbolonv1.BundleEndpointProfile_BUNDLE_ENDPOINT_PROFILE_HTTPS_WEB
		if s.cfg.Federation.Profile == profileSPIFFE {
			own.Profile = symbolonv1.BundleEndpointProfile_BUNDLE_ENDPOINT_PROFILE_HTTPS_SPIFFE
			own.EndpointId = ca.ControllerID(s.cfg.trustDomain()).String()
		}
	}
	describeBundle(own, b)
	return connect.NewResponse(&symbolonv1.ListTrustDomainsResponse{Own: own, TrustDomains: s.trustDomains()}), nil
}

// endpointURL is where others find the bundle, as far as that is known here: by the
// address that it is served on, or, where that is all of them, by a name.
func (s *Server) endpointURL() string {
	host, port, err := net.SplitHostPort(s.federation.Addr().String())
	if err != nil {
		return ""
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		if len(s.cfg.Advertise) > 0 {
			host = s.cfg.Advertise[0]
		} else if name, err := os.Hostname(); err == nil {
			host = name
		}
	}
	return "https://" + net.JoinHostPort(host, port) + "/"
}

// trustDomains are the others, by name.
func (s *Server) trustDomains() []*symbolonv1.TrustDomainStatus {
	var out []*symbolonv1.TrustDomainStatus
	for _, r := range s.policies.snapshot().List(policydb.KindTrustDomain, "/") {
		out = append(out, s.trustDomain(r))
	}
	return out
}

func (s *Server) trustDomain(r *symbolonv1.Resource) *symbolonv1.TrustDomainStatus {
	t := r.GetTrustDomain()
	out := &symbolonv1.TrustDomainStatus{
		Name: r.GetName(), Endpoint: t.GetEndpoint(), Profile: t.GetProfile(), EndpointId: t.GetEndpointId(), Claims: t.GetClaims(),
	}
	if b := s.policies.trustBundle(r.GetName()); b != nil {
		describeBundle(out, b.Bundle)
		if !b.record.Fetched.IsZero() {
			out.Fetched, out.Changed = timestamppb.New(b.record.Fetched), timestamppb.New(b.record.Changed)
		}
	}
	h := s.followers.health(r.GetName())
	if h.err != nil {
		out.Error, out.FailingSince = h.err.Error(), timestamppb.New(h.since)
	}
	if !h.next.IsZero() {
		out.NextFetch = timestamppb.New(h.next)
	}
	return out
}

// trustDomainsInBrief leaves the bundles out.
func (s *Server) trustDomainsInBrief() []*symbolonv1.TrustDomainStatus {
	out := s.trustDomains()
	for _, t := range out {
		t.Bundle = ""
	}
	return out
}

func describeBundle(out *symbolonv1.TrustDomainStatus, b *spiffebundle.Bundle) {
	if data, err := b.Marshal(); err == nil {
		out.Bundle = string(data)
	}
	out.Roots = uint32(len(b.X509Authorities()))
	var end time.Time
	for _, root := range b.X509Authorities() {
		if end.IsZero() || root.NotAfter.Before(end) {
			end = root.NotAfter
		}
	}
	if !end.IsZero() {
		out.NotAfter = timestamppb.New(end)
	}
	out.Sequence, _ = b.SequenceNumber()
	if hint, ok := b.RefreshHint(); ok {
		out.RefreshHint = durationpb.New(hint)
	}
}

// RefreshTrustDomain has its endpoint asked now.
func (s adminService) RefreshTrustDomain(ctx context.Context, req *connect.Request[symbolonv1.RefreshTrustDomainRequest]) (*connect.Response[symbolonv1.RefreshTrustDomainResponse], error) {
	name := req.Msg.GetName()
	r := s.policies.snapshot().Get(policydb.KindTrustDomain, "/", name)
	if r == nil {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("there is no TrustDomain %q", name))
	}
	switch err := s.followers.refresh(ctx, r); {
	case errors.Is(err, errShuttingDown), ctx.Err() != nil:
		return nil, err
	case err != nil: // unavailable would say that we are
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	}
	return connect.NewResponse(&symbolonv1.RefreshTrustDomainResponse{TrustDomain: s.trustDomain(r)}), nil
}
