package policydb

import (
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/symbolon/symbolon/identity"
)

// Bounds of the caches. A full one of bitsets is dropped whole, since what is in use
// comes back within microseconds each; of addresses the newer takes the older's place.
const (
	// maxPointers bounds the attribute sets found by address: a power of two.
	maxPointers = 1 << pointerBits
	pointerBits = 12
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
// (which is immutable and shared, and cannot go away while it is remembered here),
// then by the hash of what policies can see of it.
type identities struct {
	pointers atomic.Pointer[pointerCache]
	hashes   atomic.Pointer[hashCache]
	answers  atomic.Pointer[answers]
	nobody   *pointerEntry // without attributes
}

// pointerCache has two places for each set, by its address. It is two loads and a
// comparison, where a concurrent map's lookup would be most of a decision.
type pointerCache struct {
	slots [maxPointers]atomic.Pointer[pointerEntry]
}

type pointerEntry struct {
	first  *identity.Attribute
	length int
	known  *known
	// chain is the one of the namespace that the set was last seen in: who has the
	// same attributes is nearly always in the same namespace.
	chain atomic.Pointer[chain]
}

// is: two sets can begin at one address only if one is a part of the other.
func (e *pointerEntry) is(attrs identity.Attributes) bool {
	return e != nil && e.first == &attrs[0] && e.length == len(attrs)
}

// place is the first of the places of attrs; the second is its neighbour. The heap's
// objects do not move, and an address that is remembered is not used again.
func place(attrs identity.Attributes) uint64 {
	return uint64(uintptr(unsafe.Pointer(&attrs[0]))) * 0x9e3779b97f4a7c15 >> (64 - pointerBits)
}

type hashCache struct {
	entries sync.Map // [sha256.Size]byte: *known
	bytes   atomic.Int64
}

// identify finds or makes what is known of attrs.
func (c *Compiled) identify(attrs identity.Attributes) *known { return c.entry(attrs).known }

func (c *Compiled) entry(attrs identity.Attributes) *pointerEntry {
	if len(attrs) == 0 {
		return c.known.nobody
	}
	if pointers := c.known.pointers.Load(); pointers != nil {
		i := place(attrs)
		if e := pointers.slots[i].Load(); e.is(attrs) {
			return e
		}
		if e := pointers.slots[i^1].Load(); e.is(attrs) {
			return e
		}
	}
	return c.newEntry(attrs)
}

// newEntry is entry for a set at an address not seen before.
func (c *Compiled) newEntry(attrs identity.Attributes) *pointerEntry {
	e := &pointerEntry{first: &attrs[0], length: len(attrs), known: c.identifyByHash(attrs)}
	pointers := c.known.pointers.Load()
	if pointers == nil {
		pointers = new(pointerCache)
		if !c.known.pointers.CompareAndSwap(nil, pointers) {
			return e // remembered the next time
		}
	}
	// What was there moves over, so that two sets which share a place both stay.
	i := place(attrs)
	if old := pointers.slots[i].Swap(e); old != nil {
		pointers.slots[i^1].Store(old)
	}
	return e
}

// chainAt is the chain of a namespace in which e is judged; nil if it is not known.
func (c *Compiled) chainAt(e *pointerEntry, namespace string) *chain {
	if ch := e.chain.Load(); ch != nil && ch.namespace() == namespace {
		return ch
	}
	ch := c.chains[namespace]
	if ch != nil {
		e.chain.Store(ch)
	}
	return ch
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
			// What pointers and answers lead to is to be freed as well.
			c.known.pointers.Store(nil)
			c.known.answers.Store(nil)
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
	return c.subjectsOf(c.identify(attrs))
}

func (c *Compiled) objectBits(attrs identity.Attributes) *bitset {
	return c.objectsOf(c.identify(attrs))
}

func (c *Compiled) subjectsOf(k *known) *bitset { return c.bits(k, &k.subject, &c.subjects) }

func (c *Compiled) objectsOf(k *known) *bitset { return c.bits(k, &k.object, &c.objects) }
