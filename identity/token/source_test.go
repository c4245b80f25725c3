package token

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net/url"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// controller signs as the real one does, or fails.
type controller struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	mu   sync.Mutex
	app  string
	err  error
	n    int
	once []byte // the nonce that counts
}

func (c *controller) IssueToken(_ context.Context, req *connect.Request[symbolonv1.IssueTokenRequest]) (*connect.Response[symbolonv1.IssueTokenResponse], error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil, c.err
	}
	res := &symbolonv1.IssueTokenResponse{Nonce: c.once}
	if len(req.Msg.GetSignature()) == 0 {
		return connect.NewResponse(res), nil
	}
	if !bytes.Equal(req.Msg.GetNonce(), c.once) {
		return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("nonce"))
	}
	leaf, err := x509.ParseCertificate(req.Msg.GetChain()[0])
	if err != nil {
		return nil, err
	}
	if err := CheckProof(leaf, req.Msg.GetNonce(), req.Msg.GetSignature()); err != nil {
		return nil, connect.NewError(connect.CodePermissionDenied, err)
	}
	jkt, err := Thumbprint(leaf.PublicKey)
	if err != nil {
		return nil, err
	}
	c.n++
	at := time.Now().Truncate(time.Second)
	res.Token, err = Sign(c.key, &Statement{
		Subject: webID, Audience: acme, Thumbprint: jkt, IssuedAt: at, Expiry: at.Add(time.Hour),
		Claims: identity.NewAttributes(map[string][]string{"app": {c.app}}),
	})
	res.NotAfter, res.RotateAt = timestamppb.New(at.Add(time.Hour)), timestamppb.New(at.Add(30*time.Minute))
	return connect.NewResponse(res), err
}

func (c *controller) set(app string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.app, c.err = app, err
}

// svids is the other source.
type svids chan identity.Update

func (s svids) Watch(ctx context.Context, _ *identity.Workload) <-chan identity.Update {
	out := make(chan identity.Update)
	go func() {
		defer close(out)
		for {
			select {
			case u := <-s:
				select {
				case out <- u:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// site is the CA of the SVIDs.
type site struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newSite(t *testing.T) *site {
	s := &site{t: t, key: newKey(t)}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "site"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
	}
	s.cert = s.sign(c, c, s.key)
	return s
}

func (s *site) sign(c, parent *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	s.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), s.key)
	if err != nil {
		s.t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

func (s *site) bundles() *x509bundle.Set {
	return x509bundle.NewSet(x509bundle.FromX509Authorities(webID.TrustDomain(), []*x509.Certificate{s.cert}))
}

func (s *site) credential(life time.Duration, extension bool) *identity.Credential {
	s.t.Helper()
	key := newKey(s.t)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(2), URIs: []*url.URL{webID.URL()}, KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
	}
	if extension {
		e, err := identity.MarshalClaims(nil)
		if err != nil {
			s.t.Fatal(err)
		}
		c.ExtraExtensions = []pkix.Extension{e}
	}
	svid, err := identity.NewSVID([]*x509.Certificate{s.sign(c, s.cert, key)}, key)
	if err != nil {
		s.t.Fatal(err)
	}
	return &identity.Credential{SVID: svid, Bundles: s.bundles()}
}

func TestSource(t *testing.T) {
	c := &controller{t: t, key: newKey(t), app: "web", once: []byte("nonce")}
	v := NewVerifier()
	if err := v.Set(acme, announced(t, c.key)); err != nil {
		t.Fatal(err)
	}
	from, ca := make(svids), newSite(t)
	s := NewSource(from, c, v)
	ctx, cancel := context.WithCancel(t.Context())
	updates := s.Watch(ctx, &identity.Workload{})
	// until waits for an update like it, passing over others.
	until := func(what string, is func(identity.Update) bool) identity.Update {
		t.Helper()
		for end := time.After(20 * time.Second); ; {
			select {
			case u := <-updates:
				if is(u) {
					return u
				}
			case <-end:
				t.Fatalf("%s has not happened", what)
			}
		}
	}
	app := func(u identity.Update) string {
		if u.Credential == nil {
			return ""
		}
		return u.Credential.Principal().Attributes.Get("app")
	}
	first := ca.credential(time.Hour, false)
	from <- identity.Update{Credential: first}
	u := <-updates
	if app(u) != "web" || u.Err != nil || u.Credential.SVID != first.SVID || u.Credential.Principal().Issuer != identity.FromToken {
		t.Fatalf("the first is %v, %v", app(u), u.Err)
	}

	// Profiles have changed.
	c.set("shop", nil)
	s.Renew()
	until("another token", func(u identity.Update) bool { return app(u) == "shop" && u.Credential.SVID == first.SVID })

	// Its bundles have: at once, and with the token that there is.
	wider := &identity.Credential{SVID: first.SVID, Bundles: ca.bundles()}
	from <- identity.Update{Credential: wider}
	until("the bundles", func(u identity.Update) bool { return u.Credential.Bundles == wider.Bundles && app(u) == "shop" })

	// The controller is away while the SVID rotates: the one before stays, with its token.
	away := errors.New("away")
	c.set("", away)
	second := ca.credential(time.Hour, false)
	from <- identity.Update{Credential: second}
	u = until("word of the failure", func(u identity.Update) bool { return errors.Is(u.Err, away) })
	if u.Credential.SVID != first.SVID || app(u) != "shop" || u.Credential.Bundles != second.Bundles {
		t.Errorf("held %v", u.Credential)
	}
	// A controller that was restarted knows other nonces, and that is no failure.
	c.mu.Lock()
	c.app, c.err, c.once = "late", nil, []byte("another")
	c.mu.Unlock()
	until("the new one", func(u identity.Update) bool {
		return u.Credential.SVID == second.SVID && app(u) == "late" && u.Err == nil
	})

	// But not past its end, nor past a root that is withdrawn.
	c.set("", away)
	other := newSite(t)
	third := other.credential(time.Hour, false)
	from <- identity.Update{Credential: third}
	u = until("one without a token", func(u identity.Update) bool { return u.Credential.SVID == third.SVID })
	if app(u) != "" || u.Credential.Token != nil {
		t.Errorf("%v, %v", app(u), u.Err)
	}

	// An SVID that carries claims needs none, whatever is in them.
	c.mu.Lock()
	before := c.n
	c.err = nil
	c.mu.Unlock()
	extended := other.credential(time.Hour, true)
	from <- identity.Update{Credential: extended}
	u = until("the extension", func(u identity.Update) bool { return u.Credential.SVID == extended.SVID })
	if u.Credential != extended || u.Err != nil {
		t.Errorf("%v, %v", u.Credential, u.Err)
	}
	if c.mu.Lock(); c.n > before+1 { // one may have been under way
		t.Errorf("%d tokens for an SVID with claims", c.n-before)
	}
	c.mu.Unlock()

	// What is withdrawn is withdrawn, token or not.
	from <- identity.Update{Credential: first, Err: identity.ErrWithdrawn}
	until("the withdrawal", func(u identity.Update) bool {
		return errors.Is(u.Err, identity.ErrWithdrawn) && u.Credential.Token == nil
	})
	cancel()
	for range updates {
	}
}

// Who answers with another's token is not believed.
func TestSourceChecksTheAnswer(t *testing.T) {
	c := &controller{t: t, key: newKey(t), app: "web", once: []byte("nonce")}
	v := NewVerifier()
	if err := v.Set(acme, announced(t, newKey(t))); err != nil {
		t.Fatal(err)
	}
	from, ca := make(svids), newSite(t)
	ctx, cancel := context.WithCancel(t.Context())
	updates := NewSource(from, c, v).Watch(ctx, &identity.Workload{})
	from <- identity.Update{Credential: ca.credential(time.Hour, false)}
	if u := <-updates; !errors.Is(u.Err, ErrInvalid) || u.Credential.Token != nil {
		t.Errorf("%v, %v", u.Credential, u.Err)
	}
	cancel()
	for range updates {
	}
}
