package policydb

import (
	"bytes"
	"encoding/json"
	"net/url"
	"slices"
	"strings"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

var endpointProfiles = map[string]symbolonv1.BundleEndpointProfile{
	"https_spiffe": symbolonv1.BundleEndpointProfile_BUNDLE_ENDPOINT_PROFILE_HTTPS_SPIFFE,
	"https_web":    symbolonv1.BundleEndpointProfile_BUNDLE_ENDPOINT_PROFILE_HTTPS_WEB,
}

// maxEndpointBytes bounds a URL; a SPIFFE ID may be as long (SPIFFE-ID section 2.3).
const maxEndpointBytes = 2048

// maxForeignClaims bounds the list of what a domain may say.
const maxForeignClaims = 64

func (d *decoder) trustDomain(r *symbolonv1.Resource, e map[string]entry) {
	t := &symbolonv1.TrustDomain{}
	r.Kind = &symbolonv1.Resource_TrustDomain{TrustDomain: t}
	if x, ok := e["endpoint"]; ok {
		t.Endpoint, _ = d.str(x.value, "endpoint")
	}
	if x, ok := e["profile"]; ok {
		t.Profile = word(d, x, endpointProfiles)
	}
	if x, ok := e["endpoint_id"]; ok {
		t.EndpointId, _ = d.str(x.value, "endpoint_id")
	}
	if x, ok := e["bundle"]; ok {
		text, _ := d.block(x)
		t.Bundle = compactJSON(text)
	}
	if x, ok := e["claims"]; ok {
		t.Claims = canonical(d.stringList(x, "claim"))
	}
}

// compactJSON is one form for one bundle, however it was indented; what is not JSON
// stays as it is, for check to refuse.
func compactJSON(s string) string {
	var b bytes.Buffer
	if json.Compact(&b, []byte(s)) != nil {
		return s
	}
	return b.String()
}

// trustDomain checks what is said of another trust domain.
func (c *checker) trustDomain(r *symbolonv1.Resource) {
	t := r.GetTrustDomain()
	if r.GetNamespace() != "/" {
		c.failf([]any{"namespace", theValue{}}, `write "namespace: /"`, "a TrustDomain stands in the root namespace: it is trusted everywhere or nowhere")
	}
	if checkName(r.GetName()) != nil {
		return // which has been told
	}
	td, err := spiffeid.TrustDomainFromString(r.GetName())
	if err != nil || td.Name() != r.GetName() {
		c.failf([]any{"name", theValue{}}, "the name is the trust domain's, such as partner.example", "name %s is not a trust domain's", printable(r.GetName()))
		return
	}
	c.endpoint(td, t)
	if t.GetBundle() != "" {
		if _, err := identity.ParseBundle(td, []byte(t.GetBundle())); err != nil {
			c.failf([]any{"bundle"}, "write what the other side's 'symbolon trust-domain bundle' or 'spire-server bundle show -format spiffe' prints", "%s", err)
		}
	}
	if t.GetEndpoint() == "" && t.GetBundle() == "" && len(t.GetClaims()) == 0 {
		c.failf(nil, "give it an endpoint, a bundle or claims", "the TrustDomain says nothing")
	}
	if n := len(t.GetClaims()); n > maxForeignClaims {
		c.failf([]any{"claims"}, "", "%d claims, at most %d are allowed", n, maxForeignClaims)
	}
	for _, claim := range t.GetClaims() {
		c.foreignClaim(claim)
	}
}

// endpoint checks that endpoint, profile and endpoint_id fit each other.
func (c *checker) endpoint(td spiffeid.TrustDomain, t *symbolonv1.TrustDomain) {
	if t.GetEndpoint() == "" {
		for key, given := range map[string]bool{
			"profile":     t.GetProfile() != symbolonv1.BundleEndpointProfile_BUNDLE_ENDPOINT_PROFILE_UNSPECIFIED,
			"endpoint_id": t.GetEndpointId() != "",
		} {
			if given {
				c.failf([]any{key}, "add \"endpoint:\" with the URL of the bundle, or leave both out", "there is a %s and no endpoint", key)
			}
		}
		return
	}
	c.add(checkEndpoint(t.GetEndpoint()), "endpoint", theValue{})
	switch t.GetProfile() {
	case symbolonv1.BundleEndpointProfile_BUNDLE_ENDPOINT_PROFILE_HTTPS_WEB:
		if t.GetEndpointId() != "" {
			c.failf([]any{"endpoint_id"}, "leave it out, or write \"profile: https_spiffe\"", "with profile https_web the endpoint is known by its host name, not by a SPIFFE ID")
		}
	case symbolonv1.BundleEndpointProfile_BUNDLE_ENDPOINT_PROFILE_HTTPS_SPIFFE:
		id, err := spiffeid.FromString(t.GetEndpointId())
		switch {
		case t.GetEndpointId() == "":
			c.failf([]any{"profile"}, "add \"endpoint_id: spiffe://"+td.Name()+"/...\"", "with profile https_spiffe there must be an endpoint_id")
		case err != nil || len(t.GetEndpointId()) > maxEndpointBytes || id.Path() == "":
			c.failf([]any{"endpoint_id", theValue{}}, "write spiffe://"+td.Name()+"/spire/server, as the other side says",
				"endpoint_id %s is not a SPIFFE ID with a path", printable(t.GetEndpointId()))
		case id.TrustDomain() != td:
			c.failf([]any{"endpoint_id", theValue{}}, "use the endpoint that "+td.Name()+" serves itself, or profile https_web",
				"endpoint_id is of %s, which is not to vouch for %s", id.TrustDomain().Name(), td.Name())
		}
		if t.GetBundle() == "" {
			c.failf([]any{"profile"}, "add \"bundle: |\" with the SPIFFE bundle that the other side has now",
				"with profile https_spiffe there must be a bundle: the first answer has to be verified by something")
		}
	default:
		c.failf([]any{"endpoint"}, oneOf(sortedKeys(endpointProfiles)), "the TrustDomain has an endpoint and no profile")
	}
}

func checkEndpoint(endpoint string) *mistake {
	u, err := url.Parse(endpoint)
	const hint = "write https://bundle.partner.example:8443/"
	printing := !strings.ContainsFunc(endpoint, func(r rune) bool { return !unicode.IsPrint(r) || r == ' ' })
	switch {
	case err != nil || u.Hostname() == "" || u.Opaque != "" || !printing:
		return wrong(hint, "endpoint %s is not a URL with a host", printable(endpoint))
	case len(endpoint) > maxEndpointBytes:
		return wrong("", "endpoint is %d bytes long, at most %d are allowed", len(endpoint), maxEndpointBytes)
	case u.Scheme != "https":
		return wrong(hint, "endpoint %s is not https", printable(endpoint))
	case u.User != nil:
		return wrong("leave the part before @ out: bundles are public", "endpoint holds a user or a password")
	case u.Fragment != "" || strings.Contains(endpoint, "#"):
		return wrong(hint, "endpoint %s has a fragment", printable(endpoint))
	}
	return nil
}

// foreignClaim is a label, a dotted key, or "prefix.*".
func (c *checker) foreignClaim(claim string) {
	path := []any{"claims", claim}
	key := claim
	if prefix, ok := strings.CutSuffix(claim, ".*"); ok && prefix != "" {
		key = prefix + ".x"
	}
	switch {
	case strings.HasPrefix(key, "spiffe."):
		c.failf(path, "leave it out: it is read from the certificate itself, whoever signed it", "claim %s cannot be asserted", printable(claim))
	case strings.Contains(key, "*"):
		c.failf(path, "write keys, or prefix.* for all keys of a source, such as image.*", "claim %s has a form that is not allowed", printable(claim))
	default:
		c.add(checkAttributeKey(key), path...)
	}
}

func (f *formatter) trustDomain(t *symbolonv1.TrustDomain) {
	if t.GetEndpoint() != "" {
		f.line("endpoint", quote(t.GetEndpoint()))
		f.line("profile", nameOf(endpointProfiles, t.GetProfile()))
	}
	if t.GetEndpointId() != "" {
		f.line("endpoint_id", quote(t.GetEndpointId()))
	}
	if t.GetBundle() != "" {
		f.line("bundle", quoteJSON(t.GetBundle()))
	}
	if len(t.GetClaims()) > 0 {
		f.line("claims", flowList(t.GetClaims()))
	}
}

// quoteJSON writes text full of double quotes in single ones, where it needs no escape
// besides (YAML 1.2.2 section 7.3.2).
func quoteJSON(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) {
		return quote(s)
	}
	return "'" + strings.ReplaceAll(s, "'", "''") + "'"
}

// foreignClaims is what other trust domains may say of their workloads.
type foreignClaims map[string]*claimSet // by trust domain

// any tells whether some domain may assert a key.
func (f foreignClaims) any(key string) bool {
	for _, s := range f {
		if s.has(key) {
			return true
		}
	}
	return false
}

// claimSet is a TrustDomain's claims, to be looked up.
type claimSet struct {
	keys     map[string]struct{}
	prefixes []string // with the dot
}

func newClaimSet(t *symbolonv1.TrustDomain) *claimSet {
	s := &claimSet{keys: make(map[string]struct{}, len(t.GetClaims()))}
	for _, claim := range t.GetClaims() {
		if prefix, ok := strings.CutSuffix(claim, "*"); ok {
			s.prefixes = append(s.prefixes, prefix)
		} else {
			s.keys[claim] = struct{}{}
		}
	}
	return s
}

func (s *claimSet) has(key string) bool {
	if _, ok := s.keys[key]; ok {
		return true
	}
	return slices.ContainsFunc(s.prefixes, func(p string) bool { return len(key) > len(p) && strings.HasPrefix(key, p) })
}

// ClaimAllowed tells whether another trust domain may assert an attribute of its
// workloads: whether its TrustDomain lists the key, or a prefix of it. What no
// TrustDomain speaks of is not allowed, and spiffe.* never is: that is read from the
// verified ID. Asking for the domain of the local workload itself is the caller's
// mistake: it is not foreign.
func (c *Compiled) ClaimAllowed(trustDomain, key string) bool {
	s := c.foreign[trustDomain]
	return s != nil && !strings.HasPrefix(key, "spiffe.") && s.has(key)
}
