package identity

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ReservedPath is the first path element of the IDs that are not workloads':
// hosts and controllers. No namespace may have this name.
const ReservedPath = "symbolon"

var (
	// ErrMalformedSVID: the certificate is not an X.509-SVID of a workload's form.
	ErrMalformedSVID = errors.New("malformed X.509-SVID")
	// ErrNotWorkload: a valid ID, of a host or a controller.
	ErrNotWorkload = errors.New("not a workload's SPIFFE ID")
	// ErrMalformedClaims: the claims extension does not parse.
	ErrMalformedClaims = errors.New("malformed claims extension")
)

// Issuer says whose word a workload's attributes are, as records have it. There is
// one at a time: what several say of a workload is never mixed.
type Issuer string

const (
	// FromNobody: nothing is known but the ID.
	FromNobody Issuer = ""
	// FromExtension: the CA's that signed the certificate, in the claims extension. An
	// extension that is there counts, also if it holds no claim.
	FromExtension Issuer = "extension"
	// FromToken: the controller's, in a token bound to the certificate's key.
	FromToken Issuer = "token"
	// FromPolicy: Profiles', by the SPIFFE ID.
	FromPolicy Issuer = "policy"
)

// Principal is a workload with a proven name.
type Principal struct {
	ID spiffeid.ID
	// Namespace and Name are the two halves of the ID's path: "/acme/prod", "web".
	Namespace, Name string
	// Attributes are the claims, and spiffe.id and spiffe.trust_domain.
	Attributes Attributes
	// Issuer is whose word the claims are.
	Issuer Issuer
}

// With is the same workload with the claims of another issuer in place of what it had.
// As ever, spiffe.* comes from the ID.
func (p *Principal) With(claims Attributes, from Issuer) *Principal {
	out := *p
	out.Attributes, out.Issuer = attributesOf(p.ID, claims), from
	return &out
}

// PrincipalOf reads a workload's name and claims from a leaf certificate. The
// caller has verified the chain; nothing is ever read from another certificate.
// Errors: ErrMalformedSVID, ErrNotWorkload, ErrMalformedClaims.
func PrincipalOf(leaf *x509.Certificate) (Principal, error) {
	id, err := idOf(leaf)
	if err != nil {
		return Principal{}, err
	}
	claims, found, err := claimsOf(leaf)
	if err != nil {
		return Principal{}, err
	}
	p, err := NewPrincipal(id, claims)
	if err == nil && found {
		p.Issuer = FromExtension
	}
	return p, err
}

// maxID is the length of a SPIFFE ID, in bytes, that everybody must support and
// nobody should exceed (SPIFFE-ID, section 2.3).
const maxID = 2048

// idOf is the one SPIFFE ID of a leaf. Errors: ErrMalformedSVID.
func idOf(leaf *x509.Certificate) (spiffeid.ID, error) {
	if len(leaf.URIs) != 1 {
		return spiffeid.ID{}, fmt.Errorf("%w: %d URI SANs, want exactly one", ErrMalformedSVID, len(leaf.URIs))
	}
	if n := len(leaf.URIs[0].String()); n > maxID {
		return spiffeid.ID{}, fmt.Errorf("%w: a SPIFFE ID of %d bytes, at most %d", ErrMalformedSVID, n, maxID)
	}
	id, err := spiffeid.FromURI(leaf.URIs[0])
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("%w: %w", ErrMalformedSVID, err)
	}
	return id, nil
}

// NewPrincipal splits the ID's path and adds what derives from it to the claims.
// Errors: ErrNotWorkload.
func NewPrincipal(id spiffeid.ID, claims Attributes) (Principal, error) {
	path := id.Path()
	i := strings.LastIndexByte(path, '/')
	if i < 0 || path[i+1:] == "" {
		return Principal{}, fmt.Errorf("%w: %s has no path", ErrNotWorkload, id)
	}
	if path == "/"+ReservedPath || strings.HasPrefix(path, "/"+ReservedPath+"/") {
		return Principal{}, fmt.Errorf("%w: %s", ErrNotWorkload, id)
	}
	ns := path[:i]
	if ns == "" {
		ns = "/"
	}
	return Principal{ID: id, Namespace: ns, Name: path[i+1:], Attributes: attributesOf(id, claims)}, nil
}

// attributesOf adds what derives from the ID. A claim cannot speak for the certificate
// it stands in.
func attributesOf(id spiffeid.ID, claims Attributes) Attributes {
	claims = claims.Filter(func(k string) bool { return !strings.HasPrefix(k, "spiffe.") })
	return claims.Union(Attributes{
		{"spiffe.id", id.String()},
		{"spiffe.trust_domain", id.TrustDomain().Name()},
	})
}

// SVID is a workload's certificate with its key, which exists only in memory: an
// SVID prints and encodes as its ID and its end (see redact.go). Immutable.
type SVID struct {
	Principal
	// Chain, leaf first, without the root.
	Chain []*x509.Certificate
	Key   crypto.Signer `json:"-" yaml:"-"`
	// TLS is the same in crypto/tls's form, made once.
	TLS *tls.Certificate `json:"-" yaml:"-"`
}

// NewSVID checks that the leaf is a workload's.
func NewSVID(chain []*x509.Certificate, key crypto.Signer) (*SVID, error) {
	if len(chain) == 0 {
		return nil, fmt.Errorf("%w: empty chain", ErrMalformedSVID)
	}
	p, err := PrincipalOf(chain[0])
	if err != nil {
		return nil, err
	}
	return newSVID(p, chain, key), nil
}

// NewHostSVID is for a host's own certificate. A peer takes nothing but a refusal
// from it; Namespace, Name and Attributes are empty.
func NewHostSVID(chain []*x509.Certificate, key crypto.Signer) (*SVID, error) {
	if len(chain) == 0 {
		return nil, fmt.Errorf("%w: empty chain", ErrMalformedSVID)
	}
	id, err := idOf(chain[0])
	if err != nil {
		return nil, err
	}
	if !IsHost(id) {
		return nil, fmt.Errorf("%w: %s is not a host's", ErrMalformedSVID, id)
	}
	return newSVID(Principal{ID: id}, chain, key), nil
}

// IsHost tells whether id has the form of an enrolled host's:
// spiffe://<trust domain>/symbolon/host/<host id>.
func IsHost(id spiffeid.ID) bool {
	return strings.HasPrefix(id.Path(), "/"+ReservedPath+"/host/")
}

func newSVID(p Principal, chain []*x509.Certificate, key crypto.Signer) *SVID {
	t := &tls.Certificate{PrivateKey: key, Leaf: chain[0]}
	for _, c := range chain {
		t.Certificate = append(t.Certificate, c.Raw)
	}
	return &SVID{Principal: p, Chain: chain, Key: key, TLS: t}
}

// NotAfter is the end of the leaf's validity.
func (s *SVID) NotAfter() time.Time { return s.Chain[0].NotAfter }

// Serial is the leaf's serial number.
func (s *SVID) Serial() Serial { return SerialOf(s.Chain[0]) }

// Credential is what a workload brings to a handshake: its SVID, and the bundles
// by which it judges others. Immutable; a newer one replaces it.
type Credential struct {
	SVID    *SVID
	Bundles *x509bundle.Set
	// Token says what the SVID does not, if it carries no claims; nil: there is none.
	Token *Token
}

// Token is the controller's word on a workload whose SVID is of another CA, bound to
// the SVID's key (package identity/token). Immutable.
type Token struct {
	// Compact is the JWS, as it goes into Open, until NotAfter.
	Compact  string
	NotAfter time.Time
	// Principal is the workload with the token's claims.
	Principal *Principal
}

// Principal is the workload, as well as its credential says: by the extension of its
// SVID, else by its token, also one that has expired: what the controller said last
// holds here until it says something else, or the SVID ends.
func (c *Credential) Principal() *Principal {
	if c.Token != nil && c.SVID.Issuer == FromNobody {
		return c.Token.Principal
	}
	return &c.SVID.Principal
}
