// Package enrol is a host's way into a trust domain: it trades a join token for
// the host's SVID, and keeps that SVID.
//
// The controller is proven before anything is said to it: its chain must lead to
// the very root whose key hash the token carries, and its leaf must be the
// controller's. Only then is the token's secret sent. The host's private key is
// made here and never leaves.
package enrol

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

const (
	tokenPrefix = "symbolon1"
	// SecretSize is 256 bits.
	SecretSize = 32
	idSize     = 8
)

// ErrTokenMalformed: not of the form symbolon1.<id>.<secret>.<pin>.
var ErrTokenMalformed = errors.New("malformed join token")

// Token is a join token. It is a secret: String shows it without.
type Token struct {
	// ID names it in the controller's store: 16 hex digits.
	ID     string
	Secret [SecretSize]byte
	// Pin is the SHA-256 of the SubjectPublicKeyInfo of the trust domain's root.
	Pin [sha256.Size]byte
}

// NewToken makes one with random ID and secret for a root's pin.
func NewToken(pin [sha256.Size]byte) Token {
	t := Token{Pin: pin}
	var id [idSize]byte
	_, _ = rand.Read(id[:]) // never fails: crypto/rand
	_, _ = rand.Read(t.Secret[:])
	t.ID = hex.EncodeToString(id[:])
	return t
}

// ParseToken reads "symbolon1.<id>.<secret, base64url>.<pin, hex>"; white space
// around it, as files have it, is ignored. Errors, none of which shows the
// secret: ErrTokenMalformed.
func ParseToken(s string) (Token, error) {
	parts := strings.Split(strings.TrimSpace(s), ".")
	if len(parts) != 4 || parts[0] != tokenPrefix {
		return Token{}, fmt.Errorf("%w: want %s.<id>.<secret>.<pin>", ErrTokenMalformed, tokenPrefix)
	}
	t := Token{ID: parts[1]}
	if id, err := hex.DecodeString(t.ID); err != nil || len(id) != idSize || t.ID != strings.ToLower(t.ID) {
		return Token{}, fmt.Errorf("%w: the id is not %d hex digits", ErrTokenMalformed, 2*idSize)
	}
	secret, err := base64.RawURLEncoding.Strict().DecodeString(parts[2])
	if err != nil || len(secret) != SecretSize {
		return Token{}, fmt.Errorf("%w: the secret is not %d bytes of base64url", ErrTokenMalformed, SecretSize)
	}
	pin, err := hex.DecodeString(parts[3])
	if err != nil || len(pin) != sha256.Size || parts[3] != strings.ToLower(parts[3]) {
		return Token{}, fmt.Errorf("%w: the pin is not %d hex digits", ErrTokenMalformed, 2*sha256.Size)
	}
	t.Secret, t.Pin = [SecretSize]byte(secret), [sha256.Size]byte(pin)
	return t, nil
}

// Reveal is the inverse of ParseToken.
func (t Token) Reveal() string {
	return strings.Join([]string{
		tokenPrefix, t.ID, base64.RawURLEncoding.EncodeToString(t.Secret[:]), hex.EncodeToString(t.Pin[:]),
	}, ".")
}

// String is for logs: the id and the pin.
func (t Token) String() string {
	return strings.Join([]string{tokenPrefix, t.ID, "***", hex.EncodeToString(t.Pin[:])}, ".")
}

// GoString is String, so that %#v does not print the secret either.
func (t Token) GoString() string { return t.String() }
