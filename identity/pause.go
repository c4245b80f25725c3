package identity

import (
	"math/rand/v2"
	"time"

	"connectrpc.com/connect"
)

// Retries have full jitter, so that the hosts of a controller that comes back do
// not come back together.
const (
	retryBase = 500 * time.Millisecond
	// A workload that has an SVID can wait; one without is refused everywhere.
	maxRetry      = time.Minute
	maxFirstRetry = 5 * time.Second

	// minRotation keeps a controller's mistake (a time in the past) from being a
	// loop.
	minRotation = time.Second
	// rotationJitter is the part of the time to rotation that is given up to spread
	// the requests.
	rotationJitter = 0.1
)

// retryPause is how long to wait after so many failures in a row, from 1, the last
// of which was err.
func retryPause(failures int, hasCredential bool, err error) time.Duration {
	if permanent(err) {
		return maxRetry - time.Duration(rand.Float64()*rotationJitter*float64(maxRetry))
	}
	most := maxFirstRetry
	if hasCredential {
		most = maxRetry
	}
	d := retryBase << min(failures-1, 16)
	return rand.N(min(d, most)) + time.Millisecond
}

// permanent: the controller has judged the request, and will judge it so again until
// somebody changes something. What changes it there (Profiles, roots) wakes us up;
// asking sooner would only be load.
func permanent(err error) bool {
	switch connect.CodeOf(err) {
	case connect.CodeInvalidArgument, connect.CodeFailedPrecondition, connect.CodePermissionDenied:
		return true
	}
	return false
}

// rotationPause is how long to wait before the next SVID is asked for. A controller
// that says nothing sensible gets asked at half of the SVID's life.
func rotationPause(now, rotateAt, notAfter time.Time) time.Duration {
	left := notAfter.Sub(now)
	d := rotateAt.Sub(now)
	if d <= 0 || d >= left {
		d = left / 2
	}
	d -= time.Duration(rand.Float64() * rotationJitter * float64(d))
	return max(d, minRotation)
}
