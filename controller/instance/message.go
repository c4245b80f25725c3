package instance

import (
	"crypto/x509"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"slices"

	"github.com/smallstep/pkcs7"

	"github.com/symbolon/symbolon/controller/enrol"
)

// maxCertificates bounds those of a message.
const maxCertificates = 5

// digests and signatures are the algorithms that count; the library knows SHA-1 and DSA,
// too.
var (
	digests    = []asn1.ObjectIdentifier{pkcs7.OIDDigestAlgorithmSHA256, pkcs7.OIDDigestAlgorithmSHA384, pkcs7.OIDDigestAlgorithmSHA512}
	signatures = []asn1.ObjectIdentifier{
		pkcs7.OIDEncryptionAlgorithmRSA, pkcs7.OIDEncryptionAlgorithmRSASHA256, pkcs7.OIDEncryptionAlgorithmRSASHA384, pkcs7.OIDEncryptionAlgorithmRSASHA512,
		pkcs7.OIDDigestAlgorithmECDSASHA256, pkcs7.OIDDigestAlgorithmECDSASHA384, pkcs7.OIDDigestAlgorithmECDSASHA512,
	}
)

// parse reads a PKCS#7 signed message (RFC 2315; CMS, RFC 5652) and refuses what no cloud
// makes. Nothing of it is verified. Errors: ErrDocument.
func parse(data []byte) (*pkcs7.PKCS7, error) {
	p, err := pkcs7.Parse(data)
	if err != nil {
		return nil, refuse("it is no PKCS#7 message")
	}
	// Of several signers one may be anybody.
	if n := len(p.Signers); n != 1 {
		return nil, refuse("it has %d signers, want 1", n)
	}
	s := p.Signers[0]
	is := func(oid asn1.ObjectIdentifier) func(asn1.ObjectIdentifier) bool { return oid.Equal }
	if s.IssuerAndSerialNumber.SerialNumber == nil {
		return nil, refuse("its signer has no serial number")
	}
	if !slices.ContainsFunc(digests, is(s.DigestAlgorithm.Algorithm)) || !slices.ContainsFunc(signatures, is(s.DigestEncryptionAlgorithm.Algorithm)) {
		return nil, refuse("its signature is none of RSA or ECDSA with SHA-256, SHA-384 or SHA-512")
	}
	// The digest in the attributes is of content of this type, or of something else that
	// was signed for another purpose.
	if len(s.AuthenticatedAttributes) > 0 {
		var contentType asn1.ObjectIdentifier
		if err := p.UnmarshalSignedAttribute(pkcs7.OIDAttributeContentType, &contentType); err != nil || !contentType.Equal(pkcs7.OIDData) {
			return nil, refuse("its signed attributes are not about data")
		}
	}
	if n := len(p.Certificates); n > maxCertificates {
		return nil, refuse("it has %d certificates, at most %d are looked at", n, maxCertificates)
	}
	for _, c := range p.Certificates {
		// Before anything is verified by it: a huge RSA key costs seconds.
		if err := enrol.CheckKey(c.PublicKey); err != nil {
			return nil, refuse("a certificate in it: %v", err)
		}
	}
	return p, nil
}

// decode reads a document that is believed. It is an object and nothing else: signed
// attributes, which a trick can make into content, are not. Errors: ErrDocument.
func decode(content []byte, v any) error {
	if len(content) == 0 || content[0] != '{' || json.Unmarshal(content, v) != nil {
		return refuse("what is signed is no JSON document")
	}
	return nil
}

// certificates reads PEM. Errors: ErrAnchors.
func certificates(file string) ([]*x509.Certificate, error) {
	data, err := read(file)
	if err != nil {
		return nil, err
	}
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%w: %s holds a %s; want certificates only", ErrAnchors, file, block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: %s: certificate %d: %w", ErrAnchors, file, len(out)+1, err)
		}
		if err := enrol.CheckKey(c.PublicKey); err != nil {
			return nil, fmt.Errorf("%w: %s: certificate %d: %w", ErrAnchors, file, len(out)+1, err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%w: %s holds no certificate in PEM", ErrAnchors, file)
	}
	return out, nil
}

// split tells roots, which sign themselves, from what is below them. Errors: ErrAnchors.
func split(file string, all []*x509.Certificate) (roots, intermediates *x509.CertPool, err error) {
	roots, intermediates = x509.NewCertPool(), x509.NewCertPool()
	found := false
	for _, c := range all {
		switch {
		case !c.IsCA:
			return nil, nil, fmt.Errorf("%w: %s: %s is not a CA", ErrAnchors, file, c.Subject)
		case c.CheckSignatureFrom(c) == nil:
			roots.AddCert(c)
			found = true
		default:
			intermediates.AddCert(c)
		}
	}
	if !found {
		return nil, nil, fmt.Errorf("%w: %s holds no root, that is, no certificate that signs itself", ErrAnchors, file)
	}
	return roots, intermediates, nil
}
