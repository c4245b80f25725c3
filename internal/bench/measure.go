package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
)

// run measures: in each round every workload, and for each workload every system,
// each round beginning with another one.
func (l *lab) run(ctx context.Context, o *options, r *results) error {
	var chosen []workload
	for _, w := range allWorkloads(o.idle) {
		if slices.Contains(o.workloads, w.name) || w.kind == "idle" && slices.Contains(o.workloads, "idle") {
			chosen = append(chosen, w)
			r.Workloads = append(r.Workloads, &table{workload: w, Name: w.name, Title: w.title, Samples: make(map[string][]*sample)})
		}
	}
	for round := range o.rounds {
		for i, w := range chosen {
			if w.fresh && round >= idleRounds(w, o) {
				continue
			}
			fmt.Fprintf(l.progress, "round %d of %d, %s:", round+1, o.rounds, w.name)
			for turn := range l.pairs {
				p := l.pairs[(turn+round)%len(l.pairs)]
				if w.fresh && p.start == nil || p.only != nil && !slices.Contains(p.only, w.name) {
					continue // no proxy to weigh, or nothing that another does not show
				}
				s := l.cell(ctx, o, p, w, round)
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				r.Workloads[i].Samples[p.name] = append(r.Workloads[i].Samples[p.name], s)
				if s.Failed != "" {
					fmt.Fprintf(l.progress, " %s FAILED (%s)", p.name, s.Failed)
					continue
				}
				m := w.metrics[0]
				fmt.Fprintf(l.progress, " %s %.*f", p.name, m.digits, m.of(s))
			}
			fmt.Fprintln(l.progress)
		}
	}
	return nil
}

// idleRounds: memory varies little and takes long.
func idleRounds(w workload, o *options) int {
	if o.quick || w.conns > 2000 {
		return 1
	}
	return 2
}

const (
	// noisy is how many cores other processes may use before a measurement is
	// repeated, if there is patience left. The quietest one counts.
	noisy    = 0.25
	attempts = 3
)

// cell is one measurement. A system that fails is recorded as such and the
// benchmark goes on: that, too, is a result.
func (l *lab) cell(ctx context.Context, o *options, p *pair, w workload, round int) *sample {
	var best *sample
	for attempt := 0; attempt == 0 || attempt < attempts && o.patience > 0 && !w.fresh && best.Noise > noisy; attempt++ {
		began := time.Now()
		s := &sample{Round: round + 1}
		if err := l.sample(ctx, o, p, w, s); err != nil {
			s.Failed = oneLine(err)
		} else if s.Load.Requests+s.Load.Bytes == 0 {
			s.Failed = "nothing came through: " + s.Load.FirstError
		}
		if s.Failed != "" || ctx.Err() != nil {
			return s
		}
		if attempt > 0 {
			o.patience -= time.Since(began)
		}
		if best == nil || s.Noise < best.Noise {
			best = s
		}
	}
	l.noise, l.steal = append(l.noise, best.Noise), append(l.steal, best.Steal)
	return best
}

func (l *lab) sample(ctx context.Context, o *options, p *pair, w workload, s *sample) (err error) {
	if w.fresh {
		return l.weigh(ctx, o, p, w, s)
	}
	if w.delay > 0 {
		short, err := p.lengthen(w.delay)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, short()) }()
	}
	var before snapshot
	var stolen float64
	var began time.Time
	var t *trace
	s.Load, err = l.load(ctx, p, w, o.duration, func(end bool, r loaded) error {
		now, err := processes()
		if err != nil {
			return err
		}
		if !end {
			before, began, stolen = now, time.Now(), steal()
			t, err = startTrace(o, p, w)
			return err
		}
		took := time.Since(began).Seconds()
		if p.clientSide != nil {
			s.ClientCPU = now.cpu(p.clientSide.Pid) - before.cpu(p.clientSide.Pid)
			s.ServerCPU = now.cpu(p.serverSide.Pid) - before.cpu(p.serverSide.Pid)
		}
		s.Noise = (now.others(os.Getpid()) - before.others(os.Getpid())) / took
		s.Steal = (steal() - stolen) / took
		return t.stop(r, l.progress)
	})
	return err
}

// lengthen makes the link between the hosts a long one, until short is called.
func (p *pair) lengthen(by time.Duration) (short func() error, err error) {
	there, err := p.client.Delay("eth0", by)
	if err != nil {
		return nil, err
	}
	back, err := p.server.Delay("eth0", by)
	if err != nil {
		return nil, errors.Join(err, there())
	}
	return func() error { return errors.Join(there(), back()) }, nil
}

// warmConns is how many idle connections a fresh pair of proxies has when its memory is
// first read, so that code, caches and what a first connection brings with it count as
// nobody's. They stay, or those that are counted would be given their memory.
const warmConns = 256

// weigh measures idle connections, through fresh proxies that have warmConns others.
func (l *lab) weigh(ctx context.Context, o *options, p *pair, w workload, s *sample) error {
	if err := l.restart(ctx, p); err != nil {
		return err
	}
	warm := w
	warm.conns = warmConns
	_, err := l.beside(ctx, p, warm, w.limit()+2*o.settle, func() error { return l.weighBeside(ctx, o, p, w, s) })
	return err
}

// weighBeside measures idle connections beside those that are open.
func (l *lab) weighBeside(ctx context.Context, o *options, p *pair, w workload, s *sample) error {
	before, err := p.settled(ctx, o)
	if err != nil {
		return err
	}
	began := time.Now()
	var after footprints
	s.Load, err = l.beside(ctx, p, w, o.settle, func() (err error) {
		s.Opening = time.Since(began).Seconds()
		after, err = p.settled(ctx, o)
		return err
	})
	if err != nil {
		return err
	}
	n := float64(w.conns)
	s.Conns = n
	s.ClientKB, s.ClientFDs = (after.clientKB-before.clientKB)/n, (after.clientFDs-before.clientFDs)/n
	s.ServerKB, s.ServerFDs = (after.serverKB-before.serverKB)/n, (after.serverFDs-before.serverFDs)/n
	return nil
}

// beside is load, which calls f when its connections are open.
func (l *lab) beside(ctx context.Context, p *pair, w workload, window time.Duration, f func() error) (loaded, error) {
	return l.load(ctx, p, w, window, func(end bool, _ loaded) error {
		if end {
			return nil
		}
		return f()
	})
}

// footprints are both proxies' memory, KB, and descriptors.
type footprints struct{ clientKB, clientFDs, serverKB, serverFDs float64 }

// settled reads them after a rest.
func (p *pair) settled(ctx context.Context, o *options) (f footprints, err error) {
	if err := rest(ctx, o.settle); err != nil {
		return f, err
	}
	now, err := processes()
	if err != nil {
		return f, err
	}
	if f.clientKB, f.clientFDs, err = now.footprint(p.clientSide.Pid); err != nil {
		return f, err
	}
	f.serverKB, f.serverFDs, err = now.footprint(p.serverSide.Pid)
	return f, err
}

func rest(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// load runs the load generator on the client's host. edge is called when it is ready
// and has not begun, and when it has finished and has its connections still open.
func (l *lab) load(ctx context.Context, p *pair, w workload, window time.Duration, edge func(end bool, r loaded) error) (r loaded, err error) {
	limit := w.limit() + window
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	c := p.client.Command(ctx, l.exe, "load", "-kind", w.kind, "-target", p.target, "-conns", fmt.Sprint(w.conns), "-window", window.String())
	c.Unit = loadUnit
	var stderr bytes.Buffer
	c.Stderr = &stderr
	in, err := c.StdinPipe()
	if err != nil {
		return r, err
	}
	stdout, err := c.StdoutPipe()
	if err != nil {
		return r, err
	}
	if err := c.Start(); err != nil {
		return r, err
	}
	out := bufio.NewReader(stdout)
	err = func() error {
		if err := expect(out, "ready\n"); err != nil {
			return err
		}
		if edge != nil {
			if err := edge(false, r); err != nil {
				return err
			}
		}
		if _, err := io.WriteString(in, "go\n"); err != nil {
			return err
		}
		line, err := out.ReadBytes('\n')
		if err != nil {
			return err
		}
		if err := json.Unmarshal(line, &r); err != nil {
			return fmt.Errorf("load generator said %q: %w", line, err)
		}
		if edge != nil {
			return edge(true, r)
		}
		return nil
	}()
	if err != nil {
		if ctx.Err() != nil {
			err = errors.Join(fmt.Errorf("not done within %v", limit), err)
		}
		cancel()
	}
	_ = in.Close()
	if wait := c.Wait(); err == nil {
		err = wait
	}
	if err != nil && stderr.Len() > 0 {
		err = errors.Join(errors.New(strings.TrimSpace(stderr.String())), err)
	}
	return r, err
}

func expect(r *bufio.Reader, want string) error {
	line, err := r.ReadString('\n')
	if err != nil {
		return fmt.Errorf("load generator ended before it was ready: %w", err)
	}
	if line != want {
		return fmt.Errorf("load generator said %q, not %q", line, want)
	}
	return nil
}

// oneLine is an error for a table.
func oneLine(err error) string { return strings.Join(strings.Split(err.Error(), "\n"), "; ") }
