package proxy

import (
	"errors"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// doubtful tells whether the bundles of the local workload are others than those by which
// the peers of these connections were verified in their handshakes.
func (q *question) doubtful() bool {
	if q.kind != toTunnel && q.kind != fromTunnel || q.endpoint == nil {
		return false
	}
	e := q.near.current.Load()
	return e != nil && e.Credential().Bundles != q.endpoint.Credential().Bundles
}

// disbelieved is why nobody here vouches for the connection's peer any more, however good
// its certificate was in the handshake: its trust domain has no bundle, or the root that
// it came from was withdrawn. 0: somebody does.
func (l *live) disbelieved(now time.Time) symbolonv1.Reason {
	if l.leaf == nil || !l.question.doubtful() {
		return 0
	}
	if err := l.question.near.current.Load().Vouches(l.leaf, l.above, now); err != nil {
		return disbelief(err)
	}
	return 0
}

// disbelief is the reason for an error of Vouches.
func disbelief(err error) symbolonv1.Reason {
	if errors.Is(err, identity.ErrNoBundle) {
		return symbolonv1.Reason_REASON_WRONG_TRUST_DOMAIN
	}
	return symbolonv1.Reason_REASON_PEER_UNVERIFIED
}
