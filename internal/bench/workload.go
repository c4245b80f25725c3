package main

import (
	"fmt"
	"time"
)

const (
	requestSize = 1 << 10 // bytes each way
	// firstByteSize is what a new connection asks: enough to tell one from another.
	firstByteSize = 64
)

// workload is one kind of load; its fields are the load generator's arguments.
type workload struct {
	name, title string
	kind        string // of loads
	conns       int
	fresh       bool // proxies are started anew: memory is read
	metrics     []metric
	// delay is how much longer each packet takes each way.
	delay time.Duration
}

// metric is a figure that is computed from one measurement.
type metric struct {
	name   string
	lower  bool // is better
	digits int
	of     func(*sample) float64
}

// sample is one measurement of one system.
type sample struct {
	Round int
	Load  loaded
	// CPU seconds in the window, of each proxy with all its processes.
	ClientCPU, ServerCPU float64
	// Cores that processes which are not ours used meanwhile, and other machines.
	Noise, Steal float64
	// KB of memory and descriptors for each of Conns idle connections, by side.
	Conns, ClientKB, ServerKB, ClientFDs, ServerFDs float64 `json:",omitempty"`
	// Opening is how long the load generator took until it was ready, seconds.
	Opening float64
	// Failed says why there is nothing to see.
	Failed string `json:",omitempty"`
}

// loaded is what the load generator saw.
type loaded struct {
	Seconds    float64
	Bytes      uint64 // of bulk transfers
	Requests   uint64 // answered
	Errors     uint64
	FirstError string  `json:",omitempty"`
	P50, P99   float64 // µs, of requests, or until a new connection's first byte
}

func (s *sample) cpu() float64 { return s.ClientCPU + s.ServerCPU }

var (
	gbits   = metric{"Gbit/s", false, 2, func(s *sample) float64 { return float64(s.Load.Bytes) * 8 / 1e9 / s.Load.Seconds }}
	perGB   = metric{"CPU s/GB", true, 2, func(s *sample) float64 { return s.cpu() / (float64(s.Load.Bytes) / 1e9) }}
	rate    = metric{"req/s", false, 0, func(s *sample) float64 { return float64(s.Load.Requests) / s.Load.Seconds }}
	p50     = metric{"p50 µs", true, 0, func(s *sample) float64 { return s.Load.P50 }}
	p99     = metric{"p99 µs", true, 0, func(s *sample) float64 { return s.Load.P99 }}
	per100k = metric{"CPU s/100k", true, 2, func(s *sample) float64 { return s.cpu() / float64(s.Load.Requests) * 1e5 }}
	conns   = metric{"conn/s", false, 0, rate.of}
	first50 = metric{"first byte p50 µs", true, 0, p50.of}
	first99 = metric{"p99 µs", true, 0, p99.of}
	perConn = metric{"CPU ms/conn", true, 2, func(s *sample) float64 { return s.cpu() / float64(s.Load.Requests) * 1e3 }}
	opened  = metric{"opened/s", false, 0, func(s *sample) float64 { return s.Conns / s.Opening }}
	kbC     = metric{"client KB", true, 1, func(s *sample) float64 { return s.ClientKB }}
	kbS     = metric{"server KB", true, 1, func(s *sample) float64 { return s.ServerKB }}
	fdsC    = metric{"client fds", true, 2, func(s *sample) float64 { return s.ClientFDs }}
	fdsS    = metric{"server fds", true, 2, func(s *sample) float64 { return s.ServerFDs }}

	bulkMetrics    = []metric{gbits, perGB}
	echoMetrics    = []metric{rate, p50, p99, per100k}
	connectMetrics = []metric{conns, first50, first99, perConn}
	farMetrics     = []metric{first50, first99}
	idleMetrics    = []metric{kbC, kbS, fdsC, fdsS, opened}
	mixedMetrics   = []metric{p50, p99, gbits}
)

func allWorkloads(idle []int) []workload {
	all := []workload{
		{name: "down-1", title: "Bulk to the client, 1 stream", kind: "down", conns: 1, metrics: bulkMetrics},
		{name: "down-8", title: "Bulk to the client, 8 streams", kind: "down", conns: 8, metrics: bulkMetrics},
		{name: "up-1", title: "Bulk to the server, 1 stream", kind: "up", conns: 1, metrics: bulkMetrics},
		{name: "up-8", title: "Bulk to the server, 8 streams", kind: "up", conns: 8, metrics: bulkMetrics},
		{name: "echo-1", title: "1 KB request and answer, 1 open connection", kind: "echo", conns: 1, metrics: echoMetrics},
		{name: "echo-64", title: "1 KB request and answer, 64 open connections", kind: "echo", conns: 64, metrics: echoMetrics},
		{name: "connect", title: "A new connection for each request, 16 workers", kind: "connect", conns: 16, metrics: connectMetrics},
		{name: "far", title: "A new connection for each request, one after the other, over a link of 20 ms there and back",
			kind: "connect", conns: 1, metrics: farMetrics, delay: 10 * time.Millisecond},
		{name: "mixed", title: "1 KB request and answer beside one bulk stream to the client", kind: "mixed", conns: 1, metrics: mixedMetrics},
	}
	for _, n := range idle {
		all = append(all, workload{
			name: fmt.Sprintf("idle-%d", n), title: fmt.Sprintf("%d idle connections: memory and descriptors of each", n),
			kind: "idle", conns: n, fresh: true, metrics: idleMetrics,
		})
	}
	return all
}

// workloadNames has the idle ones under one name, since their number varies.
func workloadNames() []string {
	var names []string
	for _, w := range allWorkloads(nil) {
		names = append(names, w.name)
	}
	return append(names, "idle", decideWorkload)
}

// limit bounds a load generator's life beyond its window, with time for opening its
// connections however slowly.
func (w workload) limit() time.Duration {
	return 2*time.Minute + time.Duration(w.conns)*20*time.Millisecond
}
