package cli_test

import (
	"strings"
	"testing"

	"github.com/symbolon/symbolon/internal/cli"
)

// Two operators exchange bundles as files: what bundle prints is what a TrustDomain takes.
func TestTrustDomains(t *testing.T) {
	ours, theirs := newOperator(t), newOperatorOf(t, "partner.example")
	ok := cli.ExitOK

	out, _ := ours.runs(ok, "", "trust-domain", "show")
	contains(t, out, "acme.example", "refresh hint", "5m0s")
	bundle, _ := theirs.runs(ok, "", "trust-domain", "bundle")
	contains(t, bundle, `"use":"x509-svid"`, `"spiffe_sequence"`)

	doc := "kind: TrustDomain\nnamespace: /\nname: partner.example\nbundle: |\n  " + strings.TrimSpace(bundle) + "\nclaims: [app]\n"
	ours.runs(ok, doc, "policy", "apply", "-f", "-")
	out, _ = ours.runs(ok, "", "trust-domain", "list")
	contains(t, out, "partner.example", "given", "never", "app")
	out, _ = ours.runs(ok, "", "trust-domain", "show", "partner.example")
	contains(t, out, "roots", "✓ given")
	again, _ := ours.runs(ok, "", "trust-domain", "bundle", "partner.example")
	if again != bundle {
		t.Errorf("the bundle is\n%s, not\n%s", again, bundle)
	}
	out, _ = ours.runs(ok, "", "status")
	contains(t, out, "partner.example", "✓ given, confirmed never")

	// What get prints is what apply takes.
	out, _ = ours.runs(ok, "", "policy", "get", "trustdomain:/partner.example")
	ours.runs(ok, out, "policy", "diff", "-f", "-")

	_, talk := ours.runs(cli.ExitNegative, "", "trust-domain", "refresh", "partner.example")
	contains(t, talk, "has no endpoint")
	ours.runs(cli.ExitNegative, "", "trust-domain", "show", "nobody.example")

	// One's own is refused, and another's bundle under a name.
	_, talk = ours.runs(cli.ExitUsage, "kind: TrustDomain\nnamespace: /\nname: acme.example\nclaims: [app]\n", "policy", "apply", "-f", "-")
	contains(t, talk, "this controller's own trust domain")
	_, talk = ours.runs(cli.ExitUsage, strings.Replace(doc, "name: partner", "name: other", 1), "policy", "apply", "-f", "-")
	contains(t, talk, "an X.509 authority is of partner.example, not of other.example")
}
