package main

import (
	"fmt"
	"os"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/policydb"
)

// snapshot is what the controller said last. Immutable.
type snapshot struct {
	generation uint64
	profiles   []*symbolonv1.Resource
	// digest is what the controller calls this set beside the generation.
	digest []byte
}

// newSnapshot takes nothing but Profiles that speak of IDs alone, whatever came.
func newSnapshot(m *symbolonv1.ListClaimProfilesResponse) *snapshot {
	return &snapshot{m.GetGeneration(), policydb.ProfilesByID(m.GetProfiles()), m.GetDigest()}
}

// claims are the labels of id; none for an ID that no Profile speaks of. Certificates
// are believed everywhere, so a Profile counts only for IDs whose path is in its
// namespace or below: who may write Profiles in one namespace has no say in others.
func (s *snapshot) claims(id spiffeid.ID) identity.Attributes {
	if s == nil {
		return nil
	}
	claims, _ := policydb.ClaimsForCA(s.profiles, id)
	return claims
}

// load reads what save has left.
func load(path string) (*snapshot, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b, err := readAll(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	m := &symbolonv1.ListClaimProfilesResponse{}
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("%s is not what this plugin writes; remove it: %w", path, err)
	}
	return newSnapshot(m), nil
}

// save replaces the file as a whole or not at all.
func (s *snapshot) save(path string) error {
	b, err := proto.Marshal(&symbolonv1.ListClaimProfilesResponse{Generation: s.generation, Profiles: s.profiles, Digest: s.digest})
	if err != nil {
		return err
	}
	temporary := path + temporarySuffix
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		_ = os.Remove(temporary)
	}
	return err
}
