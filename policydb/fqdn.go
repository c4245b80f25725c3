package policydb

import (
	"cmp"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// Externals and Services by name. What a name's addresses are is found out by whoever
// asks (the proxy, on its host): policydb is told which names an address has. A name is
// no proof. Whoever answers for it can put any address there, so it opens a way to an
// address of which nothing else is known, and closes none: it does not count where a
// Service has the address, nor against a deny on the network that the address is in.

// maxExactNames bounds the names without a wildcard, of all Externals and Services
// together: each proxy resolves those that it can see, for ever.
const maxExactNames = 4096

// exactName is the rank of a match by a whole name. A wildcard's is the number of labels
// behind the asterisk, which is less.
const exactName = 1 << 8

// nameTable is the Externals (or Services) of one namespace by name.
type nameTable struct {
	exact map[string][]addressEntry
	below map[string][]addressEntry // by what follows "*."
	each  []addressEntry            // of each resource one
}

func addNames(tables map[string]*nameTable, key Key, e addressEntry, names []string) error {
	for i, s := range names {
		if m := checkFQDN(s); m != nil {
			return errors.New(m.message)
		}
		t := tables[key.Namespace]
		if t == nil {
			t = &nameTable{exact: make(map[string][]addressEntry), below: make(map[string][]addressEntry)}
			tables[key.Namespace] = t
		}
		if i == 0 {
			t.each = append(t.each, e)
		}
		into := t.exact
		suffix, wild := strings.CutPrefix(s, "*.")
		if wild {
			into = t.below
		}
		into[suffix] = append(into[suffix], e)
	}
	return nil
}

// opens tells whether a name of e may make an address that External, on a port.
func (e *addressEntry) opens(addr netip.Addr, t transport, port uint16) bool {
	return e.ports.contains(t, port) && !(e.public && private(addr))
}

// private tells addresses that lead into one's own networks (RFC 1918, RFC 4193 and its
// predecessor, RFC 6598, and those within NAT64's prefixes): what answers for a public
// name has no business there, and whoever makes it do so wants something (DNS rebinding).
func private(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	if nat64.Contains(a) {
		b := a.As16()
		a = netip.AddrFrom4([4]byte(b[12:]))
		return private(a) || a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsUnspecified()
	}
	return a.IsPrivate() || slices.ContainsFunc(ownNetworks, func(p netip.Prefix) bool { return p.Contains(a) })
}

var (
	nat64       = netip.MustParsePrefix("64:ff9b::/96")
	ownNetworks = []netip.Prefix{
		netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("0.0.0.0/8"),
		netip.MustParsePrefix("fec0::/10"), netip.MustParsePrefix("64:ff9b:1::/48"),
	}
)

// collect takes the entries of the best rank that names of an address have, on a port.
func (t *nameTable) collect(addr netip.Addr, names []string, transport transport, port uint16) (found []addressEntry, rank int) {
	add := func(es []addressEntry, r int) {
		for _, e := range es {
			if r < rank || !e.opens(addr, transport, port) {
				continue
			}
			if r > rank {
				found, rank = nil, r
			}
			found = append(found, e)
		}
	}
	for _, name := range names {
		add(t.exact[name], exactName)
		for suffix := name; ; {
			var ok bool
			if _, suffix, ok = strings.Cut(suffix, "."); !ok {
				break
			}
			add(t.below[suffix], 1+strings.Count(suffix, "."))
		}
	}
	return found, rank
}

// findNamed looks along a namespace's chain for what has one of names: a whole name
// before a wildcard, a longer wildcard before a shorter one, then the namespace nearest
// to the root. Several of it are all of them, as in Source: an address that names share
// has the labels of each, or it would depend on the order of answers who may go there.
func (c *Compiled) findNamed(tables map[string]*nameTable, namespace string, addr netip.Addr, names []string, protocol string, port uint16) *ExternalMatch {
	ch := c.chains[namespace]
	if ch == nil || len(names) == 0 || len(tables) == 0 {
		return nil
	}
	var best []addressEntry
	rank := 0
	for _, ns := range ch.path {
		if t := tables[ns]; t != nil {
			if es, r := t.collect(addr, names, transportOf(protocol), port); r > rank {
				best, rank = es, r
			}
		}
	}
	if len(best) == 0 {
		return nil
	}
	slices.SortFunc(best, func(x, y addressEntry) int { return cmp.Compare(x.match.Ref, y.match.Ref) })
	m := &ExternalMatch{Ref: best[0].match.Ref, exact: rank == exactName}
	for _, e := range best {
		m.Labels = m.Labels.Union(e.match.Labels)
	}
	return m
}

// Names are all names without a wildcard that addresses are to be found of, sorted.
func (c *Compiled) Names() []string {
	var out []string
	for _, tables := range []map[string]*nameTable{c.externalNames, c.serviceNames} {
		for _, t := range tables {
			for name := range t.exact {
				out = append(out, name)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// NamesMatter tells whether a destination of a workload of the namespace can be an
// External or a Service by name.
func (c *Compiled) NamesMatter(namespace string) bool {
	ch := c.chains[namespace]
	return ch != nil && slices.ContainsFunc(ch.path, func(ns string) bool { return c.externalNames[ns] != nil || c.serviceNames[ns] != nil })
}

// NameMayOpen tells whether a destination that has names could be another External if
// one more name of it were known, such as the one that the client asks for. Names that
// the client has given must be found to have the address before they count.
func (c *Compiled) NameMayOpen(namespace string, addr netip.Addr, protocol string, port uint16, names ...string) bool {
	ch := c.chains[namespace]
	if ch == nil || len(c.externalNames) == 0 {
		return false
	}
	ext, service := c.Destination(namespace, addr, protocol, port, names...)
	if service != "" || ext != nil && (ext.exact || !ext.byName && c.claimed(namespace, addr, protocol, port)) {
		return false
	}
	t := transportOf(protocol)
	return slices.ContainsFunc(ch.path, func(ns string) bool {
		table := c.externalNames[ns]
		return table != nil && slices.ContainsFunc(table.each, func(e addressEntry) bool { return e.opens(addr, t, port) })
	})
}

// HasName tells whether an External of the namespace's chain has the name, on the port,
// and would count for the address.
func (c *Compiled) HasName(namespace, name string, addr netip.Addr, protocol string, port uint16) bool {
	return checkFQDN(name) == nil && c.findNamed(c.externalNames, namespace, addr, []string{name}, protocol, port) != nil
}

// PublicOnly is the External that would have an address which is none's (see Destination)
// by one of names, were the address not private; "": there is none.
func (c *Compiled) PublicOnly(namespace string, addr netip.Addr, protocol string, port uint16, names ...string) string {
	if !private(addr) {
		return ""
	}
	if m := c.findNamed(c.externalNames, namespace, netip.Addr{}, names, protocol, port); m != nil {
		return m.Ref
	}
	return ""
}

// claimed: names do not count for an address that an External has by itself, or that is
// in a Service.
func (c *Compiled) claimed(namespace string, addr netip.Addr, protocol string, port uint16) bool {
	if s, _ := c.find(c.services, namespace, addr, on(protocol, port)); s != nil {
		return true
	}
	_, length := c.find(c.externals, namespace, addr, on(protocol, port))
	return length >= 0 && length == addr.Unmap().BitLen()
}

// Endpoint is the External as the end of a connection.
func (m *ExternalMatch) Endpoint() Endpoint { return Endpoint{External: m.Ref, Attributes: m.Labels} }

// DecideExternal judges a connection of a workload to an External that Destination
// found. One that was found by a name is denied as well by a deny on the External that
// the address is without the name: who answers for a name must not be able to lead
// past it.
func (c *Compiled) DecideExternal(own *Endpoint, ext *ExternalMatch, protocol string, port uint16, now time.Time) Decision {
	q := &Query{From: *own, To: ext.Endpoint(), Protocol: protocol, Port: port}
	d := c.Decide(Client, q, now)
	if ext.beneath == nil || !d.Allow {
		return d
	}
	q.To = ext.beneath.Endpoint()
	network := c.Decide(Client, q, now)
	for _, until := range []time.Time{d.Until, network.Until} {
		if !until.IsZero() {
			sooner(&d.Until, until)
		}
	}
	if !network.Allow && network.Reason == symbolonv1.Reason_REASON_POLICY {
		network.Until = d.Until
		return network
	}
	return d
}

// namesOf is how an External that an edge was recorded with is written by name, where
// its address alone does not say that it is one.
func (c *Compiled) namesOf(e *Edge) []string {
	if m, _ := c.Destination(e.From.Namespace, e.ToAddress, e.Protocol, e.Port); m != nil && m.Ref == e.To.External {
		return nil
	}
	return c.declared[e.To.External].GetAddresses().GetFqdns()
}

// evadable tells whether a selector goes by an External's labels: whether it selects the
// External, and would not if nothing were known of it.
func evadable(s *symbolonv1.Selector, labels identity.Attributes) bool {
	return matchSelector(s, labels) && !matchSelector(s, nil)
}
