package main

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"
	"time"
)

func TestPercentFor(t *testing.T) {
	const mb = 1 << 20
	for live, want := range map[uint64]int{
		0: 700, 1: 700, 4 * mb: 700, // the runtime multiplies its own 4 MB by it, too
		4*mb + 1: 540, 8 * mb: 300, 15*mb + 5: 100, 16 * mb: 100, 17 * mb: 100, 1 << 40: 100,
	} {
		if got := percentFor(live); got != want {
			t.Errorf("%d bytes in use: GOGC=%d, want %d", live, got, want)
		}
	}
	for live := uint64(0); live < 100*mb; live += mb / 3 {
		goal := max(live, 4*mb) * uint64(100+percentFor(live)) / 100
		if goal > max(minHeap+paceStep, 2*live) {
			t.Errorf("%d bytes in use: collected at %d", live, goal)
		}
	}
}

// TestPaceFollowsTheHeap: each collection sets the pace for the next one.
func TestPaceFollowsTheHeap(t *testing.T) {
	before := debug.SetGCPercent(goPercent)
	t.Cleanup(func() { debug.SetGCPercent(before) })
	t.Setenv("GOGC", "")
	stop := paceCollections()
	defer stop()
	percent := func() uint64 {
		s := []metrics.Sample{{Name: "/gc/gogc:percent"}}
		metrics.Read(s)
		return s[0].Value.Uint64()
	}
	becomes := func(what string, ok func(uint64) bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); !ok(percent()); {
			if time.Now().After(deadline) {
				t.Fatalf("%s: GOGC=%d, %d bytes in use", what, percent(), liveHeap())
			}
			runtime.GC()
			time.Sleep(time.Millisecond)
		}
	}
	fits := func(p uint64) bool { return p == uint64(percentFor(liveHeap())) }
	becomes("as it is", fits)
	much := make([]byte, 2*minHeap)
	becomes("much in use", func(p uint64) bool { return p == goPercent })
	runtime.KeepAlive(much)
	becomes("as before", fits)
}

func TestGOGCIsTheOperators(t *testing.T) {
	before := debug.SetGCPercent(goPercent)
	t.Cleanup(func() { debug.SetGCPercent(before) })
	t.Setenv("GOGC", "50")
	paceCollections()()
	if now := debug.SetGCPercent(goPercent); now != goPercent {
		t.Errorf("GOGC=%d", now)
	}
}
