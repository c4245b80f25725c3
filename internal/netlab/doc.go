// Package netlab makes little worlds of network namespaces: hosts, links,
// switches, routers that translate addresses, and balancers, with real programs
// in them. Tests, the demo and the benchmarks stand on it.
//
//	func TestThroughNAT(t *testing.T) {
//		w := netlab.Test(t, "iptables", "nginx", "curl")
//		net := w.TwoHosts()                  // client -- router -- server, IPv4 and IPv6
//		net.Router.SNAT(net.RouterToServer)  // the server sees the router's address
//
//		if _, err := net.Server.Nginx(t.Context(), netlab.Nginx{Port: 80, Body: "hello"}); err != nil {
//			t.Fatal(err)
//		}
//		page, err := net.Client.Output(t.Context(), "curl", "-sS", "http://10.2.0.2/")
//		...
//	}
//
// # Errors
//
// Calls that build the world (Host, Router, Switch, Link, Attach, Route, SNAT,
// ...) return no error: the first failure is kept, later building calls do
// nothing, and [World.Err] as well as every call that uses the world reports it.
// In a world of [Test] the failure ends the test at the call; such calls belong
// on the test's goroutine. Calls that run programs or open sockets return errors
// as usual.
//
// # What a host is
//
// A host is a network namespace and nothing more: files, users and processes are
// the machine's. [Host.Command] and [Host.Start] run programs in it, optionally
// as another user and, where the machine has cgroup v2 (alone or beside v1), in a
// cgroup of their own that looks like a systemd unit's. [Host.Do], [Host.Dial]
// and [Host.Listen] make sockets in it for the calling process; to the kernel
// such sockets have the calling process's user, executable and cgroup.
// Namespaces have no /etc/hosts and no resolver of their own: use addresses.
//
// # Looking at the wire
//
// [Host.Capture] records an interface with tcpdump. It starts and stops exactly:
// a frame of the capture's own is seen in the file before Capture and Stop
// return, so nothing in between is missed. [Capture.Contains] looks for bytes in
// packets and in reassembled streams; check [Capture.Packets] as well, so that
// "not found" cannot mean that nothing was there to look at.
//
// # What is left behind
//
// Nothing. [World.Close] ends every process in the world's namespaces and removes
// namespaces, links, cgroups and files. What a killed process leaves, the next
// [New] removes ([Sweep]): every name carries its owner's process id and start
// time. Two directories that belong to no world are made if they are missing
// and stay: /run/netns (as "ip netns add" does) and /run/sshd (which sshd demands).
//
// The machine's own network namespace is never touched: links are made inside
// the namespaces they join.
package netlab
