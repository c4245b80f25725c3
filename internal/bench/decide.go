package main

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/policydb"
)

// decideWorkload needs no lab: it is policydb alone, in this process.
const decideWorkload = "decide"

const (
	decidePeers  = 64 // that take turns as the known one
	decideBurst  = 20_000
	decideFresh  = 200 // peers at first sight, in a round
	decideRounds = 8   // within each of the benchmark's
)

var decideAttributes = []int{30, 100}

func decideSizes(quick bool) []int {
	if quick {
		return []int{1000, 10_000}
	}
	return []int{1000, 10_000, 100_000}
}

// decided is how long one side's decisions take with so many policies, for workloads
// of so many attributes. CPU time of the deciding thread, medians over rounds.
type decided struct {
	Policies, Attributes int
	KnownNs, NewNs       float64 // what was asked before, and peers at first sight
	PortNs               float64 // peers seen before, a port on which they were not asked for
	KnownAllocs          float64 // for each decision
	NewAllocs            float64
	CompileMs            float64 // of all policies
	BytesPerPolicy       float64 // of memory that compiling leaves, at rest
}

// measureDecisions compiles each size and asks it.
func measureDecisions(ctx context.Context, o *options, progress io.Writer) ([]decided, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all []decided
	for _, n := range decideSizes(o.quick) {
		c, took, size, err := compileMany(n)
		if err != nil {
			return all, err
		}
		for _, attributes := range decideAttributes {
			if ctx.Err() != nil {
				return all, context.Cause(ctx)
			}
			d := decided{Policies: n, Attributes: attributes, CompileMs: float64(took.Microseconds()) / 1e3, BytesPerPolicy: size / float64(n)}
			if err := d.measure(c, o.rounds); err != nil {
				return all, err
			}
			fmt.Fprintf(progress, "decide: %d policies, %d attributes: %.0f ns known, %.0f ns on another port, %.0f ns new\n", n, attributes, d.KnownNs, d.PortNs, d.NewNs)
			all = append(all, d)
		}
	}
	return all, nil
}

func (d *decided) measure(c *policydb.Compiled, rounds int) error {
	now := time.Now()
	queries := make([]policydb.Query, decidePeers)
	from := decideIdentity(7, d.Attributes)
	for i := range queries {
		// All call the same: as many policies meet each of them.
		queries[i] = policydb.Query{
			From:     policydb.Endpoint{Namespace: decideNamespace, Attributes: from},
			To:       policydb.Endpoint{Namespace: decideNamespace, Attributes: decideIdentity(49, d.Attributes).Union(identity.Attributes{{Key: "tier", Value: fmt.Sprint(i)}})},
			Protocol: "tcp", Port: 443,
		}
	}
	if x := c.Decide(policydb.Client, &queries[0], now); !x.Allow || x.Policy == "" {
		return fmt.Errorf("the question that is measured is not decided by a policy, but by %v", x.Reason)
	}
	runtime.GC() // what was before is not to be swept meanwhile
	var known, anew, fresh []float64
	for round := range decideRounds * rounds {
		ns, allocs := cost(decideBurst, func(i int) { c.Decide(policydb.Client, &queries[i%decidePeers], now) })
		if round > 0 { // the first sees them for the first time
			known, d.KnownAllocs = append(known, ns), max(d.KnownAllocs, allocs)
		}
		// The same peers, but three times as many questions as are remembered.
		ns, _ = cost(decideBurst, func(i int) {
			q, turn := queries[i%decidePeers], (round*decideBurst+i)/decidePeers
			q.Port = uint16(8000 + turn/2%101)
			c.Decide(policydb.Side(turn%2), &q, now)
		})
		anew = append(anew, ns)
		peers := make([]policydb.Query, decideFresh)
		for i := range peers {
			peers[i] = queries[i%decidePeers]
			peers[i].To.Attributes = peers[i].To.Attributes.Union(identity.Attributes{{Key: "zone", Value: fmt.Sprintf("%d-%d-%d", d.Attributes, round, i)}})
		}
		ns, d.NewAllocs = cost(decideFresh, func(i int) { c.Decide(policydb.Client, &peers[i], now) })
		fresh = append(fresh, ns)
	}
	slices.Sort(known)
	slices.Sort(anew)
	slices.Sort(fresh)
	d.KnownNs, d.PortNs, d.NewNs = median(known), median(anew), median(fresh)
	return nil
}

// cost is this thread's CPU time, in ns, and the allocations for each of n calls.
func cost(n int, f func(int)) (ns, allocs float64) {
	runtime.LockOSThread() // or it is two threads' time
	defer runtime.UnlockOSThread()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	began := threadTime()
	for i := range n {
		f(i)
	}
	took := threadTime() - began
	runtime.ReadMemStats(&after)
	// What the runtime does beside us is a few in all, not in each.
	return float64(took.Nanoseconds()) / float64(n), float64((after.Mallocs - before.Mallocs) / uint64(n))
}

func threadTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		panic(err) // the kernel has had it for twenty years
	}
	return time.Duration(t.Nano())
}

// compileMany compiles n policies: the time it takes, and the bytes that stay.
func compileMany(n int) (*policydb.Compiled, time.Duration, float64, error) {
	rs := decidePolicies(n)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	began := threadTime()
	c, err := policydb.Compile(rs, 1)
	took := threadTime() - began
	runtime.GC()
	runtime.ReadMemStats(&after)
	runtime.KeepAlive(rs) // what a proxy has received is not counted
	return c, took, float64(after.HeapAlloc) - float64(before.HeapAlloc), err
}

const decideNamespace = "/acme/prod"

// decidePolicies are n policies as a large installation has them: five for each
// application, a fifth of them inherited, a tenth with two alternatives, some with
// prefixes and exclusions, all with ports and an obligation.
func decidePolicies(n int) []*symbolonv1.Resource {
	rs := make([]*symbolonv1.Resource, 0, n+3)
	for _, path := range []string{"/", "/acme", decideNamespace} {
		rs = append(rs, &symbolonv1.Resource{Namespace: path, Kind: &symbolonv1.Resource_NamespaceKind{NamespaceKind: &symbolonv1.Namespace{
			Mode: symbolonv1.Mode_MODE_ENFORCE, Default: symbolonv1.Default_DEFAULT_DENY,
		}}})
	}
	in := func(key string, values ...string) *symbolonv1.Clause {
		return &symbolonv1.Clause{Key: key, Operator: &symbolonv1.Clause_In{In: &symbolonv1.Values{Values: values}}}
	}
	all := func(clauses ...*symbolonv1.Clause) *symbolonv1.Term { return &symbolonv1.Term{Clauses: clauses} }
	apps := n / 5
	app := func(i int) string { return fmt.Sprintf("app-%d", i%apps) }
	for i := range n {
		p := &symbolonv1.Policy{
			Verb:    symbolonv1.Verb_VERB_ALLOW,
			Subject: &symbolonv1.Selector{Terms: []*symbolonv1.Term{all(in("app", app(i)), in("env", "prod"))}},
			Object:  &symbolonv1.Selector{Terms: []*symbolonv1.Term{all(in("app", app(7*i)), in("env", "prod", "qa"))}},
			Ports:   []*symbolonv1.PortRange{{Protocol: "tcp", First: 443, Last: 443}, {Protocol: "tcp", First: 8000, Last: 8100}},
			// Both sides' namespaces are below, so what propagates counts.
			WithEncrypt: true, Propagate: true,
		}
		switch i % 20 {
		case 3, 4:
			p.Subject.Terms = []*symbolonv1.Term{all(in("app", app(i))), all(in("app", app(i+1)), in("tier", "ops"))}
		case 5:
			p.Object.Terms[0] = all(
				&symbolonv1.Clause{Key: "app", Operator: &symbolonv1.Clause_Prefix{Prefix: app(7 * i)}},
				&symbolonv1.Clause{Key: "vuln.level", Operator: &symbolonv1.Clause_Not{Not: &symbolonv1.Values{Values: []string{"critical"}}}},
			)
		}
		r := &symbolonv1.Resource{Namespace: decideNamespace, Name: fmt.Sprintf("p-%06d", i), Kind: &symbolonv1.Resource_Policy{Policy: p}}
		if i%5 == 0 {
			r.Namespace = "/acme"
		}
		rs = append(rs, r)
	}
	// So that zone is a key that policies use, and another zone another identity.
	rs = append(rs, &symbolonv1.Resource{Namespace: "/", Name: "zones", Kind: &symbolonv1.Resource_Policy{Policy: &symbolonv1.Policy{
		Verb: symbolonv1.Verb_VERB_DENY, Subject: &symbolonv1.Selector{Any: true}, Propagate: true,
		Object: &symbolonv1.Selector{Terms: []*symbolonv1.Term{all(in("zone", "closed"))}},
	}}})
	return rs
}

// decideIdentity is a workload of an application, with count attributes.
func decideIdentity(app, count int) identity.Attributes {
	m := map[string][]string{"app": {fmt.Sprintf("app-%d", app)}, "env": {"prod"}, "vuln.level": {"low"}}
	for i := range count - len(m) {
		m[fmt.Sprintf("k8s.label-%d", i)] = []string{fmt.Sprintf("value-%d", i)}
	}
	return identity.NewAttributes(m)
}

// writeDecisions prints the table.
func writeDecisions(w io.Writer, all []decided) {
	if len(all) == 0 {
		return
	}
	rows := [][]string{{"", "known, ns", "allocs", "other port, ns", "first sight, µs", "allocs", "compile, ms", "B/policy"}}
	for _, d := range all {
		rows = append(rows, []string{
			fmt.Sprintf("%d policies, %d attributes", d.Policies, d.Attributes),
			fmt.Sprintf("%.0f", d.KnownNs), fmt.Sprintf("%.0f", d.KnownAllocs),
			fmt.Sprintf("%.0f", d.PortNs),
			fmt.Sprintf("%.1f", d.NewNs/1e3), fmt.Sprintf("%.0f", d.NewAllocs),
			fmt.Sprintf("%.1f", d.CompileMs), fmt.Sprintf("%.0f", d.BytesPerPolicy),
		})
	}
	fmt.Fprintf(w, "\n### Policy decisions, one side's, CPU time (`%s`)\n\n", decideWorkload)
	writeRows(w, rows)
}
