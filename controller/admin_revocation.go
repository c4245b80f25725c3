package controller

import (
	"context"
	"errors"
	"fmt"
	"maps"
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

// Revoke is in force here when it answers, and on its way to the connected hosts.
func (s adminService) Revoke(ctx context.Context, req *connect.Request[symbolonv1.RevokeRequest]) (*connect.Response[symbolonv1.RevokeResponse], error) {
	rec, err := s.revocationOf(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	rec.Actor = actorOf(req.Peer())
	made, already, err := s.revoke(ctx, rec)
	if err != nil {
		return nil, err
	}
	hosts, _, err := s.hosts.list(ctx)
	if err != nil {
		return nil, s.internal("list hosts", err)
	}
	res := &symbolonv1.RevokeResponse{Record: made.proto(), Already: already}
	for _, h := range hosts {
		if s.hub.presence(h.ID).connected {
			res.HostsConnected++
		} else {
			res.HostsAway++
		}
	}
	only, _ := (*identity.Revocations)(nil).Update(&symbolonv1.Revocations{Number: 1, Added: []*symbolonv1.Revocation{made.revocation()}})
	for _, w := range s.inventory.list("") {
		if p, err := w.principal(); err == nil && (only.Check(w.serial(), p) != nil || made.Host == w.HostID) {
			res.Workloads++
		}
	}
	return connect.NewResponse(res), nil
}

// revoke records who did what, besides doing it.
func (s *Server) revoke(ctx context.Context, rec revocationRecord) (*revocationRecord, bool, error) {
	made, already, err := s.revocations.add(ctx, rec)
	if errors.Is(err, errRevocationsFull) {
		return nil, false, connect.NewError(connect.CodeResourceExhausted, err)
	}
	if err != nil {
		return nil, false, s.internal("revoke", err)
	}
	s.log.Info("revoked", zap.String("revocation", made.ID), zap.String("spiffe_id", made.SPIFFEID), zap.String("serial", made.Serial),
		zap.String("host", made.Host), zap.Any("labels", made.Labels), zap.String("reason", rec.Reason), zap.String("actor", rec.Actor), zap.Bool("already", already))
	return made, already, nil
}

// maxRevocationTTL is above the life of any certificate that is called short-lived.
const maxRevocationTTL = 2 * 365 * 24 * time.Hour

// revocationOf checks what is to be revoked. Errors: invalid_argument, not_found.
func (s *Server) revocationOf(ctx context.Context, m *symbolonv1.RevokeRequest) (rec revocationRecord, err error) {
	invalid := func(format string, args ...any) (revocationRecord, error) {
		return revocationRecord{}, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf(format, args...))
	}
	named := 0
	for _, given := range []bool{m.GetSpiffeId() != "", m.GetSerial() != "", m.GetHost() != "", len(m.GetLabels()) > 0} {
		if given {
			named++
		}
	}
	if named != 1 {
		return invalid("name exactly one of a SPIFFE ID, a serial number, a host and labels")
	}
	if m.GetTrustDomain() != "" && m.GetSerial() == "" {
		return invalid("a trust domain goes with a serial number only")
	}
	if r := m.GetReason(); len(r) > maxReason || r != "" && !printable(r) {
		return invalid("the reason is longer than %d bytes, or not one line of text", maxReason)
	}
	rec.Reason = m.GetReason()
	own := s.cfg.trustDomain()
	ttl := m.GetTtl().AsDuration()
	if m.GetTtl() != nil {
		if td := m.GetTrustDomain(); m.GetSerial() == "" || td == "" || td == own.Name() {
			return invalid("how long goes with a serial number of another trust domain only: of all else it is known, or it is until unrevoked")
		}
		if ttl < time.Minute || ttl > maxRevocationTTL {
			return invalid("%v: want between 1m and %v, what is left of the certificate's life or more", ttl, maxRevocationTTL)
		}
	}
	switch {
	case m.GetSpiffeId() != "":
		id, err := spiffeid.FromString(m.GetSpiffeId())
		if err != nil || id.Path() == "" {
			return invalid("%q is not a SPIFFE ID, such as spiffe://%s/acme/prod/web", m.GetSpiffeId(), own.Name())
		}
		if id == ca.ControllerID(own) {
			return invalid("%s is this controller: no host could hear of an unrevocation", id)
		}
		if id.MemberOf(own) && identity.IsHost(id) {
			// The host with all that it has; its certificate alone has a serial number.
			rec.Host = strings.TrimPrefix(id.Path(), "/"+identity.ReservedPath+"/host/")
			break
		}
		rec.SPIFFEID = id.String()
	case m.GetSerial() != "":
		serial, err := identity.ParseSerial(m.GetSerial())
		if err != nil {
			return invalid("%w", err)
		}
		td := own
		if m.GetTrustDomain() != "" {
			if td, err = spiffeid.TrustDomainFromString(m.GetTrustDomain()); err != nil {
				return invalid("trust domain %q: %w", m.GetTrustDomain(), err)
			}
		}
		rec.Serial, rec.TrustDomain = serial.String(), td.Name()
		if td == own {
			rec.Expires = s.ca.ValidUntil()
			if w, ok := s.inventory.bySerial(rec.Serial); ok {
				rec.Expires = w.NotAfter
			}
		} else if ttl > 0 {
			rec.Expires = s.opts.Now().Add(ttl)
		}
	case m.GetHost() != "":
		rec.Host = m.GetHost()
	default:
		for k, v := range m.GetLabels() {
			if len(k) > maxAttributeKey || !printable(k) || strings.ContainsAny(k, " =") {
				return invalid("label %.*q: a key has up to %d bytes, without blanks", maxAttributeKey, k, maxAttributeKey)
			}
			if len(v) > maxAttributeValue || !printable(v) {
				return invalid("label %s: the value is empty, malformed or longer than %d bytes", k, maxAttributeValue)
			}
		}
		if len(m.GetLabels()) > maxLabels {
			return invalid("%d labels, the limit is %d", len(m.GetLabels()), maxLabels)
		}
		rec.Labels = maps.Clone(m.GetLabels())
	}
	if rec.Host != "" {
		rec.TrustDomain = own.Name()
		if _, _, err := s.hosts.get(ctx, rec.Host); errors.Is(err, store.ErrNotFound) {
			return rec, connect.NewError(connect.CodeNotFound, fmt.Errorf("there is no host %q", rec.Host))
		} else if err != nil {
			return rec, s.internal("read host", err)
		}
	}
	return rec, nil
}

// ListRevocations lists what is in force, and who has not heard of it.
func (s adminService) ListRevocations(context.Context, *connect.Request[symbolonv1.ListRevocationsRequest]) (*connect.Response[symbolonv1.ListRevocationsResponse], error) {
	all, number := s.revocations.list()
	res := &symbolonv1.ListRevocationsResponse{Number: number, HostsBehind: s.hub.withoutRevocations(number)}
	for _, r := range all {
		res.Records = append(res.Records, r.proto())
	}
	return connect.NewResponse(res), nil
}

// Unrevoke ends a revocation. What it has cut does not come back by itself.
func (s adminService) Unrevoke(ctx context.Context, req *connect.Request[symbolonv1.UnrevokeRequest]) (*connect.Response[symbolonv1.UnrevokeResponse], error) {
	rec, err := s.revocations.remove(ctx, req.Msg.GetId())
	if errors.Is(err, errNotRevoked) {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("%w: %q; 'symbolon ca revocations' lists them", err, req.Msg.GetId()))
	}
	if err != nil {
		return nil, s.internal("unrevoke", err)
	}
	s.log.Info("unrevoked", zap.String("revocation", rec.ID), zap.String("spiffe_id", rec.SPIFFEID), zap.String("serial", rec.Serial),
		zap.String("host", rec.Host), zap.Any("labels", rec.Labels), zap.String("actor", actorOf(req.Peer())))
	return connect.NewResponse(&symbolonv1.UnrevokeResponse{Record: rec.proto()}), nil
}

// revokeRemoved ends what was issued to a host that is about to be removed.
func (s *Server) revokeRemoved(ctx context.Context, hostID, actor string) error {
	_, _, err := s.revoke(ctx, revocationRecord{
		Host: hostID, TrustDomain: s.cfg.TrustDomain, Reason: "host removed", Actor: actor,
		Expires: s.ca.ValidUntil().Add(removalSlack),
	})
	return err
}

// removalSlack is for what is being issued while a host is removed.
const removalSlack = time.Minute

// refuseRevoked refuses to issue what nobody would accept; serial is that of a certificate
// that there is already, or "". Errors: permission_denied.
func (s *Server) refuseRevoked(hostID string, serial identity.Serial, p *identity.Principal) error {
	set := s.revocations.current()
	err := set.CheckHost(s.cfg.TrustDomain, hostID)
	if err == nil && p != nil {
		err = set.Check(serial, p)
	}
	if err != nil {
		return connect.NewError(connect.CodePermissionDenied, err)
	}
	return nil
}
