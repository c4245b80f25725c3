package main

import (
	"context"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	memoryEvery = time.Second
	// quietAllocs is how much may be allocated between two looks at a quiet time, bytes.
	quietAllocs = 1 << 20
	// garbageMin is how much garbage, and memory that the runtime keeps for the next
	// burst, is worth a collection, bytes, if it is also more than a quarter of what is in
	// use.
	garbageMin = 2 << 20
)

// tidyMemory collects garbage and gives memory back when little happens, until ctx
// ends. Connections are opened in bursts, and what their handshakes leave behind
// would else stay for as long as the connections are idle.
func tidyMemory(ctx context.Context) {
	samples := []metrics.Sample{
		{Name: "/gc/heap/allocs:bytes"}, {Name: "/memory/classes/heap/objects:bytes"}, {Name: "/gc/heap/live:bytes"},
		{Name: "/memory/classes/heap/free:bytes"},
	}
	tick := time.NewTicker(memoryEvery)
	defer tick.Stop()
	var before uint64
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		metrics.Read(samples)
		allocs, objects, live := samples[0].Value.Uint64(), samples[1].Value.Uint64(), samples[2].Value.Uint64()
		kept := objects + samples[3].Value.Uint64()
		if allocs-before < quietAllocs && kept > live+max(live/4, garbageMin) {
			debug.FreeOSMemory()
		}
		before = allocs
	}
}
