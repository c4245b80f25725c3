package identity

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"unicode/utf8"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// The claims extension of an X.509-SVID's leaf, DER:
//
//	Claims  ::= SEQUENCE { version INTEGER (1), claims SEQUENCE OF Claim }
//	Claim   ::= SEQUENCE { key UTF8String, value UTF8String }
//
// sorted by key, then value, without duplicates. There is one encoding of a set
// of claims, and the decoder takes no other.
const (
	claimsVersion = 1

	// MaxClaims is how many key=value pairs an SVID carries at most.
	MaxClaims = 64
	// MaxClaimsSize bounds the extension's value, in bytes. QUIC handshakes fail
	// from about 16 KB of certificates on.
	MaxClaimsSize = 4096
)

// ClaimsOID names the extension: an arc under 2.25 (UUIDs, ITU-T X.667), which
// needs no registration. X.667 numbers have 128 bits and design.md allowed 63, but
// crypto/x509 refuses a whole certificate in which an OID component exceeds 31
// bits, so the number was drawn below 2^31.
var ClaimsOID = asn1.ObjectIdentifier{2, 25, 1165296520}

// MarshalClaims encodes claims as an extension, never critical: other SPIFFE
// software must be able to ignore it. Errors: ErrMalformedClaims, for what could
// not be read back (over the limits, an empty key, invalid UTF-8).
func MarshalClaims(claims Attributes) (pkix.Extension, error) {
	// Attributes can be written as a literal; only the canonical form is readable.
	claims = append(Attributes(nil), claims...).normalize()
	if len(claims) > MaxClaims {
		return pkix.Extension{}, fmt.Errorf("%w: %d claims, at most %d", ErrMalformedClaims, len(claims), MaxClaims)
	}
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(claimsVersion)
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			for _, c := range claims {
				b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
					addUTF8String(b, c.Key)
					addUTF8String(b, c.Value)
				})
			}
		})
	})
	for _, c := range claims {
		if err := checkClaim(c); err != nil {
			return pkix.Extension{}, err
		}
	}
	der, err := b.Bytes()
	if err != nil {
		return pkix.Extension{}, fmt.Errorf("%w: %w", ErrMalformedClaims, err)
	}
	if len(der) > MaxClaimsSize {
		return pkix.Extension{}, fmt.Errorf("%w: %d bytes, at most %d", ErrMalformedClaims, len(der), MaxClaimsSize)
	}
	return pkix.Extension{Id: ClaimsOID, Value: der}, nil
}

// ClaimsOf reads the claims of one certificate; nil if it has none. The caller
// has verified the certificate and knows it to be a leaf: claims elsewhere mean
// nothing. Errors: ErrMalformedClaims.
func ClaimsOf(leaf *x509.Certificate) (Attributes, error) {
	claims, _, err := claimsOf(leaf)
	return claims, err
}

// claimsOf also tells whether there is the extension: an empty one is a word, too.
func claimsOf(leaf *x509.Certificate) (_ Attributes, seen bool, err error) {
	var der []byte
	for _, e := range leaf.Extensions {
		if !e.Id.Equal(ClaimsOID) {
			continue
		}
		if seen {
			return nil, false, fmt.Errorf("%w: the extension occurs twice", ErrMalformedClaims)
		}
		if e.Critical {
			return nil, false, fmt.Errorf("%w: the extension is critical", ErrMalformedClaims)
		}
		seen, der = true, e.Value
	}
	if !seen {
		return nil, false, nil
	}
	claims, err := parseClaims(der)
	return claims, true, err
}

func parseClaims(der []byte) (Attributes, error) {
	if len(der) > MaxClaimsSize {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrMalformedClaims, len(der), MaxClaimsSize)
	}
	in := cryptobyte.String(der)
	var body, list cryptobyte.String
	var version int64
	if !in.ReadASN1(&body, cbasn1.SEQUENCE) || !in.Empty() || !body.ReadASN1Integer(&version) {
		return nil, fmt.Errorf("%w: not a versioned sequence", ErrMalformedClaims)
	}
	if version != claimsVersion {
		return nil, fmt.Errorf("%w: version %d, want %d", ErrMalformedClaims, version, claimsVersion)
	}
	if !body.ReadASN1(&list, cbasn1.SEQUENCE) || !body.Empty() {
		return nil, fmt.Errorf("%w: not a sequence of claims", ErrMalformedClaims)
	}
	var claims Attributes
	for !list.Empty() {
		if len(claims) == MaxClaims {
			return nil, fmt.Errorf("%w: more than %d claims", ErrMalformedClaims, MaxClaims)
		}
		var pair, key, value cryptobyte.String
		if !list.ReadASN1(&pair, cbasn1.SEQUENCE) ||
			!pair.ReadASN1(&key, cbasn1.UTF8String) ||
			!pair.ReadASN1(&value, cbasn1.UTF8String) || !pair.Empty() {
			return nil, fmt.Errorf("%w: claim %d is not a pair of UTF8Strings", ErrMalformedClaims, len(claims))
		}
		c := Attribute{string(key), string(value)}
		if err := checkClaim(c); err != nil {
			return nil, err
		}
		if n := len(claims); n > 0 && compareAttributes(claims[n-1], c) >= 0 {
			return nil, fmt.Errorf("%w: claim %d is out of order or repeated", ErrMalformedClaims, n)
		}
		claims = append(claims, c)
	}
	return claims, nil
}

func checkClaim(c Attribute) error {
	switch {
	case c.Key == "":
		return fmt.Errorf("%w: empty key", ErrMalformedClaims)
	case !utf8.ValidString(c.Key), !utf8.ValidString(c.Value):
		return fmt.Errorf("%w: claim %q is not UTF-8", ErrMalformedClaims, c.Key)
	}
	return nil
}

func addUTF8String(b *cryptobyte.Builder, s string) {
	b.AddASN1(cbasn1.UTF8String, func(b *cryptobyte.Builder) { b.AddBytes([]byte(s)) })
}
