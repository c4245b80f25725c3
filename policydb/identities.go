package policydb

import (
	"sync"
	"sync/atomic"

	"github.com/symbolon/symbolon/identity"
)

// Bounds of the caches; a full one is dropped whole, since what is in use comes
// back within microseconds each.
const (
	// maxPointers bounds the attribute sets found by address.
	maxPointers = 4096
	// maxBitsetBytes bounds the bitsets of all identities.
	maxBitsetBytes = 64 << 20
)

// known is one identity as policies see it: which of them it matches, as subject
// and as object. Each is found when first asked for.
type known struct {
	attributes      identity.Attributes // reduced to the keys that policies use
	subject, object atomic.Pointer[bitset]
}

// identities finds known identities: first by the address of the attribute set
// (which is immutable and shared, and cannot go away while it is a key here), then
// by the hash of what policies can see of it.
type identities struct {
	pointers atomic.Pointer[pointerCache]
	hashes   atomic.Pointer[hashCache]
}

type pointerCache struct {
	entries sync.Map // *identity.Attribute, the first of the set: pointerEntry
	n       atomic.Int64
}

type pointerEntry struct {
	length int
	known  *known
}

type hashCache struct {
	entries sync.Map // [sha256.Size]byte: *known
	bytes   atomic.Int64
}

// identify finds or makes what is known of attrs.
func (c *Compiled) identify(attrs identity.Attributes) *known {
	if len(attrs) == 0 {
		return c.identifyByHash(nil)
	}
	pointers := c.known.pointers.Load()
	if pointers != nil {
		// Two sets can begin at one address only if one is a part of the other.
		if v, ok := pointers.entries.Load(&attrs[0]); ok && v.(pointerEntry).length == len(attrs) {
			return v.(pointerEntry).known
		}
	}
	k := c.identifyByHash(attrs)
	if pointers == nil || pointers.n.Load() >= maxPointers {
		fresh := new(pointerCache)
		if !c.known.pointers.CompareAndSwap(pointers, fresh) {
			return k
		}
		pointers = fresh
	}
	if _, had := pointers.entries.Swap(&attrs[0], pointerEntry{len(attrs), k}); !had {
		pointers.n.Add(1)
	}
	return k
}

func (c *Compiled) identifyByHash(attrs identity.Attributes) *known {
	seen := attrs.Filter(func(key string) bool {
		_, used := c.keys[key]
		return used
	})
	var hash any = seen.Hash()
	cache := c.known.hashes.Load()
	if cache != nil {
		if v, ok := cache.entries.Load(hash); ok {
			return v.(*known)
		}
	}
	if cache == nil || cache.bytes.Load() >= maxBitsetBytes {
		fresh := new(hashCache)
		if c.known.hashes.CompareAndSwap(cache, fresh) {
			// What pointers lead to is to be freed as well.
			c.known.pointers.Store(nil)
		}
		cache = c.known.hashes.Load()
	}
	k, had := cache.entries.LoadOrStore(hash, &known{attributes: seen})
	if !had {
		cache.bytes.Add(knownBytes(seen))
	}
	return k.(*known)
}

// knownBytes is about what an identity takes beside its bitsets.
func knownBytes(attrs identity.Attributes) int64 {
	n := int64(256)
	for _, a := range attrs {
		n += int64(32 + len(a.Key) + len(a.Value))
	}
	return n
}

// bits is what k matches as subject (or object), found at first sight.
func (c *Compiled) bits(k *known, side *atomic.Pointer[bitset], m *matcher) *bitset {
	if b := side.Load(); b != nil {
		return b
	}
	dense := make([]uint64, len(m.always))
	m.match(k.attributes, dense)
	b := newBitset(dense)
	if side.CompareAndSwap(nil, b) {
		if cache := c.known.hashes.Load(); cache != nil {
			cache.bytes.Add(b.bytes())
		}
	}
	return b
}

func (c *Compiled) subjectBits(attrs identity.Attributes) *bitset {
	k := c.identify(attrs)
	return c.bits(k, &k.subject, &c.subjects)
}

func (c *Compiled) objectBits(attrs identity.Attributes) *bitset {
	k := c.identify(attrs)
	return c.bits(k, &k.object, &c.objects)
}
