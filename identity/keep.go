package identity

import (
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Kept is a workload with its SVID, as one run of a proxy leaves it to the next.
// The workload is still the same one if its key and its attributes are.
type Kept struct {
	Workload *Workload
	SVID     *SVID
	// Bundles are what it was used with; nil: the source knows from elsewhere.
	Bundles *x509bundle.Set
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
	// Bundles are roots by trust domain.
	Bundles map[string][][]byte `json:"bundles,omitempty"`
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
		j.Bundles = rawBundles(k.Bundles)
		out = append(out, j)
	}
	return json.Marshal(out)
}

// UnmarshalKept reads what MarshalKept wrote, without what has expired by now. That
// the chains verify is for the source to see, by the bundles of then.
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
		bundles, err := parseBundles(j.Bundles)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errKept, err)
		}
		w := &Workload{Key: j.Key}
		for _, a := range j.Attributes {
			w.Attributes = append(w.Attributes, Attribute{a[0], a[1]})
		}
		out = append(out, Kept{w, svid, bundles})
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
			out = append(out, Kept{e.workload, e.credential.SVID, e.credential.Bundles})
		}
	}
	return out
}

func rawBundles(set *x509bundle.Set) map[string][][]byte {
	if set == nil {
		return nil
	}
	out := make(map[string][][]byte, set.Len())
	for _, b := range set.Bundles() {
		var roots [][]byte
		for _, c := range b.X509Authorities() {
			roots = append(roots, c.Raw)
		}
		out[b.TrustDomain().Name()] = roots
	}
	return out
}

func parseBundles(raw map[string][][]byte) (*x509bundle.Set, error) {
	if len(raw) == 0 {
		return nil, nil
	}
	set := x509bundle.NewSet()
	for name, ders := range raw {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, err
		}
		b := x509bundle.New(td)
		for _, der := range ders {
			c, err := x509.ParseCertificate(der)
			if err != nil {
				return nil, err
			}
			b.AddX509Authority(c)
		}
		set.Add(b)
	}
	return set, nil
}

// Estate is what an earlier run left to a source: SVIDs that nobody has asked for yet.
// Each workload begins with its own, where the source finds it good still, and gets a
// new one as soon as there is one. The zero value is empty. Safe for concurrent use.
type Estate struct {
	mu   sync.Mutex
	kept map[Key]Kept
}

// Restore replaces what was restored before.
func (e *Estate) Restore(kept []Kept) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.kept = make(map[Key]Kept, len(kept))
	for _, k := range kept {
		e.kept[k.Workload.Key] = k
	}
}

// Restored lists what was restored and not yet asked for, and is still valid.
func (e *Estate) Restored() []Kept {
	now := time.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []Kept
	for key, k := range e.kept {
		if !now.Before(k.SVID.NotAfter()) {
			delete(e.kept, key)
			continue
		}
		out = append(out, k)
	}
	return out
}

// Claim takes w's, if what is known of w is still the same.
func (e *Estate) Claim(w *Workload) (Kept, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	k, ok := e.kept[w.Key]
	delete(e.kept, w.Key)
	return k, ok && slices.Equal(k.Workload.Attributes, w.Attributes)
}

// restored is w's SVID of an earlier run, if it verifies; nil if there is none.
func (s *ControllerSource) restored(w *Workload, bundles *x509bundle.Set) *SVID {
	k, ok := s.Claim(w)
	if !ok {
		return nil
	}
	if _, err := Verify(k.SVID.Chain, bundles, time.Now()); err != nil {
		return nil
	}
	return k.SVID
}
