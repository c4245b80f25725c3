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

// span is a range of words, from first to before end, as summaries see it.
type span struct {
	first, end uint32
}

// mask is which bits of word s of a summary lie in the span.
func (r span) mask(s uint32) uint64 {
	m := ^uint64(0)
	if s == r.first/wordBits {
		m <<= r.first % wordBits
	}
	if s == r.end/wordBits {
		m &= 1<<(r.end%wordBits) - 1
	}
	return m
}

// both calls f with each word in the span that has bits of a and of b, and its
// index, in order.
func both(a, b *bitset, r span, f func(i uint32, w uint64)) {
	for s := r.first / wordBits; s*wordBits < r.end; s++ {
		for m := a.summary[s] & b.summary[s] & r.mask(s); m != 0; m &= m - 1 {
			i := s*wordBits + uint32(bits.TrailingZeros64(m))
			if w := a.word(i) & b.word(i); w != 0 {
				f(i, w)
			}
		}
	}
}
