package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/identity"
)

// ErrUpstream: the operator's own CA cannot be taken over.
var ErrUpstream = errors.New("ca: the operator's CA cannot be used")

const (
	// maxAbove bounds the operator's certificates, which every SVID carries but the root.
	maxAbove = 4
	minRSA   = 2048
)

// readUpstream reads the operator's CA: its certificate, those above it up to the root,
// and its key, which is sealed into the store and never read from the file again. keys
// is what the two are called in the configuration, without "_cert_file" and "_key_file".
// Errors: ErrUpstream.
func (c *CA) readUpstream(keys, certFile, keyFile string) (*signer, error) {
	certs, err := readCertificates(keys+"_cert_file", certFile)
	if err != nil {
		return nil, err
	}
	bad := func(format string, args ...any) (*signer, error) {
		return nil, fmt.Errorf("%w: %s: %s", ErrUpstream, certFile, fmt.Sprintf(format, args...))
	}
	if len(certs) > maxAbove {
		return bad("%d certificates, at most %d", len(certs), maxAbove)
	}
	for i, cert := range certs {
		if !cert.IsCA || !cert.BasicConstraintsValid || cert.KeyUsage != 0 && cert.KeyUsage&x509.KeyUsageCertSign == 0 {
			return bad("%q is no CA certificate", cert.Subject)
		}
		issuer := cert // the last one is the root
		if i+1 < len(certs) {
			issuer = certs[i+1]
		}
		if err := cert.CheckSignatureFrom(issuer); err != nil {
			return bad("%q is not signed by %q; put the CA first, then each issuer, a root that signs itself last", cert.Subject, issuer.Subject)
		}
	}
	key, err := readKey(keys+"_key_file", keyFile)
	if err != nil {
		return nil, err
	}
	if !sameKey(key.Public(), certs[0].PublicKey) {
		return nil, fmt.Errorf("%w: %s is not the key of %q, the first certificate in %s", ErrUpstream, keyFile, certs[0].Subject, certFile)
	}
	return &signer{cert: certs[0], key: key, above: certs[1:], trustDomain: c.cfg.TrustDomain.IDString()}, nil
}

func readCertificates(name, path string) (certs []*x509.Certificate, err error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrUpstream, name, err)
	}
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrUpstream, path, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("%w: %s: no PEM certificate in it", ErrUpstream, path)
	}
	return certs, nil
}

// readKey never says what is in the file.
func readKey(name, path string) (crypto.Signer, error) {
	bad := func(text string) (crypto.Signer, error) {
		return nil, fmt.Errorf("%w: %s: %s", ErrUpstream, path, text)
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrUpstream, name, err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return bad("others could read it; chmod 600 it")
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrUpstream, name, err)
	}
	defer clear(data)
	block, _ := pem.Decode(data)
	if block == nil {
		return bad("no PEM block in it")
	}
	defer clear(block.Bytes)
	var key any
	switch block.Type {
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	default:
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	}
	if err != nil {
		return bad("no private key that is not encrypted (PKCS#8, EC or RSA)")
	}
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return k, nil
		}
	case *rsa.PrivateKey:
		if k.N.BitLen() >= minRSA {
			return k, nil
		}
	case ed25519.PrivateKey:
		return k, nil
	}
	return bad("its key is of a kind that is not accepted; use ECDSA (P-256, P-384), Ed25519 or RSA (2048 bits or more)")
}

func sameKey(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// tryOut signs for a workload, and verifies as a peer would: what the operator's CA may
// not sign shows now, and not in every handshake.
func (c *CA) tryOut(root, intermediate *signer) error {
	if err := c.try(intermediate, root.presented(), root.root()); err != nil {
		return fmt.Errorf("%w: what %q signs for %s does not verify: %w; it needs room for one more CA below it (path length), no name constraint against URIs of that name, and to be valid now",
			ErrUpstream, root.cert.Subject, c.cfg.TrustDomain.IDString(), err)
	}
	return nil
}

// try verifies by root what intermediate signs, presented with above.
func (c *CA) try(intermediate *signer, above []*x509.Certificate, root *x509.Certificate) error {
	key, err := newKey()
	if err != nil {
		return err
	}
	t := c.leaf(spiffeid.RequireFromPath(c.cfg.TrustDomain, "/try/out"))
	leaf, err := create(t, intermediate.cert, key.Public(), intermediate.key)
	if err != nil {
		return err
	}
	chain := append([]*x509.Certificate{leaf, intermediate.cert}, above...)
	bundle := x509bundle.FromX509Authorities(c.cfg.TrustDomain, []*x509.Certificate{root})
	_, err = identity.VerifySVID(chain, bundle, c.cfg.Now())
	return err
}

// checkUpstream compares the CA in force with the one in the configuration, if that is
// still there to be looked at. It may also be one that was in force before.
func (c *CA) checkUpstream(inForce *signer, record rootRecord) error {
	if c.cfg.UpstreamCert == "" {
		return nil
	}
	certs, err := readCertificates("ca.upstream_cert_file", c.cfg.UpstreamCert)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if slices.ContainsFunc(record.Retired, func(r []byte) bool { return bytes.Equal(r, fingerprint(certs[0])) }) {
		return nil
	}
	if !bytes.Equal(certs[0].Raw, inForce.cert.Raw) {
		return fmt.Errorf("%w: the store has another CA already, %q; a CA is taken over at the first start only: remove ca.upstream_cert_file and ca.upstream_key_file, name yours in ca.next_cert_file and ca.next_key_file instead, and rotate the root (docs/ca.md)",
			ErrUpstream, inForce.cert.Subject)
	}
	return nil
}

// root is what peers trust: the end of the chain.
func (s *signer) root() *x509.Certificate {
	if n := len(s.above); n > 0 {
		return s.above[n-1]
	}
	return s.cert
}

// end is when the first of the chain ends.
func (s *signer) end() time.Time {
	end := s.cert.NotAfter
	for _, cert := range s.above {
		if cert.NotAfter.Before(end) {
			end = cert.NotAfter
		}
	}
	return end
}

// presented is what an SVID carries beyond our intermediate: all but the root.
func (s *signer) presented() []*x509.Certificate {
	if len(s.above) == 0 {
		return nil
	}
	return append([]*x509.Certificate{s.cert}, s.above[:len(s.above)-1]...)
}

// bound is what a sealed key is bound to: it opens with these certificates, for this
// trust domain only.
func (s *signer) bound() []byte {
	b := bytes.Clone(s.cert.Raw)
	for _, cert := range s.above {
		b = append(b, cert.Raw...)
	}
	return append(b, s.trustDomain...)
}
