package token

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
)

// A host that asks for a token proves that it holds the SVID's key, or any host could
// have attributes of its own choice said of any certificate that it has ever been shown.
// It signs the controller's nonce, so that a proof cannot be had in advance, and the
// leaf; the text in front keeps the signature from meaning anything elsewhere (a TLS
// signature begins with spaces, a certificate with a SEQUENCE, a JWS with base64).

// ErrProof: the signature is not by the certificate's key, over this nonce.
var ErrProof = errors.New("no proof that the host holds the SVID's key")

// MaxNonce bounds a nonce, bytes.
const MaxNonce = 128

const proofContext = "symbolon/token-request/1\x00"

func proofText(nonce []byte, leaf *x509.Certificate) []byte {
	sum := sha256.Sum256(leaf.Raw)
	b := append([]byte(proofContext), byte(len(nonce)))
	return append(append(b, nonce...), sum[:]...)
}

// Prove signs for a request: by ECDSA or RSA-PSS over SHA-256, or Ed25519.
func Prove(key crypto.Signer, nonce []byte, leaf *x509.Certificate) ([]byte, error) {
	if len(nonce) == 0 || len(nonce) > MaxNonce {
		return nil, fmt.Errorf("a nonce of %d bytes", len(nonce))
	}
	text := proofText(nonce, leaf)
	if _, ok := key.Public().(ed25519.PublicKey); ok {
		return key.Sign(rand.Reader, text, crypto.Hash(0))
	}
	var opts crypto.SignerOpts = crypto.SHA256
	if _, ok := key.Public().(*rsa.PublicKey); ok {
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}
	}
	sum := sha256.Sum256(text)
	return key.Sign(rand.Reader, sum[:], opts)
}

// CheckProof is for the controller, which has verified leaf. Errors: ErrProof.
func CheckProof(leaf *x509.Certificate, nonce, signature []byte) error {
	if len(nonce) == 0 || len(nonce) > MaxNonce {
		return fmt.Errorf("%w: a nonce of %d bytes", ErrProof, len(nonce))
	}
	var by x509.SignatureAlgorithm
	switch leaf.PublicKey.(type) {
	case *ecdsa.PublicKey:
		by = x509.ECDSAWithSHA256
	case *rsa.PublicKey:
		by = x509.SHA256WithRSAPSS
	case ed25519.PublicKey:
		by = x509.PureEd25519
	default:
		return fmt.Errorf("%w: a %T", ErrProof, leaf.PublicKey)
	}
	if err := leaf.CheckSignature(by, proofText(nonce, leaf), signature); err != nil {
		return fmt.Errorf("%w: %w", ErrProof, err)
	}
	return nil
}
