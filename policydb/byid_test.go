package policydb

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const profilesByID = tree + `
kind: Profile
namespace: /
name: partner
match: {spiffe.trust_domain: partner.example}
labels: {env: prod}
---
kind: Profile
namespace: /acme
name: billing
match: {spiffe.id: {prefix: "spiffe://site-a.test/billing/"}}
labels: {app: payments}
---
kind: Profile
namespace: /acme
name: not-the-db
match: {spiffe.trust_domain: site-a.test, spiffe.id: {not: ["spiffe://site-a.test/billing/db"]}}
labels: {tier: front}
---
kind: Profile
namespace: /acme
name: by-process
match: {spiffe.trust_domain: site-a.test, os.user: postgres}
labels: {tier: db}
---
kind: Profile
namespace: /acme
name: hosts
match: {container.id: {exists: false}}
labels: {app: payments}
`

func TestClaimsByID(t *testing.T) {
	db := newDB(t, profilesByID)
	byID := ProfilesByID(db.Snapshot().List(KindProfile, ""))
	for _, c := range []struct{ id, want, by string }{
		{"spiffe://partner.example/x", "env=prod", "/partner"},
		{"spiffe://site-a.test/billing/web", "app=payments tier=front", "/acme/billing /acme/not-the-db"},
		{"spiffe://site-a.test/billing/db", "app=payments", "/acme/billing"},
		{"spiffe://site-a.test/other", "tier=front", "/acme/not-the-db"},
		{"spiffe://site-a.test.evil.example/billing/web", "", ""},
		{"spiffe://stranger.example/billing/web", "", ""},
	} {
		claims, by := ClaimsByID(byID, spiffeid.RequireFromString(c.id))
		got := ""
		for i, ref := range by {
			if i > 0 {
				got += " "
			}
			got += ref
		}
		if diff := cmp.Diff([]string{c.want, c.by}, []string{claims.String(), got}); diff != "" {
			t.Errorf("%s:\n%s", c.id, diff)
		}
	}
}
