package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"
)

// loads are the kinds of load. Each gets its connections open and warm, calls ready,
// and works until the window that ready returns is over.
var loads = map[string]func(*load) (loaded, error){
	"down": (*load).down, "up": (*load).up, "echo": (*load).echo,
	"connect": (*load).connect, "idle": (*load).idle, "mixed": (*load).mixed,
}

// load is a load generator at work.
type load struct {
	ctx    context.Context
	target string
	conns  int
	window time.Duration
	ready  func() error
	dialer net.Dialer

	mu   sync.Mutex
	open []net.Conn
}

const (
	dialTimeout = 30 * time.Second
	// dialers is how many connections are being opened at once.
	dialers = 16
	// ioTimeout ends a load generator whose peer hangs.
	ioTimeout = 60 * time.Second
)

// loadMain generates one load. It says "ready" on standard output, starts when a
// line comes in on standard input, prints its result as JSON, and keeps its
// connections open until standard input ends: so the caller can read the proxies'
// counters exactly at the window's edges.
func loadMain(ctx context.Context, args []string) error {
	l := &load{ctx: ctx, dialer: net.Dialer{Timeout: dialTimeout}}
	f := flag.NewFlagSet("load", flag.ContinueOnError)
	kind := f.String("kind", "", "of load")
	f.StringVar(&l.target, "target", "", "address and port")
	f.IntVar(&l.conns, "conns", 1, "connections, or workers")
	f.DurationVar(&l.window, "window", time.Second, "how long to measure")
	if err := f.Parse(args); err != nil {
		return err
	}
	work, ok := loads[*kind]
	if !ok {
		return fmt.Errorf("no such load: %q", *kind)
	}
	in := bufio.NewReader(os.Stdin)
	l.ready = func() error {
		fmt.Println("ready")
		_, err := in.ReadString('\n')
		return err
	}
	defer l.close()
	r, err := work(l)
	if err != nil {
		return err
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, in)
	return nil
}

func (l *load) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.open {
		c.Close()
	}
}

// dial opens a connection for an operation.
func (l *load) dial(op byte) (net.Conn, error) {
	c, err := l.dialer.DialContext(l.ctx, "tcp", l.target)
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(l.window + ioTimeout))
	if _, err := c.Write([]byte{op}); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// dialAll opens n connections, some at a time, runs warm on each, and keeps them.
func (l *load) dialAll(n int, op byte, warm func(net.Conn) error) ([]net.Conn, error) {
	var (
		wg    sync.WaitGroup
		conns = make([]net.Conn, n)
		errs  = make([]error, dialers)
	)
	for d := range dialers {
		wg.Go(func() {
			for i := d; i < n && errs[d] == nil; i += dialers {
				if conns[i], errs[d] = l.dial(op); errs[d] == nil {
					l.mu.Lock()
					l.open = append(l.open, conns[i])
					l.mu.Unlock()
					errs[d] = warm(conns[i])
				}
			}
		})
	}
	wg.Wait()
	return conns, errors.Join(errs...)
}

// each runs f on every connection at the same time.
func each(conns []net.Conn, f func(i int, c net.Conn) error) error {
	var wg sync.WaitGroup
	errs := make([]error, len(conns))
	for i, c := range conns {
		wg.Go(func() { errs[i] = f(i, c) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// down measures bulk transfers to the client, from the first byte asked for in the
// window to the last that was.
func (l *load) down() (loaded, error) {
	conns, err := l.dialAll(l.conns, opSource, func(c net.Conn) error { return fetch(c, time.Time{}, nil) })
	if err != nil {
		return loaded{}, err
	}
	if err := l.ready(); err != nil {
		return loaded{}, err
	}
	bytes := make([]uint64, len(conns))
	start := time.Now()
	err = each(conns, func(i int, c net.Conn) error { return fetch(c, start.Add(l.window), &bytes[i]) })
	return loaded{Seconds: time.Since(start).Seconds(), Bytes: sum(bytes)}, err
}

// fetch downloads pieces, two asked for at a time, until end, but one at least.
func fetch(c net.Conn, end time.Time, count *uint64) error {
	buf := make([]byte, ioBuffer)
	ask := binary.BigEndian.AppendUint32(nil, piece)
	asked, got := 0, 0
	for {
		for asked-got <= piece && (asked == 0 || time.Now().Before(end)) {
			if _, err := c.Write(ask); err != nil {
				return err
			}
			asked += piece
		}
		if got == asked {
			if count != nil {
				*count = uint64(got)
			}
			return nil
		}
		n, err := c.Read(buf)
		if err != nil {
			return err
		}
		got += n
	}
}

// up measures bulk transfers to the server, until it has confirmed the last byte.
func (l *load) up() (loaded, error) {
	conns, err := l.dialAll(l.conns, opSink, func(c net.Conn) error { _, err := push(c, time.Now()); return err })
	if err != nil {
		return loaded{}, err
	}
	if err := l.ready(); err != nil {
		return loaded{}, err
	}
	bytes := make([]uint64, len(conns))
	start := time.Now()
	err = each(conns, func(i int, c net.Conn) (err error) {
		bytes[i], err = push(c, start.Add(l.window))
		return err
	})
	return loaded{Seconds: time.Since(start).Seconds(), Bytes: sum(bytes)}, err
}

// push uploads until end, one piece at least, and returns how much of that arrived.
func push(c net.Conn, end time.Time) (uint64, error) {
	block := make([]byte, ioBuffer)
	binary.BigEndian.PutUint32(block, ioBuffer-4)
	sent := 0
	for sent < piece || time.Now().Before(end) {
		if _, err := c.Write(block); err != nil {
			return 0, err
		}
		sent += ioBuffer - 4
	}
	if _, err := c.Write([]byte{0, 0, 0, 0}); err != nil {
		return 0, err
	}
	var count [8]byte
	if _, err := io.ReadFull(c, count[:]); err != nil {
		return 0, err
	}
	if arrived := binary.BigEndian.Uint64(count[:]); arrived != uint64(sent) {
		return arrived, fmt.Errorf("%d bytes arrived of %d", arrived, sent)
	}
	return uint64(sent), nil
}

func sum(all []uint64) (total uint64) {
	for _, n := range all {
		total += n
	}
	return total
}

// percentiles returns the 50th and 99th of durations in nanoseconds, in µs.
func percentiles(ns []uint32) (p50, p99 float64) {
	if len(ns) == 0 {
		return 0, 0
	}
	slices.Sort(ns)
	at := func(q float64) float64 { return float64(ns[int(q*float64(len(ns)-1))]) / 1e3 }
	return at(0.50), at(0.99)
}
