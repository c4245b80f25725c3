package redirect

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// legZone is the conntrack zone (1 to 65535) in which the proxy's own connections are
// looked up by what they send. What they are sent is looked up where everything is, in
// zone 0, so that answers find them, and no two connections get the same answers.
//
// Otherwise the proxy's connections and the applications', which have the same
// addresses, could be taken for one another by whoever gets the other's port. For ten
// seconds after a peer has reset a tunnel, conntrack would take the SYN of an
// application with the tunnel's port for one more packet of the tunnel, which is not
// redirected: only the guard would hold it up, and refuse it. Nor would the guard, if the
// tunnel's destination was translated to one that is not intercepted: by another program,
// or by us, after a tunnel to this very host, to the inbound listener. And a tunnel from
// the port of an application that the proxy has reset would end in the proxy's own
// outbound listener.
const legZone = 0x4d00 // 19712

// zoneChains put the proxy's own connections into their zone. They look at the mark
// alone, not at the cgroup: what the kernel answers for a socket in TIME_WAIT has the
// socket's mark, and no cgroup any more, and outside the zone conntrack would take it
// for a connection of its own, and give it another port. A forged mark gains nothing
// here: it is redirected in this zone too, or refused by the guard, which both ask for
// the cgroup.
func zoneChains() []chain {
	rules := []string{fmt.Sprintf("-m mark ! --mark %#x/%#x -j RETURN", markBase, uint32(markMask))}
	// Not MarkInbound: accepted connections are answers. Not markClient: with TPROXY, the
	// client's own connection from the same port, which is dropped now, would be given
	// another port, and the proxy would hold that for the client's.
	for _, mark := range []int{MarkTunnel, MarkApp, MarkControl} {
		rules = append(rules, fmt.Sprintf("-p tcp -m mark --mark %#x -j CT --zone-orig %d", mark, legZone))
	}
	return []chain{{chainROut, "OUTPUT", rules}}
}

// applyZone loads zoneChains. It must come before anything is dialled: a connection
// that conntrack has outside the zone is cut by its coming. A kernel that cannot do it
// is warned of and no error: the guard still refuses what is not redirected.
func (r *Rules) applyZone(ctx context.Context, f family) error {
	delete(r.noZone, f.name)
	err := r.apply(ctx, f, "raw")
	if err == nil {
		return nil
	}
	if !lacksZones(err) {
		return fmt.Errorf("load %s rules, table raw: %w", f.name, err)
	}
	r.noZone[f.name] = fmt.Sprintf("the %s connections of the proxy cannot be tracked apart from the applications' (iptables -t raw -j CT --zone-orig: %v): for some seconds after a peer has reset a tunnel, an application that gets the tunnel's port and calls the same destination is refused, or goes where the tunnel went if another rule translates that destination to one that is not in redirect.outbound; load or install the kernel modules xt_CT, iptable_raw and ip6table_raw", f.name, err)
	return nil
}

// lacksZones says that the tool, or the kernel, knows no table raw, no target CT or no
// zones: trying again does not help.
func lacksZones(err error) bool {
	var te *ToolError
	if !errors.As(err, &te) {
		return false
	}
	for _, words := range []string{
		"missing kernel module", "No chain/target/match by that name", "Table does not exist",
		"No such file or directory", "not supported", "unknown option",
	} {
		if strings.Contains(te.Stderr, words) {
			return true
		}
	}
	return false
}
