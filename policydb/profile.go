package policydb

import (
	"cmp"
	"path"
	"slices"
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// defaultClaims are the sourced attributes that become claims where no matching
// Profile says which.
var defaultClaims = []string{"host.*", "cloud.*", "k8s.*", "image.*", "os.user", "os.group"}

// Assignment is what Profiles make of a workload.
type Assignment struct {
	// Namespace and Workload are the two halves of the SPIFFE ID's path.
	Namespace, Workload string
	// Labels are those of all matching profiles on the namespace's chain.
	Labels identity.Attributes
	// Profiles gave name or labels: "namespace/name", sorted.
	Profiles []string
	// Claims are the labels, and the sourced attributes that the profiles select.
	Claims identity.Attributes
}

// Assign finds a workload's name, namespace, labels and claims by its sourced
// attributes (host.* among them) and the namespace that its host is enrolled in.
//
// Of the matching profiles that name a workload, the one in the deepest namespace
// wins, then the first by name. A profile above the host's namespace names
// workloads in the host's; one below it, in its own. Without one the workload is
// "unprofiled." and its unit or executable.
func (s *Snapshot) Assign(hostNamespace string, attrs identity.Attributes) Assignment {
	// Whatever the host says: labels come from here, spiffe.* from the certificate.
	attrs = attrs.Filter(func(k string) bool { return !isLabel(k) && !strings.HasPrefix(k, spiffePrefix) })
	return s.assign(hostNamespace, attrs, "")
}

// assign is Assign by all of attrs; namespace, if not empty, is the workload's.
func (s *Snapshot) assign(hostNamespace string, attrs identity.Attributes, namespace string) Assignment {
	matching := s.matchingProfiles(hostNamespace, attrs)
	a := Assignment{Namespace: hostNamespace, Workload: unprofiledName(attrs)}
	var naming *symbolonv1.Resource
	for _, r := range matching {
		if r.GetProfile().GetWorkload() == "" {
			continue
		}
		if naming == nil || compareNaming(r, naming) < 0 {
			naming = r
		}
	}
	if naming != nil {
		a.Workload = naming.GetProfile().GetWorkload()
		if within(naming.GetNamespace(), hostNamespace) {
			a.Namespace = naming.GetNamespace()
		}
	}
	if namespace != "" {
		a.Namespace = namespace
	}
	var claims []string
	for _, r := range matching {
		// A profile of another branch below the host does not speak for this one.
		if !within(a.Namespace, r.GetNamespace()) {
			continue
		}
		p := r.GetProfile()
		a.Labels = a.Labels.Union(identity.AttributesFromProto(p.GetLabels()))
		claims = append(claims, p.GetClaims()...)
		if len(p.GetLabels()) > 0 || r == naming {
			a.Profiles = append(a.Profiles, RefOf(r))
		}
	}
	slices.Sort(a.Profiles)
	if len(claims) == 0 {
		claims = defaultClaims
	}
	a.Claims = a.Labels.Union(attrs.Filter(func(k string) bool { return claimed(claims, k) }))
	return a
}

// matchingProfiles looks on the host's chain and below it.
func (s *Snapshot) matchingProfiles(hostNamespace string, attrs identity.Attributes) []*symbolonv1.Resource {
	var out []*symbolonv1.Resource
	consider := func(r *symbolonv1.Resource) {
		if p := r.GetProfile(); p != nil && matchTerm(p.GetMatch(), attrs) {
			out = append(out, r)
		}
	}
	for _, ns := range chainOf(parentPath(hostNamespace)) {
		for _, r := range s.collect(indexID+"_prefix", exactlyKind{KindProfile, ns}) {
			consider(r)
		}
	}
	for _, r := range s.List(KindProfile, hostNamespace) {
		consider(r)
	}
	return out
}

// compareNaming puts the deepest namespace first, then goes by name, and by
// namespace where names are equal too.
func compareNaming(a, b *symbolonv1.Resource) int {
	return cmp.Or(
		-cmp.Compare(depth(a.GetNamespace()), depth(b.GetNamespace())),
		cmp.Compare(a.GetName(), b.GetName()),
		cmp.Compare(a.GetNamespace(), b.GetNamespace()),
	)
}

func depth(namespace string) int {
	if namespace == "/" {
		return 0
	}
	return strings.Count(namespace, "/")
}

// claimed tells whether a list of keys and "prefix.*" selects key. What a process says
// of itself is never swept along: who wants it as a claim names it.
func claimed(claims []string, key string) bool {
	for _, c := range claims {
		prefix, wild := strings.CutSuffix(c, "*")
		if c == key || wild && key != ownWord && strings.HasPrefix(key, prefix) {
			return true
		}
	}
	return false
}

// ownWord is the one sourced attribute that a process can set as it likes.
const ownWord = "proc.args"

// unprofiledName is a name for people to recognize, in the letters of a SPIFFE ID.
func unprofiledName(attrs identity.Attributes) string {
	name := attrs.Get("proc.unit")
	if name == "" {
		if exe := attrs.Get("proc.exe"); exe != "" {
			name = path.Base(exe)
		}
	}
	name = strings.Map(func(r rune) rune {
		if r < 0x80 && isSegmentByte(byte(r)) {
			return r
		}
		return '-'
	}, name)
	if name == "" {
		name = "unknown"
	}
	return UnprofiledPrefix + name[:min(len(name), maxNameBytes-len(UnprofiledPrefix))]
}
