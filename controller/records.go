package controller

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/policydb"
)

// What lies where in the store (package ca has the rest, under ca/ and ca-):
//
//	state                          state, JSON
//	resource/<kind><namespace>|<name>  Resource, protobuf
//	token/<id>                     tokenRecord, JSON
//	host/<id>                      hostRecord, JSON
//	workload<path>@<host id>       workloadRecord, JSON: the last SVID issued
//	history/<generation>           generationRecord, JSON
//	undo/<generation>/<n>          what undoes it, in chunks (history.go)
//	edge<namespace>|<hash>|<host id>   EdgeSet of one edge, protobuf
//	trust-bundle/<trust domain>    trustBundleRecord, JSON
//	bundle-sequence                bundleSequence, JSON: of our own bundle
//	hits<policy>                   policyHits, JSON
//	learn<namespace>               learnRecord, JSON
//	identity/<SHA-256 of a name>   identityRecord, JSON
//	scan/<subject>|<scanner>       scanRecord, JSON
//	revocations                    revocationState, JSON
//	revocation/<id>                revocationRecord, JSON
const (
	keyState       = "state"
	resourcePrefix = "resource/"
	tokenPrefix    = "token/"
	hostPrefix     = "host/"
	workloadPrefix = "workload/"
	historyPrefix  = "history/"
	undoPrefix     = "undo/"
	edgePrefix     = "edge"
	hitsPrefix     = "hits"
	scanPrefix     = "scan/"

	trustBundlePrefix = "trust-bundle/"
	keyBundleSequence = "bundle-sequence"
	keyRevocations    = "revocations"
	revocationPrefix  = "revocation/"
	learnPrefix       = "learn"
	identityPrefix    = "identity/"
)

// hostIDLabel is the host.* attribute that every host has, spiffeIDLabel one of those
// that enrolled by an X509-SVID.
const (
	hostIDLabel   = "id"
	spiffeIDLabel = "spiffe_id"
)

// state is what changes with every generation.
type state struct {
	Generation uint64 `json:"generation"`
	// ProfilesGeneration is the last one in which any Profile changed: an SVID
	// issued before it may say what is no longer so.
	ProfilesGeneration uint64 `json:"profiles_generation"`
}

// tokenRecord is a join token without its secret.
type tokenRecord struct {
	SecretSHA256 []byte            `json:"secret_sha256"`
	Namespace    string            `json:"namespace"`
	Labels       map[string]string `json:"labels,omitempty"`
	Created      time.Time         `json:"created"`
	Expires      time.Time         `json:"expires"`
	// UsedBy is the host that it made; a token with one is spent.
	UsedBy string `json:"used_by,omitempty"`
}

// hostRecord is an enrolled host.
type hostRecord struct {
	ID        string            `json:"id"`
	Hostname  string            `json:"hostname"`
	Namespace string            `json:"namespace"`
	Labels    map[string]string `json:"labels,omitempty"`
	// Reported is what the host said of itself at enrolment: os.*, for people only.
	Reported     identity.Attributes `json:"reported,omitempty"`
	Enrolled     time.Time           `json:"enrolled"`
	LastSeen     time.Time           `json:"last_seen"`
	SVIDNotAfter time.Time           `json:"svid_not_after"`
	// Issuer is the intermediate that has signed its SVID (ca.Issued.Issuer).
	Issuer string `json:"issuer,omitempty"`
	// Bundle is the version of the roots that it has acknowledged last.
	Bundle uint64 `json:"bundle,omitempty"`
	// Addresses is what it said of them when it connected last.
	Addresses []string `json:"addresses,omitempty"`
	// Identity is what it enrolled as, if not by a token (hostIdentity), and SPIFFEID that
	// of its certificate then.
	Identity string `json:"identity,omitempty"`
	SPIFFEID string `json:"spiffe_id,omitempty"`
	// Names is hostIdentity's.
	Names string `json:"names,omitempty"`
	// Instance is the cloud's instance that it is, by a verified document; Cloud are the
	// document's cloud.* attributes, and Started is when the instance was, where the
	// document says that in the place of answering a challenge.
	Instance string              `json:"instance,omitempty"`
	Cloud    identity.Attributes `json:"cloud,omitempty"`
	Started  time.Time           `json:"started,omitzero"`
}

// identityRecord is the host that an identity has enrolled as; an instance's, the host
// that it is.
type identityRecord struct {
	Identity string `json:"identity"`
	HostID   string `json:"host_id"`
	// Removed: an operator has removed the host. Its certificate does not bring it back.
	Removed bool `json:"removed,omitempty"`
}

func identityKey(name string) string {
	sum := sha256.Sum256([]byte(name))
	return identityPrefix + hex.EncodeToString(sum[:])
}

// attributes are what the controller itself vouches for: host.*, which are the
// enrolment's labels and the ID, and cloud.*.
func (h *hostRecord) attributes() identity.Attributes {
	m := map[string][]string{"host." + hostIDLabel: {h.ID}}
	for k, v := range h.Labels {
		m["host."+k] = []string{v}
	}
	if h.SPIFFEID != "" {
		m["host."+spiffeIDLabel] = []string{h.SPIFFEID}
	}
	return identity.NewAttributes(m).Union(h.Cloud)
}

// workloadRecord is the last SVID issued to one workload on one host.
type workloadRecord struct {
	SPIFFEID  string              `json:"spiffe_id"`
	Namespace string              `json:"namespace"`
	Name      string              `json:"name"`
	Claims    identity.Attributes `json:"claims,omitempty"`
	HostID    string              `json:"host_id"`
	Issued    time.Time           `json:"issued"`
	NotAfter  time.Time           `json:"not_after"`
	// Subjects are what scanners may speak of in it: each executable and image that it
	// ran with an SVID that may still be valid, and when the last such was issued.
	Subjects map[string]time.Time `json:"subjects,omitempty"`
	Serial   string               `json:"serial,omitempty"` // hexadecimal
	Issuer   string               `json:"issuer,omitempty"` // the intermediate that has signed it
}

// principal is who the SVID speaks for.
func (w *workloadRecord) principal() (*identity.Principal, error) {
	id, err := spiffeid.FromString(w.SPIFFEID)
	if err != nil {
		return nil, err
	}
	p, err := identity.NewPrincipal(id, w.Claims)
	return &p, err
}

func (w *workloadRecord) serial() identity.Serial {
	s, _ := identity.ParseSerial(w.Serial) // as it was written, or not at all
	return s
}

// path is the SPIFFE ID's.
func (w *workloadRecord) path() string { return strings.TrimSuffix(w.Namespace, "/") + "/" + w.Name }

// key uses that no SPIFFE ID has an @.
func (w *workloadRecord) key() string {
	return strings.TrimSuffix(workloadPrefix, "/") + w.path() + "@" + w.HostID
}

func resourceKey(k policydb.Key) string {
	return resourcePrefix + k.Kind + k.Namespace + "|" + k.Name
}

func putJSON(key string, v any) (store.Op, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return store.Op{}, fmt.Errorf("%s: %w", key, err)
	}
	return store.Put(key, b), nil
}

func getJSON(kv store.KV, v any) error {
	if err := json.Unmarshal(kv.Value, v); err != nil {
		return fmt.Errorf("%w: %s: %w", store.ErrCorrupt, kv.Key, err)
	}
	return nil
}

// listJSON reads the records under a prefix, in the order of their keys, and the
// revision to watch them from.
func listJSON[T any](ctx context.Context, st store.Store, prefix string) ([]*T, int64, error) {
	kvs, rev, err := st.List(ctx, prefix)
	if err != nil {
		return nil, 0, err
	}
	out := make([]*T, len(kvs))
	for i, kv := range kvs {
		out[i] = new(T)
		if err := getJSON(kv, out[i]); err != nil {
			return nil, 0, err
		}
	}
	return out, rev, nil
}

// putResource is deterministic, so that an unchanged resource has unchanged bytes.
func putResource(r *symbolonv1.Resource) (store.Op, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(r)
	if err != nil {
		return store.Op{}, fmt.Errorf("%s: %w", policydb.RefOf(r), err)
	}
	return store.Put(resourceKey(policydb.KeyOf(r)), b), nil
}

func getResource(kv store.KV) (*symbolonv1.Resource, error) {
	r := &symbolonv1.Resource{}
	if err := proto.Unmarshal(kv.Value, r); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", store.ErrCorrupt, kv.Key, err)
	}
	return r, nil
}
