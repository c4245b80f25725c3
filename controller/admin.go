package controller

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/zap"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/policydb"
)

// adminService implements symbolonv1connect.AdminServiceHandler. adminGate has
// admitted the caller.
type adminService struct{ *Server }

// GetStatus counts.
func (s adminService) GetStatus(ctx context.Context, _ *connect.Request[symbolonv1.GetStatusRequest]) (*connect.Response[symbolonv1.GetStatusResponse], error) {
	hosts, _, err := s.hosts.list(ctx)
	if err != nil {
		return nil, s.internal("list hosts", err)
	}
	snapshot := s.policies.snapshot()
	return connect.NewResponse(&symbolonv1.GetStatusResponse{
		Version:        s.opts.Version,
		TrustDomain:    s.cfg.TrustDomain,
		Generation:     snapshot.Generation(),
		Started:        timestamppb.New(s.started),
		CaNotAfter:     timestamppb.New(s.ca.NotAfter()),
		Hosts:          uint32(len(hosts)),
		HostsConnected: uint32(s.hub.connected()),
		Workloads:      uint32(len(s.inventory.list(""))),
		Policies:       uint32(len(snapshot.List(policydb.KindPolicy, ""))),
		Namespaces:     uint32(len(snapshot.List(policydb.KindNamespace, ""))),
		FlowsLost:      s.flows.lostCount(),
		TrustDomains:   s.trustDomainsInBrief(),

		Revocations:             uint32(s.revocations.current().Len()),
		HostsWithoutRevocations: uint32(len(s.hub.withoutRevocations(s.revocations.current().Number()))),
		Ages:                    s.ages(hosts),
	}), nil
}

// CreateJoinToken makes a token for one host.
func (s adminService) CreateJoinToken(ctx context.Context, req *connect.Request[symbolonv1.CreateJoinTokenRequest]) (*connect.Response[symbolonv1.CreateJoinTokenResponse], error) {
	m := req.Msg
	if err := s.namespaceError(m.GetNamespace()); err != nil {
		return nil, err
	}
	if err := checkLabels(m.GetLabels()); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	ttl := defaultTokenTTL
	if m.GetTtl() != nil {
		ttl = m.GetTtl().AsDuration()
	}
	if ttl < time.Second || ttl > maxTokenTTL {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("ttl %v: want between 1s and %v", ttl, maxTokenTTL))
	}
	token, expires, err := s.createToken(ctx, m.GetNamespace(), m.GetLabels(), ttl)
	if err != nil {
		return nil, s.internal("create join token", err)
	}
	s.log.Info("join token created", zap.String("token", token.ID), zap.String("namespace", m.GetNamespace()),
		zap.Any("labels", m.GetLabels()), zap.Time("expires", expires))
	return connect.NewResponse(&symbolonv1.CreateJoinTokenResponse{Token: token.Reveal(), Expires: timestamppb.New(expires)}), nil
}

// ListHosts tells what is stored of hosts and what is known of their sessions.
func (s adminService) ListHosts(ctx context.Context, _ *connect.Request[symbolonv1.ListHostsRequest]) (*connect.Response[symbolonv1.ListHostsResponse], error) {
	hosts, _, err := s.hosts.list(ctx)
	if err != nil {
		return nil, s.internal("list hosts", err)
	}
	res := &symbolonv1.ListHostsResponse{Generation: s.policies.snapshot().Generation()}
	for _, h := range hosts {
		p := s.hub.presence(h.ID)
		res.Hosts = append(res.Hosts, &symbolonv1.Host{
			Id: h.ID, Hostname: h.Hostname, Namespace: h.Namespace,
			Attributes: h.attributes().Union(h.Reported).Proto(),
			Enrolled:   timestamppb.New(h.Enrolled), LastSeen: timestamppb.New(h.seen(p)), SvidNotAfter: timestamppb.New(h.SVIDNotAfter),
			Connected: p.connected, Generation: p.acked, Error: p.refusal, Version: p.version, Addresses: p.addresses,
		})
	}
	return connect.NewResponse(res), nil
}

// RemoveHost ends a host: its session is cut, nothing more is issued to it, and what was
// is revoked.
func (s adminService) RemoveHost(ctx context.Context, req *connect.Request[symbolonv1.RemoveHostRequest]) (*connect.Response[symbolonv1.RemoveHostResponse], error) {
	id := req.Msg.GetId()
	if _, _, err := s.hosts.get(ctx, id); err == nil {
		// First: what fails in between leaves it refused, not let in.
		if err := s.revokeRemoved(ctx, id, actorOf(req.Peer())); err != nil {
			return nil, err
		}
	}
	if err := s.hosts.remove(ctx, id, req.Msg.GetReadmit()); errors.Is(err, store.ErrNotFound) {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("there is no host %q", id))
	} else if err != nil {
		return nil, s.internal("remove host", err)
	}
	s.log.Info("host removed", zap.String("host", id), zap.Bool("readmit", req.Msg.GetReadmit()))
	return connect.NewResponse(&symbolonv1.RemoveHostResponse{}), nil
}

// ListWorkloads lists those with an SVID that is still valid.
func (s adminService) ListWorkloads(_ context.Context, req *connect.Request[symbolonv1.ListWorkloadsRequest]) (*connect.Response[symbolonv1.ListWorkloadsResponse], error) {
	res := &symbolonv1.ListWorkloadsResponse{}
	for _, w := range s.inventory.list(req.Msg.GetNamespace()) {
		res.Workloads = append(res.Workloads, &symbolonv1.Workload{
			SpiffeId: w.SPIFFEID, Namespace: w.Namespace, Name: w.Name, Attributes: w.Claims.Proto(), HostId: w.HostID,
			Issued: timestamppb.New(w.Issued), NotAfter: timestamppb.New(w.NotAfter), Serial: w.Serial,
		})
	}
	return connect.NewResponse(res), nil
}
