package controller

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// ages tells how old what is in force is, of the hosts that there are.
func (s *Server) ages(hosts []*hostRecord) *symbolonv1.Ages {
	out := &symbolonv1.Ages{}
	generations, current := s.policies.generations()
	if n := len(generations); n > 0 {
		out.Policy = timestamppb.New(generations[n-1].Time)
	}
	for _, w := range s.inventory.list("") {
		earlier(&out.SvidOldest, w.Issued)
		if earlier(&out.SvidNextEnd, w.NotAfter) {
			out.SvidNextEndId = w.SPIFFEID
		}
	}
	now := s.opts.Now()
	for _, h := range hosts {
		// One that has ended is no end that comes: the host must enrol again.
		if h.SVIDNotAfter.After(now) && earlier(&out.HostSvidNextEnd, h.SVIDNotAfter) {
			out.HostSvidNextEndId = h.ID
		}
		p := s.hub.presence(h.ID)
		switch {
		case p.connected && p.acked != current:
			out.HostsBehind++
		case !p.connected && earlier(&out.AwaySince, h.seen(p)):
			out.AwayId = h.ID
		}
	}
	revoked, _ := s.revocations.list()
	if n := len(revoked); n > 0 {
		out.Revoked = timestamppb.New(revoked[n-1].Time)
	}
	for _, r := range s.scans.list() {
		out.Scans++
		earlier(&out.ScanOldest, r.Pushed)
		earlier(&out.ScanNextEnd, r.Until)
	}
	return out
}

// earlier takes t if it is before what was there, and tells whether it did.
func earlier(to **timestamppb.Timestamp, t time.Time) bool {
	if *to != nil && !t.Before((*to).AsTime()) {
		return false
	}
	*to = timestamppb.New(t)
	return true
}

// seen is when a host was last heard of, by its record or since the start.
func (h *hostRecord) seen(p presence) time.Time {
	if p.lastSeen.After(h.LastSeen) {
		return p.lastSeen
	}
	return h.LastSeen
}
