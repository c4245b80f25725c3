package main

import (
	"context"
	"embed"
	"fmt"
	"os"
	"strings"

	"github.com/symbolon/symbolon/internal/fleet"
	"github.com/symbolon/symbolon/internal/netlab"
)

// policies are what the demo applies, readable as files as well.
//
//go:embed policy/*.yaml
var policies embed.FS

const policyDir = "policy"

// enrol starts the controller, applies the policy, and starts a proxy on each of
// the three hosts that have programs to protect.
func (d *demo) enrol(ctx context.Context) (err error) {
	d.heading("A controller, a policy, a proxy on each host", "The policy speaks of programs and labels; no workload's address is in it.")
	if err := d.listen(); err != nil {
		return err
	}
	if d.fleet, err = fleet.New(ctx, d.controller, controllerAddr); err != nil {
		return err
	}
	if err := os.CopyFS(d.net.Dir(), policies); err != nil {
		return err
	}
	if err := d.printPolicies(); err != nil {
		return err
	}
	r, err := d.operator(ctx, "policy", "apply", "-f", policyDir)
	if err != nil {
		return err
	}
	if err := d.claim(r.ExitCode == 0, "the controller checked it and put it in force", r); err != nil {
		return err
	}
	d.say("\nEach host joins with a token that works once; its keys are made there and stay there.")
	// The proxies take every port and every destination: that is the default.
	if err := together(
		d.join(ctx, d.client, "desk", &d.clientProxy),
		d.join(ctx, d.server, "server", &d.serverProxy),
		d.join(ctx, d.backend, "backend", &d.backendProxy),
	); err != nil {
		return err
	}
	if err := d.fleet.Settle(ctx); err != nil {
		return err
	}
	if r, err = d.operator(ctx, "host", "list"); err != nil {
		return err
	}
	generation, err := d.fleet.Generation(ctx)
	if err != nil {
		return err
	}
	if err := d.claim(r.ExitCode == 0, fmt.Sprintf("client, server and backend enforce generation %d of the policy", generation), r); err != nil {
		return err
	}
	d.meaning("From here on, what policy does not allow does not pass, on any port of the three hosts.")
	return nil
}

func (d *demo) join(ctx context.Context, h *netlab.Host, role string, p **fleet.Proxy) func() error {
	return func() (err error) {
		*p, err = d.fleet.Proxy(ctx, h, fleet.Enrolment{Namespace: "/acme/prod", Labels: map[string]string{"role": role}})
		return err
	}
}

// printPolicies shows the first Profile and all Policies.
func (d *demo) printPolicies() error {
	const profiles, access = policyDir + "/2-profiles.yaml", policyDir + "/3-access.yaml"
	text, err := policies.ReadFile(profiles)
	if err != nil {
		return err
	}
	first, _, _ := strings.Cut(string(text), "---\n")
	d.command(fmt.Sprintf("head -n %d %s", strings.Count(first, "\n"), profiles), d.controller.Name())
	d.output(first)
	if text, err = policies.ReadFile(access); err != nil {
		return err
	}
	d.command("cat "+access, d.controller.Name())
	d.output(string(text))
	return nil
}

// listen captures, from before the hosts join, all that passes the NAT's outside
// and the cable between balancer and backend.
func (d *demo) listen() error {
	for _, at := range []struct {
		iface *netlab.Interface
		where string
	}{
		{d.natOut, "on the NAT's outside"},
		{d.balancerIn, "between balancer and backend"},
	} {
		c, err := at.iface.Host.Capture(at.iface.Name, "")
		if err != nil {
			return err
		}
		d.captures = append(d.captures, &tap{c, at.where})
	}
	return nil
}
