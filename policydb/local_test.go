package policydb

import (
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/identity"
)

const localSet = `
kind: Namespace
name: /
mode: enforce
default: deny
attributes: {app: {}}
---
{kind: Namespace, name: /acme, mode: enforce}
---
{kind: Namespace, name: /acme/prod, mode: enforce}
---
{kind: Namespace, name: /acme/prod/shop, mode: enforce}
---
{kind: Namespace, name: /acme/prod/bank, mode: enforce}
---
{kind: Namespace, name: /acme/dev, mode: enforce}
---
{kind: Profile, namespace: /acme/prod/shop, name: shop, match: {spiffe.id: {prefix: "spiffe://site.example/ns/shop/"}}, labels: {app: shop}}
---
{kind: Profile, namespace: /acme/prod, name: all, match: {spiffe.trust_domain: site.example}, labels: {app: any}}
---
{kind: Profile, namespace: /acme/dev, name: dev, match: {spiffe.trust_domain: site.example}, labels: {app: dev}}
---
{kind: Profile, namespace: /acme/prod/bank, name: exe, match: {proc.exe: /bin/bank}, labels: {app: bank}}
---
kind: Policy
namespace: /acme/prod
name: shop-calls-shop
propagate: true
subject: {app: shop}
verb: allow
object: {app: shop}
`

func TestLocalNamespace(t *testing.T) {
	c := compile(t, localSet).compiled
	for _, tc := range []struct{ name, id, host, want string }{
		{"its path is a namespace", "spiffe://site.example/acme/prod/shop/web", "/acme/prod", "/acme/prod/shop"},
		{"its path is the host's", "spiffe://site.example/acme/prod/web", "/acme/prod", "/acme/prod"},
		{"its path is a namespace beside the host's", "spiffe://site.example/acme/dev/web", "/acme/prod", "/acme/prod"},
		{"its path is above the host's", "spiffe://site.example/acme/web", "/acme/prod", "/acme/prod"},
		{"it has a name only", "spiffe://site.example/web", "/acme/prod", "/acme/prod"},
		{"its path is none, a Profile speaks of it", "spiffe://site.example/ns/shop/sa/web", "/acme/prod", "/acme/prod/shop"},
		{"that Profile is not of this host", "spiffe://site.example/ns/shop/sa/web", "/acme/prod/bank", "/acme/prod/bank"},
		{"only a Profile of the host's speaks of it", "spiffe://site.example/ns/x/sa/web", "/acme/prod", "/acme/prod"},
		{"nobody speaks of it", "spiffe://other.example/ns/shop/sa/web", "/acme/prod", "/acme/prod"},
		{"a host of all", "spiffe://site.example/acme/dev/web", "/", "/acme/dev"},
	} {
		if got := c.LocalNamespace(spiffeid.RequireFromString(tc.id), tc.host); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.name, got, tc.want)
		}
	}
}

// A peer gains nothing by its path: whatever it is, the decision is the same.
func TestAPeersPathDecidesNothing(t *testing.T) {
	c := compile(t, localSet).compiled
	own := Endpoint{Namespace: "/acme/prod/shop", Attributes: identity.NewAttributes(map[string][]string{"app": {"shop"}})}
	for _, app := range []string{"shop", "other"} {
		var first *Decision
		for _, path := range []string{"/acme/prod/shop/web", "/acme/prod/web", "/web", "/ns/x/sa/y"} {
			p, err := identity.NewPrincipal(spiffeid.RequireFromString("spiffe://stranger.example"+path), identity.NewAttributes(map[string][]string{"app": {app}}))
			if err != nil {
				t.Fatal(err)
			}
			peer := Endpoint{Namespace: p.Namespace, Attributes: p.Attributes}
			for side, q := range map[Side]*Query{
				Server: {From: peer, To: own, Protocol: "tcp", Port: 80},
				Client: {From: own, To: peer, Protocol: "tcp", Port: 80},
			} {
				d := c.Decide(side, q, time.Now())
				if first == nil {
					first = &d
				}
				if d.Allow != (app == "shop") || d.Policy != first.Policy {
					t.Errorf("%s %s at %s: %+v", app, path, side, d)
				}
			}
			// Nor does it become known by it.
			if got := c.About(&identity.Principal{ID: p.ID, Namespace: p.Namespace}, own.Namespace, spiffeid.RequireTrustDomainFromString("site.example")); got.Attributes.Has("app") {
				t.Errorf("%s is %s", path, fmt.Sprint(got.Attributes))
			}
		}
	}
}
