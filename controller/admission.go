package controller

import (
	"context"
	"crypto"
	"errors"

	"connectrpc.com/connect"
	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/ca"
	"github.com/symbolon/symbolon/controller/instance"
	"github.com/symbolon/symbolon/identity"
)

// admission is a proven identity, and what the host becomes by it.
type admission struct {
	who       hostIdentity
	namespace string
	labels    map[string]string
	// instance is what a cloud's document proves; nil: there is none.
	instance *instance.Instance
	// again judges an identity that is a host already; nil: it is that host.
	again func(was *hostRecord) error
}

// admit makes or renews the host that a proven identity stands for.
func (s enrolmentService) admit(ctx context.Context, req *connect.Request[symbolonv1.EnrolRequest], pub crypto.PublicKey, reported identity.Attributes, a admission) (*connect.Response[symbolonv1.EnrolResponse], error) {
	refuse := func(code connect.Code, err error) error {
		s.log.Warn("enrolment refused", zap.Error(err), zap.String("identity", a.who.name), zap.String("address", req.Peer().Addr))
		return connect.NewError(code, err)
	}
	var issued *ca.Issued
	again := false
	host, err := s.hosts.admit(ctx, a.who.name, func(was *hostRecord) (*hostRecord, error) {
		now := s.opts.Now()
		h := &hostRecord{
			ID: newHostID(), Hostname: req.Msg.GetHostname(), Namespace: a.namespace, Labels: a.labels, Reported: reported,
			Identity: a.who.name, Names: a.who.names, SPIFFEID: a.who.spiffeID, Enrolled: now, LastSeen: now,
		}
		h.setInstance(a.instance)
		if again = was != nil; again {
			if a.again != nil {
				if err := a.again(was); err != nil {
					return nil, err
				}
			}
			// RenewHost would refuse it, too.
			if err := s.refuseRevoked(was.ID, "", nil); err != nil {
				return nil, err
			}
			h.ID, h.Addresses = was.ID, was.Addresses
		}
		var err error
		if issued, err = s.ca.IssueHost(pub, h.ID); err != nil {
			return nil, err
		}
		h.SVIDNotAfter, h.Issuer = issued.Leaf.NotAfter, issued.Issuer()
		return h, nil
	}, a.who.barring()...)
	switch {
	case connect.CodeOf(err) == connect.CodePermissionDenied: // refuseRevoked's
		return nil, refuse(connect.CodePermissionDenied, errors.Unwrap(err))
	case errors.Is(err, errBarred) || errors.Is(err, errInstanceUsed) || errors.Is(err, errInstanceTaken):
		return nil, refuse(connect.CodePermissionDenied, err)
	case errors.Is(err, errNoNamespace):
		return nil, refuse(connect.CodeFailedPrecondition, err)
	case err != nil:
		return nil, s.internal("enrol", err)
	}
	s.log.Info("host enrolled", zap.String("host", host.ID), zap.String("hostname", host.Hostname), zap.String("namespace", host.Namespace),
		zap.String("address", req.Peer().Addr), zap.String("identity", a.who.name), zap.String("instance", host.Instance), zap.Bool("again", again))
	return s.enrolled(host, issued), nil
}
