package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/ca"
	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/identity"
)

// proxyService implements symbolonv1connect.ProxyServiceHandler. hostGate has
// admitted the caller.
type proxyService struct{ *Server }

// IssueSVID signs a workload's key under the name that the Profiles give it.
func (s proxyService) IssueSVID(ctx context.Context, req *connect.Request[symbolonv1.IssueSVIDRequest]) (*connect.Response[symbolonv1.IssueSVIDResponse], error) {
	host := hostOf(ctx)
	if err := s.issueLimit.allow(host.ID, "SVIDs"); err != nil {
		return nil, err
	}
	pub, err := ca.PublicKey(req.Msg.GetCsr())
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	reported := identity.AttributesFromProto(req.Msg.GetAttributes())
	if err := checkAttributes(reported, assertable...); err != nil {
		s.log.Warn("attributes refused", zap.String("host", host.ID), zap.Error(err))
		return nil, err
	}
	now := s.opts.Now() // before scans are read: what is said later is news
	subjects := scanSubjects(reported)
	scanned := s.scans.of(subjects...)
	a := s.policies.snapshot().Assign(host.Namespace, overlay(reported, scanned).Union(host.attributes()))
	id, err := spiffeid.FromPath(s.cfg.trustDomain(), strings.TrimSuffix(a.Namespace, "/")+"/"+a.Workload)
	if err != nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("workload %q in %s: %w", a.Workload, a.Namespace, err))
	}
	who, err := identity.NewPrincipal(id, a.Claims)
	if err != nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	}
	if err := s.refuseRevoked(host.ID, "", &who); err != nil {
		s.log.Warn("SVID refused", zap.String("host", host.ID), zap.Error(err))
		return nil, err
	}
	issued, err := s.ca.IssueWorkload(pub, id, a.Claims, host.ID)
	switch {
	case errors.Is(err, ca.ErrClaims):
		return nil, connect.NewError(connect.CodeFailedPrecondition,
			fmt.Errorf("%s: %w; let `claims` in the Profiles %v select fewer attributes", id, err, a.Profiles))
	case errors.Is(err, ca.ErrID):
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	case err != nil:
		return nil, s.internal("issue SVID", err)
	}
	s.inventory.record(workloadRecord{
		SPIFFEID: id.String(), Namespace: a.Namespace, Name: a.Workload, Claims: a.Claims,
		HostID: host.ID, Issued: now, NotAfter: issued.Leaf.NotAfter, Subjects: issuedAt(subjects, now),
		Serial: identity.SerialOf(issued.Leaf).String(), Issuer: issued.Issuer(),
	})
	// Who pushed meanwhile did not find this host in the inventory; and who has replaced
	// the intermediate told it before it had this SVID.
	if !slices.Equal(scanned, s.scans.of(subjects...)) || !s.ca.InForce(issued) {
		s.hub.reissue([]string{host.ID})
	}
	s.log.Debug("SVID issued", zap.Stringer("id", id), zap.String("host", host.ID), zap.Strings("profiles", a.Profiles))
	return connect.NewResponse(&symbolonv1.IssueSVIDResponse{
		Svid: issuedProto(issued), Namespace: a.Namespace, Workload: a.Workload, Profiles: a.Profiles,
	}), nil
}

func issuedAt(subjects []string, now time.Time) map[string]time.Time {
	m := make(map[string]time.Time, len(subjects))
	for _, s := range subjects {
		m[s] = now
	}
	return m
}

// RenewHost gives a host that still exists its next SVID.
func (s proxyService) RenewHost(ctx context.Context, req *connect.Request[symbolonv1.RenewHostRequest]) (*connect.Response[symbolonv1.RenewHostResponse], error) {
	host := hostOf(ctx)
	if err := s.renewLimit.allow(host.ID, "host SVIDs"); err != nil {
		return nil, err
	}
	pub, err := ca.PublicKey(req.Msg.GetCsr())
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	if err := s.refuseRevoked(host.ID, "", nil); err != nil {
		return nil, err
	}
	issued, err := s.ca.IssueHost(pub, host.ID)
	if err != nil {
		return nil, s.internal("renew host", err)
	}
	err = s.hosts.update(ctx, host.ID, func(h *hostRecord) {
		h.LastSeen, h.SVIDNotAfter, h.Issuer = s.opts.Now(), issued.Leaf.NotAfter, issued.Issuer()
	})
	if errors.Is(err, store.ErrNotFound) {
		return nil, errRemoved(host.ID)
	}
	if err != nil {
		return nil, s.internal("renew host", err)
	}
	if !s.ca.InForce(issued) { // as for a workload's
		s.hub.reissue([]string{host.ID})
	}
	bundle, version := s.bundle()
	return connect.NewResponse(&symbolonv1.RenewHostResponse{Svid: issuedProto(issued), Bundle: bundle, BundleVersion: version}), nil
}
