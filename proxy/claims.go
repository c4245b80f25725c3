package proxy

import (
	"crypto/x509"
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/token"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/policydb"
)

// What is known of the two ends of a connection, and on whose word: the certificate's
// extension, else a token of the controller's, else Profiles by the SPIFFE ID. The order
// is strict: where one has spoken, those behind it are not asked.

// known is the workload as policy in force sees it.
func (w *party) known(c *policydb.Compiled) *identity.Principal {
	p := w.sees(c, w.principal())
	if ns := w.namespace(c); ns != p.Namespace {
		moved := *p
		moved.Namespace = ns
		p = &moved
	}
	return p
}

func (w *party) endpoint(c *policydb.Compiled) policydb.Endpoint { return endpointOf(w.known(c)) }

// sees is a peer with what policy tells w of it.
func (w *party) sees(c *policydb.Compiled, peer *identity.Principal) *identity.Principal {
	if c == nil {
		return peer
	}
	own := w.principal()
	return c.About(peer, w.namespace(c), own.ID.TrustDomain())
}

func endpointOf(p *identity.Principal) policydb.Endpoint {
	return policydb.Endpoint{Namespace: p.Namespace, Attributes: p.Attributes}
}

// admitPeer is asked on every handshake, on resumed ones too.
func (p *Proxy) admitPeer(local *identity.Credential, _ *x509.Certificate, peer *mtls.Peer) error {
	if err := p.refuseRevokedPeer(local, peer); err != nil {
		return err
	}
	if c := p.policy.Load(); c != nil {
		return p.checkClaims(c, local.SVID.ID.TrustDomain(), &peer.Principal)
	}
	return nil // nothing is allowed then
}

// checkClaims refuses a foreign certificate that claims what no TrustDomain lets it
// claim. Foreign is what is neither of the local workload's trust domain nor of the
// controller's, whose policy this is anyway.
func (p *Proxy) checkClaims(c *policydb.Compiled, local spiffeid.TrustDomain, peer *identity.Principal) error {
	td := peer.ID.TrustDomain()
	if peer.Issuer != identity.FromExtension || td == local || td == p.controllerDomain() {
		return nil
	}
	for key := range peer.Attributes.Keys() {
		if !strings.HasPrefix(key, "spiffe.") && !c.ClaimAllowed(td.Name(), key) {
			return deny(symbolonv1.Reason_REASON_CLAIM_NOT_ALLOWED,
				fmt.Errorf("%s claims %q, and no TrustDomain %s allows it that", peer.ID, clip(key), td))
		}
	}
	return nil
}

// controllerDomain is the trust domain that this host is enrolled in; zero: not known.
func (p *Proxy) controllerDomain() spiffeid.TrustDomain {
	if e := p.hostEnd.Load(); e != nil {
		return e.Credential().SVID.ID.TrustDomain()
	}
	return spiffeid.TrustDomain{}
}

// shown is who has opened a tunnel, by its certificate, or by the token in m, Open or
// Control, where the certificate says nothing. A token that is not good refuses: to go on without it
// would be to judge by less than the client meant to show.
func (p *Proxy) shown(peer *mtls.Peer, m interface{ GetToken() string }) (*identity.Principal, error) {
	if peer.Issuer != identity.FromNobody || m.GetToken() == "" {
		return &peer.Principal, nil
	}
	out, err := p.tokens.Verify(m.GetToken(), &peer.Principal, peer.Leaf, p.now())
	if err != nil {
		return nil, deny(tokenReason(err), fmt.Errorf("the client's token: %w", err))
	}
	return out, nil
}

func tokenReason(err error) symbolonv1.Reason {
	switch {
	case errors.Is(err, token.ErrExpired):
		return symbolonv1.Reason_REASON_TOKEN_EXPIRED
	case errors.Is(err, token.ErrWrongKey):
		return symbolonv1.Reason_REASON_TOKEN_WRONG_KEY
	case errors.Is(err, token.ErrWrongSubject):
		return symbolonv1.Reason_REASON_TOKEN_WRONG_SUBJECT
	}
	return symbolonv1.Reason_REASON_TOKEN_INVALID
}

// tokenFor is the token that goes into Open; "" for none. It stays within the trust
// domain: elsewhere another controller's may be wanted, and this one's would refuse us.
func (p *Proxy) tokenFor(c *identity.Credential, server *identity.Principal) string {
	t := c.Token
	if t == nil || c.SVID.Issuer != identity.FromNobody || past(t.NotAfter, p.now()) || !server.ID.MemberOf(c.SVID.ID.TrustDomain()) {
		return ""
	}
	return t.Compact
}

// SetTokenKeys replaces the keys that tokens are believed by, and the trust domain whose
// controller has them.
func (p *Proxy) SetTokenKeys(controller spiffeid.TrustDomain, keys []*symbolonv1.TokenKey) error {
	return p.tokens.Set(controller, keys)
}

// unexplained gives a denial by default its better reason, where nothing but its ID
// is known of the peer: no policy could have spoken of it.
func unexplained(d policydb.Decision, peer *identity.Principal) policydb.Decision {
	if !d.Allow && d.Reason == symbolonv1.Reason_REASON_DEFAULT && peer.Issuer == identity.FromNobody {
		d.Reason = symbolonv1.Reason_REASON_NO_CLAIMS
	}
	return d
}
