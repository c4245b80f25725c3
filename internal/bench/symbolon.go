package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/fleet"
	"github.com/symbolon/symbolon/internal/netlab"
)

const (
	controllerAddr = "10.9.0.1"
	loadUnit       = "load.service"
	backendUnit    = "backend.service"
)

// policy has a namespace for each protection: a client that may talk to a server,
// and nobody else to anybody.
func policy() string {
	const head = "kind: Namespace\nname: /acme\nmode: enforce\ndefault: deny\nprotection: encrypted\nattributes: {app: {}}\n"
	const one = `---
kind: Namespace
name: /acme/%[1]s
mode: enforce
protection: %[1]s
---
kind: Profile
namespace: /acme/%[1]s
name: load
match: {proc.unit: ` + loadUnit + `}
workload: load
labels: {app: load}
---
kind: Profile
namespace: /acme/%[1]s
name: backend
match: {proc.unit: ` + backendUnit + `}
workload: backend
labels: {app: backend}
---
kind: Policy
namespace: /acme/%[1]s
name: load-backend
subject: {app: load}
verb: allow
object: {app: backend}
`
	return head + fmt.Sprintf(one, "encrypted") + fmt.Sprintf(one, "authenticated")
}

// startController starts the controller that all of Symbolon's proxies share. Its
// network is not the one that is measured.
func (l *lab) startController(ctx context.Context) (err error) {
	l.management = l.world.Switch("mgmt")
	host := l.world.Host("ctl")
	l.management.Attach(host, controllerAddr+"/24")
	if l.fleet, err = fleet.New(ctx, host, controllerAddr); err != nil {
		return err
	}
	return l.fleet.Apply(ctx, policy())
}

// startSymbolon enrols both hosts, or starts their proxies again. config is added to
// their proxy.yaml.
func startSymbolon(protection, config string) func(context.Context, *lab, *pair) error {
	return func(ctx context.Context, l *lab, p *pair) (err error) {
		start := func(h *netlab.Host, known **fleet.Proxy, daemon **netlab.Daemon) error {
			if *known == nil {
				l.addresses++
				l.management.Attach(h, fmt.Sprintf("10.9.0.%d/24", 1+l.addresses))
				if *known, err = l.fleet.Proxy(ctx, h, fleet.Enrolment{Namespace: "/acme/" + protection, Config: config}); err != nil {
					return err
				}
			} else if err := (*known).Start(ctx); err != nil {
				return err
			}
			*daemon = (*known).Daemon()
			return nil
		}
		if err := start(p.server, &p.serverProxy, &p.serverSide); err != nil {
			return err
		}
		if err := start(p.client, &p.clientProxy, &p.clientSide); err != nil {
			return err
		}
		return l.fleet.Settle(ctx)
	}
}

// proveRecord looks at the record of a connection of ours: decided by policy on both
// sides, and protected as it should be.
func (p *pair) proveRecord(ctx context.Context) error {
	if p.clientProxy == nil {
		return nil
	}
	want := "encrypted"
	if !p.encrypted {
		want = "authenticated"
	}
	_, err := p.clientProxy.WaitFlow(ctx, func(r *flow.Line) bool {
		return r.Outcome == "allow" && r.Protection == want && r.TLSVersion == "TLS 1.3" &&
			r.CipherSuite == "TLS_AES_256_GCM_SHA384" && r.ClientPolicy != "" && r.ServerPolicy != ""
	})
	return err
}

// records sums up what Symbolon's proxies recorded.
func (p *pair) records() (string, error) {
	if p.clientProxy == nil {
		return "", nil
	}
	var notes []string
	var errs []error
	for _, proxy := range []*fleet.Proxy{p.clientProxy, p.serverProxy} {
		lines, err := proxy.Flows()
		if err != nil {
			errs = append(errs, err)
			continue
		}
		resumed, reused, other := 0, 0, make(map[string]int)
		exchanges := make(map[string]int)
		for _, r := range lines {
			switch {
			case r.Reused:
				reused++
			case r.Resumed:
				resumed++
			}
			if r.Outcome != "allow" {
				other[r.Outcome+" "+r.Reason]++
			}
			exchanges[r.KeyExchange]++
		}
		note := fmt.Sprintf("%s: %d records: %d on a tunnel that had served before, %d on one whose handshake was resumed; key exchanges %v", proxy.Host.Name(), len(lines), reused, resumed, exchanges)
		if len(other) > 0 {
			note += fmt.Sprintf(", not allowed %v", other)
		}
		notes = append(notes, note)
	}
	return strings.Join(notes, "; "), errors.Join(errs...)
}
