package policydb

import (
	"strings"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// What policy knows of a workload by its SPIFFE ID alone: the labels of the Profiles
// that look at nothing else. It is the last resort, for certificates without claims and
// without a token.
//
// Whoever may write a Profile in a namespace has the say in it, not beyond: its labels
// are believed by those who are judged there, or below. They are also believed of the
// workloads whose own ID stands there, but only within one trust domain: what path a
// foreign ID has is a stranger's choice.

// maxAbout is how many workloads are remembered with their labels.
const maxAbout = 4096

// byID is the Profiles of a set that look at SPIFFE IDs only.
type byID struct {
	profiles []*symbolonv1.Resource
	found    *lru.Cache[aboutKey, identity.Attributes] // nil without profiles
}

type aboutKey struct {
	id        spiffeid.ID
	namespace string
	own       bool
}

const spiffePrefix = "spiffe."

func newByID(resources []*symbolonv1.Resource) byID {
	b := byID{profiles: ProfilesByID(resources)}
	if len(b.profiles) > 0 {
		b.found, _ = lru.New[aboutKey, identity.Attributes](maxAbout) // fails only for a size below one
	}
	return b
}

// labels are those of all Profiles that know id and are believed.
func (b *byID) labels(id spiffeid.ID, believed func(namespace string) bool) identity.Attributes {
	labels, _ := ClaimsByID(b.believed(believed), id)
	return labels
}

// believed are the Profiles of namespaces that are.
func (b *byID) believed(namespace func(string) bool) (ps []*symbolonv1.Resource) {
	for _, r := range b.profiles {
		if namespace(r.GetNamespace()) {
			ps = append(ps, r)
		}
	}
	return ps
}

// pathNamespace is all of an ID's path but its last segment.
func pathNamespace(id spiffeid.ID) string {
	if ns := parentPath(id.Path()); ns != "" {
		return ns
	}
	return "/"
}

// About is p with what Profiles know of its SPIFFE ID, if nothing is known of it
// otherwise; else, and where they know nothing, p itself. namespace and own are those
// of the workload that is judged for, which may be p. Safe for concurrent use; what
// policy has said of one workload shares its attributes.
func (c *Compiled) About(p *identity.Principal, namespace string, own spiffeid.TrustDomain) *identity.Principal {
	if p.Issuer != identity.FromNobody || len(c.byID.profiles) == 0 || p.ID.IsZero() {
		return p
	}
	k := aboutKey{p.ID, namespace, p.ID.MemberOf(own)}
	attrs, ok := c.byID.found.Get(k)
	if !ok {
		path := pathNamespace(p.ID)
		labels := c.byID.labels(p.ID, func(ns string) bool {
			return within(namespace, ns) || k.own && within(path, ns)
		})
		if len(labels) > 0 {
			attrs = p.With(labels, identity.FromPolicy).Attributes
		}
		c.byID.found.Add(k, attrs)
	}
	if len(attrs) == 0 {
		return p
	}
	out := *p
	out.Attributes, out.Issuer = attrs, identity.FromPolicy
	return &out
}

// ClaimsOfID are the labels that a CA may put into the certificate of a workload of
// which it knows nothing but the SPIFFE ID, and the Profiles that gave them: those that
// stand on the way from the root to the ID's path. The certificate is believed
// everywhere, so no others count.
func (s *Snapshot) ClaimsOfID(id spiffeid.ID) (labels identity.Attributes, profiles []string) {
	var ps []*symbolonv1.Resource
	for _, ns := range chainOf(pathNamespace(id)) {
		ps = append(ps, s.collect(indexID+"_prefix", exactlyKind{KindProfile, ns})...)
	}
	return ClaimsByID(ProfilesByID(ps), id)
}

// ClaimsForCA is Snapshot.ClaimsOfID of a set of ProfilesByID, for who has no more.
func ClaimsForCA(profiles []*symbolonv1.Resource, id spiffeid.ID) (labels identity.Attributes, by []string) {
	b := byID{profiles: profiles}
	path := pathNamespace(id)
	return ClaimsByID(b.believed(func(ns string) bool { return within(path, ns) }), id)
}

// AssignID is Assign for a workload whose SPIFFE ID another CA has given: what
// Profiles look at is id as well, and its name is the ID's. Its namespace is the one in
// which its host judges it, see LocalNamespace: labels of any other would be believed of
// it elsewhere, and not there.
func (s *Snapshot) AssignID(hostNamespace string, attrs identity.Attributes, id spiffeid.ID) Assignment {
	attrs = attrs.Filter(func(k string) bool { return !isLabel(k) && !strings.HasPrefix(k, spiffePrefix) })
	attrs = attrs.Union(attributesOfID(id))
	a := s.assign(hostNamespace, attrs, s.localNamespace(id, hostNamespace, attrs))
	a.Workload = id.Path()[strings.LastIndexByte(id.Path(), '/')+1:]
	a.Claims = a.Claims.Filter(func(k string) bool { return !strings.HasPrefix(k, spiffePrefix) })
	return a
}

// localNamespace is LocalNamespace, of what is stored.
func (s *Snapshot) localNamespace(id spiffeid.ID, host string, attrs identity.Attributes) string {
	exists := func(ns string) bool { return s.Get(KindNamespace, ns, "") != nil }
	if path := pathNamespace(id); within(path, host) && exists(path) {
		return path
	}
	var deepest *symbolonv1.Resource
	for _, r := range s.matchingProfiles(host, attrs) {
		if ByID(r.GetProfile()) && within(r.GetNamespace(), host) && exists(r.GetNamespace()) &&
			(deepest == nil || compareNaming(r, deepest) < 0) {
			deepest = r
		}
	}
	if deepest != nil {
		return deepest.GetNamespace()
	}
	return host
}
