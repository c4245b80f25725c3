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
// beyond and covers the port, and that length.
func (t *addressTable) find(addr netip.Addr, protocol transport, port uint16, beyond int) (*ExternalMatch, int) {
	for _, length := range t.lengths[family(addr)] {
		if length <= beyond {
			break
		}
		p, err := addr.Prefix(length)
		if err != nil {
			return nil, beyond
		}
		for _, e := range t.prefixes[p] {
			if e.ports.contains(protocol, port) {
				return e.match, length
			}
		}
	}
	return nil, beyond
}

// find looks along a namespace's chain. The longest prefix wins; among equals the
// namespace nearest to the root, then the first by name.
func (c *Compiled) find(tables map[string]*addressTable, namespace string, addr netip.Addr, protocol string, port uint16) *ExternalMatch {
	ch := c.chains[namespace]
	if ch == nil || !addr.IsValid() || len(tables) == 0 {
		return nil
	}
	addr = addr.Unmap().WithZone("")
	var best *ExternalMatch
	length := -1
	for _, ns := range ch.path {
		if t := tables[ns]; t != nil {
			if m, n := t.find(addr, transportOf(protocol), port, length); m != nil {
				best, length = m, n
			}
		}
	}
	return best
}

// External finds what an address without a proxy is to a namespace: the External on
// its chain with the longest prefix around addr that covers the port.
func (c *Compiled) External(namespace string, addr netip.Addr, protocol string, port uint16) (*ExternalMatch, bool) {
	m := c.find(c.externals, namespace, addr, protocol, port)
	return m, m != nil
}

// Service finds the Service in the same way: addresses that lead to proxies.
func (c *Compiled) Service(namespace string, addr netip.Addr, protocol string, port uint16) (ref string, ok bool) {
	m := c.find(c.services, namespace, addr, protocol, port)
	if m == nil {
		return "", false
	}
	return m.Ref, true
}
