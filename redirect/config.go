package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
)

// The listeners' default ports.
const (
	DefaultOutboundPort = 15001
	DefaultInboundPort  = 15006
)

// Backend says which implementation of iptables holds the rules.
type Backend string

// The backends. BackendDefault is whatever the host's plain iptables command is,
// so that ours stand in the same place as everybody else's rules.
const (
	BackendDefault Backend = ""
	BackendNFT     Backend = "nft"
	BackendLegacy  Backend = "legacy"
)

// IPv6Mode says whether IPv6 is redirected too.
type IPv6Mode uint8

// IPv6Auto loads IPv6 rules wherever the kernel speaks IPv6; it fails where the
// kernel does and ip6tables is missing, because connections would go around the
// proxy. IPv6Off leaves IPv6 unprotected.
const (
	IPv6Auto IPv6Mode = iota
	IPv6On
	IPv6Off
)

// Config says what is redirected. The zero value redirects nothing; DefaultConfig
// is what the proxy starts from.
type Config struct {
	// OutboundPort and InboundPort are the proxy's listeners; 0 means the default.
	OutboundPort, InboundPort uint16
	// InboundPorts are the protected local ports, ExcludeInbound those among them
	// that are reached as without a proxy. The listeners' own ports are always left
	// out.
	InboundPorts, ExcludeInbound PortSet
	// Outbound are the destinations to intercept, ExcludeOutbound those among them
	// to leave alone, however long their prefixes are.
	Outbound, ExcludeOutbound []netip.Prefix
	// FailClosed keeps the rules in force when the proxy is dead. Without it they
	// lapse Lapse after the last refresh by Rules.Watch.
	FailClosed bool
	// Transparent takes inbound connections by TPROXY instead of REDIRECT: nothing is
	// translated, the client's port is always its own, and conntrack may forget a
	// connection without harm. Connections from this host to itself are redirected all
	// the same. The listener must have passed PrepareInbound.
	Transparent bool
	// PreserveSource lets the proxy reach local applications from the address of their
	// remote client (Conntrack.DialAs): it brings the answers back.
	PreserveSource bool
	IPv6           IPv6Mode
	Backend        Backend
}

// DefaultConfig intercepts everything but inbound SSH, and fails closed.
func DefaultConfig() Config {
	return Config{
		OutboundPort:   DefaultOutboundPort,
		InboundPort:    DefaultInboundPort,
		InboundPorts:   AllPorts(),
		ExcludeInbound: Ports(PortRange{22, 22}),
		Outbound:       []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")},
		FailClosed:     true,
	}
}

// OutboundAddrs are the addresses on which the outbound listener must listen:
// there the kernel sends what local processes connect to elsewhere.
func (c Config) OutboundAddrs() []netip.AddrPort {
	c = c.withDefaults()
	addrs := []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), c.OutboundPort)}
	if c.ipv6() {
		addrs = append(addrs, netip.AddrPortFrom(netip.IPv6Loopback(), c.OutboundPort))
	}
	return addrs
}

// InboundAddr is the address on which the inbound listener must listen: the
// wildcard (one socket for both families where there is IPv6), as the kernel sends
// to the address of whatever interface a connection came in by.
func (c Config) InboundAddr() netip.AddrPort {
	c = c.withDefaults()
	if c.ipv6() {
		return netip.AddrPortFrom(netip.IPv6Unspecified(), c.InboundPort)
	}
	return netip.AddrPortFrom(netip.IPv4Unspecified(), c.InboundPort)
}

// Validate returns an error that names the configuration's key and the remedy.
func (c Config) Validate() error {
	c = c.withDefaults()
	var errs []error
	if c.OutboundPort == c.InboundPort {
		errs = append(errs, fmt.Errorf("redirect: both listeners have port %d: give them different ports", c.InboundPort))
	}
	if !slices.Contains([]Backend{BackendDefault, BackendNFT, BackendLegacy}, c.Backend) {
		errs = append(errs, fmt.Errorf("redirect.backend: %q is unknown: write nft, legacy, or leave it out", c.Backend))
	}
	if c.IPv6 > IPv6Off {
		errs = append(errs, fmt.Errorf("redirect: unknown IPv6 mode %d", c.IPv6))
	}
	for _, p := range c.Outbound {
		errs = append(errs, checkPrefix("redirect.outbound", p))
	}
	for _, p := range c.ExcludeOutbound {
		errs = append(errs, checkPrefix("redirect.exclude_outbound", p))
	}
	return errors.Join(errs...)
}

func (c Config) withDefaults() Config {
	if c.OutboundPort == 0 {
		c.OutboundPort = DefaultOutboundPort
	}
	if c.InboundPort == 0 {
		c.InboundPort = DefaultInboundPort
	}
	return c
}

// ipv6 says whether the kernel of this network namespace speaks IPv6 and the
// configuration wants it redirected.
func (c Config) ipv6() bool {
	switch c.IPv6 {
	case IPv6On:
		return true
	case IPv6Off:
		return false
	}
	// Present as soon as the IPv6 stack is, even if no address is set yet. Not
	// /proc/net: that is the main thread's namespace.
	_, err := os.Stat("/proc/thread-self/net/if_inet6")
	return err == nil
}

// protectedPorts are the members of symbolon_in.
func (c Config) protectedPorts() PortSet {
	own := Ports(PortRange{c.OutboundPort, c.OutboundPort}, PortRange{c.InboundPort, c.InboundPort})
	return c.InboundPorts.Minus(c.ExcludeInbound).Minus(own)
}

// intercepted are the members of symbolon_out4 (is4) or symbolon_out6.
func (c Config) intercepted(is4 bool) []netip.Prefix {
	family := func(all []netip.Prefix) []netip.Prefix {
		return slices.DeleteFunc(slices.Clone(all), func(p netip.Prefix) bool { return p.Addr().Is4() != is4 })
	}
	return splitDefault(subtract(family(c.Outbound), family(c.ExcludeOutbound)))
}
