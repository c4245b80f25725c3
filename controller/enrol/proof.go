package enrol

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

const (
	// exporterLabel names the keying material that a proof is made over.
	exporterLabel = "EXPORTER-symbolon-enrolment"
	// proofContext keeps a proof from being a signature for anything else, and anything
	// else from being one: the form is that of TLS 1.3's CertificateVerify (RFC 8446,
	// section 4.4.3), under a name of its own.
	proofContext = "symbolon enrolment x509pop v1"
	bindingSize  = 32

	minRSA, maxRSA = 2048, 8192
)

var (
	// ErrProof: the certificate's key did not sign for this connection.
	ErrProof = errors.New("the certificate's key is not proven on this connection")
	// ErrKey: a kind of key that does not count.
	ErrKey = fmt.Errorf("the key is none of ECDSA P-256, P-384, P-521, Ed25519, RSA of %d to %d bits", minRSA, maxRSA)
)

// binding is a value that nobody but the two ends of one TLS connection knows, and that
// neither can choose: nonce and channel in one. It is another for each request, and each
// label.
func binding(state tls.ConnectionState, label string, csr []byte) ([]byte, error) {
	context := sha256.Sum256(csr)
	b, err := state.ExportKeyingMaterial(label, context[:], bindingSize)
	if err != nil {
		return nil, fmt.Errorf("exported keying material: %w", err)
	}
	return b, nil
}

func proofText(binding []byte) []byte {
	return append([]byte(strings.Repeat(" ", 64)+proofContext+"\x00"), binding...)
}

// prove signs for a connection. The certificate's key stays where it is.
func prove(state tls.ConnectionState, csr []byte, cert tls.Certificate) (*symbolonv1.X509Proof, error) {
	b, err := binding(state, exporterLabel, csr)
	if err != nil {
		return nil, err
	}
	signer, ok := cert.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, ErrKey
	}
	algorithm, hash, err := algorithmOf(signer.Public())
	if err != nil {
		return nil, err
	}
	text := proofText(b)
	if hash != 0 {
		h := hash.New()
		h.Write(text)
		text = h.Sum(nil)
	}
	var opts crypto.SignerOpts = hash
	if algorithm == x509.SHA256WithRSAPSS {
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: hash}
	}
	signature, err := signer.Sign(rand.Reader, text, opts)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	return &symbolonv1.X509Proof{Chain: cert.Certificate, Signature: signature}, nil
}

// CheckProof tells whether leaf's key signed for the connection and the request.
// Errors: ErrProof, ErrKey.
func CheckProof(state *tls.ConnectionState, csr []byte, leaf *x509.Certificate, signature []byte) error {
	if state == nil {
		return ErrProof
	}
	algorithm, _, err := algorithmOf(leaf.PublicKey)
	if err != nil {
		return err
	}
	b, err := binding(*state, exporterLabel, csr)
	if err != nil {
		return err
	}
	if leaf.CheckSignature(algorithm, proofText(b), signature) != nil {
		return ErrProof
	}
	return nil
}

// CheckKey tells whether a key may be part of a proof, or of a chain above one.
// Errors: ErrKey.
func CheckKey(key crypto.PublicKey) error {
	_, _, err := algorithmOf(key)
	return err
}

// algorithmOf is the one signature scheme of a key: nothing is negotiated.
func algorithmOf(key crypto.PublicKey) (x509.SignatureAlgorithm, crypto.Hash, error) {
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256():
			return x509.ECDSAWithSHA256, crypto.SHA256, nil
		case elliptic.P384():
			return x509.ECDSAWithSHA384, crypto.SHA384, nil
		case elliptic.P521():
			return x509.ECDSAWithSHA512, crypto.SHA512, nil
		}
	case *rsa.PublicKey:
		if n := key.N.BitLen(); n >= minRSA && n <= maxRSA {
			return x509.SHA256WithRSAPSS, crypto.SHA256, nil
		}
	case ed25519.PublicKey:
		return x509.PureEd25519, 0, nil
	}
	return 0, 0, ErrKey
}
