package controller

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/token"
)

const (
	// nonceLife is how old a nonce may be.
	nonceLife = 5 * time.Minute
	// maxTokenChain and maxTokenCertificate bound what is looked at, certificates and bytes.
	maxTokenChain, maxTokenCertificate = 8, 16 << 10
)

// IssueToken signs the attributes of a workload whose SVID another CA has signed. Which
// workload it is, that CA says; that the host runs it, the proof that it holds the
// SVID's key; the rest are attributes, as for an SVID of ours.
func (s proxyService) IssueToken(ctx context.Context, req *connect.Request[symbolonv1.IssueTokenRequest]) (*connect.Response[symbolonv1.IssueTokenResponse], error) {
	host := hostOf(ctx)
	if err := s.issueLimit.allow(host.ID, "SVIDs and tokens"); err != nil {
		return nil, err
	}
	now := s.opts.Now()
	answer := &symbolonv1.IssueTokenResponse{Nonce: s.nonces.give(host.ID, now)}
	if len(req.Msg.GetSignature()) == 0 {
		return connect.NewResponse(answer), nil
	}
	if !s.nonces.good(req.Msg.GetNonce(), host.ID, now) {
		return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("the nonce has expired, or is not this controller's for this host: ask for one"))
	}
	p, leaf, err := s.provenWorkload(req.Msg, now)
	if err != nil {
		s.log.Warn("token refused", zap.String("host", host.ID), zap.Error(err))
		return nil, err
	}
	reported := identity.AttributesFromProto(req.Msg.GetAttributes())
	if err := checkAttributes(reported, assertable...); err != nil {
		s.log.Warn("attributes refused", zap.String("host", host.ID), zap.Error(err))
		return nil, err
	}
	subjects := scanSubjects(reported)
	scanned := s.scans.of(subjects...)
	a := s.policies.snapshot().AssignID(host.Namespace, overlay(reported, scanned).Union(host.attributes()), p.ID)
	if err := s.refuseRevoked(host.ID, identity.SerialOf(leaf), p.With(a.Claims, identity.FromToken)); err != nil {
		s.log.Warn("token refused", zap.String("host", host.ID), zap.Error(err))
		return nil, err
	}
	jkt, err := token.Thumbprint(leaf.PublicKey)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	expiry := now.Add(token.MaxLife)
	if expiry.After(leaf.NotAfter) {
		expiry = leaf.NotAfter
	}
	signed, err := s.tokenKeys.Sign(&token.Statement{
		Subject: p.ID, Audience: s.cfg.trustDomain(), Thumbprint: jkt, IssuedAt: now, Expiry: expiry, Claims: a.Claims,
	})
	if errors.Is(err, token.ErrInvalid) {
		return nil, connect.NewError(connect.CodeFailedPrecondition,
			fmt.Errorf("%s: %w; let `claims` in the Profiles %v select fewer attributes", p.ID, err, a.Profiles))
	}
	if err != nil {
		return nil, s.internal("issue token", err)
	}
	s.inventory.record(workloadRecord{
		SPIFFEID: p.ID.String(), Namespace: a.Namespace, Name: a.Workload, Claims: a.Claims,
		HostID: host.ID, Issued: now, NotAfter: leaf.NotAfter, Subjects: issuedAt(subjects, now),
	})
	// Who pushed meanwhile did not find this host in the inventory.
	if !identicalAttributes(scanned, s.scans.of(subjects...)) {
		s.hub.reissue([]string{host.ID})
	}
	s.log.Debug("token issued", zap.Stringer("id", p.ID), zap.String("host", host.ID), zap.Strings("profiles", a.Profiles))
	answer.Token, answer.Profiles = signed, a.Profiles
	answer.NotAfter, answer.RotateAt = timestamppb.New(expiry), timestamppb.New(now.Add(expiry.Sub(now)/2))
	return connect.NewResponse(answer), nil
}

// provenWorkload is whom a request is for: a chain that verifies by the bundle of a
// trust domain that the operator has let in, and a signature by its leaf's key.
func (s *Server) provenWorkload(m *symbolonv1.IssueTokenRequest, now time.Time) (*identity.Principal, *x509.Certificate, error) {
	if n := len(m.GetChain()); n == 0 || n > maxTokenChain {
		return nil, nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("a chain of %d certificates, want 1 to %d", n, maxTokenChain))
	}
	var chain []*x509.Certificate
	for _, der := range m.GetChain() {
		if len(der) > maxTokenCertificate {
			return nil, nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("a certificate of %d bytes, at most %d", len(der), maxTokenCertificate))
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, nil, connect.NewError(connect.CodeInvalidArgument, errors.New("the chain holds what is no certificate"))
		}
		chain = append(chain, c)
	}
	p, err := identity.Verify(chain, foreignBundles{s}, now)
	if err != nil {
		return nil, nil, connect.NewError(connect.CodePermissionDenied, fmt.Errorf("the SVID is not believed: %w", err))
	}
	if p.Issuer == identity.FromExtension {
		return nil, nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("the SVID of %s carries claims, beside which nobody would look at a token", p.ID))
	}
	if err := token.CheckProof(chain[0], m.GetNonce(), m.GetSignature()); err != nil {
		return nil, nil, connect.NewError(connect.CodePermissionDenied, err)
	}
	return &p, chain[0], nil
}

// foreignBundles are those of the trust domains that the operator has let in by a
// TrustDomain. Our own is not among them, whose SVIDs carry claims; but below SPIRE, which
// signs in the same trust domain without.
type foreignBundles struct{ *Server }

func (f foreignBundles) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if f.upstream != nil && td == f.cfg.trustDomain() {
		return f.ca.Bundle(), nil
	}
	b := f.policies.trustBundle(td.Name())
	if b == nil {
		return nil, fmt.Errorf("no TrustDomain %s, or no bundle of it yet: apply one with its bundle or endpoint", td)
	}
	return b.X509Bundle(), nil
}

func identicalAttributes(a, b identity.Attributes) bool { return a.Hash() == b.Hash() }

// renewTokenKeys tells hosts of a new key well before it signs.
func (s *Server) renewTokenKeys(ctx context.Context) error {
	changed, err := s.tokenKeys.Renew(ctx)
	if changed {
		s.hub.publish(s.policies.distribution())
	}
	return err
}

// nonces are what a host signs to prove that it holds a key now. None is kept: each
// says when it was given and to whom, under a key of this process. To use one twice
// gains nothing: it proves the same.
type nonces struct{ key [32]byte }

func newNonces() (n nonces) {
	_, _ = rand.Read(n.key[:]) // never fails: crypto/rand
	return n
}

func (n *nonces) give(host string, now time.Time) []byte {
	at := binary.BigEndian.AppendUint64(nil, uint64(now.Unix()))
	return append(at, n.mac(at, host)...)
}

func (n *nonces) mac(at []byte, host string) []byte {
	h := hmac.New(sha256.New, n.key[:])
	h.Write(at) // of fixed size
	h.Write([]byte(host))
	return h.Sum(nil)
}

func (n *nonces) good(nonce []byte, host string, now time.Time) bool {
	const at = 8
	if len(nonce) != at+sha256.Size || !hmac.Equal(nonce[at:], n.mac(nonce[:at], host)) {
		return false
	}
	age := now.Sub(time.Unix(int64(binary.BigEndian.Uint64(nonce)), 0))
	return age >= -time.Second && age <= nonceLife
}
