package main

import (
	"bytes"
	"crypto/x509"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
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

// received notes in a generation from the controller when it was heard. It goes to the next
// process with it, so that a restart makes nothing younger. Only the session calls it.
func (d *daemonParts) received(g *symbolonv1.Generation) {
	now := timestamppb.Now()
	was := d.generation.Load()
	r := &symbolonv1.Received{Policy: now, Revocations: now, Bundles: make(map[string]*timestamppb.Timestamp)}
	if t := was.GetReceived().GetRevocations(); t != nil && g.GetRevocations() == nil {
		r.Revocations = t
	}
	own := d.host.cred.Load().TrustDomain.Name()
	before, after := bundlesOf(was, own), bundlesOf(g, own)
	for name, roots := range after {
		r.Bundles[name] = now
		if t := was.GetReceived().GetBundles()[name]; t != nil && slices.EqualFunc(before[name], roots, bytes.Equal) {
			r.Bundles[name] = t
		}
	}
	g.Received = r
}

// receivedRevocations notes that what is revoked is as the controller says now. It is on its
// way to the next process with the next change at the latest.
func (d *daemonParts) receivedRevocations() {
	was := d.generation.Load()
	if was == nil {
		return // the generation that comes with it notes it
	}
	g := shallow(was)
	g.Received = &symbolonv1.Received{
		Policy: was.GetReceived().GetPolicy(), Revocations: timestamppb.Now(), Bundles: was.GetReceived().GetBundles(),
	}
	d.generation.Store(g)
	d.keeper.changed()
}

// bundlesOf are the roots that a generation gives, by trust domain, in one order.
func bundlesOf(g *symbolonv1.Generation, own string) map[string][][]byte {
	out := make(map[string][][]byte)
	if roots := g.GetBundle(); len(roots) > 0 {
		out[own] = roots
	}
	for _, b := range g.GetBundles() {
		out[b.GetTrustDomain()] = b.GetRoots()
	}
	for name, roots := range out {
		out[name] = slices.SortedFunc(slices.Values(roots), bytes.Compare)
	}
	return out
}

// addAges puts in since when things are as they are. What never was is not there.
func (d *daemonParts) addAges(out map[string]any) {
	put := func(key string, t time.Time) {
		if !t.IsZero() {
			out[key] = t.UTC()
		}
	}
	g := d.generation.Load()
	r := g.GetReceived()
	since, heard := d.session.Ages()
	put("controller_since", since)
	// What an earlier process has heard counts, too.
	for _, t := range []*timestamppb.Timestamp{r.GetPolicy(), r.GetRevocations()} {
		if t != nil && t.AsTime().After(heard) {
			heard = t.AsTime()
		}
	}
	put("controller_heard", heard)
	if t := r.GetPolicy(); t != nil {
		put("policy_since", t.AsTime())
	}
	if t := r.GetRevocations(); t != nil {
		put("revocations_since", t.AsTime())
	}
	bundles := make(map[string]map[string]any)
	for name, roots := range bundlesOf(g, d.host.cred.Load().TrustDomain.Name()) {
		b := map[string]any{"roots": len(roots)}
		if t := r.GetBundles()[name]; t != nil {
			b["since"] = t.AsTime()
		}
		var end time.Time
		for _, der := range roots {
			c, err := x509.ParseCertificate(der) // apply has read it
			if err == nil && (end.IsZero() || c.NotAfter.Before(end)) {
				end = c.NotAfter
			}
		}
		if !end.IsZero() {
			b["next_end"] = end.UTC()
		}
		bundles[name] = b
	}
	out["bundles"] = bundles
}
