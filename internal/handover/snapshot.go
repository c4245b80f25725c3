package handover

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

const (
	magic = "symbolon proxy snapshot\n"
	// formatVersion counts changes that an older program must not read past.
	formatVersion = 1
	maxHeader     = 64 << 10
)

var (
	// ErrFormat: these bytes are no snapshot, or not a whole one.
	ErrFormat = errors.New("malformed snapshot")
	// ErrNewerFormat: a later version of the program wrote it.
	ErrNewerFormat = errors.New("snapshot of a newer version")
)

// Header says whose snapshot it is, and of when.
type Header struct {
	Created time.Time `json:"created"`
	// Serial grows with each snapshot that follows on another.
	Serial uint64 `json:"serial"`
	// TrustDomain, HostID, Controller (its address) and Instance (the proxy's socket)
	// must be those of whoever takes it over.
	TrustDomain string `json:"trust_domain"`
	HostID      string `json:"host_id"`
	Controller  string `json:"controller"`
	Instance    string `json:"instance"`
	// InKeyring: the host's identity was in the kernel's keyring, too. Where it is not
	// any more, somebody has removed it.
	InKeyring bool `json:"in_keyring"`
}

// Snapshot is what a proxy must know to decide, and to show who its workloads are,
// before it has spoken to its controller. Its private keys make it as secret as they
// are: Wipe it when it was of use.
type Snapshot struct {
	Header
	// Policy is the generation in force (symbolon.v1.Generation), empty: none.
	Policy []byte
	// Host is the host's credential (enrol.HostCredential.Marshal).
	Host []byte
	// Workloads are their SVIDs (identity.MarshalKept).
	Workloads []byte
}

// Marshal gives
//
//	magic, version (4 bytes), then header (JSON), policy, host, workloads:
//	each its length (4 bytes) and so many bytes; numbers are big endian
func (s *Snapshot) Marshal() ([]byte, error) {
	header, err := json.Marshal(s.Header)
	if err != nil {
		return nil, err
	}
	parts := [][]byte{header, s.Policy, s.Host, s.Workloads}
	size := len(magic) + 4
	for _, p := range parts {
		size += 4 + len(p)
	}
	if size > MaxSnapshot || len(header) > maxHeader {
		return nil, fmt.Errorf("snapshot: %d bytes, at most %d", size, MaxSnapshot)
	}
	// Exactly as much as it takes: growing would leave copies of keys behind.
	b := append(make([]byte, 0, size), magic...)
	b = binary.BigEndian.AppendUint32(b, formatVersion)
	for _, p := range parts {
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(p))), p...)
	}
	return b, nil
}

// UnmarshalSnapshot reads what Marshal wrote. The parts share b.
// Errors: ErrFormat, ErrNewerFormat.
func UnmarshalSnapshot(b []byte) (*Snapshot, error) {
	rest, ok := bytes.CutPrefix(b, []byte(magic))
	if !ok || len(rest) < 4 {
		return nil, ErrFormat
	}
	if v := binary.BigEndian.Uint32(rest); v > formatVersion {
		return nil, fmt.Errorf("%w: %d, this one reads up to %d", ErrNewerFormat, v, formatVersion)
	} else if v == 0 {
		return nil, fmt.Errorf("%w: version 0", ErrFormat)
	}
	rest = rest[4:]
	var s Snapshot
	var header []byte
	for _, part := range []*[]byte{&header, &s.Policy, &s.Host, &s.Workloads} {
		if len(rest) < 4 {
			return nil, fmt.Errorf("%w: it ends early", ErrFormat)
		}
		n := binary.BigEndian.Uint32(rest)
		if rest = rest[4:]; uint64(n) > uint64(len(rest)) {
			return nil, fmt.Errorf("%w: a part of %d bytes, %d are left", ErrFormat, n, len(rest))
		}
		*part, rest = rest[:n:n], rest[n:]
	}
	if len(rest) > 0 || len(header) > maxHeader {
		return nil, fmt.Errorf("%w: %d bytes behind its end, a header of %d", ErrFormat, len(rest), len(header))
	}
	if err := json.Unmarshal(header, &s.Header); err != nil {
		return nil, fmt.Errorf("%w: header: %w", ErrFormat, err)
	}
	return &s, nil
}

// Wipe overwrites the parts.
func (s *Snapshot) Wipe() {
	clear(s.Policy)
	clear(s.Host)
	clear(s.Workloads)
}

// String names it without its secrets.
func (s *Snapshot) String() string {
	return fmt.Sprintf("snapshot %d of host %s, %s", s.Serial, s.HostID, s.Created.UTC().Format(time.RFC3339))
}

// GoString is String: %#v would show the keys.
func (s *Snapshot) GoString() string { return s.String() }
