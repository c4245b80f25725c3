package proxy

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
)

// partners is a policy for two trust domains; what partner.example may claim, and what
// is known of IDs, is appended.
const partners = `
kind: Namespace
name: /
mode: enforce
default: deny
protection: encrypted
attributes: {app: {}, env: {}}
---
{kind: Namespace, name: /prod, mode: enforce}
---
{kind: Policy, namespace: /prod, name: web-calls-db, subject: {app: web}, verb: allow, object: {app: db}}
---
`

const (
	partnerMayApp = "{kind: TrustDomain, namespace: /, name: partner.example, claims: [app]}\n---\n"
	knowsWeb      = "{kind: Profile, namespace: /, name: web, match: {spiffe.id: [\"spiffe://acme.example/prod/web\", \"spiffe://partner.example/x/web\"]}, labels: {app: web}}\n---\n"
	knowsDB       = "{kind: Profile, namespace: /prod, name: db, match: {spiffe.id: \"spiffe://acme.example/prod/db\"}, labels: {app: db}}\n---\n"
)

// federated makes two trust domains believe each other.
func federated(creds ...*identity.Credential) {
	for _, a := range creds {
		for _, b := range creds {
			for _, bundle := range b.Bundles.Bundles() {
				a.Bundles.Add(bundle)
			}
		}
	}
}

// newPartners is a world whose db also trusts partner.example.
func newPartners(t *testing.T, yaml string, change ...func(*Options)) (*world, *authority) {
	t.Helper()
	w := newWorld(t, change...)
	partner := newAuthority(t, "partner.example")
	cred := w.ca.workload("/prod/db", map[string][]string{"app": {"db"}})
	cred.Bundles.Add(partner.bundle())
	w.creds.set("0", cred)
	w.policy(partners + yaml)
	return w, partner
}

// foreign is a credential of the partner's that believes acme.example.
func (w *world) foreign(partner *authority, path string, claims map[string][]string) *identity.Credential {
	w.Helper()
	c := partner.workload(path, claims)
	c.Bundles.Add(w.ca.bundle())
	return c
}

// attempt opens a tunnel, from an endpoint that may resume one, and closes it.
func (w *world) attempt(e *mtls.Endpoint) *flow.Line {
	w.Helper()
	ctx := w.ctx()
	t, err := mtls.Dial(ctx, w.call(w.app.addr), e, func(*mtls.Peer) (*symbolonv1.Open, error) {
		o := mtls.NewOpen(mtls.NewFlowID(), w.app.addr, encrypted, 1)
		if tok := e.Credential().Token; tok != nil {
			o.Token = tok.Compact
		}
		return o, nil
	})
	if err == nil {
		if _, err = t.ReadVerdict(ctx); err == nil {
			_ = t.SetReadDeadline(time.Now().Add(patience))
			speaks(w, t)
			_ = t.CloseWrite()
			_, _ = io.ReadAll(t)
			t.Close()
		}
	}
	r := w.records.next()
	if (err == nil) != (r.Outcome == "allow") {
		w.Errorf("the client gets %v, recorded %s %s", err, r.Outcome, r.Reason)
	}
	return r
}

func (w *world) recorded(r *flow.Line, outcome, reason, from string) {
	w.Helper()
	if r.Outcome != outcome || r.Reason != reason || r.Source.AttributesFrom != from {
		w.Errorf("recorded %s %s (%s), attributes from %q; want %s %s from %q", r.Outcome, r.Reason, r.Detail, r.Source.AttributesFrom, outcome, reason, from)
	}
}

// Of a client, one issuer's word counts: the certificate's extension if it is there,
// even empty; else what Profiles know of the ID.
func TestWhoseWordCountsForAClient(t *testing.T) {
	w, partner := newPartners(t, knowsWeb+partnerMayApp)
	for _, tc := range []struct {
		name                  string
		cred                  *identity.Credential
		outcome, reason, from string
	}{
		{"an extension", w.ca.workload("/prod/any", map[string][]string{"app": {"web"}}), "allow", "policy", "extension"},
		{"an extension that says otherwise", w.ca.workload("/prod/web", map[string][]string{"app": {"other"}}), "deny", "default", "extension"},
		{"an empty extension", w.ca.workload("/prod/web", map[string][]string{}), "deny", "default", "extension"},
		{"no extension, and a Profile", w.ca.workload("/prod/web", nil), "allow", "policy", "policy"},
		{"no extension, and none", w.ca.workload("/prod/any", nil), "deny", "no-claims", ""},
		{"a foreign extension", w.foreign(partner, "/x/y", map[string][]string{"app": {"web"}}), "allow", "policy", "extension"},
		{"a foreign ID, and a Profile", w.foreign(partner, "/x/web", nil), "allow", "policy", "policy"},
		{"a foreign ID with our path", w.foreign(partner, "/prod/web", nil), "deny", "no-claims", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := w.in(t)
			w.recorded(w.attempt(mtls.NewEndpoint(tc.cred, mtls.Options{})), tc.outcome, tc.reason, tc.from)
		})
	}
}

// The same of a server, and of this host's own workload.
func TestWhoseWordCountsForAServer(t *testing.T) {
	w := newWorld(t)
	partner := newAuthority(t, "partner.example")
	own := w.ca.workload("/prod/web", nil)
	own.Bundles.Add(partner.bundle())
	w.creds.set("0", own)
	for _, tc := range []struct {
		name, yaml      string
		cert            *identity.Credential
		outcome, reason string
		own, from       string
	}{
		{"an extension", knowsWeb, w.ca.workload("/prod/x", map[string][]string{"app": {"db"}}), "allow", "policy", "policy", "extension"},
		{"by ID", knowsWeb + knowsDB, w.ca.workload("/prod/db", nil), "allow", "policy", "policy", "policy"},
		{"an empty extension", knowsWeb + knowsDB, w.ca.workload("/prod/db", map[string][]string{}), "deny", "default", "policy", "extension"},
		{"nothing", knowsWeb, w.ca.workload("/prod/db", nil), "deny", "no-claims", "policy", ""},
		{"a foreign claim that is allowed", knowsWeb + partnerMayApp, w.foreign(partner, "/a/b", map[string][]string{"app": {"db"}}), "allow", "policy", "policy", "extension"},
		{"a foreign claim that is not", knowsWeb, w.foreign(partner, "/a/b", map[string][]string{"app": {"db"}}), "deny", "claim-not-allowed", "policy", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := w.in(t)
			w.policy(partners + tc.yaml)
			to := w.serveOther(other4+":0", func(c *net.TCPConn) {
				x := w.server(c, *tc.cert.SVID.TLS, nil)
				o, err := readOpen(x)
				if err != nil {
					return
				}
				_, _ = x.Write(message(&symbolonv1.Verdict{Accept: true, Protection: encrypted, FlowId: o.GetFlowId()}))
				_, _ = x.Write([]byte(frame("yes") + frame("")))
				_, _ = io.Copy(io.Discard, x)
			})
			got, err := w.ask(to, "hello")
			if allowed := string(got) == "yes" && err == nil; allowed != (tc.outcome == "allow") {
				t.Errorf("the application reads %q, %v", got, err)
			}
			r := w.records.next()
			if r.Outcome != tc.outcome || r.Reason != tc.reason || r.Source.AttributesFrom != tc.own || r.Destination.AttributesFrom != tc.from {
				t.Errorf("recorded %s %s (%s), attributes from %q and %q", r.Outcome, r.Reason, r.Detail, r.Source.AttributesFrom, r.Destination.AttributesFrom)
			}
		})
	}
}

// A foreign claim that no TrustDomain allows ends the handshake, a resumed one too.
func TestForeignClaimNotAllowed(t *testing.T) {
	w, partner := newPartners(t, partnerMayApp)
	w.recorded(w.attempt(mtls.NewEndpoint(w.foreign(partner, "/x/y", map[string][]string{"app": {"web"}, "env": {"prod"}}), mtls.Options{})),
		"deny", "claim-not-allowed", "")
	e := mtls.NewEndpoint(w.foreign(partner, "/x/y", map[string][]string{"app": {"web"}}), mtls.Options{})
	w.recorded(w.attempt(e), "allow", "policy", "extension")
	r := w.attempt(e)
	if w.recorded(r, "allow", "policy", "extension"); !r.Resumed {
		t.Error("the second handshake is not a resumed one")
	}
	w.policy(partners)
	w.recorded(w.attempt(e), "deny", "claim-not-allowed", "")
	// It has another reason than the stranger, whom nobody vouches for.
	stranger := newAuthority(t, "stranger.example")
	w.recorded(w.attempt(mtls.NewEndpoint(w.foreign(stranger, "/x/y", map[string][]string{"app": {"web"}}), mtls.Options{})),
		"deny", "wrong-trust-domain", "")
	if n := w.app.accepts.Load(); n != 2 {
		t.Errorf("the application was reached %d times", n)
	}
}

// Withdrawing a claim key cuts who lives by it, and nobody else.
func TestWithdrawnClaimCuts(t *testing.T) {
	w, partner := newPartners(t, partnerMayApp)
	stays, _ := w.openEcho(w.web())
	goes, saw := w.openEcho(w.foreign(partner, "/x/y", map[string][]string{"app": {"web"}}))
	w.policy(partners)
	w.wasCut(goes, saw, "policy-changed")
	speaks(t, stays)
	stays.Close()
	w.records.next()
}

// So does a Profile that knows an ID no more, or otherwise.
func TestWithdrawnProfileCuts(t *testing.T) {
	w, _ := newPartners(t, knowsWeb)
	byPolicy := w.ca.workload("/prod/web", nil)
	for name, next := range map[string]string{"none": "", "another label": strings.Replace(knowsWeb, "app: web", "app: other", 1)} {
		t.Run(name, func(t *testing.T) {
			w := w.in(t)
			w.policy(partners + knowsWeb)
			goes, saw := w.openEcho(byPolicy)
			w.policy(partners + knowsWeb) // the same again changes nothing
			speaks(t, goes)
			w.policy(partners + next)
			w.wasCut(goes, saw, "policy-changed")
		})
	}
}

// A tunnel that waits for its next connection is no way around it.
func TestForeignClaimNotAllowedAtReuse(t *testing.T) {
	w, partner := newPartners(t, partnerMayApp)
	cred := w.foreign(partner, "/x/y", map[string][]string{"app": {"web"}})
	x := w.handshake(w.call(w.app.addr), cred.SVID.TLS, nil)
	_, _ = x.Write(append(w.framed(), frame("hello")+frame("")...))
	if r := w.records.next(); r.Outcome != "allow" {
		t.Fatalf("recorded %+v", r)
	}
	w.policy(partners)
	_, _ = x.Write(append(w.framed(), frame("secret")...))
	_, _ = ended(t, x)
	x.NetConn().Close()
	if r := w.records.next(); r.Reason != "claim-not-allowed" || !r.Reused {
		t.Errorf("recorded %+v", r)
	}
	if strings.Contains(w.app.received(), "secret") {
		t.Error("the application was reached")
	}
}

// On the client's side the tunnel waits in our own pool: judged there before it is
// used, and its server learns nothing.
func TestForeignClaimNotAllowedInThePool(t *testing.T) {
	w := newWorld(t)
	partner := newAuthority(t, "partner.example")
	own := w.ca.workload("/prod/web", map[string][]string{"app": {"web"}})
	own.Bundles.Add(partner.bundle())
	w.creds.set("0", own)
	w.policy(partners + partnerMayApp)
	read := make(chan string, 8)
	cert := w.foreign(partner, "/a/b", map[string][]string{"app": {"db"}})
	to := w.serveOther(other4+":0", func(c *net.TCPConn) {
		x := w.server(c, *cert.SVID.TLS, func(c *tls.Config) {})
		o, err := readOpen(x)
		if err != nil {
			read <- ""
			return
		}
		_, _ = x.Write(message(&symbolonv1.Verdict{Accept: true, Protection: encrypted, FlowId: o.GetFlowId(), Keep: true}))
		_, _ = x.Write([]byte(frame("yes") + frame("")))
		b, _ := io.ReadAll(x)
		read <- string(b)
	})
	if got, err := w.ask(to, "hello"); string(got) != "yes" || err != nil {
		t.Fatalf("the application reads %q, %v", got, err)
	}
	w.records.next()
	w.policy(partners)
	ask := func(to netip.AddrPort) {
		if got, err := w.ask(to, "secret"); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the application reads %q, %v", got, err)
		}
	}
	ask(to)
	if r := w.records.next(); r.Reason != "claim-not-allowed" {
		t.Errorf("recorded %+v", r)
	}
	if got := within(t, read, "the server's end"); strings.Contains(got, "secret") {
		t.Errorf("the server read %q", got)
	}
}
