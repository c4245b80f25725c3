// Package redirect is the kernel's side of the proxy: it brings the host's TCP
// connections to the proxy's listeners, tells where each one wanted to go, and
// who is at its other end.
//
// Rules loads iptables rules and ipsets (IPv4 and IPv6) that
//
//   - send connections which local processes make to the configured destinations
//     to the outbound listener, on 127.0.0.1 and [::1] (Config.OutboundAddrs);
//   - send connections which arrive for the configured ports to the inbound
//     listener, on the wildcard address (Config.InboundAddr), because the kernel
//     rewrites their destination to the address of the interface they came in by;
//   - refuse, in the filter table, whatever should have been redirected and was
//     not (the guard), and whatever is made straight to the two listeners;
//   - track, by the raw table, what the proxy itself dials in a conntrack zone of its
//     own (zone-orig 19712, legs to applications under their client's address aside).
//
// The last is because conntrack knows connections by addresses and ports alone, and the
// proxy's have those that an application's may have next, or had last. A closed
// connection's entry stays for 10 to 120 seconds: after a tunnel that the peer has reset,
// an application that gets its port and calls the same destination would not be redirected
// but refused by the guard, and a tunnel from the port of an application that the proxy
// has reset would end in the proxy's own listener. Where the kernel has no target CT or no
// zones, Rules.Warnings says so, and just that happens, with Config.FailClosed or without:
// the guard stands as long as the redirection does. It does not hold up what the tunnel's
// entry translates to a destination that is not intercepted: intercept those too there
// (the service and pod networks of Kubernetes, or 127.0.0.0/8 beside the host's addresses).
// A host that has zones of its own for what it sends must leave the proxy's connections out
// of them: our rule comes first. Flushing the raw table cuts the proxy's connections.
//
// Two options change how inbound connections are taken. Config.Transparent takes them
// by TPROXY: nothing is translated, LocalAddr is the original destination and
// RemoteAddr the client, whatever conntrack remembers. Connections from this host to
// itself, which never pass PREROUTING, are redirected all the same. With a dead proxy
// such connections time out, where redirected ones are refused. Config.PreserveSource
// lets the proxy reach local applications under their client's address
// (Conntrack.DialAs), though from another port, 16384 to 32767: conntrack would take a
// connection from the client's own port for the client's. The answers come back by a
// mark, a routing rule (fwmark 0x4d0003, priority 77) and a table of ours (19712); where
// these are missing, the answers are dropped and do not leave the host. A client that
// itself calls from those ports, as behind a NAT or a balancer that uses them, may find
// one taken: its SYN then has no answer until the other connection ends. IPv6 link-local
// clients are not preserved.
//
// Only new connections are touched: those that exist when the rules come or go
// are left alone (but, with PreserveSource, those that only the host itself has spoken
// on since, from a protected port to one of 16384 to 32767). With the proxy dead a redirected connection is refused, since
// nobody listens. With Config.FailClosed false the rules hold only while
// Rules.Watch refreshes them: they lapse by themselves a few seconds after the
// proxy has died.
//
// The proxy's own sockets are told from the applications' by their mark (Control,
// Dialer) and by the cgroup of the process that loaded the rules: a mark alone can
// be set with CAP_NET_RAW, which containers have by default. So the process that
// dials must have called Install, from the cgroup it stays in, at each start.
// Rules.Warnings says where the cgroup cannot tell them apart. What a process sends
// through packet sockets, which that capability also allows, netfilter never sees;
// there only the other host's proxy protects.
//
// Destinations on the host itself, 127.0.0.0/8 and ::1 included, are intercepted
// like any other if Config.Outbound covers them.
//
// So are link-local ones. A cloud's metadata service at 169.254.169.254 therefore
// needs an External in policy or a place in Config.ExcludeOutbound. The kernel
// cannot translate IPv6 link-local destinations (fe80::/10) to loopback: connections
// to them are refused wherever others would be redirected, so that a program which
// lives on them, such as a BGP speaker with unnumbered peers, needs
// Config.ExcludeOutbound. Neighbour discovery is no TCP and goes on. The host's own
// IPv6 link-local addresses are refused for protected ports in any case, or they
// would be a way around.
//
// An accepted connection is asked:
//
//	caller, err := connects.Caller(conn)       // who called connect, from where and to whom
//	path, err := cgroups.Path(caller.CgroupID) // the cgroup's path
//
// Without a record (ErrNoCaller), or with one that does not fit, it is asked
//
//	tuple, err := conntrack.ClientTuple(conn)      // who called, whom did it call
//	owner, err := diag.Owner(tuple.Src, tuple.Dst) // its socket: uid, inode, cgroup
//	err = StillOpen(conn)                          // the answer was about this connection
//
// conn.RemoteAddr is no substitute for ClientTuple: where two connections from
// one client port to different destinations meet in one listener, the kernel
// rewrites the second one's port, and the rewritten port may be another
// process's.
//
// What must hold of the machine: CAP_NET_ADMIN, the tools of the Debian packages
// iptables and ipset, the kernel's xt_cgroup match, and IPv6 rules wherever the
// kernel speaks IPv6. The legacy backend loads whole tables: while the proxy is down,
// its cgroup gone and its rules left in force, it refuses other programs' changes to
// the same tables (nft does not). Everything acts on the calling thread's network
// namespace; Diag and Conntrack stay in the one they were opened in.
package redirect
