package redirect

import (
	"fmt"
	"slices"
	"strings"
)

// Names in the kernel: everything of ours begins with one of the two prefixes.
const (
	chainPrefix = "SYMBOLON_"
	chainPre    = "SYMBOLON_PRE"  // nat PREROUTING: to the inbound listener
	chainOut    = "SYMBOLON_OUT"  // nat OUTPUT: to the outbound listener
	chainGIn    = "SYMBOLON_GIN"  // filter INPUT: the guard
	chainGOut   = "SYMBOLON_GOUT" // filter OUTPUT: the guard
	chainROut   = "SYMBOLON_ROUT" // raw OUTPUT: the proxy's own connections, tracked apart
	// With Config.PreserveSource or Config.Transparent only.
	chainPost  = "SYMBOLON_POST"  // nat POSTROUTING: no other program's translation
	chainMPre  = "SYMBOLON_MPRE"  // mangle PREROUTING: to the inbound listener
	chainMOut  = "SYMBOLON_MOUT"  // mangle OUTPUT: answers, to the proxy
	chainMPost = "SYMBOLON_MPOST" // mangle POSTROUTING: answers, nowhere else

	setPrefix = "symbolon_"
	setIn     = "symbolon_in"    // bitmap:port, the protected local ports, both families
	setOut4   = "symbolon_out4"  // hash:net, the destinations to intercept
	setOut6   = "symbolon_out6"  //
	setLive4  = "symbolon_live4" // hash:net, everything, while the proxy is alive (fail open only)
	setLive6  = "symbolon_live6" //
)

func isOurs(chain string) bool { return strings.HasPrefix(chain, chainPrefix) }

// chain is one of our chains: where it hangs, and its rules in the form that
// follows "-A NAME".
type chain struct {
	name, hook string
	rules      []string
}

// natChains are the redirections. Everything that must hold of them was measured;
// each rule says what would go wrong without it.
func (c Config) natChains(f family, own ownSockets) []chain {
	const syn = "-p tcp -m tcp --syn"
	ports := fmt.Sprintf("-m multiport --dports %d,%d", c.OutboundPort, c.InboundPort)
	live := c.whileAlive(f)
	in := "-m set --match-set " + setIn + " dst"
	toInbound := fmt.Sprintf("-j REDIRECT --to-ports %d", c.InboundPort)
	out := []string{
		fmt.Sprintf("-m mark --mark %#x%s -j RETURN", MarkApp, own.match),
		// A tunnel that ends on this host never passes PREROUTING.
		fmt.Sprintf("%s -m mark --mark %#x%s -m addrtype --dst-type LOCAL %s%s %s", syn, MarkTunnel, own.match, in, live, toInbound),
		fmt.Sprintf("-m mark --mark %#x/%#x%s -j RETURN", markBase, uint32(markMask), own.match),
	}
	if f.untranslatable != "" {
		// The connection would hang. The guard decides on it.
		out = append(out, "-d "+f.untranslatable+" -j RETURN")
	}
	out = append(out,
		// Made straight to a listener by the host's own address: redirected, it would
		// look like a connection to be proxied, to ourselves. The guard refuses it.
		syn+" "+ports+" -m addrtype --dst-type LOCAL -j RETURN",
		syn+" -m set --match-set "+f.outSet+" dst"+live+fmt.Sprintf(" -j REDIRECT --to-ports %d", c.OutboundPort),
	)
	// --syn: a connection from before the rules reaches conntrack as new, and a
	// translation in its midst would reset it.
	inbound := syn + " -m addrtype --dst-type LOCAL " + in + live + " " + toInbound
	if c.Transparent {
		// Taken already. Another program's rule must not send it elsewhere.
		inbound = fmt.Sprintf("-m mark --mark %#x -j ACCEPT", MarkInbound)
	}
	chains := []chain{
		// What was made on this host has been through OUTPUT.
		{chainPre, "PREROUTING", []string{"-i lo -j RETURN", inbound}},
		{chainOut, "OUTPUT", out},
	}
	if c.PreserveSource {
		// A rule that masquerades the client's network would undo it.
		chains = append(chains, chain{chainPost, "POSTROUTING", []string{fmt.Sprintf("-o lo -m mark --mark %#x -j ACCEPT", markClient)}})
	}
	return chains
}

// filterChains are the guard: what the redirections should have caught and did not
// (another program's rule came first; the table was flushed; conntrack already
// knew the tuple, as after a stray ACK that a sender can forge), or could not catch,
// is refused.
func (c Config) filterChains(f family, own ownSockets) []chain {
	const (
		syn    = "-p tcp -m tcp --syn"
		reject = " -j REJECT --reject-with tcp-reset"
	)
	live := c.whileAlive(f)
	in := " -m set --match-set " + setIn + " dst"
	out := []string{
		opened,
		fmt.Sprintf("-m mark --mark %#x/%#x%s -j RETURN", markBase, uint32(markMask), own.match),
	}
	if f.untranslatable != "" {
		// The host's own address of that kind would be a local process's way around the
		// protection of local ports, also where other hosts' are excluded.
		out = append(out, "-d "+f.untranslatable+" -o lo "+syn+in+live+reject)
	}
	out = append(out,
		// This is what a redirected connection looks like by now.
		fmt.Sprintf("-d %s -p tcp -m tcp --dport %d -j RETURN", f.loopback, c.OutboundPort),
		syn+" -m set --match-set "+f.outSet+" dst"+live+reject,
	)
	return []chain{{chainGIn, "INPUT", c.guardIn(in+live, reject)}, {chainGOut, "OUTPUT", out}}
}

// opened lets pass what does not open a connection, before anything else is asked: of the
// packets of bulk all, and what is asked of a packet is a tenth of what moving it costs.
const opened = "-p tcp -m tcp ! --syn -j RETURN"

func (c Config) guardIn(protected, reject string) []string {
	const (
		syn    = "-p tcp -m tcp --syn"
		middle = "-p tcp -m tcp ! --syn -m conntrack ! --ctstate RELATED,ESTABLISHED"
	)
	rules := []string{fmt.Sprintf("%s -m multiport --dports %d,%d -m conntrack ! --ctstate DNAT", syn, c.OutboundPort, c.InboundPort) + reject}
	if c.PreserveSource {
		// The proxy to its own listener: the client has opened a connection from the same
		// port at the same moment, and conntrack took the one for the other. An answer
		// would go to the client.
		rules = append(rules, fmt.Sprintf("-i lo -p tcp -m tcp --dport %d -m mark --mark %#x -j DROP", c.InboundPort, markClient))
	}
	rules = append(rules, "-i lo -j RETURN")
	if !c.Transparent {
		if !c.PreserveSource {
			rules = append([]string{opened}, rules...)
		}
		return append(rules, syn+protected+reject)
	}
	return append(rules,
		fmt.Sprintf("-m mark --mark %#x -j RETURN", MarkInbound), // TPROXY took it
		syn+protected+reject,
		// A SYN cookie is good for whoever listens on the port that it names. Given by our
		// listener, it must not open a connection to the application's, once conntrack
		// has forgotten the SYN. What is open already (from before the rules, if conntrack
		// does not know it) has a socket by now, and the socket a cgroup.
		middle+" -m cgroup --path \"/\" -j RETURN",
		middle+protected+reject,
	)
}

// whileAlive is the condition that ends by itself when the proxy has died, for
// hosts that fail open.
func (c Config) whileAlive(f family) string {
	if c.FailClosed {
		return ""
	}
	return " -m set --match-set " + f.liveSet + " dst"
}

// installScript brings a table from what is saved to exactly our chains and one
// jump to each, first in its hook, in one transaction. ":CHAIN" with --noflush
// empties that chain only. Chains of ours that another configuration has left go.
func installScript(table string, saved savedTable, want []chain) string {
	if len(want) == 0 {
		return removeScript(table, saved, true)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "*%s\n", table)
	for _, c := range want {
		fmt.Fprintf(&b, ":%s - [0:0]\n", c.name)
	}
	for _, c := range want {
		for _, rule := range c.rules {
			fmt.Fprintf(&b, "-A %s %s\n", c.name, rule)
		}
	}
	for _, c := range want {
		for _, line := range saved.deleteJumps(c.name) {
			b.WriteString(line + "\n")
		}
		fmt.Fprintf(&b, "-I %s 1 -j %s\n", c.hook, c.name)
	}
	for _, name := range saved.chains {
		if isOurs(name) && !slices.ContainsFunc(want, func(c chain) bool { return c.name == name }) {
			for _, line := range saved.deleteJumps(name) {
				b.WriteString(line + "\n")
			}
			fmt.Fprintf(&b, "-F %[1]s\n-X %[1]s\n", name)
		}
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

// removeScript takes out every jump to our chains and, with chains, the chains
// themselves. Empty if there is nothing to do.
func removeScript(table string, saved savedTable, chains bool) string {
	var lines []string
	for _, name := range saved.chains {
		if isOurs(name) {
			lines = append(lines, saved.deleteJumps(name)...)
		}
	}
	if chains {
		// All are emptied before any is deleted: one may lead to another.
		for _, verb := range []string{"-F ", "-X "} {
			for _, name := range saved.chains {
				if isOurs(name) {
					lines = append(lines, verb+name)
				}
			}
		}
	}
	if len(lines) == 0 {
		return ""
	}
	return "*" + table + "\n" + strings.Join(lines, "\n") + "\nCOMMIT\n"
}
