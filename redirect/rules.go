package redirect

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Rules are the kernel's rules for one Config, in the calling thread's network
// namespace. Its methods are safe for concurrent use; two processes must not
// manage the same namespace.
//
// Every change is one transaction per table. What happens between two tables is
// closed: redirections come before the guard and go after it. A method that fails
// midway leaves what it loaded, since taking it back could open a protected host;
// calling it again, or Cleanup, is always safe, also after kill -9.
type Rules struct {
	cfg      Config
	families []family
	ipset    string

	mu sync.Mutex
	// own is of the last time that rules were loaded or verified.
	own ownSockets
	// loaded is how iptables-save prints what the last Install or Repair loaded, by
	// family and table. Another version of the tool may print a rule otherwise than
	// we write it; that is no drift.
	loaded map[tableKey][]chain
	// noZone says, by family, why the kernel does not track the proxy's connections
	// apart; as of the last Install or Repair.
	noZone map[string]string
}

type tableKey struct{ family, table string }

// NewRules checks the configuration and finds the tools; it changes nothing. A
// missing tool is a *MissingToolError.
func NewRules(cfg Config) (*Rules, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	r := &Rules{cfg: cfg, loaded: map[tableKey][]chain{}, noZone: map[string]string{}}
	var err error
	if r.ipset, err = findTool("ipset", "ipset"); err != nil {
		return nil, err
	}
	f4, err := newFamily(true, cfg.Backend)
	if err != nil {
		return nil, err
	}
	r.families = []family{f4}
	if cfg.ipv6() {
		f6, err := newFamily(false, cfg.Backend)
		if err != nil {
			return nil, err
		}
		r.families = append(r.families, f6)
	}
	return r, nil
}

// IPv6 says whether IPv6 is redirected too.
func (r *Rules) IPv6() bool { return len(r.families) > 1 }

// Install loads sets and rules, whatever part of them is already there. On a host
// that fails open the rules lapse after Lapse unless Watch runs.
func (r *Rules) Install(ctx context.Context) error {
	tables := []string{"nat", "filter"}
	if r.cfg.mangled() {
		tables = append(tables, "mangle")
	}
	for _, f := range r.families {
		if err := f.probe(tables); err != nil {
			return err
		}
	}
	return r.Repair(ctx)
}

// Repair brings sets and rules back to what Install loads: our chains with our
// rules, one jump to each, first in its hook.
func (r *Rules) Repair(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.findOwn(); err != nil {
		return err
	}
	if err := r.applySets(ctx); err != nil {
		return err
	}
	if err := r.applyRoutes(); err != nil {
		return err
	}
	for _, f := range r.families {
		if err := r.applyZone(ctx, f); err != nil {
			return err
		}
	}
	// All of nat before any of filter: the guard must not refuse what the other
	// family's redirection does not catch yet.
	for _, table := range []string{"nat", "mangle", "filter"} {
		for _, f := range r.families {
			if table == "mangle" && !r.cfg.mangled() && !f.uses(ctx, table) {
				continue
			}
			if err := r.apply(ctx, f, table); err != nil {
				return fmt.Errorf("load %s rules, table %s: %w", f.name, table, err)
			}
		}
	}
	return nil
}

// findOwn brings own up to date. If it changes, what was loaded is not what is
// wanted any more.
func (r *Rules) findOwn() error {
	own, err := findOwnSockets()
	if err != nil {
		return err
	}
	if own.match != r.own.match {
		clear(r.loaded)
	}
	r.own = own
	return nil
}

// Warnings say in words where the loaded rules protect less than they could, and
// what to do; as of the last Install, Repair or Verify.
func (r *Rules) Warnings() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []string
	if r.own.warning != "" {
		all = append(all, r.own.warning)
	}
	for _, f := range r.families {
		if why := r.noZone[f.name]; why != "" {
			all = append(all, why)
		}
	}
	return all
}

func (r *Rules) chains(f family, table string) []chain {
	switch table {
	case "nat":
		return r.cfg.natChains(f, r.own)
	case "mangle":
		return r.cfg.mangleChains(f, false)
	case "raw":
		return zoneChains()
	}
	return r.cfg.filterChains(f, r.own)
}

func (r *Rules) apply(ctx context.Context, f family, table string) error {
	return r.load(ctx, f, table, r.chains(f, table))
}

// load brings a table to exactly the given chains of ours.
func (r *Rules) load(ctx context.Context, f family, table string, want []chain) error {
	if err := commitSaved(ctx, f, table, func(saved savedTable) string {
		return installScript(table, saved, want)
	}); err != nil {
		return err
	}
	now, err := f.saved(ctx, table)
	if err != nil {
		return err
	}
	printed := slices.Clone(want)
	for i, c := range printed {
		// Taken as ours only if nobody has changed the number of rules meanwhile;
		// otherwise the next Verify compares with what we wrote.
		if have := now.rules[c.name]; len(have) == len(c.rules) {
			printed[i].rules = have
		}
	}
	r.loaded[tableKey{f.name, table}] = printed
	return nil
}

// commitSaved commits a script made from what is saved. If another program changes
// the table in between, a deletion in the script may find nothing and abort it:
// then the table is read again.
func commitSaved(ctx context.Context, f family, table string, script func(savedTable) string) error {
	var last string
	var lastErr error
	for range 5 {
		saved, err := f.saved(ctx, table)
		if err != nil {
			return err
		}
		s := script(saved)
		if s == "" {
			return nil
		}
		if s == last {
			return lastErr // nothing has changed: it would fail the same way
		}
		if lastErr = f.commit(ctx, s); lastErr == nil || ctx.Err() != nil {
			return lastErr
		}
		last = s
	}
	return lastErr
}

// Verify says in words how the kernel's rules and sets differ from what Install
// loads; nothing if they do not.
func (r *Rules) Verify(ctx context.Context) (drift []string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.findOwn(); err != nil {
		return nil, err
	}
	if drift, err = r.setDrift(ctx); err != nil {
		return nil, err
	}
	routes, err := r.routeDrift()
	if err != nil {
		return nil, err
	}
	drift = append(drift, routes...)
	tables := []string{"raw", "nat", "filter"}
	if r.cfg.mangled() {
		tables = append(tables, "mangle")
	}
	for _, f := range r.families {
		for _, table := range tables {
			if table == "raw" && r.noZone[f.name] != "" {
				continue
			}
			saved, err := f.saved(ctx, table)
			if err != nil {
				return nil, fmt.Errorf("read %s rules: %w", f.name, err)
			}
			want, ok := r.loaded[tableKey{f.name, table}]
			if !ok {
				want = r.chains(f, table)
			}
			drift = append(drift, saved.drift(f.name, table, want)...)
		}
	}
	return drift, nil
}

// Remove takes everything out in two phases. First go the guard and the jumps: new
// connections pass as without a proxy, while those in flight live on, for which
// the redirecting chains must stay (the kernel stops translating packets when its
// last NAT rule goes), those that track the proxy's own connections apart, and those
// that bring answers back. Then drain runs: it should return when the proxy's
// connections have ended or when their time is up. Then chains and sets go. A nil
// drain waits for nothing. Its error is returned, but stops nothing.
func (r *Rules) Remove(ctx context.Context, drain func(context.Context) error) error {
	if err := r.detach(ctx); err != nil {
		return err
	}
	var drainErr error
	if drain != nil {
		if err := drain(ctx); err != nil {
			drainErr = fmt.Errorf("drain: %w", err)
		}
	}
	// A context that ended while draining must not leave the rest behind.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	r.mu.Lock()
	defer r.mu.Unlock()
	// Before the rules that keep the answers on this host.
	if r.cfg.PreserveSource {
		drainErr = errors.Join(drainErr, endClientLegs())
	}
	tables := []string{"filter", "nat"}
	if r.cfg.mangled() {
		tables = append(tables, "mangle")
	}
	// The proxy's own connections, should any be left, are found in their zone to the last.
	tables = append(tables, "raw")
	for _, f := range r.families {
		for _, table := range tables {
			if table == "raw" && !f.uses(ctx, table) {
				continue
			}
			if err := removeChains(ctx, f, table); err != nil {
				return errors.Join(drainErr, err)
			}
		}
	}
	return errors.Join(drainErr, removeRoutes(), destroySets(ctx, r.ipset))
}

// detach is the first phase of Remove.
func (r *Rules) detach(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.loaded)
	for _, f := range r.families {
		if err := removeChains(ctx, f, "filter"); err != nil {
			return err
		}
	}
	for _, f := range r.families {
		if err := commitSaved(ctx, f, "nat", func(saved savedTable) string {
			return removeScript("nat", saved, false)
		}); err != nil {
			return fmt.Errorf("remove %s rules, table nat: %w", f.name, err)
		}
		if r.cfg.mangled() {
			if err := r.load(ctx, f, "mangle", r.cfg.mangleChains(f, true)); err != nil {
				return fmt.Errorf("remove %s rules, table mangle: %w", f.name, err)
			}
		}
	}
	return nil
}

func removeChains(ctx context.Context, f family, table string) error {
	if err := commitSaved(ctx, f, table, func(saved savedTable) string {
		return removeScript(table, saved, true)
	}); err != nil {
		return fmt.Errorf("remove %s rules, table %s: %w", f.name, table, err)
	}
	return nil
}
