package controller

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/zap"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/ca"
	"github.com/symbolon/symbolon/controller/enrol"
	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/identity"
)

const (
	defaultTokenTTL = time.Hour
	maxTokenTTL     = 30 * 24 * time.Hour
	// tokenMemory is how long a used or expired token is still told from an unknown
	// one.
	tokenMemory = 24 * time.Hour

	maxHostname = 253
)

// enrolmentService implements symbolonv1connect.EnrolmentServiceHandler.
type enrolmentService struct{ *Server }

// Enrol trades a join token, the proof of an existing certificate, or a cloud's instance
// document for a host SVID. A document may also come beside one of the others.
func (s enrolmentService) Enrol(ctx context.Context, req *connect.Request[symbolonv1.EnrolRequest]) (*connect.Response[symbolonv1.EnrolResponse], error) {
	m := req.Msg
	pub, err := ca.PublicKey(m.GetCsr())
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	reported := identity.AttributesFromProto(m.GetAttributes())
	if err := checkAttributes(reported, "os."); err != nil {
		return nil, err
	}
	if len(m.GetHostname()) > maxHostname || !printable(m.GetHostname()) {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("the host name is empty, malformed or too long"))
	}
	token := m.GetTokenId() != "" || len(m.GetTokenSecret()) > 0
	if m.GetX509Pop() != nil && token {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("a token and a certificate: want one of them"))
	}
	proof, err := s.proveInstance(ctx, req)
	switch {
	case err != nil:
		return nil, err
	case m.GetX509Pop() != nil:
		return s.enrolByCertificate(ctx, req, pub, reported, proof)
	case proof != nil && !token:
		return s.enrolByDocument(ctx, req, pub, reported, proof)
	}
	var issued *ca.Issued
	host, err := s.hosts.spend(ctx, m.GetTokenId(), func(t *tokenRecord) (*hostRecord, error) {
		now := s.opts.Now()
		given := sha256.Sum256(m.GetTokenSecret())
		switch {
		case subtle.ConstantTimeCompare(given[:], t.SecretSHA256) != 1:
			return nil, errTokenUnknown // no more is said to who does not know the secret
		case t.UsedBy != "":
			return nil, errTokenUsed
		case !now.Before(t.Expires):
			return nil, errTokenExpired
		}
		id := newHostID()
		// Signed before the token is spent, handed out only after: an error in between
		// costs nothing.
		if issued, err = s.ca.IssueHost(pub, id); err != nil {
			return nil, err
		}
		h := &hostRecord{
			ID: id, Hostname: m.GetHostname(), Namespace: t.Namespace, Labels: t.Labels, Reported: reported,
			Enrolled: now, LastSeen: now, SVIDNotAfter: issued.Leaf.NotAfter, Issuer: issued.Issuer(),
		}
		h.setInstance(proof.instance())
		return h, nil
	})
	if err != nil {
		return nil, s.refuseToken(m.GetTokenId(), req.Peer().Addr, err)
	}
	s.log.Info("host enrolled", zap.String("host", host.ID), zap.String("hostname", host.Hostname),
		zap.String("namespace", host.Namespace), zap.String("address", req.Peer().Addr), zap.String("token", m.GetTokenId()), zap.String("instance", host.Instance))
	return s.enrolled(host, issued), nil
}

func (s enrolmentService) enrolled(host *hostRecord, issued *ca.Issued) *connect.Response[symbolonv1.EnrolResponse] {
	bundle, version := s.bundle()
	return connect.NewResponse(&symbolonv1.EnrolResponse{
		HostId:        host.ID,
		Namespace:     host.Namespace,
		Svid:          issuedProto(issued),
		Bundle:        bundle,
		BundleVersion: version,
		TrustDomain:   s.cfg.TrustDomain,
	})
}

func (s enrolmentService) refuseToken(id, address string, err error) error {
	var reason string
	switch {
	case errors.Is(err, errTokenUnknown):
		reason = enrol.ReasonUnknown
	case errors.Is(err, errTokenUsed):
		reason = enrol.ReasonUsed
	case errors.Is(err, errTokenExpired):
		reason = enrol.ReasonExpired
	case errors.Is(err, errInstanceTaken):
		s.log.Warn("enrolment refused", zap.Error(err), zap.String("address", address))
		return connect.NewError(connect.CodePermissionDenied, err)
	default:
		return s.internal("enrol", err)
	}
	if !printable(id) || len(id) > 64 {
		id = "malformed"
	}
	s.log.Warn("enrolment refused", zap.String("reason", reason), zap.String("token", id), zap.String("address", address))
	refused := connect.NewError(connect.CodeUnauthenticated, err)
	refused.Meta().Set(enrol.ReasonHeader, reason)
	return refused
}

// newHostID is 80 random bits: it says nothing of the host, and is no secret.
func newHostID() string {
	b := make([]byte, 10)
	_, _ = rand.Read(b) // never fails: crypto/rand
	return hex.EncodeToString(b)
}

// createToken keeps the hash of a new token's secret, and returns the token.
func (s *Server) createToken(ctx context.Context, namespace string, labels map[string]string, ttl time.Duration) (enrol.Token, time.Time, error) {
	token := enrol.NewToken(sha256.Sum256(s.ca.Roots()[0].RawSubjectPublicKeyInfo))
	secret := sha256.Sum256(token.Secret[:])
	now := s.opts.Now()
	if s.upstream != nil { // it pins a root, and SPIRE's come and go
		ttl = min(ttl, s.ca.NotAfter().Sub(now))
	}
	record := tokenRecord{SecretSHA256: secret[:], Namespace: namespace, Labels: labels, Created: now, Expires: now.Add(ttl)}
	op, err := putJSON(tokenPrefix+token.ID, record)
	if err != nil {
		return enrol.Token{}, time.Time{}, err
	}
	if _, ok, err := s.store.Txn(ctx, []store.Cond{{Key: op.Key}}, []store.Op{op}); err != nil || !ok {
		return enrol.Token{}, time.Time{}, errors.Join(err, errUnless(ok, "the token's ID is taken"))
	}
	return token, record.Expires, nil
}

func errUnless(ok bool, text string) error {
	if ok {
		return nil
	}
	return errors.New(text)
}

// sweepTokens forgets tokens that are long past their end.
func (s *Server) sweepTokens(ctx context.Context) error {
	kvs, _, err := s.store.List(ctx, tokenPrefix)
	if err != nil {
		return fmt.Errorf("sweep tokens: %w", err)
	}
	var ops []store.Op
	for _, kv := range kvs {
		t := &tokenRecord{}
		if err := getJSON(kv, t); err != nil {
			return fmt.Errorf("sweep tokens: %w", err)
		}
		if s.opts.Now().After(t.Expires.Add(tokenMemory)) {
			ops = append(ops, store.Delete(kv.Key))
		}
	}
	if len(ops) == 0 {
		return nil
	}
	if _, _, err := s.store.Txn(ctx, nil, ops); err != nil {
		return fmt.Errorf("sweep tokens: %w", err)
	}
	s.log.Debug("tokens swept", zap.Int("count", len(ops)))
	return nil
}

func issuedProto(i *ca.Issued) *symbolonv1.IssuedSVID {
	return &symbolonv1.IssuedSVID{
		SpiffeId: i.ID.String(),
		Chain:    i.Chain,
		NotAfter: timestamppb.New(i.Leaf.NotAfter),
		RotateAt: timestamppb.New(i.RotateAt),
	}
}

// bundle is the roots that hosts are to believe, DER each, and their version.
func (s *Server) bundle() (ders [][]byte, version uint64) {
	roots, version := s.ca.Trust()
	for _, root := range roots {
		ders = append(ders, root.Raw)
	}
	return ders, version
}

// namespaceError says why a namespace is not usable, nil if it is.
func (s *Server) namespaceError(namespace string) error {
	if !strings.HasPrefix(namespace, "/") {
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("namespace %q: want an absolute path such as /acme/prod", namespace))
	}
	if !s.policies.hasNamespace(namespace) {
		return connect.NewError(connect.CodeNotFound, fmt.Errorf("namespace %s does not exist: apply a Namespace first", namespace))
	}
	return nil
}
