package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/fleet"
)

// pair is what the two proxies of a connection recorded.
type pair struct{ client, server *flow.Line }

// id is a workload of this world's policy.
func id(workload string) string {
	return "spiffe://" + fleet.TrustDomain + "/acme/prod/" + workload
}

// recorded waits for p's record of a connection to addr:port that began after since.
func recorded(ctx context.Context, p *fleet.Proxy, since time.Time, addr string, port int, outcome string) (*flow.Line, error) {
	destination := fmt.Sprintf("%s:%d", addr, port)
	return p.WaitFlow(ctx, func(l *flow.Line) bool {
		return !l.Start.Before(since) && l.Destination.Address == destination && l.Outcome == outcome
	})
}

// both waits for the records of both sides, which share a flow id.
func (d *demo) both(ctx context.Context, server *fleet.Proxy, since time.Time, addr string, port int) (p pair, err error) {
	if p.client, err = recorded(ctx, d.clientProxy, since, addr, port, "allow"); err != nil {
		return p, err
	}
	p.server, err = server.WaitFlow(ctx, func(l *flow.Line) bool { return l.FlowID == p.client.FlowID })
	return p, err
}

// print shows a record as an operator would tell it.
func (d *demo) print(l *flow.Line) {
	d.say(fmt.Sprintf("\nThe record of the %s's proxy:", l.Reporter))
	d.field("from", "%s  {%s}  %s", name(&l.Source), labels(&l.Source), l.Source.Address)
	d.field("to", "%s  {%s}  %s", name(&l.Destination), labels(&l.Destination), l.Destination.Address)
	style := green
	if l.Outcome != "allow" {
		style = red
	}
	d.field("verdict", "%s, reason %s", d.paint(style, l.Outcome), l.Reason)
	if l.ClientPolicy != "" {
		d.field("client's side", "by %s", l.ClientPolicy)
	}
	if l.ServerPolicy != "" {
		d.field("server's side", "by %s", l.ServerPolicy)
	}
	if l.Outcome == "allow" {
		d.field("protection", "%s: %s, %s, key exchange %s", l.Protection, l.TLSVersion, l.CipherSuite, l.KeyExchange)
		d.field("bytes", "%d there, %d back", l.BytesSent, l.BytesReceived)
	}
	if l.Detail != "" {
		d.field("detail", "%s", l.Detail)
	}
}

func name(e *flow.Endpoint) string {
	switch {
	case e.SPIFFEID != "":
		return e.SPIFFEID
	case e.External != "":
		return e.External
	default:
		return "(nobody proven)"
	}
}

// labels are those that Profiles gave: the keys without a source.
func labels(e *flow.Endpoint) string {
	var all []string
	for _, k := range slices.Sorted(maps.Keys(e.Attributes)) {
		if !strings.Contains(k, ".") {
			all = append(all, k+"="+strings.Join(e.Attributes[k], ","))
		}
	}
	return strings.Join(all, " ")
}

// encrypted reports whether both records say: allowed, from and to these workloads,
// by this policy on both sides, encrypted with what is promised, and bytes went both
// ways.
func (p pair) encrypted(from, to, policy string) bool {
	for _, l := range []*flow.Line{p.client, p.server} {
		if l.Outcome != "allow" || l.Source.SPIFFEID != id(from) || l.Destination.SPIFFEID != id(to) ||
			l.Protection != "encrypted" || l.TLSVersion != "TLS 1.3" ||
			l.CipherSuite != "TLS_AES_256_GCM_SHA384" || l.KeyExchange != "X25519MLKEM768" ||
			l.BytesSent == 0 || l.BytesReceived == 0 {
			return false
		}
	}
	return p.client.ClientPolicy == policy && p.server.ServerPolicy == policy
}

// String is the evidence where a claim fails.
func (p pair) String() string { return fmt.Sprintf("client's %+v, server's %+v", *p.client, *p.server) }

// lastRecords is what the proxies wrote last: the first thing to look at where a
// claim fails.
func (d *demo) lastRecords() string {
	var b strings.Builder
	for _, p := range []*fleet.Proxy{d.clientProxy, d.serverProxy, d.backendProxy} {
		if p == nil {
			continue
		}
		lines, err := p.Flows()
		if err != nil || len(lines) == 0 {
			continue // it has written none yet
		}
		fmt.Fprintf(&b, "the last record of %s's proxy: %+v\n", p.Host.Name(), lines[len(lines)-1])
	}
	return strings.TrimRight(b.String(), "\n")
}
