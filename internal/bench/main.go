package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130 // 128 + SIGINT, as shells have it

	// limit ends a benchmark that hangs.
	limit = time.Hour
)

// options are what the command line says.
type options struct {
	quick              bool
	rounds             int
	duration           time.Duration // of one measurement
	idle               []int         // connections of each idle measurement
	settle             time.Duration // before idle memory is read
	patience           time.Duration // in all, for repeating noisy measurements
	systems, workloads []string      // names; empty: all
	congestion         string        // TCP's congestion control in the lab's hosts; empty: what they inherit
	out                string        // JSON file; empty: none
	trace              string        // "", or of traceTools
	traceDir           string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := dispatch(ctx, os.Args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		fmt.Fprintln(os.Stderr, "symbolon-bench:", err)
		os.Exit(exitUsage)
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "symbolon-bench: interrupted")
		os.Exit(exitInterrupted)
	case err != nil:
		fmt.Fprintln(os.Stderr, "symbolon-bench:", err)
		os.Exit(exitFailed)
	}
}

var errUsage = errors.New("usage")

// dispatch runs the program that the first argument names; without one, the benchmark.
func dispatch(ctx context.Context, args []string) error {
	programs := map[string]func(context.Context, []string) error{
		"backend": backendMain, "load": loadMain, "relay": relayMain, "bare": bareMain,
	}
	if len(args) > 0 {
		if program, ok := programs[args[0]]; ok {
			return program(ctx, args[1:])
		}
	}
	o, err := parse(args)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return bench(ctx, o, os.Stdout, os.Stderr)
}

func parse(args []string) (*options, error) {
	o := &options{}
	f := flag.NewFlagSet("symbolon-bench", flag.ContinueOnError)
	f.BoolVar(&o.quick, "quick", false, "less of everything, in under three minutes")
	f.IntVar(&o.rounds, "rounds", 0, "rounds; 0: 5, or 2 with -quick")
	f.DurationVar(&o.duration, "duration", 0, "of one measurement; 0: 1.5s, or 500ms with -quick")
	systems := f.String("systems", "", "comma-separated; empty: all ("+strings.Join(names(allSystems()), ", ")+")")
	workloads := f.String("workloads", "", "comma-separated; empty: all ("+strings.Join(workloadNames(), ", ")+")")
	f.StringVar(&o.congestion, "congestion", "reno", "TCP's congestion control in the hosts, for all systems: BBR has a timer for every packet, which costs more than what is measured; reno is in every kernel; empty: the machine's")
	f.StringVar(&o.out, "out", "bench/latest.json", "file for the samples, their medians and the machine; empty: none")
	f.DurationVar(&o.patience, "patience", 4*time.Minute, "time in all for repeating measurements that other processes disturb; none with -quick")
	f.StringVar(&o.trace, "trace", "", "attach 'perf' or 'strace' to the proxies while they are measured, or count their system calls by perf's 'stat'; the figures are then worth nothing, or a little less")
	f.StringVar(&o.traceDir, "trace-dir", "bench", "where -trace writes")
	if err := f.Parse(args); errors.Is(err, flag.ErrHelp) {
		return nil, err
	} else if err != nil {
		return nil, fmt.Errorf("%w: %w", errUsage, err)
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("%w: unexpected argument %q", errUsage, f.Arg(0))
	}
	if o.trace != "" && traceTools[o.trace] == "" {
		return nil, fmt.Errorf("%w: -trace is perf, stat or strace, not %q", errUsage, o.trace)
	}
	// A namespace may not choose freely.
	if allowed := strings.Fields(readLine("/proc/sys/net/ipv4/tcp_allowed_congestion_control")); o.congestion != "" && !slices.Contains(allowed, o.congestion) {
		return nil, fmt.Errorf("%w: -congestion is one of %s, or empty, not %q", errUsage, strings.Join(allowed, ", "), o.congestion)
	}
	o.idle, o.settle = []int{2000, 9000}, 5*time.Second
	if o.quick {
		o.idle, o.settle, o.patience = []int{2000}, 2*time.Second, 0
	}
	defaults(o)
	var err error
	if o.systems, err = choose("system", *systems, names(allSystems())); err != nil {
		return nil, err
	}
	if o.workloads, err = choose("workload", *workloads, workloadNames()); err != nil {
		return nil, err
	}
	if o.quick && *systems == "" {
		o.systems = names(quickSystems())
	}
	return o, nil
}

func defaults(o *options) {
	rounds, duration := 5, 1500*time.Millisecond
	if o.quick {
		rounds, duration = 2, 500*time.Millisecond
	}
	if o.rounds <= 0 {
		o.rounds = rounds
	}
	if o.duration <= 0 {
		o.duration = duration
	}
}

// choose parses a comma-separated choice among all; nothing chosen is all.
func choose(what, list string, all []string) ([]string, error) {
	if list == "" {
		return all, nil
	}
	known := make(map[string]bool)
	for _, name := range all {
		known[name] = true
	}
	chosen := strings.Split(list, ",")
	for _, name := range chosen {
		if !known[name] {
			return nil, fmt.Errorf("%w: unknown %s %q; use some of %s", errUsage, what, name, strings.Join(all, ", "))
		}
	}
	return chosen, nil
}

// bench builds the lab, measures, reports, and removes the lab.
func bench(ctx context.Context, o *options, out, progress io.Writer) (err error) {
	r := &results{Started: time.Now(), Machine: machine(ctx, o.congestion), Rounds: o.rounds, Duration: o.duration.Seconds()}
	if slices.Contains(o.workloads, decideWorkload) {
		if r.Decisions, err = measureDecisions(ctx, o, progress); err != nil {
			return err
		}
		if len(o.workloads) == 1 {
			writeDecisions(out, r.Decisions)
			return r.finish(o)
		}
	}
	l, err := newLab(ctx, o, progress)
	if l != nil {
		defer func() { err = errors.Join(err, l.close()) }()
	}
	if err != nil {
		return err
	}
	r.Systems = l.about()
	err = l.run(ctx, o, r)
	r.Took = time.Since(r.Started).Seconds()
	l.epilogue(r)
	r.write(out) // what there is, if interrupted
	if err != nil {
		return err
	}
	return r.finish(o)
}
