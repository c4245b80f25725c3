package identity

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"strings"
)

// Serial is a certificate's serial number, big endian and without leading zeros: a
// string, so that it can be compared and be a key.
type Serial string

const (
	// maxSerial is the longest that RFC 5280 (section 4.1.2.2) allows, octets.
	maxSerial = 20
	// The serial numbers that our CA gives are hostSerial, a host's tag, and as many
	// random bits as are left: 72. So all that was issued to one host can be told by
	// a look at the certificate, however much that was, without a list of it.
	hostSerial = 0x53
	tagSize    = 10
)

type hostTag [tagSize]byte

// tagOf stands for a host in serial numbers. It is no secret; it is a hash only for
// its size to be fixed.
func tagOf(hostID string) hostTag {
	sum := sha256.Sum256([]byte("symbolon host " + hostID))
	return hostTag(sum[:tagSize])
}

// NewSerial makes the serial number of a certificate that is issued to a host, or of
// one that is issued to none: "".
func NewSerial(hostID string) *big.Int {
	b := make([]byte, maxSerial)
	_, _ = rand.Read(b) // never fails: crypto/rand
	b[0] = hostSerial
	if hostID == "" {
		b[0]++
	} else {
		tag := tagOf(hostID)
		copy(b[1:], tag[:])
	}
	return new(big.Int).SetBytes(b)
}

// SerialOf is a certificate's.
func SerialOf(c *x509.Certificate) Serial { return Serial(c.SerialNumber.Bytes()) }

// tag is the host that the certificate was issued to; false: it does not say.
func (s Serial) tag() (hostTag, bool) {
	if len(s) != maxSerial || s[0] != hostSerial {
		return hostTag{}, false
	}
	return hostTag([]byte(s[1 : 1+tagSize])), true
}

// IssuedTo tells whether our CA has given it to a certificate of a host's: its own, or one of
// its workloads'.
func (s Serial) IssuedTo(hostID string) bool {
	tag, ok := s.tag()
	return ok && tag == tagOf(hostID)
}

// String is hexadecimal.
func (s Serial) String() string { return hex.EncodeToString([]byte(s)) }

var errSerial = errors.New("not a serial number in hexadecimal, of up to 20 octets")

// ParseSerial reads hexadecimal, as String writes it or as openssl does, with colons.
func ParseSerial(text string) (Serial, error) {
	digits := strings.ReplaceAll(text, ":", "")
	if len(digits)%2 == 1 {
		digits = "0" + digits
	}
	b, err := hex.DecodeString(digits)
	s := Serial(strings.TrimLeft(string(b), "\x00"))
	if err != nil || s == "" || len(s) > maxSerial {
		return "", fmt.Errorf("%w: %q", errSerial, text)
	}
	return s, nil
}
