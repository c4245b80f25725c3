// Command symbolon-demo shows Symbolon in a minute: the real programs in a small
// world of network namespaces, with real clients and servers at the ends and a real
// NAT and balancer between. 'make demo' runs it.
//
// What it prints is computed from exit codes, records and captures of the run. A
// claim that does not hold ends it with exit code 1. It removes what it made, also
// after a failure or an interrupt.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/symbolon/symbolon/internal/netlab"
)

const (
	// limit ends a demo that hangs: it takes less than a minute.
	limit = 5 * time.Minute
	// cleanupLimit bounds what is done after the end, which an interrupt does not cut.
	cleanupLimit = 30 * time.Second

	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130 // 128 + SIGINT, as shells have it
)

func main() {
	flags := flag.NewFlagSet("symbolon-demo", flag.ContinueOnError)
	keep := flags.Bool("keep", false, "when all is shown, keep the world until Enter is pressed")
	if err := flags.Parse(os.Args[1:]); errors.Is(err, flag.ErrHelp) {
		return
	} else if err != nil {
		os.Exit(exitUsage)
	}
	if flags.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "symbolon-demo: takes no arguments, only --keep")
		os.Exit(exitUsage)
	}
	// A closed terminal or a reader that has seen enough ("| head") must not keep us
	// from cleaning up either.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	err := run(ctx, newScreen(os.Stdout), *keep)
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "symbolon-demo: interrupted")
		// What failed because of that is of no interest; what is left is.
		if errors.Is(err, errCleanup) {
			fmt.Fprintln(os.Stderr, "symbolon-demo:", err)
		}
		os.Exit(exitInterrupted)
	case err != nil:
		fmt.Fprintln(os.Stderr, "symbolon-demo:", err)
		os.Exit(exitFailed)
	}
}

// run shows everything and removes everything.
func run(ctx context.Context, s *screen, keep bool) (err error) {
	if missing := netlab.Missing(tools...); len(missing) > 0 {
		return fmt.Errorf("missing programs: run 'make deps', or install %v", missing)
	}
	start := time.Now()
	d := &demo{screen: s}
	defer func() { err = errors.Join(err, d.close()) }()
	if err := d.show(ctx); err != nil {
		if records := d.lastRecords(); records != "" {
			return fmt.Errorf("%w\n%s", err, records)
		}
		return err
	}
	s.end(time.Since(start))
	if keep {
		d.waitForEnter(ctx)
	}
	return nil
}

func (d *demo) show(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for _, step := range []func(context.Context) error{
		d.build, d.plain, d.enrol, d.allowed, d.denied, d.balanced, d.wire, d.operate,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// waitForEnter returns at the end of standard input, too.
func (d *demo) waitForEnter(ctx context.Context) {
	d.explore()
	entered := make(chan struct{})
	go func() {
		defer close(entered)
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n') // its end is an answer as well
	}()
	select {
	case <-entered:
	case <-ctx.Done():
	}
}
