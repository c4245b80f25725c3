package controller

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"net/http"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/policydb"
)

// claimsService implements symbolonv1connect.ClaimsServiceHandler. claimsGate has
// admitted the caller.
type claimsService struct{ *Server }

// ListClaimProfiles gives what the claims of SPIFFE IDs follow from.
func (s claimsService) ListClaimProfiles(_ context.Context, req *connect.Request[symbolonv1.ListClaimProfilesRequest]) (*connect.Response[symbolonv1.ListClaimProfilesResponse], error) {
	snapshot := s.policies.snapshot()
	profiles := policydb.ProfilesByID(snapshot.List(policydb.KindProfile, ""))
	digest, err := digestOf(profiles)
	if err != nil {
		return nil, s.internal("claims", err)
	}
	res := &symbolonv1.ListClaimProfilesResponse{Generation: snapshot.Generation(), Digest: digest}
	if req.Msg.GetGeneration() == snapshot.Generation() && bytes.Equal(req.Msg.GetDigest(), digest) {
		res.Unchanged = true
		return connect.NewResponse(res), nil
	}
	res.Profiles = profiles
	return connect.NewResponse(res), nil
}

// digestOf is the same for the same resources in the same order.
func digestOf(resources []*symbolonv1.Resource) ([]byte, error) {
	h := sha256.New()
	for _, r := range resources {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(r)
		if err != nil {
			return nil, err
		}
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(b))))
		h.Write(b)
	}
	return h.Sum(nil), nil
}

// claimsGate admits who knows the claims token, or the admin token.
func (s *Server) claimsGate(ctx context.Context, _ connect.Spec, _ connect.Peer, header http.Header) (context.Context, error) {
	if !bears(header, s.claimsToken) && !bears(header, s.adminToken) {
		return nil, connect.NewError(connect.CodeUnauthenticated, errors.New("the claims token is missing or wrong: Authorization: Bearer, with the content of claims.token"))
	}
	return ctx, nil
}

// bears tells whether a request carries the token whose hash is want.
func bears(header http.Header, want [sha256.Size]byte) bool {
	scheme, token, _ := strings.Cut(header.Get("Authorization"), " ")
	given := sha256.Sum256([]byte(strings.TrimSpace(token)))
	return strings.EqualFold(scheme, "Bearer") && subtle.ConstantTimeCompare(given[:], want[:]) == 1
}
