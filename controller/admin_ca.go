package controller

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/zap"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/ca"
	"github.com/symbolon/symbolon/identity"
)

// GetCA says what signs, and who still has SVIDs of an earlier intermediate.
func (s adminService) GetCA(ctx context.Context, _ *connect.Request[symbolonv1.GetCARequest]) (*connect.Response[symbolonv1.GetCAResponse], error) {
	status := s.ca.Status()
	res := &symbolonv1.GetCAResponse{
		TrustDomain: s.cfg.TrustDomain, Root: certificateProto(status.Root), Pin: s.ca.Pin(), Upstream: status.Upstream,
		Intermediate: certificateProto(status.Intermediate), IntermediateRenewal: moment(status.Renewal),
		SvidTtl: durationpb.New(s.cfg.CA.SVIDTTL), Rotated: moment(status.Replaced), RotatedBy: status.By,
		EarlierUntil: moment(status.EarlierUntil),
	}
	var err error
	if res.RootRotation, err = s.rootRotation(ctx); err != nil {
		return nil, err
	}
	if s.upstream != nil {
		res.UpstreamSpire = s.upstream.proto(s.cfg.CA.UpstreamSPIREServer, s.cfg.CA.UpstreamSPIREWorkloadAPI)
		res.Roots = uint32(len(s.ca.Roots()))
	}
	if !status.EarlierUntil.IsZero() {
		if res.Behind, err = s.behind(ctx, issuerName(status.Intermediate)); err != nil {
			return nil, s.internal("list hosts", err)
		}
	}
	return connect.NewResponse(res), nil
}

// RotateIntermediate has another intermediate sign from now on. Connected hosts are told
// to ask for all their SVIDs anew; those that are away, when they come back.
func (s adminService) RotateIntermediate(ctx context.Context, req *connect.Request[symbolonv1.RotateIntermediateRequest]) (*connect.Response[symbolonv1.RotateIntermediateResponse], error) {
	actor := actorOf(req.Peer())
	previous, next, err := s.ca.RotateIntermediate(ctx, actor)
	if errors.Is(err, ca.ErrUpstream) {
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	}
	if err != nil && s.upstream != nil {
		s.upstream.note(err, s.opts.Now())
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	}
	if err != nil {
		return nil, s.internal("rotate the intermediate", err)
	}
	if s.upstream != nil {
		s.upstream.note(nil, s.opts.Now())
		s.upstreamRootsChanged() // they may have come with it
	}
	s.log.Info("intermediate rotated", zap.Stringer("previous", identity.SerialOf(previous)),
		zap.Stringer("intermediate", identity.SerialOf(next)), zap.String("actor", actor))
	s.hub.reissue(s.hub.seen())
	hosts, _, err := s.hosts.list(ctx)
	if err != nil {
		return nil, s.internal("list hosts", err)
	}
	res := &symbolonv1.RotateIntermediateResponse{Previous: certificateProto(previous), Intermediate: certificateProto(next)}
	for _, h := range hosts {
		if s.hub.presence(h.ID).connected {
			res.HostsConnected++
		} else {
			res.HostsAway++
		}
	}
	return connect.NewResponse(res), nil
}

// behind are the hosts of which something valid is known that another intermediate than
// this one has signed, by name. SVIDs of before this was recorded count, too.
func (s *Server) behind(ctx context.Context, issuer string) ([]*symbolonv1.CABehind, error) {
	hosts, _, err := s.hosts.list(ctx)
	if err != nil {
		return nil, err
	}
	byHost := make(map[string]*symbolonv1.CABehind)
	at := func(hostID string, until time.Time) *symbolonv1.CABehind {
		b := byHost[hostID]
		if b == nil {
			b = &symbolonv1.CABehind{HostId: hostID, Connected: s.hub.presence(hostID).connected}
			byHost[hostID] = b
		}
		if b.Until == nil || until.After(b.Until.AsTime()) {
			b.Until = timestamppb.New(until)
		}
		return b
	}
	for _, w := range s.inventory.list("") {
		if w.Issuer != issuer {
			at(w.HostID, w.NotAfter).Workloads++
		}
	}
	out := make([]*symbolonv1.CABehind, 0, len(byHost))
	for _, h := range hosts {
		if h.Issuer != issuer && s.opts.Now().Before(h.SVIDNotAfter) {
			at(h.ID, h.SVIDNotAfter).HostSvid = true
		}
		if b := byHost[h.ID]; b != nil {
			b.Hostname = h.Hostname
			out = append(out, b)
		}
	}
	slices.SortFunc(out, func(a, b *symbolonv1.CABehind) int {
		return cmp.Or(cmp.Compare(a.GetHostname(), b.GetHostname()), cmp.Compare(a.GetHostId(), b.GetHostId()))
	})
	return out, nil
}

// ofEarlier tells whether a host comes with an SVID of an earlier intermediate: it was
// away, or this controller was, when that was replaced.
func (s *Server) ofEarlier(ctx context.Context, hostID string) bool {
	status := s.ca.Status()
	if status.EarlierUntil.IsZero() {
		return false
	}
	h, _, err := s.hosts.get(ctx, hostID)
	return err == nil && h.Issuer != issuerName(status.Intermediate)
}

// issuerName is ca.Issued.Issuer of what an intermediate signs.
func issuerName(intermediate *x509.Certificate) string {
	return hex.EncodeToString(intermediate.SubjectKeyId)
}

// moment is nil for the zero time.
func moment(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func certificateProto(c *x509.Certificate) *symbolonv1.CACertificate {
	return &symbolonv1.CACertificate{
		Subject: c.Subject.String(), Serial: identity.SerialOf(c).String(), KeyId: hex.EncodeToString(c.SubjectKeyId), Key: keyKind(c.PublicKey),
		NotBefore: timestamppb.New(c.NotBefore), NotAfter: timestamppb.New(c.NotAfter), Certificate: c.Raw,
	}
}

func keyKind(key any) string {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		return "ECDSA " + k.Curve.Params().Name
	case ed25519.PublicKey:
		return "Ed25519"
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA %d", k.N.BitLen())
	}
	return fmt.Sprintf("%T", key)
}
