package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/fleet"
	"github.com/symbolon/symbolon/internal/netlab"
)

// The world. 198.51.100.0/24 plays the internet (RFC 5737).
const (
	clientAddr     = "10.1.0.2"
	natInside      = "10.1.0.1"
	natOutside     = "198.51.100.1"
	controllerAddr = "198.51.100.5"
	serverAddr     = "198.51.100.10"
	balancerAddr   = "198.51.100.20"
	balancerInside = "10.3.0.1"
	backendAddr    = "10.3.0.2"

	webPort = 80
	dbPort  = 5432

	// outputLines is how much of the operator's program's output is shown.
	outputLines = 15
)

const picture = `
   10.1.0.0/24                    198.51.100.0/24                     10.3.0.0/24

   client .2 ---------- NAT .1 ---+--- server .10
   curl, psql           (SNAT)    |    nginx :80, PostgreSQL :5432
   [proxy]                        |    [proxy]
                                  |
                                  +--- balancer .20 ----------------- backend .2
                                  |    HAProxy :80                    nginx :80
                                  |    (no proxy here)                [proxy]
                                  |
                                  +--- controller .5
                                       policy, certificates

`

// tools are the programs that take part.
var tools = []string{"curl", "psql", "nginx", "initdb", "postgres", "haproxy", "iptables", "ipset", "ip", "tcpdump", "tshark"}

// demo is the world and what stands in it.
type demo struct {
	*screen
	net *netlab.World
	// secret is in the web server's page and in the database: what must not be on
	// the wire. It is new in each run, so that nothing holds it by chance.
	secret string

	client, nat, controller, server, balancer, backend *netlab.Host
	natOut, balancerIn                                 *netlab.Interface

	fleet                                  *fleet.Fleet
	clientProxy, serverProxy, backendProxy *fleet.Proxy

	plainPage []byte // the web server's answer as it was on the wire without proxies
	captures  []*tap
	// What was recorded of the first allowed connection, by the server's proxy, and
	// of the one through the balancer, by the client's.
	directFlow, balancedFlow *flow.Line
}

// tap is a capture and where it is.
type tap struct {
	*netlab.Capture
	where string
}

// build makes the world and starts the servers.
func (d *demo) build(ctx context.Context) (err error) {
	fmt.Fprintln(d.w, d.paint(bold, "Symbolon: who talks to whom, proven, authorized and encrypted; applications unchanged."))
	fmt.Fprint(d.w, picture)
	d.say("Each is a network namespace on this machine; all programs are the real ones.\nStarting nginx (twice), PostgreSQL and HAProxy ...")
	if d.net, err = netlab.New(netlab.Options{}); err != nil {
		return err
	}
	random := make([]byte, 6)
	rand.Read(random)
	d.secret = "TOP-SECRET-" + hex.EncodeToString(random)
	d.link()
	if err := d.net.Err(); err != nil {
		return err
	}
	return d.serve(ctx)
}

func (d *demo) link() {
	w := d.net
	d.client, d.nat, d.server = w.Host("client"), w.Router("nat"), w.Host("server")
	d.controller, d.balancer, d.backend = w.Host("controller"), w.Router("balancer"), w.Host("backend")
	w.Link(d.client, d.nat, []string{clientAddr + "/24"}, []string{natInside + "/24"})
	internet := w.Switch("internet")
	d.natOut = internet.Attach(d.nat, natOutside+"/24")
	internet.Attach(d.controller, controllerAddr+"/24")
	internet.Attach(d.server, serverAddr+"/24")
	out := internet.Attach(d.balancer, balancerAddr+"/24")
	d.balancerIn, _ = w.Link(d.balancer, d.backend, []string{balancerInside + "/24"}, []string{backendAddr + "/24"})
	d.client.DefaultRoute(natInside)
	d.backend.DefaultRoute(balancerInside)
	d.nat.SNAT(d.natOut)
	d.balancer.SNAT(out) // the backend's own way out, to the controller
}

// serve starts the servers, at the same time: the cluster's making takes a while.
func (d *demo) serve(ctx context.Context) error {
	page := netlab.Nginx{Port: webPort, Body: "the board's numbers, " + d.secret}
	return together(
		func() error { _, err := d.server.Nginx(ctx, page); return err },
		func() error { _, err := d.backend.Nginx(ctx, page); return err },
		func() error {
			_, err := d.balancer.Balancer(ctx, netlab.Balancer{
				Port: webPort, Backends: []netip.AddrPort{netip.MustParseAddrPort(fmt.Sprintf("%s:%d", backendAddr, webPort))},
			})
			return err
		},
		func() error {
			if _, err := d.server.Postgres(ctx, dbPort); err != nil {
				return err
			}
			_, err := d.server.Output(ctx, "psql", "-q", "-h", serverAddr, "-U", "postgres", "-c",
				fmt.Sprintf("CREATE TABLE payroll AS SELECT 'ada' AS name, '%s' AS note", d.secret))
			return err
		},
	)
}

// together runs all at the same time and returns all errors.
func together(all ...func() error) error {
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, f := range all {
		wg.Go(func() { errs[i] = f() })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// run shows a command and runs it on a host. user is the machine's; "" is root. An
// exit code other than 0 is no error.
func (d *demo) run(ctx context.Context, h *netlab.Host, user string, args ...string) (netlab.Result, error) {
	where := h.Name()
	if user != "" {
		where += ", as " + user
	}
	d.command(quote(args), where)
	c := h.Command(ctx, args[0], args[1:]...)
	c.User = user
	// Nothing of the caller's: neither an http_proxy, nor a .curlrc, nor PGSSLMODE.
	c.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/nonexistent", "LC_ALL=C", "PGCONNECT_TIMEOUT=10"}
	r, err := c.Result()
	if err != nil {
		return r, err
	}
	d.output(r.Stdout)
	d.output(r.Stderr)
	return r, nil
}

// operator shows and runs the operator's program beside the controller.
func (d *demo) operator(ctx context.Context, args ...string) (netlab.Result, error) {
	d.command("symbolon "+quote(args), d.controller.Name())
	if d.color {
		args = append(args, "--color", "always")
	}
	r, err := d.cli(ctx, args...)
	if err != nil {
		return r, err
	}
	d.output(beginning(r.Stdout, outputLines))
	d.output(r.Stderr)
	return r, nil
}

// cli runs it without a word.
func (d *demo) cli(ctx context.Context, args ...string) (netlab.Result, error) {
	c := d.controller.Command(ctx, filepath.Join(d.fleet.Bin, "symbolon"), args...)
	c.Env = append(os.Environ(), d.fleet.CLIEnv()...)
	c.Dir = d.net.Dir()
	return c.Result()
}

// quote writes a command as one would type it.
func quote(args []string) string {
	words := make([]string, len(args))
	for i, a := range args {
		if strings.ContainsAny(a, " *;$()") {
			a = "'" + a + "'"
		}
		words[i] = a
	}
	return strings.Join(words, " ")
}

// close removes everything that was made.
func (d *demo) close() error {
	if d.net == nil {
		return nil
	}
	fmt.Fprintln(d.w, d.paint(faint, "\nRemoving all of it ..."))
	ctx, cancel := context.WithTimeout(context.Background(), cleanupLimit)
	defer cancel()
	var errs []error
	if d.fleet != nil {
		// Stopped first: one that still runs could keep its key after it was forgotten.
		errs = append(errs, together(stop(d.clientProxy), stop(d.serverProxy), stop(d.backendProxy)), d.fleet.Forget(ctx))
	}
	if err := errors.Join(append(errs, d.net.Close())...); err != nil {
		return fmt.Errorf("%w: %w", errCleanup, err)
	}
	return nil
}

// stop stops a proxy, if it was ever started.
func stop(p *fleet.Proxy) func() error {
	return func() error {
		if p == nil || p.Daemon() == nil {
			return nil
		}
		return p.Daemon().Stop()
	}
}

// errCleanup: something of the world may be left on this machine.
var errCleanup = errors.New("not everything was removed")
