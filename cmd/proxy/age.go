package main

import (
	"time"

	"github.com/symbolon/symbolon/identity"
)

// svidAges sums up the SVIDs of workloads in use, for the time that the controller is
// away: since when the oldest is valid, when the first of them ends, and how many could
// not be replaced when they were to be.
func svidAges(all []identity.Status) map[string]any {
	out := map[string]any{"count": 0, "not_replaced": 0}
	var count, failed int
	var oldest, next time.Time
	for _, s := range all {
		if s.Err != nil {
			failed++
		}
		if s.Credential == nil {
			continue
		}
		count++
		leaf := s.Credential.SVID.Chain[0]
		if oldest.IsZero() || leaf.NotBefore.Before(oldest) {
			oldest = leaf.NotBefore
		}
		if end := s.Credential.SVID.NotAfter(); next.IsZero() || end.Before(next) {
			next = end
		}
	}
	out["count"], out["not_replaced"] = count, failed
	if count > 0 {
		out["oldest_since"], out["next_end"] = oldest.UTC(), next.UTC()
	}
	return out
}
