package policydb

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/identity"
)

const byIDSet = `
kind: Namespace
name: /
mode: enforce
default: deny
attributes: {app: {}, tier: {}, zone: {}}
---
{kind: Namespace, name: /prod, mode: enforce}
---
{kind: Namespace, name: /prod/web, mode: enforce}
---
{kind: Namespace, name: /dev, mode: enforce}
---
kind: Profile
namespace: /
name: partner
match: {spiffe.trust_domain: partner.example}
labels: {zone: partner}
---
kind: Profile
namespace: /prod/web
name: web
match: {spiffe.id: {prefix: "spiffe://acme.example/prod/web/"}}
labels: {app: web}
---
kind: Profile
namespace: /prod/web
name: usurper
match: {spiffe.trust_domain: [acme.example, partner.example]}
labels: {tier: gold}
---
kind: Profile
namespace: /prod
name: mixed
match: {spiffe.trust_domain: acme.example, proc.exe: /usr/sbin/nginx}
labels: {tier: mixed}
---
kind: Profile
namespace: /prod
name: missing
match: {spiffe.trust_domain: acme.example, proc.exe: {exists: false}}
labels: {tier: missing}
`

// Profiles are believed where they stand and below, and of those whose own IDs stand
// there, if they are of the same trust domain.
func TestAboutByID(t *testing.T) {
	c := compile(t, byIDSet).compiled
	acme := spiffeid.RequireTrustDomainFromString("acme.example")
	for _, tc := range []struct{ name, id, judge, want string }{
		{"by its own path, from elsewhere", "spiffe://acme.example/prod/web/shop", "/dev", "app=web tier=gold"},
		{"of another path, from elsewhere", "spiffe://acme.example/dev/job", "/dev", ""},
		{"of another path, from where the Profile holds", "spiffe://acme.example/dev/job", "/prod/web", "tier=gold"},
		{"of another path, from above", "spiffe://acme.example/dev/job", "/prod", ""},
		{"a stranger that chose our path", "spiffe://partner.example/prod/web/shop", "/dev", "zone=partner"},
		{"a stranger, where somebody vouches for it", "spiffe://partner.example/x/y", "/prod/web", "tier=gold zone=partner"},
		{"nobody", "spiffe://other.example/prod/web/shop", "/prod/web", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p, err := identity.NewPrincipal(spiffeid.RequireFromString(tc.id), nil)
			if err != nil {
				t.Fatal(err)
			}
			for range 2 { // found, then remembered
				got := c.About(&p, tc.judge, acme)
				labels := got.Attributes.Filter(isLabel).String()
				if labels != tc.want {
					t.Errorf("labels %q, want %q", labels, tc.want)
				}
				if known := got.Issuer == identity.FromPolicy; known != (tc.want != "") {
					t.Errorf("issuer %q", got.Issuer)
				}
				if got.Attributes.Get("spiffe.id") != tc.id {
					t.Errorf("attributes %s", got.Attributes)
				}
			}
		})
	}
}

// What a certificate or a token says stands, however little; policy adds nothing.
func TestAboutNeverAdds(t *testing.T) {
	c := compile(t, byIDSet).compiled
	id := spiffeid.RequireFromString("spiffe://acme.example/prod/web/shop")
	for _, from := range []identity.Issuer{identity.FromExtension, identity.FromToken} {
		p := (&identity.Principal{ID: id, Namespace: "/prod/web", Name: "shop"}).With(nil, from)
		if got := c.About(p, "/prod/web", id.TrustDomain()); got != p {
			t.Errorf("%s: %v", from, got.Attributes)
		}
	}
}

func TestClaimsOfID(t *testing.T) {
	s := newDB(t, byIDSet).Snapshot()
	labels, from := s.ClaimsOfID(spiffeid.RequireFromString("spiffe://acme.example/prod/web/shop"))
	if d := cmp.Diff("app=web tier=gold", labels.String()); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{"/prod/web/usurper", "/prod/web/web"}, from); d != "" {
		t.Error(d)
	}
	if labels, _ := s.ClaimsOfID(spiffeid.RequireFromString("spiffe://acme.example/dev/job")); labels != nil {
		t.Errorf("labels %s", labels)
	}
}

// A host's word and the ID's count together; spiffe.* is the ID's, whatever the host says.
func TestAssignID(t *testing.T) {
	s := newDB(t, byIDSet).Snapshot()
	attrs := identity.NewAttributes(map[string][]string{
		"proc.exe": {"/usr/sbin/nginx"}, "spiffe.trust_domain": {"partner.example"}, "zone": {"mine"}, "host.id": {"7"},
	})
	got := s.AssignID("/prod", attrs, spiffeid.RequireFromString("spiffe://acme.example/prod/web/shop"))
	want := Assignment{
		Namespace: "/prod/web", Workload: "shop",
		Labels:   identity.NewAttributes(map[string][]string{"app": {"web"}, "tier": {"gold", "mixed"}}),
		Profiles: []string{"/prod/mixed", "/prod/web/usurper", "/prod/web/web"},
		Claims:   identity.NewAttributes(map[string][]string{"app": {"web"}, "tier": {"gold", "mixed"}, "host.id": {"7"}}),
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	// An ID whose path is no namespace of ours is where a Profile of the host's speaks of it,
	// or else in the host's.
	for id, want := range map[string]string{"spiffe://acme.example/ns/x/sa/y": "/prod/web", "spiffe://third.example/ns/x/sa/y": "/prod"} {
		if got := s.AssignID("/prod", attrs, spiffeid.RequireFromString(id)); got.Namespace != want {
			t.Errorf("%s: namespace %s, want %s", id, got.Namespace, want)
		}
	}
}

// The controller gives labels by the namespace in which the host's proxy judges, whatever
// the ID's path is: no path leads above the host's namespace, or beside it.
func TestAssignIDAgreesWithLocalNamespace(t *testing.T) {
	s, c := newDB(t, localSet).Snapshot(), compile(t, localSet).compiled
	for _, host := range []string{"/", "/acme", "/acme/prod", "/acme/prod/shop", "/acme/prod/bank", "/acme/dev"} {
		for _, id := range []string{
			"spiffe://site.example/web", "spiffe://site.example/acme/web", "spiffe://site.example/acme/prod/web",
			"spiffe://site.example/acme/prod/shop/web", "spiffe://site.example/acme/dev/web",
			"spiffe://site.example/ns/shop/sa/web", "spiffe://site.example/ns/x/sa/web", "spiffe://other.example/ns/shop/sa/web",
		} {
			id := spiffeid.RequireFromString(id)
			want, got := c.LocalNamespace(id, host), s.AssignID(host, nil, id)
			if got.Namespace != want {
				t.Errorf("%s on a host of %s: %s, and the proxy judges in %s", id, host, got.Namespace, want)
			}
			if !within(got.Namespace, host) {
				t.Errorf("%s on a host of %s is taken to %s", id, host, got.Namespace)
			}
		}
	}
}

// The Profiles that know peers by their IDs reach every host; no others do.
func TestVisibleByID(t *testing.T) {
	var names []string
	for _, r := range newDB(t, byIDSet).Snapshot().VisibleTo("/dev") {
		if r.GetProfile() != nil {
			names = append(names, RefOf(r))
		}
	}
	if d := cmp.Diff([]string{"/partner", "/prod/web/usurper", "/prod/web/web"}, names); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}
