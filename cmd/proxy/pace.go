package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
)

const (
	// minHeap is how large the heap may become before garbage is collected, bytes,
	// however little of it is in use.
	minHeap = 32 << 20
	// paceStep is how much the heap in use has to change for the pace to, bytes.
	paceStep = 1 << 20
	// goPercent and goMinHeap are the runtime's own: it collects when the heap has doubled,
	// but not below 4 MB.
	goPercent = 100
	goMinHeap = 4 << 20
)

// pacer makes collections rarer where little is in use. A handshake leaves 100 KB of garbage
// behind, mostly crypto/tls's, and with few connections open a few MB are in use: at the
// runtime's pace each 50 new tunnels cost a collection. GOMEMLIMIT holds all the same.
type pacer struct {
	percent int
	stopped atomic.Bool
}

// paceCollections sets the pace after each collection, until stop. Whoever has set GOGC has
// chosen another one.
func paceCollections() (stop func()) {
	if os.Getenv("GOGC") != "" {
		return func() {}
	}
	p := &pacer{percent: goPercent}
	p.set(liveHeap())
	p.watch()
	return func() { p.stopped.Store(true) }
}

// collected is reachable from nowhere, so that its finalizer is called after the next
// collection.
type collected struct{ p *pacer }

func (p *pacer) watch() {
	runtime.SetFinalizer(&collected{p}, func(c *collected) {
		if !c.p.stopped.Load() {
			c.p.set(liveHeap())
			c.p.watch()
		}
	})
}

// set takes effect only where something changes: it stops the world for a moment.
func (p *pacer) set(live uint64) {
	if percent := percentFor(live); percent != p.percent {
		p.percent = percent
		debug.SetGCPercent(percent)
	}
}

// liveHeap is what the last collection has left, bytes.
func liveHeap() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// percentFor is GOGC for so many bytes in use: the runtime's own, or what makes the heap
// that is collected minHeap.
func percentFor(live uint64) int {
	live = max(goMinHeap, (live+paceStep-1)/paceStep*paceStep)
	if live >= minHeap {
		return goPercent
	}
	return max(goPercent, int(100*minHeap/live)-100)
}
