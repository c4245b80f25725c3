package mtls

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"

	"golang.org/x/crypto/cryptobyte"
)

// Exported Authenticators, RFC 9261: a certificate that is shown inside a TLS connection
// which began with another one, and is bound to it by the connection's exporter. Each
// answers a request, whose context is fresh, so that none can be played again.

// ErrAuthenticator: the peer's authenticator does not prove what it is to prove.
var ErrAuthenticator = errors.New("authenticator does not verify")

const (
	msgCertificate              = 11
	msgCertificateRequest       = 13 // a server's request
	msgCertificateVerify        = 15
	msgClientCertificateRequest = 17 // a client's
	msgFinished                 = 20

	extSignatureAlgorithms = 13

	// requestContext is the size of what is fresh in a request, bytes.
	requestContext = 32
	// maxPresented is how many certificates an authenticator may carry; identity has the
	// last word on chains.
	maxPresented = 16
)

// signatureSchemes are what an SVID's key may sign with, as in the handshake.
var signatureSchemes = []tls.SignatureScheme{
	tls.ECDSAWithP256AndSHA256, tls.Ed25519, tls.ECDSAWithP384AndSHA384, tls.ECDSAWithP521AndSHA512,
	tls.PSSWithSHA256, tls.PSSWithSHA384, tls.PSSWithSHA512,
}

// exporter is ConnectionState.ExportKeyingMaterial of the connection.
type exporter func(label string, context []byte, length int) ([]byte, error)

// exported is what binds one side's authenticators to the connection.
type exported struct{ context, finished []byte }

// hashSize is that of the hash of TLS_AES_256_GCM_SHA384, without which there is no
// tunnel.
const hashSize = sha512.Size384

// of derives the secrets of what the client, or else the server, presents.
func (e exporter) of(client bool) (x exported, err error) {
	who := "server"
	if client {
		who = "client"
	}
	if x.context, err = e("EXPORTER-"+who+" authenticator handshake context", nil, hashSize); err == nil {
		x.finished, err = e("EXPORTER-"+who+" authenticator finished key", nil, hashSize)
	}
	return x, err
}

// newRequest is an authenticator request, RFC 9261 section 4, of a client or a server.
func newRequest(client bool) []byte {
	b := cryptobyte.NewBuilder(make([]byte, 0, 96))
	b.AddUint8(requestType(client))
	b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) {
		b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) {
			var fresh [requestContext]byte
			rand.Read(fresh[:]) // never fails
			b.AddBytes(fresh[:])
		})
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			b.AddUint16(extSignatureAlgorithms)
			b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
				b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
					for _, s := range signatureSchemes {
						b.AddUint16(uint16(s))
					}
				})
			})
		})
	})
	return b.BytesOrPanic()
}

func requestType(client bool) uint8 {
	if client {
		return msgClientCertificateRequest
	}
	return msgCertificateRequest
}

// parseRequest reads a request of the client's, or else of the server's.
// Errors: ErrProtocol.
func parseRequest(request []byte, client bool) (context []byte, schemes []tls.SignatureScheme, err error) {
	malformed := fmt.Errorf("%w: malformed authenticator request", ErrProtocol)
	s := cryptobyte.String(request)
	var kind uint8
	var body, fresh, extensions cryptobyte.String
	if !s.ReadUint8(&kind) || kind != requestType(client) || !s.ReadUint24LengthPrefixed(&body) || !s.Empty() ||
		!body.ReadUint8LengthPrefixed(&fresh) || !body.ReadUint16LengthPrefixed(&extensions) || !body.Empty() {
		return nil, nil, malformed
	}
	for !extensions.Empty() {
		var id uint16
		var data, list cryptobyte.String
		if !extensions.ReadUint16(&id) || !extensions.ReadUint16LengthPrefixed(&data) {
			return nil, nil, malformed
		}
		if id != extSignatureAlgorithms {
			continue
		}
		if schemes != nil || !data.ReadUint16LengthPrefixed(&list) || !data.Empty() {
			return nil, nil, malformed
		}
		for !list.Empty() {
			var scheme uint16
			if !list.ReadUint16(&scheme) {
				return nil, nil, malformed
			}
			schemes = append(schemes, tls.SignatureScheme(scheme))
		}
	}
	if len(schemes) == 0 {
		return nil, nil, malformed
	}
	return fresh, schemes, nil
}

// authenticate answers a request, of the other side's, with c: Certificate,
// CertificateVerify and Finished. Errors: ErrProtocol, that of c's key.
func authenticate(x exported, request []byte, client bool, c *tls.Certificate) ([]byte, error) {
	context, schemes, err := parseRequest(request, !client)
	if err != nil {
		return nil, err
	}
	key, ok := c.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, errors.New("the certificate's key does not sign")
	}
	scheme, err := schemeFor(key.Public(), schemes)
	if err != nil {
		return nil, err
	}
	b := cryptobyte.NewBuilder(nil)
	b.AddUint8(msgCertificate)
	b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) {
		b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(context) })
		b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) {
			for _, der := range c.Certificate {
				b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(der) })
				b.AddUint16(0) // no extensions
			}
		})
	})
	certificate, err := b.Bytes()
	if err != nil {
		return nil, err
	}
	signature, err := signWith(key, scheme, signed(x.transcript(request, certificate)))
	if err != nil {
		return nil, fmt.Errorf("signing an authenticator: %w", err)
	}
	b = cryptobyte.NewBuilder(nil)
	b.AddUint8(msgCertificateVerify)
	b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) {
		b.AddUint16(uint16(scheme))
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(signature) })
	})
	verify, err := b.Bytes()
	if err != nil {
		return nil, err
	}
	b = cryptobyte.NewBuilder(append(certificate, verify...))
	b.AddUint8(msgFinished)
	b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(x.mac(request, certificate, verify)) })
	return b.Bytes()
}

// verifyAuthenticator checks that whoever is at the other end, the client or else the
// server, has the key of the certificates that it answers our request with. Who that
// is, and whether the chain is good, is another question.
// Errors: ErrAuthenticator.
func verifyAuthenticator(x exported, request []byte, client bool, authenticator []byte) ([]*x509.Certificate, error) {
	context, schemes, err := parseRequest(request, !client)
	if err != nil {
		return nil, err
	}
	s := cryptobyte.String(authenticator)
	certificate, body, ok := nextMessage(&s, msgCertificate)
	var fresh, list cryptobyte.String
	if !ok || !body.ReadUint8LengthPrefixed(&fresh) || !body.ReadUint24LengthPrefixed(&list) || !body.Empty() {
		return nil, malformedAuthenticator("certificate")
	}
	if !bytes.Equal(fresh, context) {
		return nil, fmt.Errorf("%w: it answers another request", ErrAuthenticator)
	}
	chain, err := parseList(list)
	if err != nil {
		return nil, err
	}
	verify, body, ok := nextMessage(&s, msgCertificateVerify)
	var scheme uint16
	var signature cryptobyte.String
	if !ok || !body.ReadUint16(&scheme) || !body.ReadUint16LengthPrefixed(&signature) || !body.Empty() {
		return nil, malformedAuthenticator("certificate verify")
	}
	_, mac, ok := nextMessage(&s, msgFinished)
	if !ok || !s.Empty() {
		return nil, malformedAuthenticator("finished")
	}
	// Cheap before dear: the finished key is the connection's.
	if !hmac.Equal(mac, x.mac(request, certificate, verify)) {
		return nil, fmt.Errorf("%w: it is not bound to this connection", ErrAuthenticator)
	}
	if _, err := schemeFor(chain[0].PublicKey, filter(schemes, tls.SignatureScheme(scheme))); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAuthenticator, err)
	}
	if !verifyWith(chain[0].PublicKey, tls.SignatureScheme(scheme), signed(x.transcript(request, certificate)), signature) {
		return nil, fmt.Errorf("%w: the certificate's key has not signed it", ErrAuthenticator)
	}
	return chain, nil
}

func malformedAuthenticator(what string) error {
	return fmt.Errorf("%w: malformed %s", ErrAuthenticator, what)
}

// nextMessage takes a handshake message of the kind from s: all of it, and its body.
func nextMessage(s *cryptobyte.String, kind uint8) (whole []byte, body cryptobyte.String, ok bool) {
	start := *s
	var k uint8
	ok = s.ReadUint8(&k) && k == kind && s.ReadUint24LengthPrefixed(&body)
	if !ok {
		return nil, nil, false
	}
	return start[:len(start)-len(*s)], body, true
}

// parseList reads the certificates of a Certificate message, leaf first.
func parseList(list cryptobyte.String) (chain []*x509.Certificate, err error) {
	for !list.Empty() {
		var der, extensions cryptobyte.String
		if !list.ReadUint24LengthPrefixed(&der) || !list.ReadUint16LengthPrefixed(&extensions) {
			return nil, malformedAuthenticator("certificate list")
		}
		if len(chain) == maxPresented {
			return nil, fmt.Errorf("%w: more than %d certificates", ErrAuthenticator, maxPresented)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrAuthenticator, err)
		}
		chain = append(chain, c)
	}
	if len(chain) == 0 {
		return nil, fmt.Errorf("%w: it has no certificate", ErrAuthenticator)
	}
	return chain, nil
}

// transcript is the hash that CertificateVerify signs, RFC 9261 section 5.2.2.
func (x exported) transcript(messages ...[]byte) []byte {
	h := sha512.New384()
	h.Write(x.context)
	for _, m := range messages {
		h.Write(m)
	}
	return h.Sum(nil)
}

// mac is what Finished carries, section 5.2.3.
func (x exported) mac(messages ...[]byte) []byte {
	h := hmac.New(sha512.New384, x.finished)
	h.Write(x.transcript(messages...))
	return h.Sum(nil)
}

// signed is what a signature covers: a transcript behind a prefix that no other use of
// the key has.
func signed(transcript []byte) []byte {
	b := bytes.Repeat([]byte{' '}, 64)
	b = append(append(b, "Exported Authenticator"...), 0)
	return append(b, transcript...)
}

func filter(offered []tls.SignatureScheme, s tls.SignatureScheme) []tls.SignatureScheme {
	for _, o := range offered {
		if o == s {
			return []tls.SignatureScheme{s}
		}
	}
	return nil
}

// schemeFor is the first of the offered schemes that is fit for the key, and ours.
func schemeFor(key crypto.PublicKey, offered []tls.SignatureScheme) (tls.SignatureScheme, error) {
	for _, s := range offered {
		if len(filter(signatureSchemes, s)) > 0 && fits(key, s) {
			return s, nil
		}
	}
	return 0, fmt.Errorf("no signature scheme for a key of type %T in common", key)
}

func fits(key crypto.PublicKey, s tls.SignatureScheme) bool {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		switch s {
		case tls.ECDSAWithP256AndSHA256:
			return k.Curve == elliptic.P256()
		case tls.ECDSAWithP384AndSHA384:
			return k.Curve == elliptic.P384()
		case tls.ECDSAWithP521AndSHA512:
			return k.Curve == elliptic.P521()
		}
	case ed25519.PublicKey:
		return s == tls.Ed25519
	case *rsa.PublicKey:
		// The salt is as long as the hash: hash, salt and two bytes must go in.
		return isPSS(s) && k.Size() >= 2*hashOf(s).Size()+2 && k.N.BitLen() <= maxRSA
	}
	return false
}

// maxRSA is crypto/tls's bound on keys that it verifies with, bits.
const maxRSA = 8192

func isPSS(s tls.SignatureScheme) bool {
	return s == tls.PSSWithSHA256 || s == tls.PSSWithSHA384 || s == tls.PSSWithSHA512
}

// hashOf is the scheme's hash; 0: it signs the message itself.
func hashOf(s tls.SignatureScheme) crypto.Hash {
	switch s {
	case tls.ECDSAWithP256AndSHA256, tls.PSSWithSHA256:
		return crypto.SHA256
	case tls.ECDSAWithP384AndSHA384, tls.PSSWithSHA384:
		return crypto.SHA384
	case tls.ECDSAWithP521AndSHA512, tls.PSSWithSHA512:
		return crypto.SHA512
	}
	return 0
}

func digest(s tls.SignatureScheme, m []byte) []byte {
	switch hashOf(s) {
	case crypto.SHA256:
		d := sha256.Sum256(m)
		return d[:]
	case crypto.SHA384:
		d := sha512.Sum384(m)
		return d[:]
	case crypto.SHA512:
		d := sha512.Sum512(m)
		return d[:]
	}
	return m
}

func signWith(key crypto.Signer, s tls.SignatureScheme, m []byte) ([]byte, error) {
	var o crypto.SignerOpts = hashOf(s)
	if isPSS(s) {
		o = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: hashOf(s)}
	}
	return key.Sign(rand.Reader, digest(s, m), o)
}

func verifyWith(key crypto.PublicKey, s tls.SignatureScheme, m, signature []byte) bool {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(k, digest(s, m), signature)
	case ed25519.PublicKey:
		return ed25519.Verify(k, m, signature)
	case *rsa.PublicKey:
		o := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}
		return rsa.VerifyPSS(k, hashOf(s), digest(s, m), signature, o) == nil
	}
	return false
}
