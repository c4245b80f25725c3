package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/symbolon/symbolon/internal/fleet"
	"github.com/symbolon/symbolon/internal/netlab"
)

const (
	startLimit = 90 * time.Second
	// cleanupLimit bounds what is done after the end, which an interrupt does not cut.
	cleanupLimit = 60 * time.Second
)

// lab is the world with all systems in it, side by side: those whose turn it is not
// are idle.
type lab struct {
	world        *netlab.World
	exe          string
	certificates *certificates
	pairs        []*pair
	progress     io.Writer
	congestion   string // of all hosts; empty: what they inherit

	fleet      *fleet.Fleet // nil without Symbolon
	management *netlab.Switch
	addresses  int // given on the management network

	// By measurement: cores that other processes and other machines used.
	noise, steal []float64
}

// pair is a system in its two hosts:
//
//	client 10.1.0.1 -- veth pair -- 10.1.0.2 server
//	load, proxy                     proxy, backend
type pair struct {
	system
	client, server         *netlab.Host
	clientSide, serverSide *netlab.Daemon // the proxies; nil: none
	clientProxy            *fleet.Proxy   // nil: not Symbolon's
	serverProxy            *fleet.Proxy
	handshakes             string // how many of those watched were resumed
}

var redirecting = []string{"iptables", "ip6tables", "ipset"}

// tools are the programs of the world and of all systems.
var tools = map[string][]string{
	"":        {"ip", "tcpdump", "iptables"},
	"haproxy": {"haproxy"}, "nginx": {"nginx"}, "nginx-64k": {"nginx"}, "stunnel": {"stunnel"},
	nameSymbolon: redirecting, nameAuthenticated: redirecting, nameSingle: redirecting, nameX25519: redirecting, nameStock: redirecting,
}

// newLab starts everything and proves that each system does what it is measured
// for. The lab is to be closed, also after an error, unless it is nil.
func newLab(ctx context.Context, o *options, progress io.Writer) (*lab, error) {
	need := slices.Clone(tools[""])
	for _, name := range o.systems {
		need = append(need, tools[name]...)
	}
	if o.trace != "" {
		need = append(need, traceTools[o.trace])
	}
	if missing := netlab.Missing(need...); len(missing) > 0 {
		return nil, fmt.Errorf("missing programs: run 'make bench', or install %v", missing)
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	world, err := netlab.New(netlab.Options{})
	if err != nil {
		return nil, err
	}
	l := &lab{world: world, exe: exe, progress: progress, congestion: o.congestion}
	if l.certificates, err = newCertificates(world.Dir()); err != nil {
		return l, err
	}
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	for _, s := range allSystems() {
		if !slices.Contains(o.systems, s.name) {
			continue
		}
		fmt.Fprintf(progress, "starting %s: %s\n", s.name, s.about)
		if err := l.add(ctx, s); err != nil {
			return l, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return l, nil
}

// add makes a system's hosts and starts what belongs in them.
func (l *lab) add(ctx context.Context, s system) error {
	p := &pair{system: s, client: l.world.Host(s.name + "-c"), server: l.world.Host(s.name + "-s")}
	l.world.Link(p.client, p.server, []string{clientAddr + "/24"}, []string{serverAddr + "/24"})
	for _, h := range []*netlab.Host{p.client, p.server} {
		// Enough ports for a thousand connections a second without reusing one that
		// is in TIME-WAIT; those of the proxies are below.
		h.Sysctl("net.ipv4.ip_local_port_range", "16000 65000")
		if l.congestion != "" {
			h.Sysctl("net.ipv4.tcp_congestion_control", l.congestion)
		}
	}
	if s.start == nil || s.bare {
		p.client.Sysctl("net.ipv4.tcp_tw_reuse", "1") // ten thousand a second
	}
	if s.bare {
		p.server.Sysctl("net.ipv4.tcp_tw_reuse", "1") // its connections with the application
	}
	if err := l.world.Err(); err != nil {
		return err
	}
	l.pairs = append(l.pairs, p)
	if _, err := p.server.Start(ctx, netlab.Service{
		Unit: backendUnit, Command: []string{l.exe, "backend", "-listen", fmt.Sprintf(":%d", backendPort)}, Ports: []uint16{backendPort},
	}); err != nil {
		return err
	}
	if p.start != nil {
		if s.ours() && l.fleet == nil {
			if err := l.startController(ctx); err != nil {
				return err
			}
		}
		if err := p.start(ctx, l, p); err != nil {
			return err
		}
	}
	return l.prove(ctx, p)
}

// restart starts a system's proxies anew.
func (l *lab) restart(ctx context.Context, p *pair) error {
	if p.start == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	// Whether they end in order is not measured here.
	_, _ = p.clientSide.Stop(), p.serverSide.Stop()
	return p.start(ctx, l, p)
}

// proofs is how many workers connect while the wire is watched: enough for each
// process of a peer to have a session to resume.
const proofs = 8

// prove watches the wire while a connection is made: what is measured as encrypted
// must be, and what goes through a proxy must have gone through it.
func (l *lab) prove(ctx context.Context, p *pair) error {
	capture, err := p.server.Capture("eth0", "tcp")
	if err != nil {
		return err
	}
	_, err = l.load(ctx, p, workload{kind: "connect", conns: proofs}, time.Millisecond, nil)
	if _, stop := capture.Stop(); err == nil {
		err = stop
	}
	if err != nil {
		return err
	}
	packets, err := capture.Packets()
	if err != nil {
		return err
	}
	readable, err := capture.Contains([]byte(marker))
	if err != nil {
		return err
	}
	if packets == 0 || readable == p.encrypted {
		return fmt.Errorf("on the wire are %d packets; readable: %v", packets, readable)
	}
	streams, err := capture.Streams()
	if err != nil {
		return err
	}
	all, resumed := handshakes(streams)
	if p.bare {
		if err := proveBare(streams); err != nil {
			return err
		}
	}
	if (all > 0) != (p.start != nil && !p.bare) {
		return fmt.Errorf("on the wire are %d TLS handshakes", all)
	}
	p.handshakes = fmt.Sprintf("%d of %d resumed", resumed, all)
	return p.proveRecord(ctx)
}

// about describes the systems.
func (l *lab) about() []systemInfo {
	var all []systemInfo
	for _, p := range l.pairs {
		all = append(all, systemInfo{p.name, p.system.about, p.peer, p.handshakes})
	}
	return all
}

// epilogue adds what is known only at the end.
func (l *lab) epilogue(r *results) {
	if l.fleet != nil {
		r.Machine.Versions[nameSymbolon] = says(context.Background(), filepath.Join(l.fleet.Bin, "symbolon-proxy"), "version")
	}
	r.Noise, r.Steal = noiseOf(l.noise), noiseOf(l.steal)
	for _, p := range l.pairs {
		note, err := p.records()
		if err != nil {
			note = err.Error()
		}
		if note != "" {
			r.Notes = append(r.Notes, note)
		}
	}
}

// close removes everything.
func (l *lab) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanupLimit)
	defer cancel()
	var errs []error
	if l.fleet != nil {
		errs = append(errs, l.fleet.Forget(ctx))
	}
	return errors.Join(append(errs, l.world.Close())...)
}
