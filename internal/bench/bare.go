package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"runtime"
	"strconv"

	"github.com/symbolon/symbolon/internal/netlab"
)

// System bare is the floor under every transparent pair of proxies on this kernel: what is
// left when a pair does nothing but what it cannot do without. iptables and connection
// tracking bring it the connections of applications that know of nothing, it carries them on
// TCP connections between the hosts that serve one after the other, as our tunnels do, by the
// same hops and packets: the first bytes go along with the Open, and bring the last ACK of
// the handshake with the application. Each processor has a thread with an epoll of its own.
//
// It has no cipher, no identity, no policy and no record, it believes whoever speaks to it,
// does IPv4 only and stops at nothing: to be measured, and not to be used. Bulk passes its
// memory, as what is encrypted must; what is not need not (splice(2)), so that there
// symbolon-auth may do better.
const (
	nameBare = "bare"

	bareOutPort = 15001 // the client's side, for its applications
	bareInPort  = 15006 // the server's side, for the client's
	// bareMark is on the connections of the pair's own, which no rule is to bring back.
	bareMark = 0x4d0101
)

// bareWorkloads are those that it is a floor for: not memory, nor how bulk and requests share
// a loop.
var bareWorkloads = []string{"down-1", "down-8", "up-1", "up-8", "echo-1", "echo-64", "connect", "far"}

// startBare starts both sides, and the first time makes the rules that feed them.
func startBare(ctx context.Context, l *lab, p *pair) (err error) {
	if p.clientSide == nil {
		rule := func(h *netlab.Host, port int, where ...string) {
			args := append([]string{"-t", "nat", "-A"}, where...)
			h.IPTables(4, append(args, "-p", "tcp", "--syn", "-d", serverAddr, "--dport", strconv.Itoa(backendPort),
				"-j", "REDIRECT", "--to-ports", strconv.Itoa(port))...)
		}
		rule(p.client, bareOutPort, "OUTPUT", "-m", "mark", "!", "--mark", fmt.Sprint(bareMark))
		rule(p.server, bareInPort, "PREROUTING", "!", "-i", "lo")
		if err := l.world.Err(); err != nil {
			return err
		}
	}
	start := func(h *netlab.Host, port uint16, args ...string) (*netlab.Daemon, error) {
		return h.Start(ctx, netlab.Service{
			Unit: "bare.service", Ports: []uint16{port},
			Command: append([]string{l.exe, "bare", "-port", fmt.Sprint(port)}, args...),
		})
	}
	if p.serverSide, err = start(p.server, bareInPort); err != nil {
		return err
	}
	p.clientSide, err = start(p.client, bareOutPort, "-client")
	return err
}

// bareMain is half of the pair.
func bareMain(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("bare", flag.ContinueOnError)
	port := f.Int("port", 0, "where connections are redirected to")
	client := f.Bool("client", false, "they are applications', not the other half's")
	if err := f.Parse(args); err != nil {
		return err
	}
	failed := make(chan error)
	for range runtime.NumCPU() {
		l, err := newBareLoop(uint16(*port), *client)
		if err != nil {
			return err
		}
		go func() { failed <- l.run() }()
	}
	select {
	case err := <-failed:
		return err
	case <-ctx.Done(): // the loops end with the process
		return nil
	}
}

// errNotBare: what should have passed through system bare did not.
var errNotBare = errors.New("no frame of the pair's is on the wire")

// proveBare looks for a frame in what was captured between the hosts: no handshake tells
// that there is a pair.
func proveBare(streams []netlab.Stream) error {
	for _, s := range streams {
		if len(s.Data) > frameHeader && s.Data[0] == frameOpen {
			return nil
		}
	}
	return errNotBare
}
