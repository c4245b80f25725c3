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
	// Of one found by a name: whether by a whole one, and what the address is without.
	byName, exact bool
	beneath       *ExternalMatch
}

// addressTable is the Externals (or Services) of one namespace.
type addressTable struct {
	prefixes map[netip.Prefix]*addressEntries
	// lengths are the prefix lengths that occur, longest first: IPv4, IPv6.
	lengths [2][]int
}

// addressEntries are those of one prefix.
type addressEntries struct {
	each []addressEntry // by ref
	// any is what the prefix is where ports do not count: all of them together.
	any *ExternalMatch
}

type addressEntry struct {
	match *ExternalMatch
	ports portSet
	// public: its names count for public addresses only.
	public bool
}

func (es *addressEntries) add(e addressEntry) {
	es.each = append(es.each, e)
	slices.SortFunc(es.each, func(x, y addressEntry) int { return cmp.Compare(x.match.Ref, y.match.Ref) })
	es.any = es.each[0].match
	if len(es.each) == 1 {
		return
	}
	all := &ExternalMatch{Ref: es.any.Ref}
	for _, x := range es.each {
		all.Labels = all.Labels.Union(x.match.Labels)
	}
	es.any = all
}

// on is the entry that has a port, or nil.
func (es *addressEntries) on(t transport, port uint16) *ExternalMatch {
	for _, e := range es.each {
		if e.ports.contains(t, port) {
			return e.match
		}
	}
	return nil
}

func addAddresses(tables map[string]*addressTable, names map[string]*nameTable, key Key, a *symbolonv1.Addresses, labels map[string]*symbolonv1.LabelValues) error {
	ports, err := compilePorts(a.GetPorts())
	if err != nil {
		return err
	}
	match := &ExternalMatch{Ref: key.Ref(), Labels: identity.AttributesFromProto(labels)}
	public := key.Kind == KindExternal && !a.GetPrivate()
	if err := addNames(names, key, addressEntry{match, ports, public}, a.GetFqdns()); err != nil {
		return err
	}
	if len(a.GetCidrs()) == 0 {
		return nil
	}
	t := tables[key.Namespace]
	if t == nil {
		t = &addressTable{prefixes: make(map[netip.Prefix]*addressEntries)}
		tables[key.Namespace] = t
	}
	for _, s := range a.GetCidrs() {
		p, m := parsePrefix(s)
		if m != nil {
			return errors.New(m.message)
		}
		if t.prefixes[p] == nil {
			t.prefixes[p] = &addressEntries{}
		}
		t.prefixes[p].add(addressEntry{match: match, ports: ports})
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

// find returns what choose takes of the longest prefix around addr that is longer
// than beyond and of which it takes anything, and that length.
func (t *addressTable) find(addr netip.Addr, choose chooser, beyond int) (*ExternalMatch, int) {
	for _, length := range t.lengths[family(addr)] {
		if length <= beyond {
			break
		}
		p, err := addr.Prefix(length)
		if err != nil {
			return nil, beyond
		}
		if es := t.prefixes[p]; es != nil {
			if m := choose(es); m != nil {
				return m, length
			}
		}
	}
	return nil, beyond
}

// chooser takes one of the entries of a prefix, or nil.
type chooser func(*addressEntries) *ExternalMatch

// find looks along a namespace's chain. The longest prefix wins, and its length is
// returned with it; among equals the namespace nearest to the root, then the first
// by name.
func (c *Compiled) find(tables map[string]*addressTable, namespace string, addr netip.Addr, choose chooser) (best *ExternalMatch, length int) {
	ch, length := c.chains[namespace], -1
	if ch == nil || !addr.IsValid() || len(tables) == 0 {
		return nil, length
	}
	addr = addr.Unmap().WithZone("")
	for _, ns := range ch.path {
		if t := tables[ns]; t != nil {
			if m, n := t.find(addr, choose, length); m != nil {
				best, length = m, n
			}
		}
	}
	return best, length
}

func on(protocol string, port uint16) chooser {
	t := transportOf(protocol)
	return func(es *addressEntries) *ExternalMatch { return es.on(t, port) }
}

// Destination says what an address is that a workload of the namespace connects to.
// A Service leads to proxies, whoever owns the address; an External has none. Where
// both stand on the namespace's chain the longer prefix counts, and among equals the
// Service, since nobody may be talked out of a tunnel. Nil and "" is neither: a
// destination that must answer as a tunnel.
//
// names are those that the address is known to have. One counts as the whole address,
// behind a network that is no more than that; and not at all where a Service has the
// address by its network, or where it is private and the External does not expect that.
func (c *Compiled) Destination(namespace string, addr netip.Addr, protocol string, port uint16, names ...string) (external *ExternalMatch, service string) {
	e, el := c.find(c.externals, namespace, addr, on(protocol, port))
	s, sl := c.find(c.services, namespace, addr, on(protocol, port))
	switch {
	case s != nil && sl >= el:
		return nil, s.Ref
	case len(names) == 0, s != nil, e != nil && el == addr.Unmap().BitLen():
		return e, ""
	}
	if m := c.findNamed(c.serviceNames, namespace, addr, names, protocol, port); m != nil {
		return nil, m.Ref
	}
	if m := c.findNamed(c.externalNames, namespace, addr, names, protocol, port); m != nil {
		m.byName, m.beneath = true, e
		return m, ""
	}
	return e, ""
}

// Source finds the External that a client without a proxy belongs to, by its
// address alone, never by a name: an External's ports are those that it serves on, and
// say nothing of what it calls. Where several of the namespace that decides have the same
// network, each with ports of its own, the client is all of them: it has the labels
// of each, so that no policy on one of them is missed, and the Ref of the first by
// name.
func (c *Compiled) Source(namespace string, addr netip.Addr) (*ExternalMatch, bool) {
	m, _ := c.find(c.externals, namespace, addr, func(es *addressEntries) *ExternalMatch { return es.any })
	return m, m != nil
}
