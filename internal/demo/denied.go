package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/netlab"
)

// stranger is a user of every machine who owns nothing.
const stranger = "nobody"

// denied shows what policy does not let through, why, and what the application
// notices of it.
func (d *demo) denied(ctx context.Context) error {
	d.heading("Denied, with a reason", "curl, which may read the web server, goes for the database; and curl is run by a user\nwhom no Profile knows.")
	const policy = "/acme/reports-never-touch-databases"
	l, err := d.refused(ctx, "", fmt.Sprintf("http://%s:%d/", serverAddr, dbPort), dbPort)
	if err != nil {
		return err
	}
	if err := d.claim(l.Source.SPIFFEID == id("report") && l.Destination.SPIFFEID == id("db") && l.Reason == "policy" && l.ClientPolicy == policy,
		"denied by "+policy+", and no byte passed", *l); err != nil {
		return err
	}
	if err := d.explain(ctx, policy); err != nil {
		return err
	}
	if l, err = d.refused(ctx, stranger, directURL, webPort); err != nil {
		return err
	}
	if err := d.claim(l.Source.SPIFFEID != "" && l.Source.SPIFFEID != id("report") && labels(&l.Source) == "" && l.Reason == "default",
		fmt.Sprintf("the same program on the same host, but as user %s it has no labels: nothing allows it, so it is denied", stranger), *l); err != nil {
		return err
	}
	d.meaning("The application sees a connection that is reset; the operator sees who, whom, which policy and why.")
	return nil
}

// refused runs curl, which must get nothing, and returns the record of it.
func (d *demo) refused(ctx context.Context, user, url string, port int) (*flow.Line, error) {
	since := time.Now()
	r, err := d.run(ctx, d.client, user, curl(url)...)
	if err != nil {
		return nil, err
	}
	l, err := recorded(ctx, d.clientProxy, since, serverAddr, port, "deny")
	if err != nil {
		return nil, err
	}
	if err := d.gotNothing(r); err != nil {
		return nil, err
	}
	d.print(l)
	if l.BytesSent != 0 || l.BytesReceived != 0 {
		return nil, &claimError{"no byte passed", fmt.Sprintf("%+v", *l)}
	}
	return l, nil
}

func (d *demo) gotNothing(r netlab.Result) error {
	return d.claim(r.ExitCode > 0 && r.Stdout == "", fmt.Sprintf("curl got nothing (exit code %d)", r.ExitCode), r)
}

// explain asks the controller about the same connection.
func (d *demo) explain(ctx context.Context, policy string) error {
	r, err := d.operator(ctx, "explain", "--from", id("report"), "--to", id("db"), "--port", fmt.Sprint(dbPort))
	if err != nil {
		return err
	}
	return d.claim(r.ExitCode == 1 && strings.Contains(r.Stdout, policy), "explain, which asks without connecting, says the same (exit code 1)", r)
}
