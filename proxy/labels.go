package proxy

import (
	"strings"
	"unsafe"

	lru "github.com/hashicorp/golang-lru/v2"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// labelSets are the labels of principals in the form of records: every connection of
// a workload has the same ones, and shares them.
var labelSets = func() *lru.Cache[labelKey, labelSet] {
	c, err := lru.New[labelKey, labelSet](4096)
	if err != nil {
		panic(err) // only for a size below one
	}
	return c
}()

// labelKey is where immutable attributes are in memory. The entry keeps them there,
// so that no others can be.
type labelKey struct {
	at *identity.Attribute
	n  int
}

type labelSet struct {
	attributes identity.Attributes
	proto      map[string]*symbolonv1.LabelValues
}

// labelsOf are the attributes that are labels, not to be changed.
func labelsOf(a identity.Attributes) map[string]*symbolonv1.LabelValues {
	k := labelKey{unsafe.SliceData(a), len(a)}
	if s, ok := labelSets.Get(k); ok {
		return s.proto
	}
	s := labelSet{a, a.Filter(func(k string) bool { return !strings.Contains(k, ".") }).Proto()}
	labelSets.Add(k, s)
	return s.proto
}
