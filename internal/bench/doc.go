// Command symbolon-bench measures Symbolon's data plane side by side with nothing
// at all and with the usual pairs of TLS proxies. 'make bench' and 'make bench-quick'
// run it; docs/performance.md explains what it measures and has results.
//
// Every system has two network namespaces of its own on one veth pair: a client host
// and a server host (lab.go). The load generator and the backend are this program,
// too ('load' and 'backend'); the peers' proxies are the real ones (peers.go), and so
// are Symbolon's, fed by iptables and steered by a real controller (symbolon.go).
//
// System bare is the floor: what a transparent pair costs that does nothing but carry
// (bare.go, bare_loop.go, bare_carrier.go). What ours takes beyond it is ours; what bare
// takes beyond direct, no transparent pair is spared.
//
// Systems take turns within a round, so that what else the machine does meets all
// of them alike; results are medians over rounds. CPU is read from /proc for each
// proxy's tree of processes at the edges of the measured window (procfs.go).
//
// It is a benchmark and not a test: it fails when something does not work, never
// because something is slow.
package main
