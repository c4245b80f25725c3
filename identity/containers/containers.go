package containers

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/identity"
)

const (
	// maxContainers are remembered, as many as a host has workloads.
	maxContainers = 4096
	// firstWait is how long the first connection of a container may wait for its runtime,
	// which has some starting of the container left to do.
	firstWait = 3 * time.Second
	// askTimeout bounds one question to all runtimes.
	askTimeout = 5 * time.Second
	// pollNew is how often a runtime is asked that does not say yet that a container runs.
	pollNew = 20 * time.Millisecond
	// look is how often it is seen who is to be asked again: an answered one, whose name
	// or image's digests may change, after recheck; another one first after retry, then
	// after twice the time, up to maxRetry.
	look, recheck, retry, maxRetry = time.Second, time.Minute, time.Second, 10 * time.Second
	// forget is after how long without a question a container is asked for no more.
	forget = time.Hour
	// maxFirst and maxAgain are how many first and further questions are under way at a
	// time: a runtime that hangs must not hold up another one's new containers.
	maxFirst, maxAgain = 64, 8
)

// Options are what Containers are made of.
type Options struct {
	// Sockets are the runtimes'. One that does not exist is a runtime that is not there.
	Sockets []Socket
	// Changed hears that something else is known of a container than Known said before;
	// nil: nobody does. It must not call Close.
	Changed func()
	// Report hears when a runtime that is there cannot be asked (its reason), and when it
	// can again (nil); nil: nobody does.
	Report func(Socket, error)

	recheck time.Duration // for tests; 0: the constant
}

// Containers are what the runtimes say, and the memory of it: an identity.Containers.
// Safe for concurrent use; Close it.
type Containers struct {
	runtimes []*engine
	recheck  time.Duration
	changed  func()
	report   func(Socket, error)
	first    *semaphore.Weighted
	again    *semaphore.Weighted
	ctx      context.Context
	cancel   context.CancelFunc
	wg       sync.WaitGroup

	mu     sync.Mutex
	serial uint64 // of the last change
	all    *lru.Cache[identity.Container, *entry]
}

// engine is one runtime. The mutex of Containers guards err and last.
type engine struct {
	Socket
	asker
	err  error  // that has been reported
	last Status // but for the socket
}

// entry is one container. The mutex of Containers guards it.
type entry struct {
	of       identity.Container
	attrs    identity.Attributes
	serial   uint64
	by       *engine       // which has spoken of it; nil: none
	settled  bool          // it has been waited for
	first    chan struct{} // closed with the first answer
	asking   bool
	failures int
	due      time.Time // when it is to be asked again
	used     time.Time
}

// New starts a goroutine, which Close ends.
func New(o Options) *Containers {
	ctx, cancel := context.WithCancel(context.Background())
	cache, err := lru.New[identity.Container, *entry](maxContainers)
	if err != nil {
		panic(err) // only for a size below one
	}
	c := &Containers{
		recheck: cmp.Or(o.recheck, recheck), changed: o.Changed, report: o.Report, ctx: ctx, cancel: cancel, all: cache,
		first: semaphore.NewWeighted(maxFirst), again: semaphore.NewWeighted(maxAgain),
	}
	for _, s := range o.Sockets {
		r := &engine{Socket: s, asker: docker{s}}
		if s.Protocol == CRI {
			r.asker = cri{s}
		}
		c.runtimes = append(c.runtimes, r)
	}
	c.wg.Go(c.run)
	return c
}

// Close ends all questions, and waits for that.
func (c *Containers) Close() {
	c.mu.Lock()
	c.cancel()
	c.mu.Unlock()
	c.wg.Wait()
}

// Known implements identity.Containers.
func (c *Containers) Known(of identity.Container) (a identity.Attributes, serial uint64, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.all.Get(of)
	if !ok || !e.settled {
		return nil, 0, false
	}
	e.used = time.Now()
	return e.attrs, e.serial, true
}

// Learn implements identity.Containers.
func (c *Containers) Learn(ctx context.Context, of identity.Container) {
	e := c.begin(of)
	if e == nil {
		return
	}
	timer := time.NewTimer(firstWait)
	defer timer.Stop()
	select {
	case <-e.first:
	case <-ctx.Done(): // the next one waits
	case <-timer.C:
		c.mu.Lock()
		e.settled = true
		c.mu.Unlock()
	}
}

// begin finds a container, or begins to ask for it; nil after Close.
func (c *Containers) begin(of identity.Container) *entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return nil
	}
	e, ok := c.all.Get(of)
	if !ok {
		e = &entry{of: of, first: make(chan struct{}), asking: true, used: time.Now()}
		c.all.Add(of, e)
		c.wg.Go(func() {
			c.ask(e, nil, c.first)
			close(e.first)
		})
	}
	return e
}

// run asks again for who is due, and lets go of who is not asked for any more.
func (c *Containers) run() {
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		select {
		case <-c.ctx.Done():
			return
		case now := <-tick.C:
			c.lookAt(now)
		}
	}
}

func (c *Containers) lookAt(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return
	}
	for _, e := range c.all.Values() {
		switch {
		case e.asking:
		case now.Sub(e.used) > forget:
			c.all.Remove(e.of)
		case now.After(e.due):
			e.asking = true
			by := e.by
			c.wg.Go(func() { c.ask(e, by, c.again) })
		}
	}
}

// ask asks all runtimes for a container, which by has spoken of before, and takes the
// answer.
func (c *Containers) ask(e *entry, by *engine, slots *semaphore.Weighted) {
	if slots.Acquire(c.ctx, 1) != nil {
		return
	}
	defer slots.Release(1)
	ctx, cancel := context.WithTimeout(c.ctx, askTimeout)
	defer cancel()
	attrs, from, err := c.question(ctx, e.of, by)
	for began := time.Now(); slots == c.first && errors.Is(err, errNotYet) && time.Since(began) < firstWait; {
		// Whoever connects runs, so it has only just begun to.
		select {
		case <-ctx.Done():
		case <-time.After(pollNew):
		}
		attrs, from, err = c.question(ctx, e.of, nil)
	}
	if c.ctx.Err() == nil && c.take(e, attrs, from, err) && c.changed != nil {
		c.changed()
	}
}

// take notes the answer to a question, and tells whether something else is known now
// than somebody may have been told.
func (c *Containers) take(e *entry, attrs identity.Attributes, from *engine, err error) (changed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, told := time.Now(), e.settled
	e.asking, e.settled = false, true
	if err == nil {
		e.by, e.failures, e.due = from, 0, now.Add(c.recheck)
	} else {
		e.due = now.Add(min(retry<<min(e.failures, 8), maxRetry))
		e.failures++
		if !errors.Is(err, errUnknown) {
			return false // what was said once holds while nobody says otherwise
		}
		e.by, attrs = nil, nil
	}
	if slices.Equal(attrs, e.attrs) {
		return false
	}
	c.serial++
	e.attrs, e.serial = attrs, c.serial
	return told
}

// question asks all runtimes at once. The first one counts that knows the container, and
// whose process is in its cgroup. Errors: errUnknown, if nobody else could know it either;
// errNotYet; what is wrong with one that could not be asked.
func (c *Containers) question(ctx context.Context, of identity.Container, by *engine) (identity.Attributes, *engine, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type answer struct {
		from *engine
		is   *container
		err  error
	}
	answers := make(chan answer, len(c.runtimes))
	for _, r := range c.runtimes {
		c.wg.Go(func() {
			is, err := r.ask(ctx, of.ID)
			if err == nil {
				err = agrees(of, is)
			}
			c.heard(ctx, r, is, err)
			answers <- answer{r, is, err}
		})
	}
	why := errUnknown
	for range c.runtimes {
		a := <-answers
		switch {
		case a.err == nil:
			return a.is.attributes(), a.from, nil
		case errors.Is(a.err, errUnknown), absent(a.err) && a.from != by:
		case errors.Is(why, errUnknown), errors.Is(a.err, errNotYet):
			why = a.err
		}
	}
	return nil, nil, why
}

// errElsewhere: the runtime has a container of that id, and it is another one.
var errElsewhere = fmt.Errorf("%w: its process is in another cgroup", errUnknown)

// agrees checks a runtime's word by the kernel's.
func agrees(of identity.Container, is *container) error {
	has, err := of.Has(is.pid)
	if err != nil {
		return err
	}
	if !has {
		return errElsewhere
	}
	return nil
}

// absent tells whether an error says that no runtime is there: none was installed, or it
// was stopped.
func absent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED)
}

// heard notes how it is with a runtime, and reports a change.
func (c *Containers) heard(ctx context.Context, r *engine, is *container, err error) {
	said := err
	if absent(err) || errors.Is(err, errUnknown) || errors.Is(err, errNotYet) {
		err = nil
	}
	if err != nil && errors.Is(ctx.Err(), context.Canceled) {
		return // another one has answered
	}
	c.mu.Lock()
	r.last = r.last.after(is, said)
	was := r.err
	r.err = err
	c.mu.Unlock()
	if c.report != nil && (was == nil) != (err == nil) {
		c.report(r.Socket, err)
	}
}
