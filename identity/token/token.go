// Package token is the controller's word on a workload whose X.509-SVID another CA has
// signed: a JWT with the workload's claims, bound to the SVID's key (RFC 7800, "jkt" as
// in RFC 9449), that the workload's proxy shows in Open.
//
// It is no bearer token. Who shows it must have proved in the handshake to hold the key
// that it names, for the SPIFFE ID that it names, so there is no harm in others seeing
// it. Its form, a compact JWS:
//
//	header   {"alg": "ES256", "typ": "symbolon-claims+jwt", "kid": thumbprint of the signing key}
//	payload  {"sub": SPIFFE ID, "aud": the controller's trust domain, "iat", "exp": seconds,
//	          "cnf": {"jkt": RFC 7638 thumbprint of the SVID's key}, "claims": {key: [value...]}}
//
// A token is valid for an hour at most, and has to be valid when a connection opens;
// what is open by then goes on under what was said, until the SVID ends.
package token

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/identity"
)

const (
	// Type is the JWS header's typ: no other token of the same key passes for one.
	Type = "symbolon-claims+jwt"
	// MaxSize bounds a token, bytes: with it, Open stays below its 16 KiB. The 4 KiB of
	// claims that an SVID may carry fit in, whatever printable characters are in them.
	MaxSize = 12 << 10
	// MaxLife is how long a token is valid at most.
	MaxLife = time.Hour
	// leeway is how far the clocks of controller and hosts may be apart.
	leeway = time.Minute
)

var (
	// ErrInvalid: it does not parse, or none of the keys has signed it.
	ErrInvalid = errors.New("token invalid")
	// ErrExpired: not, or no longer, valid.
	ErrExpired = errors.New("token not valid at this time")
	// ErrWrongKey: bound to another key than the certificate's.
	ErrWrongKey = errors.New("token bound to another key")
	// ErrWrongSubject: of another workload, or for another trust domain's hosts.
	ErrWrongSubject = errors.New("token of another subject")
)

// Statement is what a token says.
type Statement struct {
	Subject  spiffeid.ID
	Audience spiffeid.TrustDomain
	// Thumbprint is that of the SVID's key.
	Thumbprint       string
	IssuedAt, Expiry time.Time // in whole seconds
	Claims           identity.Attributes
}

// payload is the form outside.
type payload struct {
	Subject  string              `json:"sub"`
	Audience string              `json:"aud"`
	IssuedAt int64               `json:"iat"`
	Expiry   int64               `json:"exp"`
	Confirm  confirm             `json:"cnf"`
	Claims   map[string][]string `json:"claims"`
}

type confirm struct {
	Thumbprint string `json:"jkt"`
}

// Thumbprint is a public key's RFC 7638 thumbprint, SHA-256 in base64url: what "jkt" and
// "kid" are. Errors: a kind of key that has no JWK form.
func Thumbprint(pub crypto.PublicKey) (string, error) {
	sum, err := (&jose.JSONWebKey{Key: pub}).Thumbprint(crypto.SHA256)
	if err != nil {
		return "", fmt.Errorf("thumbprint of a %T: %w", pub, err)
	}
	return base64.RawURLEncoding.EncodeToString(sum), nil
}

// Sign makes a token. key is ECDSA P-256. Errors: ErrInvalid, for what no verifier
// would take: too many claims, or too large ones.
func Sign(key *ecdsa.PrivateKey, s *Statement) (string, error) {
	id, err := Thumbprint(key.Public())
	if err != nil {
		return "", err
	}
	if err := checkClaims(s.Claims); err != nil {
		return "", err
	}
	p := payload{
		Subject: s.Subject.String(), Audience: s.Audience.Name(), IssuedAt: s.IssuedAt.Unix(), Expiry: s.Expiry.Unix(),
		Confirm: confirm{s.Thumbprint}, Claims: make(map[string][]string),
	}
	for _, c := range s.Claims {
		p.Claims[c.Key] = append(p.Claims[c.Key], c.Value)
	}
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false) // it would make six characters of one
	if err := enc.Encode(p); err != nil {
		return "", fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: id}},
		(&jose.SignerOptions{}).WithType(Type))
	if err != nil {
		return "", fmt.Errorf("token: %w", err)
	}
	jws, err := signer.Sign([]byte(strings.TrimSuffix(b.String(), "\n")))
	if err != nil {
		return "", fmt.Errorf("token: %w", err)
	}
	compact, err := jws.CompactSerialize()
	if err != nil {
		return "", fmt.Errorf("token: %w", err)
	}
	if len(compact) > MaxSize {
		return "", fmt.Errorf("%w: %d bytes, at most %d", ErrInvalid, len(compact), MaxSize)
	}
	return compact, nil
}

// checkClaims holds a token to the bounds of the claims extension.
func checkClaims(claims identity.Attributes) error {
	if _, err := identity.MarshalClaims(claims); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return nil
}

// open checks form and signature, and nothing that depends on who shows the token when.
// Errors: ErrInvalid.
func open(compact string, keys map[string]*ecdsa.PublicKey) (*Statement, error) {
	if len(compact) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrInvalid, len(compact), MaxSize)
	}
	jws, err := jose.ParseSignedCompact(compact, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil || len(jws.Signatures) != 1 {
		return nil, fmt.Errorf("%w: not a compact JWS by ES256", ErrInvalid) // the cause may quote it
	}
	header := jws.Signatures[0].Protected
	if typ, _ := header.ExtraHeaders[jose.HeaderType].(string); typ != Type {
		return nil, fmt.Errorf("%w: its type is not %s", ErrInvalid, Type)
	}
	key := keys[header.KeyID]
	if key == nil {
		return nil, fmt.Errorf("%w: signed by a key that the controller has not announced", ErrInvalid)
	}
	body, err := jws.Verify(key)
	if err != nil {
		return nil, fmt.Errorf("%w: the signature is not the controller's", ErrInvalid)
	}
	return parse(body)
}

// parse reads a payload. Errors: ErrInvalid.
func parse(body []byte) (*Statement, error) {
	var p payload
	if err := json.Unmarshal(body, &p); err != nil {
		return nil, fmt.Errorf("%w: the payload is no JSON of its form", ErrInvalid)
	}
	s := &Statement{Thumbprint: p.Confirm.Thumbprint, Claims: identity.NewAttributes(p.Claims)}
	var err error
	if s.Subject, err = spiffeid.FromString(p.Subject); err != nil {
		return nil, fmt.Errorf("%w: the subject is no SPIFFE ID", ErrInvalid)
	}
	if s.Audience, err = spiffeid.TrustDomainFromString(p.Audience); err != nil {
		return nil, fmt.Errorf("%w: the audience is no trust domain", ErrInvalid)
	}
	if s.Thumbprint == "" {
		return nil, fmt.Errorf("%w: bound to no key", ErrInvalid)
	}
	s.IssuedAt, s.Expiry = time.Unix(p.IssuedAt, 0), time.Unix(p.Expiry, 0)
	if life := p.Expiry - p.IssuedAt; life <= 0 || life > int64((MaxLife+leeway)/time.Second) {
		return nil, fmt.Errorf("%w: a life of %d seconds", ErrInvalid, life)
	}
	return s, checkClaims(s.Claims)
}

// check holds a statement against who shows it: the verified leaf of id.
func (s *Statement) check(id spiffeid.ID, leaf *x509.Certificate, audience spiffeid.TrustDomain, now time.Time) error {
	if s.Audience != audience {
		return fmt.Errorf("%w: for the hosts of %s, not of %s", ErrWrongSubject, s.Audience, audience)
	}
	if s.Subject != id {
		return fmt.Errorf("%w: %s", ErrWrongSubject, s.Subject)
	}
	if got, err := Thumbprint(leaf.PublicKey); err != nil || got != s.Thumbprint {
		return ErrWrongKey
	}
	if now.Before(s.IssuedAt.Add(-leeway)) || !now.Before(s.Expiry) {
		return fmt.Errorf("%w: from %s to %s", ErrExpired, s.IssuedAt.UTC().Format(time.RFC3339), s.Expiry.UTC().Format(time.RFC3339))
	}
	return nil
}
