// Package workloadapi gets one SVID by the SPIFFE Workload API, that of the proxy
// itself, and gives it to every workload of the host: one identity for all. Policy
// cannot tell the host's workloads apart then; whoever can run a program on the host
// has the host's name. It is for machines that run one thing, and for agents that do
// not delegate; package spire tells processes apart.
package workloadapi
