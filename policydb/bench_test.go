package policydb

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// benchYAML is n policies of one application each, as a large installation has
// them, a tenth of them with two alternatives, some with prefixes and exclusions.
func benchYAML(n int) string {
	var b strings.Builder
	b.WriteString(tree)
	for i := range n {
		ns := "/acme/prod"
		if i%5 == 0 {
			ns = "/acme"
		}
		subject := fmt.Sprintf("{app: app-%d, env: prod}", i%(n/5))
		object := fmt.Sprintf("{app: app-%d, env: [prod, qa]}", (i*7)%(n/5))
		switch i % 20 {
		case 3, 4:
			subject = fmt.Sprintf("[{app: app-%d}, {app: app-%d, tier: ops}]", i%(n/5), (i+1)%(n/5))
		case 5:
			object = fmt.Sprintf("{app: {prefix: app-%d}, vuln.level: {not: [critical]}}", (i*7)%(n/5))
		}
		b.WriteString(policyYAML(ns, fmt.Sprintf("p-%06d", i),
			"subject: "+subject+"\nverb: allow\nobject: "+object+"\nports: [tcp/443, tcp/8000-8100]\nwith: [encrypt]\npropagate: true"))
	}
	return b.String()
}

// benchIdentity is a workload with count attributes.
func benchIdentity(app string, count int) identity.Attributes {
	m := map[string][]string{"app": {app}, "env": {"prod"}, "vuln.level": {"low"}}
	for i := range count - len(m) {
		m[fmt.Sprintf("k8s.label-%d", i)] = []string{fmt.Sprintf("value-%d", i)}
	}
	return identity.NewAttributes(m)
}

func benchCompile(b *testing.B, n int) (*Compiled, []*symbolonv1.Resource) {
	b.Helper()
	var rs []*symbolonv1.Resource
	for _, d := range parseLarge(b, benchYAML(n)) {
		rs = append(rs, d.Resource)
	}
	c, err := Compile(rs, 1)
	if err != nil {
		b.Fatal(err)
	}
	return c, rs
}

var benchSizes = []int{1000, 10_000, 100_000}

// BenchmarkDecide is one side's decision: known, for a peer seen before (the case of
// nearly every connection); new, for a peer at first sight.
func BenchmarkDecide(b *testing.B) {
	for _, n := range benchSizes {
		b.Run(fmt.Sprintf("policies=%d", n), func(b *testing.B) {
			c, _ := benchCompile(b, n)
			for _, attrs := range []int{30, 100} {
				benchDecide(b, c, attrs)
			}
		})
	}
}

func benchDecide(b *testing.B, c *Compiled, attrs int) {
	q := &Query{
		From:     Endpoint{Namespace: "/acme/prod", Attributes: benchIdentity("app-7", attrs)},
		To:       Endpoint{Namespace: "/acme/prod", Attributes: benchIdentity("app-49", attrs)},
		Protocol: "tcp", Port: 443,
	}
	if d := c.Decide(Client, q, noon); d.Policy == "" {
		b.Fatalf("the question that is measured is not decided by a policy: %s", say(d))
	}
	b.Run(fmt.Sprintf("attributes=%d/known", attrs), func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			c.Decide(Client, q, noon)
		}
	})
	b.Run(fmt.Sprintf("attributes=%d/new", attrs), func(b *testing.B) {
		b.ReportAllocs()
		fresh := *q
		peers := make([]identity.Attributes, 4096)
		for i := range peers {
			// Another value of a key that policies use: another projection.
			peers[i] = q.To.Attributes.Union(identity.Attributes{{Key: "zone", Value: fmt.Sprint(i)}, {Key: "tier", Value: fmt.Sprint(i)}})
		}
		i := 0
		for b.Loop() {
			if i++; i%len(peers) == 0 {
				c.known.hashes.Store(nil)
				c.known.pointers.Store(nil)
				c.known.answers.Store(nil)
			}
			fresh.To.Attributes = peers[i%len(peers)]
			c.Decide(Client, &fresh, noon)
		}
	})
}

// BenchmarkCompile reports the time and, as B/policy, the memory that stays.
func BenchmarkCompile(b *testing.B) {
	for _, n := range benchSizes {
		b.Run(fmt.Sprintf("policies=%d", n), func(b *testing.B) {
			_, rs := benchCompile(b, n)
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			var c *Compiled
			for b.Loop() {
				c, _ = Compile(rs, 1)
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(n), "B/policy")
			runtime.KeepAlive(c)
		})
	}
}

// BenchmarkApply is an apply of n new policies: text to plan to commit.
func BenchmarkApply(b *testing.B) {
	for _, n := range benchSizes {
		text := benchYAML(n)
		b.Run(fmt.Sprintf("policies=%d/parse", n), func(b *testing.B) {
			b.SetBytes(int64(len(text)))
			for b.Loop() {
				parseLarge(b, text)
			}
		})
		b.Run(fmt.Sprintf("policies=%d/plan", n), func(b *testing.B) {
			docs := parseLarge(b, text)
			for b.Loop() {
				db := NewDB()
				p, err := db.Plan(docs, nil, false)
				if err != nil {
					b.Fatal(err)
				}
				if err := db.Commit(p, 1); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// parseLarge divides what is beyond one file's bound into several.
func parseLarge(t testing.TB, text string) []Document {
	t.Helper()
	var docs []Document
	for len(text) > 0 {
		end := min(len(text), maxFileBytes)
		if end < len(text) {
			end = strings.LastIndex(text[:end], "\n---\n") + 1
		}
		d, err := Parse("large.yaml", []byte(text[:end]))
		if err != nil {
			t.Fatal(err)
		}
		docs = append(docs, d...)
		text = text[end:]
	}
	return slices.Clip(docs)
}
