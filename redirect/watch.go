package redirect

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Watch verifies the rules every interval and repairs what others have changed,
// until ctx ends. On a host that fails open it also keeps the rules alive; there
// Watch is not optional. After each repair onDrift hears what had changed and
// whether the repair worked; if the rules could not even be read, drift is nil and
// err says why. Watch and onDrift run in the calling goroutine; Watch returns ctx's
// error, or why it could not begin.
func (r *Rules) Watch(ctx context.Context, interval time.Duration, onDrift func(drift []string, err error)) error {
	verify := time.NewTicker(interval)
	defer verify.Stop()

	lapsed := make(chan error, 1)
	if !r.cfg.FailClosed {
		// The socket belongs to this thread's network namespace; the goroutine, for
		// which a slow repair must not delay the refresh, may run on another.
		handle, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
		if err != nil {
			return fmt.Errorf("watch rules: %w", err)
		}
		var beating sync.WaitGroup
		stop, cancel := context.WithCancel(ctx)
		defer handle.Close()
		defer beating.Wait()
		defer cancel()
		beating.Go(func() { r.keepAlive(stop, handle, lapsed) })
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-lapsed:
			// The set itself is gone: only Repair brings it back.
			onDrift([]string{err.Error()}, r.Repair(ctx))
		case <-verify.C:
			drift, err := r.Verify(ctx)
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case err != nil:
				onDrift(nil, err)
			case len(drift) > 0:
				onDrift(drift, r.Repair(ctx))
			}
		}
	}
}

// keepAlive refreshes the rules of a host that fails open until ctx ends.
func (r *Rules) keepAlive(ctx context.Context, handle *netlink.Handle, lapsed chan<- error) {
	beats := time.NewTicker(beatEvery)
	defer beats.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-beats.C:
			if err := r.beat(handle.IpsetAdd); err != nil {
				select {
				case lapsed <- err:
				default: // the last one is not dealt with yet
				}
			}
		}
	}
}
