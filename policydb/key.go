package policydb

import (
	"cmp"
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// The kinds, as written in YAML. This is also the order in which a diff or a
// listing shows what one namespace holds.
const (
	KindNamespace   = "Namespace"
	KindTrustDomain = "TrustDomain"
	KindProfile     = "Profile"
	KindPolicy      = "Policy"
	KindExternal    = "External"
	KindService     = "Service"
	KindPolicyTest  = "PolicyTest"
)

var kinds = []string{KindNamespace, KindTrustDomain, KindProfile, KindPolicy, KindExternal, KindService, KindPolicyTest}

// Kinds returns all kinds, in listing order.
func Kinds() []string { return append([]string(nil), kinds...) }

// Key names one resource. A Namespace's own path is in Namespace, its Name is empty.
type Key struct {
	Kind, Namespace, Name string
}

// KeyOf is the key of r.
func KeyOf(r *symbolonv1.Resource) Key {
	return Key{KindOf(r), r.GetNamespace(), r.GetName()}
}

// Ref is "namespace/name"; "/name" in the root; the path itself for a Namespace.
func (k Key) Ref() string {
	if k.Kind == KindNamespace {
		return k.Namespace
	}
	return refIn(k.Namespace, k.Name)
}

// String is kind and ref, for messages.
func (k Key) String() string { return k.Kind + " " + k.Ref() }

func refIn(namespace, name string) string {
	if namespace == "/" {
		return "/" + name
	}
	return namespace + "/" + name
}

// KindOf is r's kind as written in YAML; "" for one that this version does not know.
func KindOf(r *symbolonv1.Resource) string {
	switch r.GetKind().(type) {
	case *symbolonv1.Resource_NamespaceKind:
		return KindNamespace
	case *symbolonv1.Resource_Profile:
		return KindProfile
	case *symbolonv1.Resource_Policy:
		return KindPolicy
	case *symbolonv1.Resource_External:
		return KindExternal
	case *symbolonv1.Resource_Service:
		return KindService
	case *symbolonv1.Resource_PolicyTest:
		return KindPolicyTest
	case *symbolonv1.Resource_TrustDomain:
		return KindTrustDomain
	}
	return ""
}

// RefOf is "/acme/prod/web-may-call-api"; for a resource of the root "/name"; for a
// Namespace its path.
func RefOf(r *symbolonv1.Resource) string { return KeyOf(r).Ref() }

func kindOrder(kind string) int {
	for i, k := range kinds {
		if k == kind {
			return i
		}
	}
	return len(kinds)
}

// compareKeys orders by namespace (a parent before what is below it), kind, name.
func compareKeys(a, b Key) int {
	return cmp.Or(
		comparePaths(a.Namespace, b.Namespace),
		cmp.Compare(kindOrder(a.Kind), kindOrder(b.Kind)),
		cmp.Compare(a.Name, b.Name),
	)
}

// comparePaths orders namespaces depth first: one and all below it stand together.
func comparePaths(a, b string) int { return cmp.Compare(dirPath(a), dirPath(b)) }

// dirPath ends in a slash, so that prefixes are whole elements.
func dirPath(namespace string) string {
	if strings.HasSuffix(namespace, "/") {
		return namespace
	}
	return namespace + "/"
}

// parentPath is the namespace above; "" above the root.
func parentPath(namespace string) string {
	if namespace == "/" || namespace == "" {
		return ""
	}
	if i := strings.LastIndexByte(namespace, '/'); i > 0 {
		return namespace[:i]
	}
	return "/"
}

// within tells whether namespace is ancestor itself or below it.
func within(namespace, ancestor string) bool {
	return strings.HasPrefix(dirPath(namespace), dirPath(ancestor))
}

// chainOf lists namespace and its ancestors from the root down: "/", "/a", "/a/b".
func chainOf(namespace string) []string {
	var chain []string
	for ns := namespace; ns != ""; ns = parentPath(ns) {
		chain = append(chain, ns)
	}
	for i, j := 0, len(chain)-1; i < j; i, j = i+1, j-1 {
		chain[i], chain[j] = chain[j], chain[i]
	}
	return chain
}

// CompareKeys orders as listings do: by namespace, a parent before what is below it,
// then by kind and name.
func CompareKeys(a, b Key) int { return compareKeys(a, b) }
