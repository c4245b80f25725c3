// Package handover gives a proxy's open sockets, and what it knows, to the process that
// comes after it. There are two ways, with the same things in them:
//
//   - A service manager keeps descriptors while no process runs (systemd's file descriptor
//     store, sd_pid_notify_with_fds(3)): Store puts them there, and the next process
//     finds them, by name, in LISTEN_FDS (sd_listen_fds(3)). Connections that arrive in
//     between wait in the listeners' backlogs, also after a crash.
//   - A running process starts the next one itself (Spawn), which inherits them in the
//     same form and one socket more, over which the two agree on the moment of change
//     (Control).
//
// What is known is a Snapshot: policy, certificates and their private keys. It
// travels in a sealed memory file (Seal), which no process can change any more and
// which has no name on any disk. Everything here is close-on-exec: no other child
// gets it.
package handover
