// Package agent is what the sources that ask a SPIFFE agent have in common: which one
// of several SVIDs is the workload's, and by which roots it judges others.
package agent

import (
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/identity"
)

// Rule chooses among the SVIDs of a workload that has several. Both conditions must
// hold; an empty one holds always.
type Rule struct {
	// Hint is that of the SVID's registration entry.
	Hint string
	// PathPrefix is what the path of the ID begins with, whole segments: "/prod" is the
	// beginning of "/prod/web", not of "/production/web".
	PathPrefix string
}

// Offer is one SVID that an agent offers.
type Offer struct {
	ID   spiffeid.ID
	Hint string
}

// told is how many IDs an error lists.
const told = 8

// Choose returns the place of the workload's SVID among offers. One alone needs no
// rule. Their order means nothing: agents sort by what nobody chose. Errors:
// identity.ErrWithdrawn if there is none, or more than one is left.
func (r Rule) Choose(offers []Offer) (int, error) {
	switch len(offers) {
	case 0:
		return 0, fmt.Errorf("%w: the agent has none for this workload; it needs a registration entry whose selectors match", identity.ErrWithdrawn)
	case 1:
		return 0, nil
	}
	if r == (Rule{}) {
		return 0, fmt.Errorf("%w: the agent offers several (%s); say which with identity.spire.hint or identity.spire.path_prefix, or leave one registration entry", identity.ErrWithdrawn, list(offers))
	}
	var fit []Offer
	place := 0
	for i, o := range offers {
		if r.fits(o) {
			fit = append(fit, o)
			place = i
		}
	}
	switch len(fit) {
	case 0:
		return 0, fmt.Errorf("%w: the agent offers several (%s), and none has %s: give one registration entry that, or change the rule", identity.ErrWithdrawn, list(offers), r)
	case 1:
		return place, nil
	}
	return 0, fmt.Errorf("%w: the agent offers several (%s) that have %s: leave one such registration entry, or make the rule narrower", identity.ErrWithdrawn, list(fit), r)
}

func (r Rule) fits(o Offer) bool {
	if r.Hint != "" && o.Hint != r.Hint {
		return false
	}
	prefix := strings.TrimSuffix(r.PathPrefix, "/")
	rest, ok := strings.CutPrefix(o.ID.Path(), prefix)
	return ok && (rest == "" || rest[0] == '/')
}

// String is the rule in words.
func (r Rule) String() string {
	var parts []string
	if r.Hint != "" {
		parts = append(parts, fmt.Sprintf("the hint %q", r.Hint))
	}
	if r.PathPrefix != "" {
		parts = append(parts, fmt.Sprintf("a path below %s", r.PathPrefix))
	}
	return strings.Join(parts, " and ")
}

func list(offers []Offer) string {
	var b strings.Builder
	for i, o := range offers {
		if i == told {
			fmt.Fprintf(&b, " and %d more", len(offers)-told)
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(o.ID.String())
		if o.Hint != "" {
			fmt.Fprintf(&b, " (hint %q)", o.Hint)
		}
	}
	return b.String()
}
