package agent

import (
	"math/rand/v2"
	"time"
)

// Retries have full jitter: the workloads of a host whose agent comes back must not
// all come back at once. An agent is on this machine, and is away only briefly.
const (
	retryBase = 200 * time.Millisecond
	retryMax  = 10 * time.Second
)

// Pause is how long to wait after so many failures in a row, from 1.
func Pause(failures int) time.Duration {
	return rand.N(min(retryBase<<min(failures-1, 10), retryMax)) + time.Millisecond
}
