package proxy

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
)

// partnersWork is a policy that lets in whoever is of the partner's, by its ID alone, and
// our own web.
const partnersWork = partners + `
{kind: TrustDomain, namespace: /, name: partner.example, claims: [app]}
---
{kind: Policy, namespace: /prod, name: partner-calls-db, subject: {spiffe.trust_domain: partner.example}, verb: allow, object: {app: db}}
`

// A trust domain whose bundle goes takes its peers with it: those that are connected,
// those that would resume a session, and those whose chain has been verified before. It
// touches nobody else; come back, it is believed again.
func TestATrustDomainThatGoesCuts(t *testing.T) {
	w, partner := newPartners(t, "")
	w.policy(partnersWork)
	with := w.creds.byUID["0"]
	without := &identity.Credential{SVID: with.SVID, Bundles: x509bundle.NewSet(w.ca.bundle())}

	foreign := mtls.NewEndpoint(w.foreign(partner, "/x/y", nil), mtls.Options{})
	w.recorded(w.attempt(foreign), "allow", "policy", "")
	stays, _ := w.openEcho(w.web())
	goes, saw := w.openEcho(w.foreign(partner, "/x/y", nil))

	w.p.CredentialChanged(w.creds.set("0", without), without)
	w.wasCut(goes, saw, "wrong-trust-domain")
	w.recorded(w.attempt(foreign), "deny", "wrong-trust-domain", "")
	speaks(t, stays)

	w.p.CredentialChanged(w.creds.set("0", with), with)
	w.recorded(w.attempt(foreign), "allow", "policy", "")
	stays.Close()
	w.records.next()
}

// A root that is withdrawn, of a domain that stays, takes with it whoever came from it.
func TestARootThatGoesCuts(t *testing.T) {
	w, partner := newPartners(t, "")
	w.policy(partnersWork)
	next := newAuthority(t, "partner.example")
	with := func(roots ...*authority) *identity.Credential {
		c := &identity.Credential{SVID: w.creds.byUID["0"].SVID, Bundles: x509bundle.NewSet(w.ca.bundle())}
		b := x509bundle.New(partner.domain)
		for _, a := range roots {
			for _, root := range a.bundle().X509Authorities() {
				b.AddX509Authority(root)
			}
		}
		c.Bundles.Add(b)
		return c
	}
	change := func(c *identity.Credential) { w.p.CredentialChanged(w.creds.set("0", c), c) }

	goes, saw := w.openEcho(w.foreign(partner, "/x/y", nil))
	change(with(partner, next))
	speaks(t, goes)
	stays, _ := w.openEcho(w.foreign(next, "/x/y", nil))
	change(with(next))
	w.wasCut(goes, saw, "peer-unverified")
	speaks(t, stays)
	stays.Close()
	w.records.next()
}

// What a foreign domain writes into its certificates is its own choice: our paths, our
// labels, our reserved names, our trust domain as a claim. None of it gains anything that
// its TrustDomain and a policy do not give.
func TestAForeignerGainsNothingByItsWords(t *testing.T) {
	w, partner := newPartners(t, "")
	w.policy(partners + partnerMayApp + `
{kind: Namespace, name: /secret, mode: enforce}
---
{kind: Policy, namespace: /prod, name: ours-by-domain, subject: {spiffe.trust_domain: acme.example, app: batch}, verb: allow, object: {app: db}}
---
{kind: Policy, namespace: /prod, name: ours-by-id, subject: {spiffe.id: {prefix: "spiffe://acme.example/prod/"}, app: batch}, verb: allow, object: {app: db}}
---
{kind: Policy, namespace: /prod, name: same-domain, subject: {app: batch}, verb: allow, object: {app: db}, where: {same: [spiffe.trust_domain]}}
`)
	batch := map[string][]string{"app": {"batch"}}
	w.recorded(w.attempt(mtls.NewEndpoint(w.ca.workload("/prod/batch", batch), mtls.Options{})), "allow", "policy", "extension")
	for name, tc := range map[string]struct {
		path   string
		claims map[string][]string
		reason string
	}{
		"our path":               {"/prod/batch", batch, "default"},
		"our own workload's ID":  {"/prod/db", map[string][]string{"app": {"db", "batch"}}, "default"},
		"our domain as a path":   {"/acme.example/prod/batch", batch, "default"},
		"a namespace of ours":    {"/secret/x", batch, "default"},
		"our domain as a claim":  {"/x/y", map[string][]string{"app": {"batch"}, "spiffe.trust_domain": {"acme.example"}}, "default"},
		"our ID as a claim":      {"/x/y", map[string][]string{"app": {"batch"}, "spiffe.id": {"spiffe://acme.example/prod/batch"}}, "default"},
		"a label it may not say": {"/x/y", map[string][]string{"app": {"batch"}, "env": {"prod"}}, "claim-not-allowed"},
		"another case":           {"/x/y", map[string][]string{"App": {"batch"}}, "claim-not-allowed"},
		"an attested key":        {"/x/y", map[string][]string{"host.role": {"db"}}, "claim-not-allowed"},
		"a key with a zero byte": {"/x/y", map[string][]string{"app\x00": {"batch"}}, "claim-not-allowed"},
		"our controller's name":  {"/symbolon/controller", batch, "not-a-workload"},
	} {
		t.Run(name, func(t *testing.T) {
			w := w.in(t)
			leaf := partner.leaf(tc.path, tc.claims)
			c := partner.issue(leaf)
			e := mtls.NewEndpoint(&identity.Credential{
				SVID:    &identity.SVID{Principal: identity.Principal{}, Chain: w.web().SVID.Chain, TLS: &c},
				Bundles: x509bundle.NewSet(w.ca.bundle(), partner.bundle()),
			}, mtls.Options{})
			r := w.attempt(e)
			if r.Outcome != "deny" || r.Reason != tc.reason {
				t.Errorf("recorded %s %s (%s), want deny %s", r.Outcome, r.Reason, r.Detail, tc.reason)
			}
		})
	}
	if n := w.app.accepts.Load(); n != 1 {
		t.Errorf("the application was reached %d times", n)
	}
}
