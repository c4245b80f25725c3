package main

import (
	"context"
	"fmt"
	"net/netip"
	"time"
)

// balanced shows a connection whose addresses are rewritten twice on its way.
func (d *demo) balanced(ctx context.Context) error {
	d.heading("Through NAT and balancer", "The NAT puts its own address in place of the client's, HAProxy opens a second connection\nof its own. Neither was told of Symbolon, and neither can read what it forwards.")
	since := time.Now()
	if err := d.fetch(ctx, balancedURL); err != nil {
		return err
	}
	p, err := d.both(ctx, d.backendProxy, since, balancerAddr, webPort)
	if err != nil {
		return err
	}
	d.balancedFlow = p.client
	if err := d.encrypted(p, "report", "web", "/acme/prod/report-reads-web"); err != nil {
		return err
	}
	d.say("\nOne connection, as the proxies at its two ends recorded it:")
	row := func(what, client, server string) { d.field(what, "%-42s %s", client, server) }
	row("", "client's proxy", "backend's proxy")
	row("source", p.client.Source.Address, p.server.Source.Address)
	row("destination", p.client.Destination.Address, p.server.Destination.Address)
	row("known as", p.client.Destination.External, "-")
	row("source is", p.client.Source.SPIFFEID, p.server.Source.SPIFFEID)
	row("server is", p.client.Destination.SPIFFEID, p.server.Destination.SPIFFEID)
	row("flow id", p.client.FlowID, p.server.FlowID)
	if err := d.claim(from(p.client.Source.Address, clientAddr) && from(p.server.Source.Address, balancerInside),
		fmt.Sprintf("the addresses differ: %s here, the balancer's %s there", clientAddr, balancerInside), p); err != nil {
		return err
	}
	if err := d.claim(p.client.Source.SPIFFEID == p.server.Source.SPIFFEID && p.client.FlowID == p.server.FlowID,
		"identity and flow id are the same at both ends", p); err != nil {
		return err
	}
	return d.impostor(ctx)
}

// impostor calls from the very address that the server knows the client by.
func (d *demo) impostor(ctx context.Context) error {
	// What comes now is in the clear by intention: no part of the capture.
	for _, c := range d.captures {
		if _, err := c.Stop(); err != nil {
			return err
		}
	}
	seen := d.directFlow.Source.Address
	d.say(fmt.Sprintf("\nAnd the reverse: when curl on the client was allowed, the server saw it come from\n%s, the NAT. Now curl on the NAT itself, which has no proxy, calls from there:", seen))
	since := time.Now()
	r, err := d.run(ctx, d.nat, "", curl(directURL)...)
	if err != nil {
		return err
	}
	if err := d.gotNothing(r); err != nil {
		return err
	}
	l, err := recorded(ctx, d.serverProxy, since, serverAddr, webPort, "deny")
	if err != nil {
		return err
	}
	d.print(l)
	if err := d.claim(from(seen, natOutside) && from(l.Source.Address, natOutside) && l.Source.SPIFFEID == "" && l.Reason == "peer-unprotected",
		"the same source address, but nobody proven behind it: denied, reason "+l.Reason, *l); err != nil {
		return err
	}
	d.meaning("An address is not an identity: NAT and balancers change nothing, and sharing an address gains nothing.")
	return nil
}

// from reports whether a record's address has the given IP.
func from(address, ip string) bool {
	a, err := netip.ParseAddrPort(address)
	return err == nil && a.Addr() == netip.MustParseAddr(ip)
}
