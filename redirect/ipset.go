package redirect

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
)

// Lapse is how long the rules of a host that fails open outlive the proxy.
// beatEvery refreshes them well before.
const (
	Lapse     = 3 * time.Second
	beatEvery = Lapse / 4
)

// tmpSuffix names the set that is filled and then swapped in.
const tmpSuffix = "_new"

// verifyMembers is the size up to which Verify compares a set member by member.
// Beyond, it counts: listing all ports takes 50 ms.
const verifyMembers = 4096

// ipSet is a set as it should be.
type ipSet struct {
	name   string
	create string // type and options, for ipset create
	kind   string // the type alone
	add    []string
	ports  PortSet // for bitmap:port, instead of add
}

func (c Config) ipSets(families []family) []ipSet {
	in := ipSet{name: setIn, create: "bitmap:port range 0-65535", kind: "bitmap:port", ports: c.protectedPorts()}
	for _, r := range in.ports.Ranges() {
		in.add = append(in.add, r.String())
	}
	sets := []ipSet{in}
	for _, f := range families {
		out := ipSet{name: f.outSet, kind: "hash:net"}
		for _, p := range c.intercepted(f.inet == "inet") {
			out.add = append(out.add, p.String())
		}
		out.create = fmt.Sprintf("hash:net family %s maxelem %d", f.inet, max(65536, len(out.add)))
		sets = append(sets, out)
	}
	return sets
}

// ipSetScript fills a set beside each existing one and swaps them: at no moment is
// a set half full.
func ipSetScript(sets []ipSet) string {
	var b strings.Builder
	for _, s := range sets {
		tmp := s.name + tmpSuffix
		fmt.Fprintf(&b, "create %s %s\ncreate %s %s\nflush %s\n", s.name, s.create, tmp, s.create, tmp)
		for _, member := range s.add {
			fmt.Fprintf(&b, "add %s %s\n", tmp, member)
		}
		fmt.Fprintf(&b, "swap %s %s\ndestroy %s\n", s.name, tmp, tmp)
	}
	return b.String()
}

func (r *Rules) applySets(ctx context.Context) error {
	script := ipSetScript(r.cfg.ipSets(r.families))
	if !r.cfg.FailClosed {
		for _, f := range r.families {
			script += fmt.Sprintf("create %s hash:net family %s timeout %d\n", f.liveSet, f.inet, int(Lapse.Seconds()))
		}
	}
	if _, err := run(ctx, script, r.ipset, "-exist", "restore"); err != nil {
		return fmt.Errorf("load ipsets: %w", err)
	}
	if !r.cfg.FailClosed {
		return r.beat(netlink.IpsetAdd)
	}
	return nil
}

// beat renews for Lapse the rules of a host that fails open.
func (r *Rules) beat(add func(set string, entry *netlink.IPSetEntry) error) error {
	timeout := uint32(Lapse.Seconds())
	for _, f := range r.families {
		unspecified := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if f.inet == "inet6" {
			unspecified = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		for _, p := range splitDefault([]netip.Prefix{unspecified}) {
			entry := &netlink.IPSetEntry{IP: net.IP(p.Addr().AsSlice()), CIDR: uint8(p.Bits()), Timeout: &timeout, Replace: true}
			if err := add(f.liveSet, entry); err != nil {
				return fmt.Errorf("refresh ipset %s: %w", f.liveSet, err)
			}
		}
	}
	return nil
}

// setDrift says how the kernel's sets differ from ours.
func (r *Rules) setDrift(ctx context.Context) ([]string, error) {
	var found []string
	for _, want := range r.cfg.ipSets(r.families) {
		head, err := run(ctx, "", r.ipset, "list", "-terse", want.name)
		if isNoSet(err) {
			found = append(found, fmt.Sprintf("ipset %s is missing", want.name))
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list ipset: %w", err)
		}
		if kind := headerField(head, "Type"); kind != want.kind {
			found = append(found, fmt.Sprintf("ipset %s is a %s, not a %s", want.name, kind, want.kind))
			continue
		}
		size := len(want.add)
		if want.kind == "bitmap:port" {
			size = want.ports.Len()
		}
		if n := headerField(head, "Number of entries"); n != strconv.Itoa(size) {
			found = append(found, fmt.Sprintf("ipset %s has %s members, not %d", want.name, n, size))
			continue
		}
		if size > verifyMembers {
			continue
		}
		out, err := run(ctx, "", r.ipset, "save", want.name)
		if err != nil {
			return nil, fmt.Errorf("list ipset: %w", err)
		}
		if !maps.Equal(savedMembers(out), want.members()) {
			found = append(found, fmt.Sprintf("ipset %s has other members", want.name))
		}
	}
	return found, nil
}

// members are written one by one, as ipset prints them: ports without ranges, a
// single address without a length.
func (s ipSet) members() map[string]bool {
	m := map[string]bool{}
	for _, r := range s.ports.Ranges() {
		for p := int(r.First); p <= int(r.Last); p++ {
			m[strconv.Itoa(p)] = true
		}
	}
	if s.kind == "bitmap:port" {
		return m
	}
	for _, a := range s.add {
		p := netip.MustParsePrefix(a)
		if p.IsSingleIP() {
			a = p.Addr().String()
		}
		m[a] = true
	}
	return m
}

func savedMembers(out string) map[string]bool {
	m := map[string]bool{}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) >= 3 && f[0] == "add" {
			m[f[2]] = true
		}
	}
	return m
}

func headerField(head, name string) string {
	for line := range strings.Lines(head) {
		if v, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// destroySets removes all sets of ours. The kernel lets go of a deleted rule's set
// only after a grace period, so a set still in use is tried again for a while.
func destroySets(ctx context.Context, ipset string) error {
	var lastErr error
	for attempt := range 20 {
		if attempt > 0 {
			select {
			case <-ctx.Done():
				return errors.Join(ctx.Err(), lastErr)
			case <-time.After(time.Duration(attempt) * 10 * time.Millisecond):
			}
		}
		out, err := run(ctx, "", ipset, "list", "-name")
		if err != nil {
			return fmt.Errorf("list ipsets: %w", err)
		}
		names := slices.DeleteFunc(strings.Fields(out), func(n string) bool { return !strings.HasPrefix(n, setPrefix) })
		if len(names) == 0 {
			return nil
		}
		lastErr = nil
		for _, name := range names {
			if _, err := run(ctx, "", ipset, "destroy", name); err != nil && !isNoSet(err) {
				lastErr = errors.Join(lastErr, err)
			}
		}
	}
	if lastErr != nil {
		return fmt.Errorf("remove ipsets: %w", lastErr)
	}
	return nil
}

func isNoSet(err error) bool {
	var te *ToolError
	return errors.As(err, &te) && strings.Contains(te.Stderr, "does not exist")
}
