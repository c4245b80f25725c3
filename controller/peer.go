package controller

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"

	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/identity"
)

// call is what the gates and the streams need to know of the HTTP request under an
// RPC: its gates see headers only.
type call struct {
	peer     *x509.Certificate // nil: it brought none
	tls      *tls.ConnectionState
	response *http.ResponseController
	stream   bool // it has no deadline
}

type (
	callKey struct{}
	hostKey struct{}
)

func callOf(ctx context.Context) call {
	c, _ := ctx.Value(callKey{}).(call)
	return c
}

// hostOf is the host that a ProxyService call comes from, as it was at its start.
func hostOf(ctx context.Context) *hostRecord {
	h, _ := ctx.Value(hostKey{}).(*hostRecord)
	return h
}

// withCall hands the request's certificate on, and gives calls that are not streams
// their deadlines: reading and writing them cannot be drawn out.
func withCall(next http.Handler, streams map[string]bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := call{response: http.NewResponseController(w), tls: r.TLS}
		if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
			c.peer = r.TLS.PeerCertificates[0]
		}
		var deadline time.Time // zero: none; a kept-alive connection may still have the last call's
		if !c.stream {
			deadline = time.Now().Add(unaryTimeout)
		}
		if errors.Join(c.response.SetReadDeadline(deadline), c.response.SetWriteDeadline(deadline)) != nil {
			http.Error(w, "deadlines are not supported on this connection", http.StatusInternalServerError)
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callKey{}, c)))
	})
}

// extend gives a call that is no stream more time than others have.
func (c call) extend(d time.Duration) error {
	if c.response == nil || c.stream {
		return nil
	}
	deadline := time.Now().Add(d)
	if err := errors.Join(c.response.SetReadDeadline(deadline), c.response.SetWriteDeadline(deadline)); err != nil {
		return connect.NewError(connect.CodeInternal, err)
	}
	return nil
}

// verifyPeer is for tls.Config.VerifyConnection, which runs on resumption too. A
// client needs no certificate here; one that it brings must be an SVID of ours.
func (s *Server) verifyPeer(cs tls.ConnectionState) error {
	if len(cs.PeerCertificates) == 0 {
		return nil
	}
	_, err := identity.VerifySVID(cs.PeerCertificates, s.ca.Bundle(), s.opts.Now())
	return err
}

// hostGate admits enrolled hosts, before anything of their message is read.
func (s *Server) hostGate(ctx context.Context, _ connect.Spec, _ connect.Peer, _ http.Header) (context.Context, error) {
	cert := callOf(ctx).peer
	if cert == nil || len(cert.URIs) != 1 {
		return nil, connect.NewError(connect.CodeUnauthenticated, errors.New("a host SVID is required: enrol first"))
	}
	// A connection can outlive the certificate that it began with.
	if s.opts.Now().After(cert.NotAfter) {
		return nil, connect.NewError(connect.CodeUnauthenticated, errors.New("the host SVID of this connection has expired: connect anew"))
	}
	id, ok := strings.CutPrefix(cert.URIs[0].Path, "/"+identity.ReservedPath+"/host/")
	if !ok || strings.Contains(id, "/") {
		return nil, connect.NewError(connect.CodePermissionDenied, fmt.Errorf("%s is not a host", cert.URIs[0]))
	}
	if err := s.refuseForged(identity.SerialOf(cert), id); err != nil {
		return nil, err
	}
	if err := s.refuseRevokedPeer(ctx); err != nil {
		return nil, err
	}
	if err := s.refuseWithdrawnPeer(ctx); err != nil {
		return nil, err
	}
	h, _, err := s.hosts.get(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return nil, errRemoved(id)
	}
	if err != nil {
		return nil, s.internal("read host", err)
	}
	return context.WithValue(ctx, hostKey{}, h), nil
}

// refuseRevokedPeer ends what runs under a certificate that was revoked. A host that was
// revoked with all that it has keeps its session: so it hears of it, and of the end of
// it; nothing is issued to it.
func (s *Server) refuseRevokedPeer(ctx context.Context) error {
	cert := callOf(ctx).peer
	id, err := spiffeid.FromURI(cert.URIs[0])
	if err == nil {
		err = s.revocations.current().CheckCertificate(identity.SerialOf(cert), &identity.Principal{ID: id})
	}
	if err != nil {
		return connect.NewError(connect.CodeUnauthenticated, err)
	}
	return nil
}

func errRemoved(id string) error {
	return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("host %s was removed: enrol it again with a new join token", id))
}

// adminGate admits who knows the admin token.
func (s *Server) adminGate(ctx context.Context, _ connect.Spec, _ connect.Peer, header http.Header) (context.Context, error) {
	if bears(header, s.adminToken) {
		return ctx, callOf(ctx).extend(operatorTimeout)
	}
	return nil, connect.NewError(connect.CodeUnauthenticated, errors.New("the admin token is missing or wrong: Authorization: Bearer, with the content of admin.token"))
}

// enrolGate bounds what callers without any proof can cost.
func (s *Server) enrolGate(ctx context.Context, _ connect.Spec, peer connect.Peer, _ http.Header) (context.Context, error) {
	if !s.enrolLimit.allow(peer.Addr) {
		err := connect.NewError(connect.CodeResourceExhausted, errors.New("too many enrolments; try again in a few seconds"))
		err.Meta().Set("Retry-After", "5")
		return nil, err
	}
	return ctx, nil
}

// internal logs what is our fault and tells the caller that it is.
func (s *Server) internal(what string, err error) error {
	code := connect.CodeInternal
	switch {
	case errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, err)
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, err)
	case errors.Is(err, store.ErrClosed):
		return connect.NewError(connect.CodeUnavailable, errors.New("the controller is shutting down"))
	case errors.Is(err, store.ErrNoSpace):
		code = connect.CodeUnavailable
	}
	s.log.Error(what, zap.Error(err))
	return connect.NewError(code, fmt.Errorf("%s: %w", what, err))
}
