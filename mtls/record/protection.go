package record

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"hash"
	"math"
)

// Sizes in bytes, RFC 8446 section 5.
const (
	headerSize    = 5
	maxPlaintext  = 1 << 14
	maxCiphertext = maxPlaintext + 256
	typeSize      = 1 // TLSInnerPlaintext.type
	tagSize       = 16
	ivSize        = 12
	overhead      = headerSize + typeSize + tagSize
	maxRecord     = headerSize + maxCiphertext

	legacyVersion = 0x0303
)

// Content types, RFC 8446 section 5.1.
const (
	typeAlert           = 21
	typeHandshake       = 22
	typeApplicationData = 23
)

// suite is what a cipher suite means for records.
type suite struct {
	keySize, hashSize int
	hash              func() hash.Hash
}

var suites = map[uint16]*suite{
	tls.TLS_AES_128_GCM_SHA256: {keySize: 16, hashSize: sha256.Size, hash: sha256.New},
	tls.TLS_AES_256_GCM_SHA384: {keySize: 32, hashSize: sha512.Size384, hash: sha512.New384},
}

// expandLabel is HKDF-Expand-Label with an empty context, RFC 8446 section 7.1.
func (s *suite) expandLabel(secret []byte, label string, length int) ([]byte, error) {
	const prefix = "tls13 "
	info := make([]byte, 0, 2+1+len(prefix)+len(label)+1)
	info = binary.BigEndian.AppendUint16(info, uint16(length))
	info = append(info, byte(len(prefix)+len(label)))
	info = append(info, prefix...)
	info = append(info, label...)
	info = append(info, 0)
	return hkdf.Expand(s.hash, secret, string(info), length)
}

// protection is one direction's cryptographic state.
type protection struct {
	suite  *suite      // nil: wiped
	secret []byte      // application_traffic_secret_N
	aead   cipher.AEAD // nil: to be made again from secret, see rest
	iv     [ivSize]byte
	// nonce is here and not on the stack because it passes through an interface.
	nonce [ivSize]byte
	// sequence is the number of the next record under this key, rested what it was at
	// the last rest.
	sequence, rested uint64
}

// newProtection makes the state for a secret, which it copies.
// Errors: ErrSuite, ErrConfig.
func newProtection(id uint16, secret []byte, sequence uint64) (*protection, error) {
	s, ok := suites[id]
	if !ok {
		return nil, fmt.Errorf("%w: %s", ErrSuite, tls.CipherSuiteName(id))
	}
	if len(secret) != s.hashSize {
		return nil, fmt.Errorf("%w: secret of %d bytes, want %d", ErrConfig, len(secret), s.hashSize)
	}
	p := &protection{suite: s}
	if err := p.install(append([]byte(nil), secret...)); err != nil {
		return nil, err
	}
	p.sequence = sequence
	return p, nil
}

// install derives key and IV from secret, and starts at record 0.
func (p *protection) install(secret []byte) error {
	p.secret, p.sequence, p.rested = secret, 0, 0
	return p.derive()
}

// derive makes key and IV, RFC 8446 section 7.3.
func (p *protection) derive() error {
	key, err := p.suite.expandLabel(p.secret, "key", p.suite.keySize)
	if err != nil {
		return err
	}
	defer clear(key)
	iv, err := p.suite.expandLabel(p.secret, "iv", ivSize)
	if err != nil {
		return err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	if p.aead, err = cipher.NewGCM(block); err != nil {
		return err
	}
	copy(p.iv[:], iv)
	return nil
}

// rest drops the AEAD, three quarters of a kilobyte, if no record has passed since the
// last call. The next one makes it again. It tells whether there still is one.
func (p *protection) rest() (warm bool) {
	if p.sequence == p.rested {
		p.aead = nil
	}
	p.rested = p.sequence
	return p.aead != nil
}

// update moves to the next generation of the secret, RFC 8446 section 7.2.
func (p *protection) update() error {
	next, err := p.suite.expandLabel(p.secret, "traffic upd", p.suite.hashSize)
	if err != nil {
		return err
	}
	clear(p.secret)
	return p.install(next)
}

// wipe forgets the keys; the state is of no use any more.
func (p *protection) wipe() {
	clear(p.secret)
	clear(p.iv[:])
	clear(p.nonce[:])
	p.suite, p.aead = nil, nil
}

// prepare sets nonce for the record under way, RFC 8446 section 5.3.
// Errors: ErrSequence, ErrReleased.
func (p *protection) prepare() error {
	if p.suite == nil {
		return ErrReleased
	}
	if p.aead == nil {
		if err := p.derive(); err != nil {
			return err
		}
	}
	if p.sequence == math.MaxUint64 {
		return ErrSequence
	}
	copy(p.nonce[:4], p.iv[:4])
	binary.BigEndian.PutUint64(p.nonce[4:], binary.BigEndian.Uint64(p.iv[4:])^p.sequence)
	return nil
}

// seal turns slot, whose bytes from headerSize are n bytes of plaintext, into a
// record, in place. It returns the record's size, n + overhead; slot must be as
// large. Errors: ErrSequence, ErrReleased.
func (p *protection) seal(slot []byte, contentType byte, n int) (int, error) {
	if err := p.prepare(); err != nil {
		return 0, err
	}
	end := headerSize + n + typeSize
	slot[end-1] = contentType
	header := slot[:headerSize:headerSize]
	header[0] = typeApplicationData
	binary.BigEndian.PutUint16(header[1:], legacyVersion)
	binary.BigEndian.PutUint16(header[3:], uint16(n+typeSize+tagSize))
	p.aead.Seal(slot[headerSize:headerSize], p.nonce[:], slot[headerSize:end], header)
	p.sequence++
	return n + overhead, nil
}

// open authenticates and decrypts a record into dst[:0] (the record's own body, or
// memory apart from it) and returns TLSInnerPlaintext. On failure nothing of it is
// readable: the AEAD leaves zeros.
func (p *protection) open(dst, record []byte) ([]byte, error) {
	if err := p.prepare(); err != nil {
		return nil, err
	}
	inner, err := p.aead.Open(dst[:0], p.nonce[:], record[headerSize:], record[:headerSize])
	if err != nil {
		return nil, err
	}
	p.sequence++
	return inner, nil
}
