package identity

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

var (
	// ErrNoCredential: the workload has no SVID that is valid now.
	ErrNoCredential = errors.New("no credential")
	// ErrClosed: the Manager was closed.
	ErrClosed = errors.New("identity manager is closed")
)

const (
	// idleTimeout is how long a workload is kept that nobody asks for.
	idleTimeout = 30 * time.Minute
	// sweepInterval is how often idle ones are looked for.
	sweepInterval = time.Minute
	// maxManaged bounds the workloads of a host.
	maxManaged = 4096
)

// Manager keeps the current credential of every workload that is in use. Safe for
// concurrent use; Close it.
type Manager struct {
	source Source
	limit  int
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu        sync.Mutex
	closed    bool
	workloads map[Key]*managed
	leaving   map[Key]*managed // no more in use, their listeners not yet told
	listeners map[*listener]struct{}
}

// listener is a pointer's worth of identity for functions, either of which may be
// nil.
type listener struct {
	changed func(Key, *Credential)
	dropped func(Key)
}

// managed is one workload in use. The Manager's mutex guards what changes.
type managed struct {
	workload *Workload
	cancel   context.CancelFunc
	dropped  <-chan struct{} // closed when the Manager lets go of it
	answered chan struct{}   // closed by the first update
	ended    chan struct{}   // closed when its listeners have heard the last of it
	before   *managed        // the same workload's, which ends first; nil: none
	replaced bool            // another one stands in its place

	credential *Credential
	err        error
	since      time.Time // of the last update
	used       time.Time
	pins       *int // survives a change of what is known of the workload
}

// NewManager starts a goroutine, which Close ends.
func NewManager(source Source) *Manager {
	ctx, cancel := context.WithCancel(context.Background())
	m := &Manager{
		source:    source,
		limit:     maxManaged,
		ctx:       ctx,
		cancel:    cancel,
		workloads: make(map[Key]*managed),
		leaving:   make(map[Key]*managed),
		listeners: make(map[*listener]struct{}),
	}
	m.wg.Go(m.sweep)
	return m
}

// Get returns the credential of w, which is valid now. The first time it starts to
// watch w's source and waits for its answer, no longer than ctx. A later failure of
// the source matters only when the last credential has expired. Errors:
// ErrNoCredential with the source's reason, ErrClosed.
func (m *Manager) Get(ctx context.Context, w *Workload) (*Credential, error) {
	var e *managed
	for answered := false; !answered; {
		var err error
		if e, err = m.use(w); err != nil {
			return nil, err
		}
		select {
		case <-e.answered:
			answered = true
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: the source has not answered: %w", ErrNoCredential, ctx.Err())
		case <-e.dropped: // by its end, by somebody else, or by Close: ask again
			if err := m.ending(e); err != nil {
				return nil, fmt.Errorf("%w: %w", ErrNoCredential, err)
			}
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := e.valid(time.Now()); err != nil {
		return nil, err
	}
	return e.credential, nil
}

// Known is Get for a workload whose source has answered; not ok: Get waits, or says what
// is wrong.
func (m *Manager) Known(w *Workload) (c *Credential, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.workloads[w.Key]
	if m.closed || e == nil || e.workload != w && !slices.Equal(e.workload.Attributes, w.Attributes) {
		return nil, false
	}
	now := time.Now()
	if e.valid(now) != nil {
		return nil, false
	}
	e.used = now
	return e.credential, true
}

// ending is why e has ended by itself; nil: it has not.
func (m *Manager) ending(e *managed) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if errors.Is(e.err, ErrEnded) {
		return e.err
	}
	return nil
}

func (e *managed) valid(now time.Time) error {
	switch {
	case e.credential == nil && e.err == nil:
		return ErrNoCredential
	case e.credential == nil:
		return fmt.Errorf("%w: %w", ErrNoCredential, e.err)
	case !now.Before(e.credential.SVID.NotAfter()):
		err := fmt.Errorf("%w: %s ended %s", ErrNoCredential, e.credential.SVID.ID,
			e.credential.SVID.NotAfter().UTC().Format(time.RFC3339))
		if e.err != nil {
			err = fmt.Errorf("%w: %w", err, e.err)
		}
		return err
	}
	return nil
}

// use finds w, or begins with it.
func (m *Manager) use(w *Workload) (*managed, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, ErrClosed
	}
	now := time.Now()
	e := m.workloads[w.Key]
	if e != nil && (e.workload == w || slices.Equal(e.workload.Attributes, w.Attributes)) {
		e.used = now
		return e, nil
	}
	pins := new(int)
	if e != nil { // what is known of it changed: a user's groups, say
		pins = e.pins
		e.replaced = true
		m.drop(w.Key)
	}
	if len(m.workloads) >= m.limit {
		m.evict()
	}
	return m.begin(w, now, pins), nil
}

// begin watches w; the caller holds the mutex.
func (m *Manager) begin(w *Workload, used time.Time, pins *int) *managed {
	ctx, cancel := context.WithCancel(m.ctx)
	e := &managed{
		workload: w, cancel: cancel, dropped: ctx.Done(), used: used, pins: pins,
		answered: make(chan struct{}), ended: make(chan struct{}), before: m.leaving[w.Key],
	}
	m.workloads[w.Key] = e
	m.wg.Go(func() { m.follow(ctx, e) })
	return e
}

// Refresh asks now for every workload in use what it is by now: the same pointer, or
// one of the same key with other attributes, which then gets an SVID by these. Its
// live connections are judged by the old one until then.
func (m *Manager) Refresh(now func(*Workload) *Workload) {
	m.mu.Lock()
	var all []*Workload
	for _, e := range m.workloads {
		all = append(all, e.workload)
	}
	m.mu.Unlock()
	for _, w := range all {
		if next := now(w); next != w {
			m.replace(w, next)
		}
	}
}

func (m *Manager) replace(was, next *Workload) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.workloads[was.Key]
	if m.closed || e == nil || e.workload != was {
		return // dropped, or replaced by who asked for it
	}
	e.replaced = true
	m.drop(was.Key)
	m.begin(next, e.used, e.pins)
}

// follow takes e's updates to itself and to the listeners, from the first to the
// last.
func (m *Manager) follow(ctx context.Context, e *managed) {
	if e.before != nil {
		<-e.before.ended
		e.before = nil
	}
	m.watch(ctx, e)
	m.leave(e)
}

// watch returns when the source has nothing more to say, which is after e was
// dropped.
func (m *Manager) watch(ctx context.Context, e *managed) {
	updates := m.source.Watch(ctx, e.workload)
	expiry := time.NewTimer(0)
	expiry.Stop()
	defer expiry.Stop()
	first := true
	for {
		select {
		case u, ok := <-updates:
			if !ok {
				return
			}
			was, now := m.take(e, u)
			if first {
				close(e.answered)
				first = false
			}
			switch {
			case errors.Is(u.Err, ErrEnded):
				m.ended(e)
			case now == was:
			case now == nil:
				expiry.Stop()
				m.tell(ctx, e.workload.Key, nil)
			default:
				expiry.Reset(time.Until(now.SVID.NotAfter()))
				m.tell(ctx, e.workload.Key, now)
			}
		case <-expiry.C:
			m.tell(ctx, e.workload.Key, nil)
		}
	}
}

// take makes u e's state, and returns its credential before and after.
func (m *Manager) take(e *managed, u Update) (was, now *Credential) {
	m.mu.Lock()
	defer m.mu.Unlock()
	was = e.credential
	switch {
	case errors.Is(u.Err, ErrWithdrawn), errors.Is(u.Err, ErrEnded):
		e.credential = nil
	case u.Credential != nil:
		e.credential = u.Credential
	}
	e.err, e.since = u.Err, time.Now()
	return was, e.credential
}

// ended drops e, which has come to its end by itself. Its live connections may go on
// until its last certificate ends: what it sent last is still under way.
func (m *Manager) ended(e *managed) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.workloads[e.workload.Key] == e {
		m.drop(e.workload.Key)
	}
}

// tell calls the listeners, without the lock, so that they may call back. A
// workload that was dropped meanwhile has nothing more to say.
func (m *Manager) tell(ctx context.Context, k Key, c *Credential) {
	for _, l := range m.listening() {
		if ctx.Err() != nil {
			return
		}
		if l.changed != nil {
			l.changed(k, c)
		}
	}
}

// leave tells the listeners that e is no more in use, unless another one of its key
// is, or the Manager itself ends.
func (m *Manager) leave(e *managed) {
	k := e.workload.Key
	if !e.replaced && m.ctx.Err() == nil {
		for _, l := range m.listening() {
			if l.dropped != nil {
				l.dropped(k)
			}
		}
	}
	m.mu.Lock()
	if m.leaving[k] == e {
		delete(m.leaving, k)
	}
	m.mu.Unlock()
	close(e.ended)
}

func (m *Manager) listening() []*listener {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Keys(m.listeners))
}

// Subscribe calls changed for every new credential of a workload in use, and with
// nil when one expired without another or was withdrawn: the time to judge its live connections
// again. Calls for one workload come one after the other, for several concurrently;
// changed should return soon, and must not call Close. A call may still be under
// way when cancel returns.
func (m *Manager) Subscribe(changed func(Key, *Credential)) (cancel func()) {
	return m.subscribe(&listener{changed: changed})
}

// SubscribeDropped calls dropped for every workload that is no more in use: idle,
// ended, or evicted to make room, with live connections if it must be. What was kept under
// its key can go. It comes after the last call of Subscribe's for that workload, and
// before Get answers for its key again; so dropped must not call Get, nor Close. A
// call may still be under way when cancel returns.
func (m *Manager) SubscribeDropped(dropped func(Key)) (cancel func()) {
	return m.subscribe(&listener{dropped: dropped})
}

func (m *Manager) subscribe(l *listener) (cancel func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.listeners[l] = struct{}{}
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.listeners, l)
	}
}

// Pin keeps a workload in use until unpin is called, whether or not it is asked
// for: a live connection's. One that was dropped since it was asked for is in use again, and
// its source is asked anew. The credential is the one that it has now, valid or not. Whoever
// holds another one, or gets nil, has missed what came between, and does not hear of it
// again: Get has the answer.
func (m *Manager) Pin(w *Workload) (now *Credential, unpin func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, func() {}
	}
	k := w.Key
	e := m.workloads[k]
	if e == nil {
		if len(m.workloads) >= m.limit {
			m.evict()
		}
		e = m.begin(w, time.Now(), new(int))
	}
	pins, unpinned := e.pins, false
	*pins++
	return e.credential, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if unpinned {
			return
		}
		unpinned = true
		*pins--
		if e := m.workloads[k]; e != nil && e.pins == pins {
			e.used = time.Now()
		}
	}
}

// drop ends a workload; the caller holds the mutex.
func (m *Manager) drop(k Key) {
	e := m.workloads[k]
	e.cancel()
	delete(m.workloads, k)
	m.leaving[k] = e
}

// evict makes room. It takes the longest unused workload of the user that has the
// most, so that one who runs thousands of programs pushes out his own.
func (m *Manager) evict() {
	perUser := make(map[uint32]int)
	for k := range m.workloads {
		perUser[k.UID]++
	}
	var victim Key
	var worst *managed
	for k, e := range m.workloads {
		if worst == nil || cmp.Or(
			cmp.Compare(perUser[k.UID], perUser[victim.UID]),
			cmp.Compare(min(*worst.pins, 1), min(*e.pins, 1)),
			worst.used.Compare(e.used)) > 0 {
			victim, worst = k, e
		}
	}
	if worst != nil {
		m.drop(victim)
	}
}

// sweep drops what nobody has used.
func (m *Manager) sweep() {
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	for {
		select {
		case <-m.ctx.Done():
			return
		case now := <-tick.C:
			m.mu.Lock()
			for k, e := range m.workloads {
				if *e.pins == 0 && now.Sub(e.used) >= idleTimeout {
					m.drop(k)
				}
			}
			m.mu.Unlock()
		}
	}
}

// Status is what a Manager knows of one workload, for people.
type Status struct {
	Workload *Workload
	// Credential is the last one, expired or not; nil if there was none.
	Credential *Credential
	// Err is why there is no newer one.
	Err error
	// Since is when the source last said something, Used when the credential was
	// last asked for.
	Since, Used time.Time
	// Pins counts the live connections that keep the workload.
	Pins int
}

// Snapshot lists the workloads in use, by SPIFFE ID and key.
func (m *Manager) Snapshot() []Status {
	m.mu.Lock()
	out := make([]Status, 0, len(m.workloads))
	for _, e := range m.workloads {
		out = append(out, Status{e.workload, e.credential, e.err, e.since, e.used, *e.pins})
	}
	m.mu.Unlock()
	slices.SortFunc(out, func(a, b Status) int {
		ka, kb := a.Workload.Key, b.Workload.Key
		return cmp.Or(cmp.Compare(a.id(), b.id()), cmp.Compare(ka.CgroupID, kb.CgroupID),
			cmp.Compare(ka.UID, kb.UID), cmp.Compare(ka.Exe.Dev, kb.Exe.Dev), cmp.Compare(ka.Exe.Ino, kb.Exe.Ino),
			cmp.Compare(ka.Exe.Ctime, kb.Exe.Ctime))
	})
	return out
}

func (s Status) id() string {
	if s.Credential == nil {
		return ""
	}
	return s.Credential.SVID.ID.String()
}

// Close ends all watching and waits for it, and for the listeners' calls.
func (m *Manager) Close() {
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	m.cancel()
	m.wg.Wait()
}
