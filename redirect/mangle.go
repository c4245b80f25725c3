package redirect

import "fmt"

// Marks in conntrack (connmark): the upper half only, so that whatever others keep in
// the lower half stays. Neither is a mark of sockets or packets, should another
// program's rules copy one to the other.
const (
	// connInbound is a connection from another host that TPROXY took.
	connInbound = "0x4d050000/0xffff0000"
	// connClient is a leg to a local application that bears its client's address.
	connClient = "0x4d020000/0xffff0000"
)

// mangled says whether the configuration needs rules in the mangle table.
func (c Config) mangled() bool { return c.Transparent || c.PreserveSource }

// mangleChains take inbound connections without translating them (Transparent), and
// bring the answers to a client's address that the proxy bears back to the proxy
// (PreserveSource). While draining, only the latter is left.
func (c Config) mangleChains(f family, draining bool) []chain {
	var pre []string
	if c.PreserveSource {
		// The client could reach into the connection that bears its address, behind the
		// proxy's back: what comes from outside is no part of it. Nor is it to be answered:
		// conntrack would take the answer for the application's.
		pre = append(pre,
			"! -i lo -p tcp -m connmark --mark "+connClient+" -j DROP",
			// Conntrack says nothing of what it finds out of place, or has forgotten.
			fmt.Sprintf("! -i lo -p tcp -m tcp ! --syn --sport %d:%d -m set --match-set %s dst -m conntrack --ctstate INVALID,NEW -j DROP", clientPorts.First, clientPorts.Last, setIn),
		)
	}
	if c.Transparent && !draining {
		pre = append(append(pre, "-i lo -j RETURN"), c.tproxy(f)...)
	}
	var chains []chain
	if len(pre) > 0 {
		chains = append(chains, chain{chainMPre, "PREROUTING", pre})
	}
	if c.PreserveSource {
		chains = append(chains,
			chain{chainMOut, "OUTPUT", []string{
				// New ones only: never the client's own, should the port be the same.
				fmt.Sprintf("-p tcp -m mark --mark %#x -m conntrack --ctstate NEW -j CONNMARK --set-xmark %s", markClient, connClient),
				// Conntrack has forgotten a connection, as after "conntrack -F". If it was one
				// with a client's address, the application's bytes must not leave the host for
				// that address. If it was another, to such a port by chance, it ends.
				fmt.Sprintf("-p tcp -m tcp ! --syn --dport %d:%d -m mark ! --mark %#x/%#x -m set --match-set %s src -m conntrack --ctstate NEW -j CONNMARK --set-xmark %s",
					clientPorts.First, clientPorts.Last, markBase, uint32(markMask), setIn, connClient),
				fmt.Sprintf("-p tcp -m connmark --mark %s -m mark ! --mark %#x -j MARK --set-xmark %#x/0xffffffff", connClient, markClient, markAnswer),
			}},
			// The guard: without the route, which another program may have removed, the
			// answers would go to the client, in the clear. Here and not in the filter table,
			// which is still told the way that the packet would have taken unmarked.
			chain{chainMPost, "POSTROUTING", []string{fmt.Sprintf("! -o lo -m mark --mark %#x -j DROP", markAnswer)}},
		)
	}
	return chains
}

// tproxy gives inbound connections to the listener as they are. They are for this
// host's own addresses, so that they need no route to get there.
//
// The target drops what it finds no socket for: with the proxy dead, connections
// time out where REDIRECT's are refused.
func (c Config) tproxy(f family) []string {
	syn := "-p tcp -m tcp --syn -m addrtype --dst-type LOCAL -m set --match-set " + setIn + " dst" + c.whileAlive(f)
	target := fmt.Sprintf("-j TPROXY --on-port %d --on-ip %s --tproxy-mark %#x/0xffffffff", c.InboundPort, f.any, MarkInbound)
	return []string{
		syn + " -j CONNMARK --set-xmark " + connInbound,
		syn + " " + target,
		// An open connection finds its socket by itself. But the ACK that completes a
		// handshake by a SYN cookie has none yet, and would find the application's.
		"-p tcp -m tcp ! --syn -m connmark --mark " + connInbound + " -m conntrack --ctdir ORIGINAL " + target,
	}
}
