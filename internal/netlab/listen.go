package netlab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"
)

// Socket states as /proc/net shows them (include/net/tcp_states.h): a listening
// TCP socket, and an unconnected UDP socket.
const (
	stateListen = "0A"
	stateClose  = "07"
)

// WaitListen returns when a socket of the host listens on the port ("tcp"), or is
// bound to it ("udp"), on any address. It looks at the kernel's table and sends
// nothing, so that no daemon sees a connection that nobody made.
func (h *Host) WaitListen(ctx context.Context, network string, port uint16) error {
	for {
		ok, err := h.listening(network, port)
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("nothing listens on %s port %d: %w", network, port, context.Cause(ctx))
		case <-time.After(pollInterval):
		}
	}
}

func (h *Host) listening(network string, port uint16) (found bool, err error) {
	state := stateListen
	switch network {
	case "tcp":
	case "udp":
		state = stateClose
	default:
		return false, fmt.Errorf("network %q is neither tcp nor udp", network)
	}
	err = h.Do(func() error {
		for _, table := range []string{network, network + "6"} {
			// /proc/net would be the main thread's namespace.
			b, err := os.ReadFile("/proc/thread-self/net/" + table)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			found = found || hasSocket(string(b), state, port)
		}
		return nil
	})
	return found, err
}

// hasSocket looks for a local port and state in a table of proc_net_tcp.rst's
// format: number, local address:port, remote address:port, state, all in hex.
func hasSocket(table, state string, port uint16) bool {
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) < 4 || f[3] != state {
			continue
		}
		p, err := strconv.ParseUint(f[1][strings.LastIndexByte(f[1], ':')+1:], 16, 16)
		if err == nil && uint16(p) == port {
			return true
		}
	}
	return false
}
