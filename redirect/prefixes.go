package redirect

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// ParsePrefixes reads networks in CIDR form, such as 10.0.0.0/8 or ::/0. It is
// strict: a bare address, host bits and IPv4-mapped IPv6 networks are errors that
// say what to write instead. The place, for example "redirect.outbound", begins
// every error.
func ParsePrefixes(place string, values ...string) ([]netip.Prefix, error) {
	prefixes := make([]netip.Prefix, 0, len(values))
	for _, v := range values {
		v = strings.TrimSpace(v)
		if addr, err := netip.ParseAddr(v); err == nil && addr.Zone() == "" {
			return nil, fmt.Errorf("%s: %q has no prefix length: write %s/%d for this one address", place, v, addr, addr.BitLen())
		}
		p, err := netip.ParsePrefix(v)
		if err != nil {
			return nil, fmt.Errorf("%s: %q is no network: write it as address/length, such as 10.0.0.0/8 or fd00::/8", place, v)
		}
		if err := checkPrefix(place, p); err != nil {
			return nil, err
		}
		prefixes = append(prefixes, p)
	}
	return prefixes, nil
}

func checkPrefix(place string, p netip.Prefix) error {
	switch {
	case !p.IsValid():
		return fmt.Errorf("%s: invalid network", place)
	case p.Addr().Is4In6():
		return fmt.Errorf("%s: %s is an IPv4-mapped network: write it in IPv4 form", place, p)
	case p != p.Masked():
		return fmt.Errorf("%s: %s has bits set beyond its length: write %s", place, p, p.Masked())
	}
	return nil
}

// subtract gives what is in from and not in minus, as disjoint networks in order.
// The kernel's own exclusions (nomatch) will not do: there a longer network in
// from would win over a shorter one in minus.
func subtract(from, minus []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for i, p := range from {
		covered := slices.ContainsFunc(from, func(o netip.Prefix) bool { return o.Bits() < p.Bits() && o.Contains(p.Addr()) }) ||
			slices.Contains(from[:i], p)
		if !covered {
			out = carve(out, p, minus)
		}
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	return out
}

func carve(out []netip.Prefix, p netip.Prefix, minus []netip.Prefix) []netip.Prefix {
	var inside []netip.Prefix
	for _, m := range minus {
		if !m.Overlaps(p) {
			continue
		}
		if m.Bits() <= p.Bits() {
			return out
		}
		inside = append(inside, m)
	}
	if len(inside) == 0 {
		return append(out, p)
	}
	low, high := halves(p)
	return carve(carve(out, low, inside), high, inside)
}

// splitDefault replaces a /0, which hash:net cannot hold, by its halves.
func splitDefault(prefixes []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range prefixes {
		if p.Bits() == 0 {
			low, high := halves(p)
			out = append(out, low, high)
			continue
		}
		out = append(out, p)
	}
	return out
}

func halves(p netip.Prefix) (low, high netip.Prefix) {
	bytes := p.Addr().AsSlice()
	bytes[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	upper, _ := netip.AddrFromSlice(bytes)
	return netip.PrefixFrom(p.Addr(), p.Bits()+1), netip.PrefixFrom(upper, p.Bits()+1)
}
