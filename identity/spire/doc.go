// Package spire gets the SVIDs of this host's workloads from a SPIRE agent, by its
// Delegated Identity API, or by the SPIFFE Broker API, which is experimental: the proxy
// names a process, the agent attests it as if it had asked itself, and hands out the SVID
// of its registration entry.
//
// The agent attests a process; so with this source each process is a workload of its
// own (identity.NewProcessResolver). What is attested is the process that connected a
// socket, or the one that was found to listen on it, as it was when it was asked about:
//
//   - Its number cannot be another process's: a pidfd is held before the agent is
//     asked, and the start time is compared afterwards.
//   - It cannot run another program for the moment in which the agent looks: an exec
//     meanwhile, by any of its threads, voids the answer (identity.ExecWatch).
//   - When it ends, its SVID is not used for anything new. A connection that was let
//     through before may go on until that SVID expires: what the process sent last is
//     still under way, and whoever inherited its socket got it from the process.
//   - When it executes another program it is another workload; when it executes the
//     same one anew, or changes its users or groups, its SVID is withdrawn, and it is
//     attested again. That is noticed within seconds.
//   - Who shares a socket with an attested process (a child, or one that it sent the
//     descriptor to) shares its identity on that socket.
//
// What the agent says counts: no SVID, several without a rule to choose by, or one that
// is no workload's withdraw what there was. That it says nothing (it restarts, it
// refuses the proxy) changes nothing: the last SVID stays until it expires.
//
// The proxy must be an attested workload itself, with an entry whose SPIFFE ID is among
// the agent's authorized_delegates or brokers, and share the agent's PID namespace.
package spire
