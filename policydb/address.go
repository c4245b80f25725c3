package policydb

import (
	"cmp"
	"errors"
	"net/netip"
	"slices"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// ExternalMatch is the External that an address belongs to.
type ExternalMatch struct {
	Ref    string // "namespace/name"
	Labels identity.Attributes
}

// addressTable is the Externals (or Services) of one namespace.
type addressTable struct {
	prefixes map[netip.Prefix][]addressEntry // by ref
	// lengths are the prefix lengths that occur, longest first: IPv4, IPv6.
	lengths [2][]int
}

type addressEntry struct {
	match *ExternalMatch
	ports portSet
}

func addAddresses(tables map[string]*addressTable, key Key, a *symbolonv1.Addresses, labels map[string]*symbolonv1.LabelValues) error {
	ports, err := compilePorts(a.GetPorts())
	if err != nil {
		return err
	}
	t := tables[key.Namespace]
	if t == nil {
		t = &addressTable{prefixes: make(map[netip.Prefix][]addressEntry)}
		tables[key.Namespace] = t
	}
	match := &ExternalMatch{Ref: key.Ref(), Labels: identity.AttributesFromProto(labels)}
	for _, s := range a.GetCidrs() {
		p, m := parsePrefix(s)
		if m != nil {
			return errors.New(m.message)
		}
		t.prefixes[p] = append(t.prefixes[p], addressEntry{match, ports})
		slices.SortFunc(t.prefixes[p], func(x, y addressEntry) int { return cmp.Compare(x.match.Ref, y.match.Ref) })
		of := &t.lengths[family(p.Addr())]
		if !slices.Contains(*of, p.Bits()) {
			*of = append(*of, p.Bits())
			slices.SortFunc(*of, func(x, y int) int { return y - x })
		}
	}
	return nil
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// find returns the entry with the longest prefix around addr that is longer than
// beyond and that fits accepts, and that length.
func (t *addressTable) find(addr netip.Addr, accepts func(portSet) bool, beyond int) (*ExternalMatch, int) {
	for _, length := range t.lengths[family(addr)] {
		if length <= beyond {
			break
		}
		p, err := addr.Prefix(length)
		if err != nil {
			return nil, beyond
		}
		for _, e := range t.prefixes[p] {
			if accepts(e.ports) {
				return e.match, length
			}
		}
	}
	return nil, beyond
}

// find looks along a namespace's chain. The longest prefix wins, and its length is
// returned with it; among equals the namespace nearest to the root, then the first
// by name.
func (c *Compiled) find(tables map[string]*addressTable, namespace string, addr netip.Addr, accepts func(portSet) bool) (best *ExternalMatch, length int) {
	ch, length := c.chains[namespace], -1
	if ch == nil || !addr.IsValid() || len(tables) == 0 {
		return nil, length
	}
	addr = addr.Unmap().WithZone("")
	for _, ns := range ch.path {
		if t := tables[ns]; t != nil {
			if m, n := t.find(addr, accepts, length); m != nil {
				best, length = m, n
			}
		}
	}
	return best, length
}

func on(protocol string, port uint16) func(portSet) bool {
	t := transportOf(protocol)
	return func(s portSet) bool { return s.contains(t, port) }
}

// Destination says what an address is that a workload of the namespace connects to.
// A Service leads to proxies, whoever owns the address; an External has none. Where
// both stand on the namespace's chain the longer prefix counts, and among equals the
// Service, since nobody may be talked out of a tunnel. Nil and "" is neither: a
// destination that must answer as a tunnel.
func (c *Compiled) Destination(namespace string, addr netip.Addr, protocol string, port uint16) (external *ExternalMatch, service string) {
	e, el := c.find(c.externals, namespace, addr, on(protocol, port))
	s, sl := c.find(c.services, namespace, addr, on(protocol, port))
	if s != nil && sl >= el {
		return nil, s.Ref
	}
	return e, ""
}

// Source finds the External that a client without a proxy belongs to, by its
// address alone: an External's ports are those that it serves on, and say nothing
// of what it calls.
func (c *Compiled) Source(namespace string, addr netip.Addr) (*ExternalMatch, bool) {
	m, _ := c.find(c.externals, namespace, addr, func(portSet) bool { return true })
	return m, m != nil
}
