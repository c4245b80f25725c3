package identity

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"iter"
	"slices"
	"sort"
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// Attribute is one key and one of its values. Keys are dotted; where a value
// comes from is part of its key (see the package comment).
type Attribute struct {
	Key, Value string
}

// Attributes is a multimap: sorted by key, then value, without duplicates. It is
// immutable once made; share it freely.
type Attributes []Attribute

// NewAttributes sorts and deduplicates. Keys without values do not exist.
func NewAttributes(m map[string][]string) Attributes {
	n := 0
	for _, vs := range m {
		n += len(vs)
	}
	if n == 0 {
		return nil
	}
	a := make(Attributes, 0, n)
	for k, vs := range m {
		for _, v := range vs {
			a = append(a, Attribute{k, v})
		}
	}
	return a.normalize()
}

func (a Attributes) normalize() Attributes {
	slices.SortFunc(a, compareAttributes)
	return slices.Compact(a)
}

func compareAttributes(x, y Attribute) int {
	if c := cmp.Compare(x.Key, y.Key); c != 0 {
		return c
	}
	return cmp.Compare(x.Value, y.Value)
}

// AttributesFromProto is the inverse of Proto.
func AttributesFromProto(m map[string]*symbolonv1.LabelValues) Attributes {
	var a Attributes
	for k, vs := range m {
		for _, v := range vs.GetValues() {
			a = append(a, Attribute{k, v})
		}
	}
	return a.normalize()
}

// Proto is the wire form; nil for none.
func (a Attributes) Proto() map[string]*symbolonv1.LabelValues {
	if len(a) == 0 {
		return nil
	}
	m := make(map[string]*symbolonv1.LabelValues)
	for _, x := range a {
		vs := m[x.Key]
		if vs == nil {
			vs = &symbolonv1.LabelValues{}
			m[x.Key] = vs
		}
		vs.Values = append(vs.Values, x.Value)
	}
	return m
}

// Of returns the entries of one key, without copying; empty if there is none.
func (a Attributes) Of(key string) Attributes {
	i := sort.Search(len(a), func(i int) bool { return a[i].Key >= key })
	j := i
	for j < len(a) && a[j].Key == key {
		j++
	}
	return a[i:j:j]
}

// Get returns the first value of key, or "".
func (a Attributes) Get(key string) string {
	if of := a.Of(key); len(of) > 0 {
		return of[0].Value
	}
	return ""
}

// Has tells whether key has any value.
func (a Attributes) Has(key string) bool { return len(a.Of(key)) > 0 }

// Keys yields each key once, in order.
func (a Attributes) Keys() iter.Seq[string] {
	return func(yield func(string) bool) {
		for i := range a {
			if i > 0 && a[i].Key == a[i-1].Key {
				continue
			}
			if !yield(a[i].Key) {
				return
			}
		}
	}
}

// Union has the pairs of both.
func (a Attributes) Union(b Attributes) Attributes {
	if len(a) == 0 {
		return b
	}
	if len(b) == 0 {
		return a
	}
	return slices.Concat(a, b).normalize()
}

// Filter keeps the pairs whose key satisfies keep.
func (a Attributes) Filter(keep func(key string) bool) Attributes {
	var out Attributes
	for _, x := range a {
		if keep(x.Key) {
			out = append(out, x)
		}
	}
	return out
}

// Hash identifies the set: equal sets and only they hash alike.
func (a Attributes) Hash() [sha256.Size]byte {
	h := sha256.New()
	var n [4]byte
	for _, x := range a {
		for _, s := range [...]string{x.Key, x.Value} {
			binary.BigEndian.PutUint32(n[:], uint32(len(s)))
			h.Write(n[:])
			h.Write([]byte(s))
		}
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// String is "key=value key=value", for logs and people; it is not parsed.
func (a Attributes) String() string {
	var b strings.Builder
	for i, x := range a {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(x.Key)
		b.WriteByte('=')
		b.WriteString(x.Value)
	}
	return b.String()
}
