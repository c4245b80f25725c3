package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/symbolon/symbolon/internal/handover"
)

// duty is a part of the daemon that one process of a host at a time has: it runs
// until it is stopped, and can be started again.
type duty struct {
	run    func(context.Context)
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func (u *duty) start(ctx context.Context) {
	ctx, u.cancel = context.WithCancel(ctx)
	u.wg.Go(func() { u.run(ctx) })
}

// stop waits for its end. It is no error to stop what does not run.
func (u *duty) stop() {
	if u.cancel != nil {
		u.cancel()
	}
	u.wg.Wait()
}

// duties are those of the daemon.
type duties struct {
	// rules watches and repairs the kernel's rules; beats only keeps those of a host
	// that fails open alive.
	rules, beats duty
	// rest is the session with the controller, the host's SVID, what the service
	// manager keeps and is told.
	rest []*duty
}

func (u *duties) start(ctx context.Context) {
	u.rules.start(ctx)
	u.startRest(ctx)
}

func (u *duties) startRest(ctx context.Context) {
	for _, x := range u.rest {
		x.start(ctx)
	}
}

func (u *duties) stopRest() {
	for _, x := range u.rest {
		x.cancel() // all at once; then wait
	}
	for _, x := range u.rest {
		x.stop()
	}
}

func (u *duties) stop() {
	u.rules.stop()
	u.beats.stop()
	u.stopRest()
}

// succeed waits for requests to hand over, and tries; it returns the process that has
// taken over, or nil after ctx has ended. A try that fails changes nothing.
func (d *daemonParts) succeed(ctx, background context.Context, u *duties) *handover.Next {
	for {
		select {
		case <-ctx.Done():
			return nil
		case sig := <-d.requests:
			d.log.Info("handing over to a new process", zap.Stringer("signal", sig))
		}
		_ = d.keeper.store.Notify("RELOADING=1", "MONOTONIC_USEC="+monotonicMicros())
		next, err := d.handOver(ctx, background, u)
		if err == nil {
			d.log.Info("handed over; open connections have their time to end", zap.Int("pid", next.PID()), zap.Duration("drain_timeout", d.cfg.DrainTimeout))
			return next
		}
		if ctx.Err() == nil {
			d.log.Error("not handed over; this process goes on", zap.Error(err))
			_ = d.keeper.store.Notify("READY=1", "STATUS=The last reload failed: "+oneLine(err))
		}
	}
}

func (d *daemonParts) handOver(ctx, background context.Context, u *duties) (*handover.Next, error) {
	program, err := nextProgram()
	if err != nil {
		return nil, err
	}
	passed := d.generation.Load()
	files, err := d.passedOn()
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	if err != nil {
		return nil, err
	}
	// The next one loads rules by its own configuration: they must not be taken for
	// drift. Nor may those of a host that fails open lapse meanwhile.
	u.rules.stop()
	u.beats.start(background)
	next, err := handover.Spawn(program, files)
	if err == nil {
		if err = d.awaitReady(ctx, next); err == nil {
			if err = d.abdicate(next, u, passed != d.generation.Load()); err == nil {
				u.beats.stop()
				return next, nil
			}
			u.startRest(background)
		}
		next.Kill()
	}
	u.beats.stop()
	if repair := d.rules.Repair(background); repair != nil { // to this configuration's
		err = errors.Join(err, repair)
	}
	u.rules.start(background)
	return nil, err
}

// passedOn are the descriptors for the next process. The caller closes them.
func (d *daemonParts) passedOn() (files []*os.File, err error) {
	for name, l := range d.kernel.listeners {
		f, err := handover.File(l, name)
		if err != nil {
			return files, err
		}
		files = append(files, f)
	}
	if d.page != nil {
		f, err := handover.File(d.page, pageName)
		if err != nil {
			return files, err
		}
		files = append(files, f)
	}
	f, err := d.keeper.pass()
	if err != nil {
		return files, err
	}
	return append(files, f), nil
}

// awaitReady waits until the next process says that it is ready.
func (d *daemonParts) awaitReady(ctx context.Context, next *handover.Next) error {
	type said struct {
		m   handover.Message
		err error
	}
	answer := make(chan said, 1)
	go func() {
		m, _, err := next.Control.Receive(time.Now().Add(d.cfg.HandoverTimeout))
		answer <- said{m, err}
	}()
	select {
	case <-ctx.Done():
		_ = next.Control.Close()
		<-answer
		return ctx.Err()
	case a := <-answer:
		if a.err == nil && a.m == handover.Ready {
			return nil
		}
		select {
		case <-next.Ended():
			return fmt.Errorf("the new process has ended: %w; its log says why", next.Err())
		case <-time.After(time.Second): // it closed, or said nonsense: it may be ending
			return fmt.Errorf("the new process was not ready within %v: %w", d.cfg.HandoverTimeout, errors.Join(a.err, context.Cause(ctx)))
		}
	}
}

// abdicate ends what only one process may do, and lets the next one begin. After an
// error the rest of the duties must be started again.
func (d *daemonParts) abdicate(next *handover.Next, u *duties, newer bool) error {
	u.stopRest()
	if newer {
		payload, err := proto.Marshal(d.generation.Load())
		if err != nil {
			return err
		}
		if err := next.Control.Send(handover.Policy, payload); err != nil {
			return err
		}
	}
	// Before it begins: the service manager listens to the main process only.
	_ = d.keeper.store.Notify("MAINPID=" + strconv.Itoa(next.PID()))
	if err := next.Control.Send(handover.Go, d.keeper.position()); err != nil {
		_ = d.keeper.store.Notify("MAINPID=" + strconv.Itoa(os.Getpid()))
		return err
	}
	return nil
}

// follow does what the next process hears from the controller, until that one's end
// of the socket is closed.
func (d *daemonParts) follow(c *handover.Control) {
	for {
		m, payload, err := c.Receive(time.Time{})
		if err != nil {
			return
		}
		switch m {
		case handover.Policy:
			if err := d.applyPassed(payload); err != nil {
				d.log.Error("policy from the new process", zap.Error(err))
			}
		case handover.Reissue:
			d.source.Reissue()
		}
	}
}

// nextProgram is the name by which this process was started. What runs under it now may
// be a newer version.
func nextProgram() (string, error) {
	path, err := exec.LookPath(os.Args[0])
	if err != nil {
		return "", err
	}
	return filepath.Abs(path)
}

// monotonicMicros is the time that the service manager wants with RELOADING=1.
func monotonicMicros() string {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return "0"
	}
	return strconv.FormatInt(now.Nano()/1000, 10)
}

func oneLine(err error) string {
	b := []byte(err.Error())
	for i, c := range b {
		if c < ' ' {
			b[i] = ' '
		}
	}
	return string(b)
}
