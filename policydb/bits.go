package policydb

import "math/bits"

const wordBits = 64

// bitset is a set of bits of which most are clear: only words that are not zero are
// kept, found by a summary of one bit per word. An AND of two costs a look at the
// summaries, a sixty-fourth of the set, and at the words that both have.
type bitset struct {
	summary []uint64
	rank    []uint32 // words that are kept for the summary's words before this one
	words   []uint64
}

// newBitset packs dense, which it does not keep.
func newBitset(dense []uint64) *bitset {
	n := 0
	for _, w := range dense {
		if w != 0 {
			n++
		}
	}
	size := (len(dense) + wordBits - 1) / wordBits
	b := &bitset{summary: make([]uint64, size), rank: make([]uint32, size), words: make([]uint64, 0, n)}
	for i, w := range dense {
		if i%wordBits == 0 {
			b.rank[i/wordBits] = uint32(len(b.words))
		}
		if w != 0 {
			b.summary[i/wordBits] |= 1 << (i % wordBits)
			b.words = append(b.words, w)
		}
	}
	return b
}

// bytes is about what b takes in memory.
func (b *bitset) bytes() int64 { return int64(len(b.summary)*12 + len(b.words)*8 + 72) }

// word is word i of the set, which summary bit i%64 has been seen to announce.
func (b *bitset) word(i uint32) uint64 {
	s := i / wordBits
	below := b.summary[s] & (1<<(i%wordBits) - 1)
	return b.words[b.rank[s]+uint32(bits.OnesCount64(below))]
}

// intersection walks the words from first to before end that a and b both have.
type intersection struct {
	a, b       *bitset
	next, last uint32 // of the summary
	end        uint32
	pending    uint64 // bits of the summary's word next-1 not yet visited
}

func intersect(a, b *bitset, first, end uint32) intersection {
	x := intersection{a: a, b: b, next: first / wordBits, last: (end + wordBits - 1) / wordBits, end: end}
	if x.next < x.last {
		x.load()
		x.pending &= ^uint64(0) << (first % wordBits)
	}
	return x
}

// load takes the next word of the summaries.
func (x *intersection) load() {
	x.pending = x.a.summary[x.next] & x.b.summary[x.next]
	x.next++
}

// word returns the next word that is not zero, and its index; ok is false at the end.
func (x *intersection) word() (i uint32, w uint64, ok bool) {
	for {
		for x.pending == 0 {
			if x.next >= x.last {
				return 0, 0, false
			}
			x.load()
		}
		i = (x.next-1)*wordBits + uint32(bits.TrailingZeros64(x.pending))
		if i >= x.end {
			return 0, 0, false
		}
		x.pending &= x.pending - 1
		if w = x.a.word(i) & x.b.word(i); w != 0 {
			return i, w, true
		}
	}
}
