package policydb

import (
	"strings"
	"testing"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func TestClaimAllowed(t *testing.T) {
	w := compile(t, tree+`
kind: TrustDomain
namespace: /
name: partner.example
claims: [app, image.name, "k8s.*"]
---
kind: TrustDomain
namespace: /
name: silent.example
endpoint: https://silent.example/
profile: https_web
`)
	for _, c := range []struct {
		domain, key string
		want        bool
	}{
		{"partner.example", "app", true},
		{"partner.example", "image.name", true},
		{"partner.example", "k8s.pod", true},
		{"partner.example", "k8s.pod/label", true},
		{"partner.example", "k8s.", false},
		{"partner.example", "k8s", false},
		{"partner.example", "k8sx.pod", false},
		{"partner.example", "image.names", false},
		{"partner.example", "image.", false},
		{"partner.example", "application", false},
		{"partner.example", "App", false},
		{"partner.example", "", false},
		{"partner.example", "env", false},
		{"partner.example", "spiffe.id", false},
		{"silent.example", "app", false},
		{"stranger.example", "app", false},
		{"sub.partner.example", "app", false},
		{"", "app", false},
	} {
		if got := w.compiled.ClaimAllowed(c.domain, c.key); got != c.want {
			t.Errorf("%s asserts %q: %t, want %t", c.domain, c.key, got, c.want)
		}
	}
}

// TestNoWireAllowsSpiffe: a set that no apply has checked cannot let a domain speak of
// what its ID says, or a TrustDomain hold below the root.
func TestNoWireAllowsSpiffe(t *testing.T) {
	r := &symbolonv1.Resource{Namespace: "/", Name: "partner.example", Kind: &symbolonv1.Resource_TrustDomain{
		TrustDomain: &symbolonv1.TrustDomain{Claims: []string{"spiffe.*", "spiffe.id", "*"}},
	}}
	set := append(resources(t, tree), r)
	c, err := Compile(set, 1)
	if err != nil {
		t.Fatal(err)
	}
	if c.ClaimAllowed("partner.example", "spiffe.id") {
		t.Error("spiffe.id may be asserted")
	}
	r.Namespace = "/acme"
	if _, err := Compile(set, 1); err == nil {
		t.Error("a TrustDomain below the root was compiled")
	}
}

// TestABundleHasOneForm: how it was written is not what it says.
func TestABundleHasOneForm(t *testing.T) {
	docs := parse(t, string(everything(t)))
	var domain Document
	for _, d := range docs {
		if d.Resource.GetTrustDomain().GetBundle() != "" {
			domain = d
		}
	}
	text := string(FormatYAML(domain.Resource))
	again := parse(t, text)[0].Resource
	if changes := FieldChanges(domain.Resource, again); changes != nil {
		t.Errorf("it differs by %v", changes)
	}
	other := strings.Replace(text, `"spiffe_sequence":1`, `"spiffe_sequence":2`, 1)
	changes := FieldChanges(domain.Resource, parse(t, other)[0].Resource)
	if len(changes) != 1 || changes[0].Path != "bundle" {
		t.Errorf("another bundle changes %v", changes)
	}
}

// TestEveryHostGetsTheTrustDomains: they hold everywhere.
func TestEveryHostGetsTheTrustDomains(t *testing.T) {
	db := newDB(t, tree+"kind: TrustDomain\nnamespace: /\nname: partner.example\nclaims: [app]\n")
	for _, ns := range []string{"/", "/acme", "/acme/prod"} {
		n := 0
		for _, r := range db.Snapshot().VisibleTo(ns) {
			if r.GetTrustDomain() != nil {
				n++
			}
		}
		if n != 1 {
			t.Errorf("a host of %s gets %d TrustDomains", ns, n)
		}
	}
}

// TestLintTellsWhatAForeignerCanMeet: and only where nothing says whose workload is meant.
func TestLintTellsWhatAForeignerCanMeet(t *testing.T) {
	const domain = "kind: TrustDomain\nnamespace: /\nname: partner.example\nclaims: [app]\n---\n"
	policy := func(subject string) string {
		return "kind: Policy\nnamespace: /acme\nname: p\nsubject: " + subject + "\nverb: allow\nobject: {tier: db}\nports: [tcp/1]\n"
	}
	for subject, want := range map[string]bool{
		"{app: web}":                                          true,
		"{app: web, env: {exists: false}}":                    true,
		"[{app: a, env: qa}, {app: b}]":                       true,
		"{app: web, env: prod}":                               false,
		"{app: web, spiffe.trust_domain: acme.example}":       false,
		"{app: web, spiffe.id: {prefix: spiffe://a.example}}": false,
		"{env: prod}":                                         false,
	} {
		db := newDB(t, tree+domain+policy(subject))
		findings, _ := Lint(db.Snapshot(), nil, noon)
		got, unknown := false, false
		for _, f := range findings {
			got = got || f.Code == LintForeignLabel
			unknown = unknown || f.Code == LintNoKnownWorkload && strings.Contains(f.Message, "gives app")
		}
		if got != want {
			t.Errorf("%s: told %t, want %t", subject, got, want)
		}
		if unknown {
			t.Errorf("%s: app is known, the partner may claim it", subject)
		}
	}
}
