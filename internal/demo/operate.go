package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"
)

// arrivalLimit is how long records may take to the controller: they are sent in
// batches.
const arrivalLimit = 10 * time.Second

// operate shows the operator's view.
func (d *demo) operate(ctx context.Context) error {
	d.heading("The operator's view", "The proxies send their records to the controller; symbolon asks it.")
	records, err := d.arrived(ctx)
	if err != nil {
		return err
	}
	for _, args := range [][]string{{"status"}, {"host", "list"}, {"flows", "--last", "20"}} {
		r, err := d.operator(ctx, args...)
		if err != nil {
			return err
		}
		if r.ExitCode != 0 {
			return fmt.Errorf("symbolon %s: exit code %d", quote(args), r.ExitCode)
		}
	}
	if err := d.claim(records == 2, fmt.Sprintf("the controller has %d records of the connection through NAT and balancer, one of each end", records), records); err != nil {
		return err
	}
	d.say(fmt.Sprintf("\nThe controller listens on %s in this world. On its own host symbolon finds it by", d.fleet.Address))
	d.output(strings.Join(d.environment(), " \\\n"))
	d.say("There is no dashboard in this version.")
	return nil
}

// arrived waits for the controller to have both ends' records of the connection
// through the balancer, and returns how many it has.
func (d *demo) arrived(ctx context.Context) (n int, err error) {
	ctx, cancel := context.WithTimeout(ctx, arrivalLimit)
	defer cancel()
	for {
		r, err := d.cli(ctx, "flows", "--last", "0", "-o", "name")
		if err != nil {
			return n, err
		}
		if n = strings.Count(r.Stdout, d.balancedFlow.FlowID); n >= 2 {
			return n, nil
		}
		select {
		case <-ctx.Done():
			return n, nil
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// environment is what the operator's program needs, without what is a matter of taste.
func (d *demo) environment() []string {
	var env []string
	for _, kv := range d.fleet.CLIEnv() {
		if strings.HasPrefix(kv, "SYMBOLON_") {
			env = append(env, kv)
		}
	}
	return env
}

// explore says how to look around in a world that is kept.
func (d *demo) explore() {
	enter := func(name string) string { return "nsenter --net=/run/netns/" + name + " " }
	fmt.Fprintf(d.w, "\n%s\n", d.paint(bold, "The world is kept until you press Enter. In another terminal, as root:"))
	d.output("\nexport " + strings.Join(d.environment(), " "))
	d.output(enter(d.controller.Netns()) + filepath.Join(d.fleet.Bin, "symbolon") + " flows --follow")
	d.output(enter(d.client.Netns()) + strings.Join(curl(balancedURL), " "))
}
