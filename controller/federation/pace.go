package federation

import (
	"math/rand/v2"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
)

const (
	// DefaultRefresh is for bundles without a hint (SPIFFE Federation, section 4.4.1).
	DefaultRefresh = 5 * time.Minute
	// minRefresh and maxRefresh bound what a hint can make us do.
	minRefresh, maxRefresh = 30 * time.Second, 24 * time.Hour
	retryFirst, retryMax   = 5 * time.Second, 5 * time.Minute
)

// RefreshAfter is how long a bundle that was fetched is good for.
func RefreshAfter(b *spiffebundle.Bundle) time.Duration {
	hint, ok := b.RefreshHint()
	if !ok || hint <= 0 {
		return DefaultRefresh
	}
	return min(max(hint, minRefresh), maxRefresh)
}

// RetryAfter is the pause after the n-th failure in a row, from 1: random, so that many
// controllers do not come at once to an endpoint that has just come back.
func RetryAfter(n int) time.Duration {
	most := min(retryMax, retryFirst<<min(n-1, 10))
	return most/2 + rand.N(most/2)
}
