package identity

import (
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
)

// Kept is a workload with its SVID, as one run of a proxy leaves it to the next.
// The workload is still the same one if its key and its attributes are.
type Kept struct {
	Workload *Workload
	SVID     *SVID
}

// maxKept bounds what is read; it is more than a Manager has.
const maxKept = 2 * maxManaged

// errKept: what was kept cannot be read.
var errKept = errors.New("kept SVIDs")

// keptJSON is the form outside. encoding/json would print a workload with its
// attributes as pairs, and an SVID without its key.
type keptJSON struct {
	Key        Key         `json:"key"`
	Attributes [][2]string `json:"attributes"`
	Chain      [][]byte    `json:"chain"`
	Private    []byte      `json:"private"` // PKCS#8
}

// MarshalKept is the SVIDs with their private keys, for a place that is memory and
// nothing else. The caller wipes it.
func MarshalKept(kept []Kept) ([]byte, error) {
	out := make([]keptJSON, 0, len(kept))
	defer func() {
		for _, k := range out {
			clear(k.Private)
		}
	}()
	for _, k := range kept {
		private, err := x509.MarshalPKCS8PrivateKey(k.SVID.Key)
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %w", errKept, k.SVID.ID, err)
		}
		j := keptJSON{Key: k.Workload.Key, Private: private}
		for _, a := range k.Workload.Attributes {
			j.Attributes = append(j.Attributes, [2]string{a.Key, a.Value})
		}
		for _, c := range k.SVID.Chain {
			j.Chain = append(j.Chain, c.Raw)
		}
		out = append(out, j)
	}
	return json.Marshal(out)
}

// UnmarshalKept reads what MarshalKept wrote, without what has expired by now. That
// the chains verify is for ControllerSource.Restore's user to see, by the bundles of
// then.
func UnmarshalKept(b []byte, now time.Time) ([]Kept, error) {
	var in []keptJSON
	if err := json.Unmarshal(b, &in); err != nil {
		// Its text could quote what it choked on.
		return nil, fmt.Errorf("%w: not what MarshalKept writes", errKept)
	}
	defer func() {
		for _, j := range in {
			clear(j.Private)
		}
	}()
	if len(in) > maxKept {
		return nil, fmt.Errorf("%w: %d, at most %d", errKept, len(in), maxKept)
	}
	var out []Kept
	for _, j := range in {
		chain, err := parseChain(j.Chain)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errKept, err)
		}
		if !now.Before(chain[0].NotAfter) {
			continue
		}
		private, err := x509.ParsePKCS8PrivateKey(j.Private)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errKept, err)
		}
		key, ok := private.(crypto.Signer)
		if !ok {
			return nil, fmt.Errorf("%w: a %T cannot sign", errKept, private)
		}
		if public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(chain[0].PublicKey) {
			return nil, fmt.Errorf("%w: %w: it is for another key", errKept, ErrMalformedSVID)
		}
		svid, err := NewSVID(chain, key)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errKept, err)
		}
		w := &Workload{Key: j.Key}
		for _, a := range j.Attributes {
			w.Attributes = append(w.Attributes, Attribute{a[0], a[1]})
		}
		out = append(out, Kept{w, svid})
	}
	return out, nil
}

// Keep lists the workloads in use whose SVIDs are valid.
func (m *Manager) Keep() []Kept {
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []Kept
	for _, e := range m.workloads {
		if e.valid(now) == nil {
			out = append(out, Kept{e.workload, e.credential.SVID})
		}
	}
	return out
}

// Restore gives the source SVIDs of an earlier run: each workload begins with its
// own, where it has one that verifies by the bundles of that moment, and gets a new
// one as soon as the controller answers. It replaces what was restored before.
func (s *ControllerSource) Restore(kept []Kept) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.restored = make(map[Key]Kept, len(kept))
	for _, k := range kept {
		s.restored[k.Workload.Key] = k
	}
}

// Restored lists what was restored and not yet asked for, and is still valid.
func (s *ControllerSource) Restored() []Kept {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Kept
	for key, k := range s.restored {
		if !now.Before(k.SVID.NotAfter()) {
			delete(s.restored, key)
			continue
		}
		out = append(out, k)
	}
	return out
}

// claim takes w's restored SVID, if it is the same workload still and if the SVID
// verifies; nil if not.
func (s *ControllerSource) claim(w *Workload, bundles *x509bundle.Set) *SVID {
	s.mu.Lock()
	k, ok := s.restored[w.Key]
	delete(s.restored, w.Key)
	s.mu.Unlock()
	if !ok || !slices.Equal(k.Workload.Attributes, w.Attributes) {
		return nil
	}
	if _, err := Verify(k.SVID.Chain, bundles, time.Now()); err != nil {
		return nil
	}
	return k.SVID
}
