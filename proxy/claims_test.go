package proxy

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/token"
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

// issuer is a controller's key for tokens, announced to the world's proxy.
type issuer struct {
	*world
	key *ecdsa.PrivateKey
}

func (w *world) issuer() *issuer {
	w.Helper()
	i := &issuer{w, newKey(w)}
	der, err := x509.MarshalPKIXPublicKey(i.key.Public())
	if err != nil {
		w.Fatal(err)
	}
	id, err := token.Thumbprint(i.key.Public())
	if err != nil {
		w.Fatal(err)
	}
	if err := w.p.SetTokenKeys(w.ca.domain, []*symbolonv1.TokenKey{{Id: id, PublicKey: der}}); err != nil {
		w.Fatal(err)
	}
	return i
}

// statement is what a good token says of a credential.
func (i *issuer) statement(c *identity.Credential, labels map[string][]string) *token.Statement {
	i.Helper()
	jkt, err := token.Thumbprint(c.SVID.Key.Public())
	if err != nil {
		i.Fatal(err)
	}
	now := time.Now().Truncate(time.Second)
	return &token.Statement{
		Subject: c.SVID.ID, Audience: i.ca.domain, Thumbprint: jkt,
		IssuedAt: now, Expiry: now.Add(time.Hour), Claims: identity.NewAttributes(labels),
	}
}

// give lets c show a token that says s.
func (i *issuer) give(c *identity.Credential, s *token.Statement) *identity.Credential {
	i.Helper()
	compact, err := token.Sign(i.key, s)
	if err != nil {
		i.Fatal(err)
	}
	p := c.SVID.With(s.Claims, identity.FromToken)
	return &identity.Credential{SVID: c.SVID, Bundles: c.Bundles, Token: &identity.Token{Compact: compact, NotAfter: s.Expiry, Principal: p}}
}

// A token stands for a certificate without claims, and each that is not good is refused
// for its own reason. None reaches the application.
func TestTokens(t *testing.T) {
	w := newWorld(t)
	w.policy(partners + knowsWeb)
	i := w.issuer()
	web := map[string][]string{"app": {"web"}}
	bare := func() *identity.Credential { return w.ca.workload("/prod/any", nil) }
	altered := func(change func(*token.Statement)) func() *identity.Credential {
		return func() *identity.Credential {
			c := bare()
			s := i.statement(c, web)
			change(s)
			return i.give(c, s)
		}
	}
	with := func(compact string) func() *identity.Credential {
		return func() *identity.Credential {
			c := bare()
			c.Token = &identity.Token{Compact: compact}
			return c
		}
	}
	for _, tc := range []struct {
		name                  string
		cred                  func() *identity.Credential
		outcome, reason, from string
	}{
		{"good", altered(func(*token.Statement) {}), "allow", "policy", "token"},
		{"of the wrong labels", altered(func(s *token.Statement) { s.Claims = nil }), "deny", "default", "token"},
		{"forged", func() *identity.Credential {
			c := bare()
			return (&issuer{w, newKey(w)}).give(c, i.statement(c, web))
		}, "deny", "token-invalid", ""},
		{"signed by the workload's own key", func() *identity.Credential {
			c := bare()
			return (&issuer{w, c.SVID.Key.(*ecdsa.PrivateKey)}).give(c, i.statement(c, web))
		}, "deny", "token-invalid", ""},
		{"junk", with("junk"), "deny", "token-invalid", ""},
		{"larger than any token", with(strings.Repeat("x", token.MaxSize+1)), "deny", "token-invalid", ""},
		{"for another key", altered(func(s *token.Statement) { s.Thumbprint = i.statement(bare(), web).Thumbprint }), "deny", "token-wrong-key", ""},
		{"expired", altered(func(s *token.Statement) {
			s.IssuedAt, s.Expiry = s.IssuedAt.Add(-time.Hour), s.IssuedAt.Add(-time.Minute)
		}), "deny", "token-expired", ""},
		{"of the future", altered(func(s *token.Statement) { s.IssuedAt = s.IssuedAt.Add(30 * time.Minute) }), "deny", "token-expired", ""},
		{"of another subject", altered(func(s *token.Statement) { s.Subject = w.web().SVID.ID }), "deny", "token-wrong-subject", ""},
		{"for another controller's hosts", altered(func(s *token.Statement) { s.Audience = spiffeid.RequireTrustDomainFromString("evil.example") }), "deny", "token-wrong-subject", ""},
		{"beside an extension, which it cannot overrule", func() *identity.Credential {
			c := w.ca.workload("/prod/any", map[string][]string{"app": {"other"}})
			return i.give(c, i.statement(c, web))
		}, "deny", "default", "extension"},
		{"beside an empty extension", func() *identity.Credential {
			c := w.ca.workload("/prod/any", map[string][]string{})
			return i.give(c, i.statement(c, web))
		}, "deny", "default", "extension"},
		{"before what Profiles know of the ID", func() *identity.Credential {
			c := w.ca.workload("/prod/web", nil) // app: web
			return i.give(c, i.statement(c, map[string][]string{"app": {"other"}}))
		}, "deny", "default", "token"},
		{"none, so Profiles are asked", func() *identity.Credential { return w.ca.workload("/prod/web", nil) }, "allow", "policy", "policy"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := w.in(t)
			reached := w.app.accepts.Load()
			w.recorded(w.attempt(mtls.NewEndpoint(tc.cred(), mtls.Options{})), tc.outcome, tc.reason, tc.from)
			if n := w.app.accepts.Load() - reached; n != 0 && tc.outcome != "allow" {
				t.Errorf("the application was reached %d times", n)
			}
		})
	}
}

// What opened under a token goes on when it has ended; what opens then does not. A new
// connection of a tunnel shows a token of its own.
func TestTokenEnds(t *testing.T) {
	w := newWorld(t)
	i := w.issuer()
	c := w.ca.workload("/prod/any", nil)
	s := i.statement(c, map[string][]string{"app": {"web"}})
	s.Expiry = s.IssuedAt.Add(10 * time.Minute)
	cred := i.give(c, s)
	e := mtls.NewEndpoint(cred, mtls.Options{})
	open := func(framed bool) *symbolonv1.Open {
		o := mtls.NewOpen(mtls.NewFlowID(), w.app.addr, encrypted, 1)
		o.Token, o.Framed = cred.Token.Compact, framed
		return o
	}
	lives, err := mtls.Dial(w.ctx(), w.call(w.app.addr), e, func(*mtls.Peer) (*symbolonv1.Open, error) { return open(false), nil })
	if err == nil {
		_, err = lives.ReadVerdict(w.ctx())
	}
	if err != nil {
		t.Fatal(err)
	}
	_ = lives.SetReadDeadline(time.Now().Add(patience))
	speaks(t, lives)
	x := w.handshake(w.call(w.app.addr), cred.SVID.TLS, nil)
	_, _ = x.Write(append(message(open(true)), frame("hello")+frame("")...))
	w.recorded(w.records.next(), "allow", "policy", "token")
	_, _ = x.Write(append(message(open(true)), frame("again")+frame("")...))
	w.recorded(w.records.next(), "allow", "policy", "token")

	w.clock.advance(11 * time.Minute)
	w.p.table.sweep(w.clock.now())
	w.policy(baseline)
	speaks(t, lives)
	w.recorded(w.attempt(e), "deny", "token-expired", "")
	_, _ = x.Write(append(message(open(true)), frame("secret")...))
	w.recorded(w.records.next(), "deny", "token-expired", "")
	_, _ = ended(t, x)
	x.NetConn().Close()
	w.policy(denied) // and a policy still cuts it
	if _, err := io.ReadAll(lives); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client sees %v", err)
	}
	w.recorded(w.records.next(), "deny", "policy-changed", "token")
	if strings.Contains(w.app.received(), "secret") {
		t.Error("the application was reached")
	}
}

// Our own proxy shows its workload's token to its own trust domain, and to nobody else,
// and not once it has expired.
func TestOwnToken(t *testing.T) {
	w := newWorld(t)
	partner := newAuthority(t, "partner.example")
	i := w.issuer()
	c := w.ca.workload("/prod/any", nil)
	c.Bundles.Add(partner.bundle())
	cred := i.give(c, i.statement(c, map[string][]string{"app": {"web"}}))
	w.creds.set("0", cred)
	w.policy(partners + partnerMayApp)
	for _, tc := range []struct {
		name  string
		cert  *identity.Credential
		shown bool
	}{
		{"to its own", w.ca.workload("/prod/db", map[string][]string{"app": {"db"}}), true},
		{"to a stranger", w.foreign(partner, "/a/b", map[string][]string{"app": {"db"}}), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := w.in(t)
			opens := make(chan *symbolonv1.Open, 1)
			to := w.serveOther(other4+":0", func(c *net.TCPConn) {
				x := w.server(c, *tc.cert.SVID.TLS, nil)
				o, err := readOpen(x)
				if err != nil {
					return
				}
				opens <- o
				_, _ = x.Write(message(&symbolonv1.Verdict{Accept: true, Protection: encrypted, FlowId: o.GetFlowId()}))
				_, _ = x.Write([]byte(frame("yes") + frame("")))
				_, _ = io.Copy(io.Discard, x)
			})
			if got, err := w.ask(to, "hello"); string(got) != "yes" || err != nil {
				t.Errorf("the application reads %q, %v", got, err)
			}
			w.recorded(w.records.next(), "allow", "policy", "token")
			if o := within(t, opens, "the Open"); (o.GetToken() == cred.Token.Compact) != tc.shown || !tc.shown && o.GetToken() != "" {
				t.Errorf("shown %.20q", o.GetToken())
			}
		})
	}
	if got := w.p.tokenFor(cred, w.p.parties.byKey[w.creds.keys["0"]].principal()); got == "" {
		t.Error("not shown while valid")
	}
	w.clock.advance(2 * time.Hour)
	if got := w.p.tokenFor(cred, &cred.SVID.Principal); got != "" {
		t.Error("shown after its end")
	}
}
