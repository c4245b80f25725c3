package cloudlab

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"slices"
	"time"
)

// Message is a PKCS#7 signed message (RFC 2315, section 9), made by hand: tests have to
// make what no library would.
type Message struct {
	Content      []byte
	Signers      []Signer
	Certificates []*x509.Certificate
	// Indefinite gives it lengths that are not told beforehand (BER), as AWS's have.
	Indefinite bool
}

// Signer signs a Message.
type Signer struct {
	Cert *x509.Certificate
	Key  crypto.Signer // RSA
	Hash crypto.Hash   // 0: SHA-256
	// Bare leaves the signed attributes out: the content is signed itself.
	Bare bool
	// Signed is other content that the attributes' digest is of; nil: the message's.
	Signed []byte
	// Type is the content type of the attributes; nil: data.
	Type asn1.ObjectIdentifier
	// Unsigned are attributes that nobody has signed, DER each.
	Unsigned [][]byte
}

var (
	oidData          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
	oidSignedData    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	oidContentType   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}
	oidMessageDigest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
	oidSigningTime   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 5}
	oidRSA           = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}
	oidHash          = map[crypto.Hash]asn1.ObjectIdentifier{
		crypto.SHA1:   {1, 3, 14, 3, 2, 26},
		crypto.SHA256: {2, 16, 840, 1, 101, 3, 4, 2, 1},
	}
)

const (
	tagSequence, tagSet = 0x30, 0x31
	tagExplicit0        = 0xa0
	tagUnsigned         = 0xa1
	tagOctets           = 0x04
	tagOctetsParts      = 0x24 // in parts, one after another
	indefinite          = 0x80
)

// Marshal signs.
func (m *Message) Marshal() ([]byte, error) {
	var infos, algorithms [][]byte
	for _, s := range m.Signers {
		info, err := s.info(m.Content)
		if err != nil {
			return nil, err
		}
		infos, algorithms = append(infos, info), append(algorithms, algorithm(oidHash[s.hash()]))
	}
	wrap, content := tlv, tlv(tagOctets, m.Content)
	if m.Indefinite {
		wrap = open
		content = open(tagOctetsParts, tlv(tagOctets, m.Content))
	}
	parts := [][]byte{number(1), tlv(tagSet, algorithms...), wrap(tagSequence, oid(oidData), wrap(tagExplicit0, content))}
	if len(m.Certificates) > 0 {
		var ders [][]byte
		for _, c := range m.Certificates {
			ders = append(ders, c.Raw)
		}
		parts = append(parts, tlv(tagExplicit0, ders...))
	}
	parts = append(parts, tlv(tagSet, infos...))
	return wrap(tagSequence, oid(oidSignedData), wrap(tagExplicit0, wrap(tagSequence, parts...))), nil
}

func (s *Signer) hash() crypto.Hash {
	if s.Hash == 0 {
		return crypto.SHA256
	}
	return s.Hash
}

func (s *Signer) info(content []byte) ([]byte, error) {
	if s.Signed != nil {
		content = s.Signed
	}
	var attributes []byte
	text := content
	if !s.Bare {
		attributes = s.Attributes(content)
		text = tlv(tagSet, attributes)
	}
	signature, err := s.Key.Sign(rand.Reader, sum(s.hash(), text), s.hash())
	if err != nil {
		return nil, err
	}
	if s.Cert.SerialNumber == nil {
		return nil, errors.New("the certificate has no serial number")
	}
	parts := [][]byte{number(1), tlv(tagSequence, s.Cert.RawIssuer, der(s.Cert.SerialNumber)), algorithm(oidHash[s.hash()])}
	if !s.Bare {
		parts = append(parts, tlv(tagExplicit0, attributes))
	}
	parts = append(parts, algorithm(oidRSA), tlv(tagOctets, signature))
	if len(s.Unsigned) > 0 {
		parts = append(parts, tlv(tagUnsigned, s.Unsigned...))
	}
	return tlv(tagSequence, parts...), nil
}

// Attributes are the signed ones over a content, DER, without what is around them. With
// a SET around them they are what is really signed.
func (s *Signer) Attributes(content []byte) []byte {
	kind := s.Type
	if kind == nil {
		kind = oidData
	}
	all := [][]byte{
		attribute(oidContentType, oid(kind)),
		attribute(oidSigningTime, der(time.Now().UTC())),
		attribute(oidMessageDigest, tlv(tagOctets, sum(s.hash(), content))),
	}
	slices.SortFunc(all, bytes.Compare) // as DER has sets
	return bytes.Join(all, nil)
}

// DigestAttribute is an attribute that names a digest, as Signer.Unsigned takes them.
func DigestAttribute(content []byte) []byte {
	return attribute(oidMessageDigest, tlv(tagOctets, sum(crypto.SHA256, content)))
}

func attribute(kind asn1.ObjectIdentifier, value []byte) []byte {
	return tlv(tagSequence, oid(kind), tlv(tagSet, value))
}

func sum(hash crypto.Hash, b []byte) []byte {
	h := hash.New()
	h.Write(b)
	return h.Sum(nil)
}

func algorithm(id asn1.ObjectIdentifier) []byte {
	return der(pkix.AlgorithmIdentifier{Algorithm: id, Parameters: asn1.NullRawValue})
}

func oid(id asn1.ObjectIdentifier) []byte { return der(id) }
func number(n int) []byte                 { return der(n) }

func der(v any) []byte {
	b, err := asn1.Marshal(v)
	if err != nil {
		panic(err) // of values that are made here
	}
	return b
}

// tlv is one value with its tag and length.
func tlv(tag byte, parts ...[]byte) []byte {
	content := bytes.Join(parts, nil)
	return append(header(tag, len(content)), content...)
}

func header(tag byte, n int) []byte {
	switch {
	case n < 0x80:
		return []byte{tag, byte(n)}
	case n < 0x100:
		return []byte{tag, 0x81, byte(n)}
	}
	return []byte{tag, 0x82, byte(n >> 8), byte(n)} // no test has more than 64 KiB
}

// open is tlv with an end mark in the place of a length.
func open(tag byte, parts ...[]byte) []byte {
	return slices.Concat([]byte{tag, indefinite}, bytes.Join(parts, nil), []byte{0, 0})
}
