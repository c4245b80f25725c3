package main

import (
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"sync"
	"time"
)

// echo measures requests, one at a time on each open connection.
func (l *load) echo() (loaded, error) {
	conns, err := l.dialAll(l.conns, opEcho, func(c net.Conn) error { return ask(c, make([]byte, requestSize)) })
	if err != nil {
		return loaded{}, err
	}
	if err := l.ready(); err != nil {
		return loaded{}, err
	}
	times := make([][]uint32, len(conns))
	start := time.Now()
	err = each(conns, func(i int, c net.Conn) (err error) {
		times[i], err = askUntil(c, start.Add(l.window))
		return err
	})
	return requests(start, times), err
}

// requests sums up what the connections measured.
func requests(start time.Time, times [][]uint32) loaded {
	r := loaded{Seconds: time.Since(start).Seconds()}
	all := slices.Concat(times...)
	r.Requests = uint64(len(all))
	r.P50, r.P99 = percentiles(all)
	return r
}

// ask sends a request and waits for the whole answer.
func ask(c net.Conn, buf []byte) error {
	if _, err := c.Write(buf); err != nil {
		return err
	}
	_, err := io.ReadFull(c, buf)
	return err
}

// askUntil asks until end and returns how long each answer took, in ns.
func askUntil(c net.Conn, end time.Time) ([]uint32, error) {
	buf := make([]byte, requestSize)
	times := make([]uint32, 0, 1<<16)
	for last := time.Now(); last.Before(end); {
		if err := ask(c, buf); err != nil {
			return times, err
		}
		now := time.Now()
		times = append(times, nanos(now.Sub(last)))
		last = now
	}
	return times, nil
}

// nanos clips at 4.29 s.
func nanos(d time.Duration) uint32 { return uint32(min(d.Nanoseconds(), math.MaxUint32)) }

// marker is in the first bytes of each new connection, to be looked for on the wire.
const marker = "SYMBOLON-BENCH-THIS-IS-READABLE"

// connect measures requests that come with a connection each. The time is from
// connect(2) to the answer's first byte.
func (l *load) connect() (loaded, error) {
	for range l.conns {
		if _, err := l.once(); err != nil { // identities cached, sessions to resume
			return loaded{}, err
		}
	}
	if err := l.ready(); err != nil {
		return loaded{}, err
	}
	var (
		wg     sync.WaitGroup
		times  = make([][]uint32, l.conns)
		mu     sync.Mutex
		failed uint64
		why    string
		start  = time.Now()
		end    = start.Add(l.window)
	)
	for i := range l.conns {
		wg.Go(func() {
			for time.Now().Before(end) && l.ctx.Err() == nil {
				took, err := l.once()
				if err != nil {
					mu.Lock()
					if failed++; why == "" {
						why = err.Error()
					}
					mu.Unlock()
					continue
				}
				times[i] = append(times[i], nanos(took))
			}
		})
	}
	wg.Wait()
	r := requests(start, times)
	r.Errors, r.FirstError = failed, why
	return r, l.ctx.Err()
}

// once makes a connection, asks, and closes it.
func (l *load) once() (time.Duration, error) {
	start := time.Now()
	c, err := l.dialer.DialContext(l.ctx, "tcp", l.target)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	_ = c.SetDeadline(start.Add(dialTimeout))
	buf := make([]byte, 1+firstByteSize)
	buf[0] = opEcho
	copy(buf[1:], marker)
	if _, err := c.Write(buf); err != nil {
		return 0, err
	}
	n, err := c.Read(buf)
	took := time.Since(start)
	if err != nil {
		return 0, err
	}
	_, err = io.ReadFull(c, buf[n:firstByteSize])
	return took, err
}

// idleAlive is how many idle connections are tried at the end.
const idleAlive = 64

// idle opens connections, uses each once, and lets them be. At the end some of them
// are used again: they must be alive.
func (l *load) idle() (loaded, error) {
	small := make([]byte, firstByteSize)
	conns, err := l.dialAll(l.conns, opEcho, func(c net.Conn) error { return ask(c, make([]byte, len(small))) })
	if err != nil {
		return loaded{}, err
	}
	if err := l.ready(); err != nil {
		return loaded{}, err
	}
	start := time.Now()
	r := loaded{}
	for i := 0; i < len(conns); i += max(1, len(conns)/idleAlive) {
		_ = conns[i].SetDeadline(time.Now().Add(ioTimeout))
		if err := ask(conns[i], small); err != nil {
			return r, fmt.Errorf("idle connection %d of %d: %w", i, len(conns), err)
		}
		r.Requests++
	}
	r.Seconds = time.Since(start).Seconds()
	return r, nil
}

// mixed measures requests beside a bulk transfer to the client.
func (l *load) mixed() (loaded, error) {
	bulk, err := l.dialAll(1, opSource, func(c net.Conn) error { return fetch(c, time.Time{}, nil) })
	if err != nil {
		return loaded{}, err
	}
	asking, err := l.dialAll(l.conns, opEcho, func(c net.Conn) error { return ask(c, make([]byte, requestSize)) })
	if err != nil {
		return loaded{}, err
	}
	if err := l.ready(); err != nil {
		return loaded{}, err
	}
	times := make([][]uint32, len(asking))
	var bytes uint64
	start := time.Now()
	end := start.Add(l.window)
	err = each(append(bulk, asking...), func(i int, c net.Conn) (err error) {
		if i == 0 {
			return fetch(c, end, &bytes)
		}
		times[i-1], err = askUntil(c, end)
		return err
	})
	r := requests(start, times)
	r.Bytes = bytes
	return r, err
}
