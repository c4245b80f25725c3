package netlab

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// etherLocal is IEEE 802's ethertype for local experiments. Sync's own frames
	// bear it, so that they are nothing to any protocol.
	etherLocal = 0x88b5
	// tokenSize is the payload of such a frame, in bytes: random, so that no
	// traffic holds it by chance.
	tokenSize = 32
	// syncTimeout bounds the time until a frame that was sent is in the file.
	syncTimeout = 20 * time.Second
	// resend is how often Sync repeats its frame: the kernel's buffer may be full,
	// and before tcpdump is up nobody hears it.
	resend = 20 * time.Millisecond
)

// Capture is a running or finished tcpdump.
type Capture struct {
	host   *Host
	iface  string
	path   string
	daemon *Daemon
}

// Capture records what passes an interface of the host ("eth0", "lo", or "any").
// The filter is pcap-filter(7)'s; empty means everything. When Capture returns,
// tcpdump is recording.
func (h *Host) Capture(iface, filter string) (*Capture, error) {
	c, err := h.capture(iface, filter)
	if err != nil {
		return nil, fmt.Errorf("netlab: capture %s on %s: %w", iface, h.name, err)
	}
	return c, nil
}

func (h *Host) capture(iface, filter string) (*Capture, error) {
	dir, err := h.world.mkdir(h.name)
	if err != nil {
		return nil, err
	}
	n := h.world.next()
	c := &Capture{host: h, iface: iface, path: filepath.Join(dir, fmt.Sprintf("%s-%d.pcap", iface, n))}
	args := []string{"tcpdump", "-i", iface, "-n", "-p",
		"-U",               // each packet to the file at once
		"--immediate-mode", // each packet from the kernel at once
		"-B", "16384",      // KiB of kernel buffer
		"-Z", "root", // Debian's drops to a user who could not write here
		"-w", c.path}
	if filter != "" {
		args = append(args, fmt.Sprintf("(%s) or ether proto %#x", filter, etherLocal))
	}
	c.daemon, err = h.Start(context.Background(), Service{
		Unit:    fmt.Sprintf("tcpdump-%d.service", n),
		Command: args,
		Stop:    syscall.SIGINT,
		Ready: func(ctx context.Context) error {
			if _, err := os.Stat(c.path); err != nil {
				return err
			}
			return c.sync(ctx)
		},
	})
	return c, err
}

// Path returns the file, in pcap format.
func (c *Capture) Path() string { return c.path }

// Sync returns when everything that passed the interface before the call is in
// the file. It sends a frame of its own and waits for it to arrive there.
func (c *Capture) Sync() error {
	if c.daemon.Ended() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), syncTimeout)
	defer cancel()
	if err := c.sync(ctx); err != nil {
		return fmt.Errorf("netlab: capture %s on %s: %w", c.iface, c.host.name, err)
	}
	return nil
}

func (c *Capture) sync(ctx context.Context) error {
	token := make([]byte, tokenSize)
	rand.Read(token)
	file, err := os.Open(c.path)
	if err != nil {
		return err
	}
	defer file.Close()
	var tail []byte
	sent := time.Time{}
	for {
		if time.Since(sent) > resend {
			if err := c.host.Do(func() error { return sendFrame(c.iface, token) }); err != nil {
				return err
			}
			sent = time.Now()
		}
		more, err := io.ReadAll(file)
		if err != nil {
			return err
		}
		tail = append(tail, more...)
		if bytes.Contains(tail, token) {
			return nil
		}
		tail = tail[max(0, len(tail)-tokenSize+1):]
		select {
		case <-ctx.Done():
			return fmt.Errorf("a frame that was sent is not in the file: %w", context.Cause(ctx))
		case <-time.After(pollInterval):
		}
	}
}

// sendFrame sends payload out of an interface of the thread's namespace; taps on
// the interface see it. "any" hears lo as well as every other.
func sendFrame(iface string, payload []byte) error {
	if iface == "any" {
		iface = "lo"
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(iface)
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req); err != nil {
		return fmt.Errorf("interface %s: %w", iface, err)
	}
	return unix.Sendto(fd, payload, 0, &unix.SockaddrLinklayer{
		Protocol: etherLocal<<8&0xff00 | etherLocal>>8, // network byte order
		Ifindex:  int(req.Uint32()),
		Halen:    6, // to 00:00:00:00:00:00, nobody's address
	})
}

// Stop ends the recording, with everything that passed before the call in the
// file, and returns the file's path. It lives until the world is closed.
func (c *Capture) Stop() (string, error) {
	if err := c.Sync(); err != nil {
		return c.path, err
	}
	return c.path, c.daemon.Stop()
}

// Packets returns the number of IP packets recorded so far. A test that claims
// that something is not on the wire must see that something else is.
func (c *Capture) Packets() (int, error) {
	n := 0
	err := c.each(func(p packet) {
		if p.isIP() {
			n++
		}
	})
	return n, err
}

// Contains reports whether the bytes were recorded so far: in one packet,
// headers included, or in the stream of one direction of a TCP connection, where
// they may spread over packets.
func (c *Capture) Contains(b []byte) (bool, error) {
	found := false
	var segments reassembly
	err := c.each(func(p packet) {
		found = found || bytes.Contains(p.data, b)
		if s, ok := p.tcp(); ok {
			segments.add(s)
		}
	})
	if err != nil || found {
		return found, err
	}
	for _, s := range segments.streams() {
		if bytes.Contains(s.Data, b) {
			return true, nil
		}
	}
	return false, nil
}

// Streams returns what was recorded so far of each direction of each TCP
// connection that carried data. Where packets are missing, a new stream begins.
func (c *Capture) Streams() ([]Stream, error) {
	var segments reassembly
	err := c.each(func(p packet) {
		if s, ok := p.tcp(); ok {
			segments.add(s)
		}
	})
	return segments.streams(), err
}

// each calls f with the packets recorded so far.
func (c *Capture) each(f func(packet)) error {
	if err := c.Sync(); err != nil {
		return err
	}
	file, err := os.Open(c.path)
	if err != nil {
		return fmt.Errorf("netlab: %w", err)
	}
	defer file.Close()
	if err := readPcap(file, f); err != nil {
		return fmt.Errorf("netlab: %s: %w", c.path, err)
	}
	return nil
}

// Tshark dissects what was recorded so far: a row per packet that passes the
// display filter (wireshark-filter(4)), with the fields asked for.
func (c *Capture) Tshark(ctx context.Context, filter string, fields ...string) ([][]string, error) {
	if len(fields) == 0 {
		return nil, errors.New("netlab: tshark: no fields asked for")
	}
	if err := c.Sync(); err != nil {
		return nil, err
	}
	path, err := Tool("tshark")
	if err != nil {
		return nil, fmt.Errorf("netlab: %w", err)
	}
	args := []string{"-n", "-r", c.path, "-Y", filter, "-T", "fields", "-E", "separator=/t"}
	for _, f := range fields {
		args = append(args, "-e", f)
	}
	out, err := exec.CommandContext(ctx, path, args...).Output()
	if err != nil {
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
		}
		return nil, fmt.Errorf("netlab: tshark: %w", err)
	}
	var rows [][]string
	for line := range strings.Lines(string(out)) {
		rows = append(rows, strings.Split(strings.TrimRight(line, "\n"), "\t"))
	}
	return rows, nil
}
