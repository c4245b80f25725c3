package policydb

import (
	"fmt"
	"net/netip"
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func (c *checker) addresses(a *symbolonv1.Addresses, service bool) {
	if len(a.GetCidrs()) == 0 && len(a.GetFqdns()) == 0 {
		c.failf([]any{"addresses"}, "write {cidrs: [203.0.113.0/24]}", "there are no addresses")
	}
	for _, s := range a.GetCidrs() {
		_, m := parsePrefix(s)
		c.add(m, "addresses", "cidrs", s)
	}
	for _, s := range a.GetFqdns() {
		m := checkFQDN(s)
		if m == nil && service && strings.HasPrefix(s, "*.") {
			m = wrong("name each, or write its networks under cidrs",
				"%s: a Service cannot have a wildcard: which names there are is not known before a client asks for one", s)
		}
		c.add(m, "addresses", "fqdns", s)
	}
	c.ports([]any{"addresses", "ports"}, a.GetPorts())
	switch {
	case a.GetPrivate() && service:
		c.failf([]any{"addresses", "private"}, "leave it out", "a Service may have private addresses anyhow: a proxy must answer there")
	case a.GetPrivate() && len(a.GetFqdns()) == 0:
		c.failf([]any{"addresses", "private"}, "leave it out", "private is about names (fqdns), and there are none")
	}
}

// parsePrefix takes networks only: with a length, and no bits beyond it.
func parsePrefix(s string) (netip.Prefix, *mistake) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
			return p, wrong(fmt.Sprintf("write %s/%d", s, a.BitLen()), "%s has no prefix length", printable(s))
		}
		return p, wrong("write 203.0.113.0/24 or 2001:db8::/32", "%s is not a network", printable(s))
	}
	if p.Addr().Is4In6() {
		return p, wrong("write it as IPv4", "%s is an IPv4 network in IPv6 clothes", printable(s))
	}
	if p != p.Masked() {
		return p, wrong("did you mean "+p.Masked().String()+"?", "%s has bits set beyond its prefix length", printable(s))
	}
	return p, nil
}

// IsName tells whether text is a DNS name as fqdns has them, and no address.
func IsName(text string) bool { return checkFQDN(text) == nil }

// checkFQDN: a DNS name (RFC 1123), or "*." and one.
func checkFQDN(s string) *mistake {
	name, wild := strings.CutPrefix(s, "*.")
	if len(name) == 0 || len(name) > 253 {
		return wrong("", "%s is not a DNS name", printable(s))
	}
	labels := strings.Split(name, ".")
	if wild && len(labels) == 1 {
		return wrong("write one more label, such as *.example."+name, "%s is wider than a name that somebody owns", printable(s))
	}
	if last := labels[len(labels)-1]; last != "" && strings.Trim(last, "0123456789") == "" {
		return wrong("write addresses under cidrs", "%s is not a DNS name", printable(s))
	}
	for _, label := range labels {
		ok := len(label) > 0 && len(label) <= 63 && label[0] != '-' && label[len(label)-1] != '-'
		for i := 0; i < len(label); i++ {
			b := label[i]
			ok = ok && (b >= 'a' && b <= 'z' || b >= '0' && b <= '9' || b == '-')
		}
		if !ok {
			return wrong("lower case, without a dot at the end; *. may stand in front", "%s is not a DNS name", printable(s))
		}
	}
	return nil
}
