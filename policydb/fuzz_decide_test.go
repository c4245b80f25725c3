package policydb

import (
	"fmt"
	"math/rand"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// The small words out of which sets and questions are made: small enough that things
// meet, and with all that has fooled matchers before among them.
var (
	fuzzKeys       = []string{"app", "env", "tier", "proc.exe", "a.b"}
	fuzzValues     = []string{"", "a", "ab", "abc", "b", "a=b", "=", "A"}
	fuzzPrefixes   = []string{"a", "ab", "abc", "b", "a=", "=", "A", "abcd"}
	fuzzNamespaces = []string{"/", "/a", "/a/b", "/a/b/c", "/a-b", "/x", "/a/x", "/ab"}
	fuzzZones      = []string{"UTC", "Europe/Oslo", "America/St_Johns", "Australia/Lord_Howe"}
	fuzzHours      = [][2]uint32{{0, 0}, {8 * 60, 12 * 60}, {22 * 60, 6 * 60}, {2*60 + 30, 3 * 60}, {0, 1440}, {60, 61}, {1439, 1440}, {1, 0}}
	fuzzPorts      = [][]*symbolonv1.PortRange{
		nil,
		{{Protocol: "tcp", First: 443, Last: 443}},
		{{Protocol: "tcp", First: 1, Last: 500}, {Protocol: "udp", First: 53, Last: 53}},
		{{Protocol: "udp", First: 1, Last: 65535}},
		{{Protocol: "tcp", First: 500, Last: 65535}},
	}
	fuzzAsked = []uint16{443, 53, 500, 1, 65535}
	fuzzEpoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
)

// A fuzzCase is numbers that choose among the words. code reads it from bytes or
// writes it to them, by one and the same walk, so that a case in Go can be a seed.
type fuzzCase struct {
	namespaces [8]struct{ known, byDefault, protection int }
	policies   []fuzzPolicy
	ends       [2]struct {
		namespace, external int
		values              [5]int // bit per value, for each key
	}
	port, udp   int
	hours, mins int // after the epoch
}

// fuzzLearns is from where on a fuzzCase's namespace is in learn.
const fuzzLearns = 5

type fuzzPolicy struct {
	namespace, verb, observe, fallback, propagate, encrypt, log int
	subject, object                                             fuzzSelector
	same, different                                             int // bit per key
	ports, days, hours, zone, expires                           int
}

type fuzzSelector struct {
	terms [][]fuzzClause // none: any
}

type fuzzClause struct {
	key, operator int // in, not, prefix, exists, missing
	values        int // bit per value; for a prefix its index
}

type coder struct {
	data    []byte
	writing bool
}

func (c *coder) n(v *int, below int) {
	if c.writing {
		c.data = append(c.data, byte(*v))
		return
	}
	*v = 0
	if len(c.data) > 0 {
		*v = int(c.data[0]) % below
		c.data = c.data[1:]
	}
}

func (c *coder) code(f *fuzzCase) {
	for i := range f.namespaces {
		ns := &f.namespaces[i]
		c.n(&ns.known, 8) // mostly known, and mostly enforced
		c.n(&ns.byDefault, 3)
		c.n(&ns.protection, 3)
	}
	for i := range f.ends {
		e := &f.ends[i]
		c.n(&e.namespace, len(fuzzNamespaces))
		c.n(&e.external, 4)
		for k := range e.values {
			c.n(&e.values[k], 256)
		}
	}
	c.n(&f.port, len(fuzzAsked))
	c.n(&f.udp, 4)
	c.n(&f.hours, 256)
	c.n(&f.mins, 256)
	count := len(f.policies)
	c.n(&count, 90) // more than a word's bits
	if !c.writing {
		f.policies = make([]fuzzPolicy, count)
	}
	for i := range f.policies {
		c.policy(&f.policies[i])
	}
}

func (c *coder) policy(p *fuzzPolicy) {
	c.n(&p.namespace, len(fuzzNamespaces))
	c.n(&p.verb, 4)
	for _, v := range []*int{&p.observe, &p.fallback, &p.propagate, &p.encrypt, &p.log} {
		c.n(v, 4)
	}
	c.selector(&p.subject)
	c.selector(&p.object)
	c.n(&p.same, 256)
	c.n(&p.different, 256)
	c.n(&p.ports, 2*len(fuzzPorts))
	c.n(&p.days, 256)
	c.n(&p.hours, 2*len(fuzzHours))
	c.n(&p.zone, len(fuzzZones))
	c.n(&p.expires, 256)
}

func (c *coder) selector(s *fuzzSelector) {
	count := len(s.terms)
	c.n(&count, 4)
	if !c.writing {
		s.terms = make([][]fuzzClause, count)
	}
	for i := range s.terms {
		clauses := len(s.terms[i]) - 1
		c.n(&clauses, 4)
		if !c.writing {
			s.terms[i] = make([]fuzzClause, clauses+1)
		}
		for j := range s.terms[i] {
			cl := &s.terms[i][j]
			c.n(&cl.key, len(fuzzKeys))
			c.n(&cl.operator, 5)
			c.n(&cl.values, 256)
		}
	}
}

// build makes the resources and the question.
func (f *fuzzCase) build() ([]*symbolonv1.Resource, *Query, time.Time) {
	var rs []*symbolonv1.Resource
	for i, ns := range f.namespaces {
		if ns.known == 7 {
			continue
		}
		mode := symbolonv1.Mode_MODE_ENFORCE
		if ns.known >= fuzzLearns {
			mode = symbolonv1.Mode_MODE_LEARN
		}
		rs = append(rs, &symbolonv1.Resource{Namespace: fuzzNamespaces[i], Kind: &symbolonv1.Resource_NamespaceKind{NamespaceKind: &symbolonv1.Namespace{
			Mode: mode, Default: symbolonv1.Default(ns.byDefault + 1), Protection: symbolonv1.Protection(ns.protection),
		}}})
	}
	now := fuzzEpoch.Add(time.Duration(f.hours)*37*time.Hour + time.Duration(f.mins)*7*time.Minute)
	for i := range f.policies {
		rs = append(rs, f.policies[i].build(i, now))
	}
	q := &Query{Protocol: "tcp", Port: fuzzAsked[f.port]}
	if f.udp == 3 {
		q.Protocol = "udp"
	}
	for i, e := range []*Endpoint{&q.From, &q.To} {
		e.Attributes = fuzzAttributes(f.ends[i].values)
		e.Namespace = fuzzNamespaces[f.ends[i].namespace]
		if f.ends[i].external == 3 {
			e.Namespace, e.External = "", "/x/external"
		}
	}
	return rs, q, now
}

func fuzzAttributes(values [5]int) identity.Attributes {
	m := make(map[string][]string)
	for k, mask := range values {
		m[fuzzKeys[k]] = fuzzChosen(fuzzValues, mask)
	}
	return identity.NewAttributes(m)
}

func fuzzChosen(words []string, mask int) []string {
	var out []string
	for i, w := range words {
		if mask&(1<<i) != 0 {
			out = append(out, w)
		}
	}
	return out
}

func (p *fuzzPolicy) build(i int, now time.Time) *symbolonv1.Resource {
	out := &symbolonv1.Policy{
		Subject: p.subject.build(), Object: p.object.build(),
		Verb:        symbolonv1.Verb(p.verb + 1),
		WhereSame:   fuzzChosen(fuzzKeys, p.same/8), // mostly none
		WithEncrypt: p.encrypt == 3, WithLog: p.log == 3,
		Fallback: p.fallback == 3, Propagate: p.propagate != 0,
	}
	if p.different >= 128 {
		out.WhereDifferent = fuzzChosen(fuzzKeys, p.different)
	}
	if p.observe == 3 {
		out.Mode = symbolonv1.Mode_MODE_OBSERVE
	}
	if p.ports < len(fuzzPorts) {
		out.Ports = fuzzPorts[p.ports]
	}
	if p.hours < len(fuzzHours) {
		h := fuzzHours[p.hours]
		out.When = &symbolonv1.Window{Days: uint32(p.days % 127), StartMinute: h[0], EndMinute: h[1], Timezone: fuzzZones[p.zone]}
	}
	if p.expires >= 224 {
		out.Expires = timestamppb.New(now.Add(time.Duration(p.expires-240) * time.Minute))
	}
	return &symbolonv1.Resource{Namespace: fuzzNamespaces[p.namespace], Name: fmt.Sprintf("p%02d", (i*37)%101), Kind: &symbolonv1.Resource_Policy{Policy: out}}
}

func (s *fuzzSelector) build() *symbolonv1.Selector {
	if len(s.terms) == 0 {
		return &symbolonv1.Selector{Any: true}
	}
	out := &symbolonv1.Selector{}
	for _, clauses := range s.terms {
		t := &symbolonv1.Term{}
		for _, c := range clauses {
			x := &symbolonv1.Clause{Key: fuzzKeys[c.key]}
			values := &symbolonv1.Values{Values: fuzzChosen(fuzzValues, c.values)}
			switch c.operator {
			case 0:
				x.Operator = &symbolonv1.Clause_In{In: values}
			case 1:
				x.Operator = &symbolonv1.Clause_Not{Not: values}
			case 2:
				x.Operator = &symbolonv1.Clause_Prefix{Prefix: fuzzPrefixes[c.values%len(fuzzPrefixes)]}
			default:
				x.Operator = &symbolonv1.Clause_Exists{Exists: c.operator == 3}
			}
			t.Clauses = append(t.Clauses, x)
		}
		out.Terms = append(out.Terms, t)
	}
	return out
}

// knownFailures are seven ways in which matchers of this kind have gone wrong.
func knownFailures() map[string]fuzzCase {
	const in, not, prefix, missing = 0, 1, 2, 4
	const app, env, tier = 0, 1, 2
	one := func(subject ...[]fuzzClause) fuzzCase {
		return fuzzCase{policies: []fuzzPolicy{{propagate: 1, hours: len(fuzzHours), subject: fuzzSelector{terms: subject}}}}
	}
	from := func(f fuzzCase, values [5]int) fuzzCase {
		f.ends[0].values = values
		return f
	}
	bit := func(v string) int { return 1 << slices.Index(fuzzValues, v) }
	return map[string]fuzzCase{
		// app in [a, a*] holds twice for app=a; env is not there.
		"a clause hit twice": from(one([]fuzzClause{{app, in, bit("a") | bit("ab")}, {env, in, bit("a")}}), [5]int{app: bit("a") | bit("ab")}),
		// abc has the prefixes a, ab and abc; each is the same clause or another's.
		"overlapping prefixes": from(one(
			[]fuzzClause{{app, prefix, 0}, {tier, prefix, 1}},
			[]fuzzClause{{app, prefix, 1}, {env, prefix, 2}},
		), [5]int{app: bit("abc")}),
		"multi-valued keys": from(one([]fuzzClause{{app, in, bit("a") | bit("b")}, {env, not, bit("a")}}),
			[5]int{app: bit("a") | bit("b") | bit("abc"), env: bit("a") | bit("b")}),
		"not on an absent key":    from(one([]fuzzClause{{app, in, bit("a")}, {env, not, bit("a")}}), [5]int{app: bit("a")}),
		"two exists: false":       from(one([]fuzzClause{{app, missing, 0}, {env, missing, 0}}), [5]int{tier: bit("a"), env: bit("b")}),
		"values with equals sign": from(one([]fuzzClause{{app, in, bit("a=b")}, {env, in, bit("=")}}), [5]int{app: bit("a=b"), env: bit("b")}),
		"empty values":            from(one([]fuzzClause{{app, in, bit("")}, {env, not, bit("")}}), [5]int{app: bit(""), env: bit("")}),
	}
}

func TestKnownMatcherFailures(t *testing.T) {
	for name, f := range knownFailures() {
		t.Run(name, func(t *testing.T) {
			// As bytes and back it must be the same case, or the seeds mean nothing.
			c := &coder{writing: true}
			c.code(&f)
			var back fuzzCase
			(&coder{data: c.data}).code(&back)
			if fmt.Sprint(back) != fmt.Sprint(f) {
				t.Fatalf("case does not survive its encoding:\n%v\n%v", f, back)
			}
			rs, q, now := f.build()
			compiled, err := Compile(rs, 1)
			if err != nil {
				t.Fatal(err)
			}
			// None of the seven subjects matches: the root's default denies.
			if d := compiled.Decide(Client, q, now); d.Allow || d.Reason != symbolonv1.Reason_REASON_DEFAULT {
				t.Errorf("got %q", say(d))
			}
			holdToReference(t, rs, q, now)
		})
	}
}

// FuzzDecide holds Decide against Reference: on first and on second sight, for equal
// attributes at another address, whatever the order of resources, and until Until.
func FuzzDecide(f *testing.F) {
	for _, k := range knownFailures() {
		c := &coder{writing: true}
		c.code(&k)
		f.Add(c.data)
	}
	for _, k := range learnCases() {
		c := &coder{writing: true}
		c.code(&k)
		f.Add(c.data)
	}
	rng := rand.New(rand.NewSource(1))
	for range 16 {
		f.Add(randomBytes(rng, 200+rng.Intn(3000)))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var k fuzzCase
		(&coder{data: data}).code(&k)
		rs, q, now := k.build()
		holdToReference(t, rs, q, now)
	})
}

// TestDecideAgreesWithReference is the fuzz target on large random sets, in every run.
func TestDecideAgreesWithReference(t *testing.T) {
	rng := rand.New(rand.NewSource(2))
	verdicts := make(map[string]int)
	for range 1500 {
		var k fuzzCase
		(&coder{data: randomBytes(rng, 200+rng.Intn(3000))}).code(&k)
		rs, q, now := k.build()
		holdToReference(t, rs, q, now)
		d := Reference(rs, Client, q, now)
		verdicts[fmt.Sprint(d.Allow, d.Reason)]++
		if d.WouldAllow != nil {
			verdicts["would"]++
		}
	}
	// A generator that reaches but one verdict would prove nothing.
	for _, v := range []string{"true REASON_POLICY", "false REASON_POLICY", "true REASON_FALLBACK", "false REASON_FALLBACK", "true REASON_DEFAULT",
		"false REASON_DEFAULT", "false REASON_NO_POLICY", "false REASON_ENCRYPTION_UNAVAILABLE", "true REASON_LEARN", "would"} {
		if verdicts[v] < 5 {
			t.Errorf("%q came out %d times: %v", v, verdicts[v], verdicts)
		}
	}
}

func randomBytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	rng.Read(b)
	return b
}

func holdToReference(t *testing.T, rs []*symbolonv1.Resource, q *Query, now time.Time) {
	t.Helper()
	c, err := Compile(rs, 1)
	if err != nil {
		t.Fatal(err)
	}
	slices.Reverse(rs)
	reversed, err := Compile(rs, 1)
	if err != nil {
		t.Fatalf("in reverse order: %v", err)
	}
	for _, side := range []Side{Client, Server} {
		want := Reference(rs, side, q, now)
		got := c.Decide(side, q, now)
		if side == Client && got.Allow && !c.MayReach(&q.From, now) {
			t.Fatalf("MayReach denies what Decide allows: %+v", q)
		}
		again := *q
		again.From.Attributes, again.To.Attributes = slices.Clone(q.From.Attributes), slices.Clone(q.To.Attributes)
		for name, d := range map[string]Decision{
			"first sight": got, "second sight": c.Decide(side, q, now), "equal attributes": c.Decide(side, &again, now),
			"reverse order": reversed.Decide(side, q, now), "explained": c.Explain(side, q, now).Decision,
		} {
			if diff := diffDecisions(d, want); diff != "" {
				t.Fatalf("%s side, %s: %s", side, name, diff)
			}
		}
		checkExplanation(t, c.Explain(side, q, now), want)
		// What is remembered of one question is no other's, nor another time's: a clock goes
		// on, and is set back.
		for _, other := range neighbours(q) {
			for _, at := range []time.Time{now.Add(25 * time.Hour), now} {
				if diff := diffDecisions(c.Decide(side, other, at), Reference(rs, side, other, at)); diff != "" {
					t.Fatalf("%s side, %+v after other questions, at %s: %s", side, other, at, diff)
				}
			}
		}
		if diff := diffDecisions(c.Decide(side, q, now), want); diff != "" {
			t.Fatalf("%s side, after other questions: %s", side, diff)
		}
		if got.Until.IsZero() {
			continue
		}
		if !got.Until.After(now) {
			t.Fatalf("until %s is not after %s", got.Until, now)
		}
		for _, at := range []time.Time{now.Add(got.Until.Sub(now) / 2), got.Until.Add(-1)} {
			if diff := diffDecisions(Reference(rs, side, q, at), want); diff != "" {
				t.Fatalf("%s side: changes at %s, before until %s: %s", side, at, got.Until, diff)
			}
		}
	}
}

// neighbours are questions that differ from q in one thing each.
func neighbours(q *Query) []*Query {
	var out []*Query
	add := func(change func(*Query)) {
		x := *q
		change(&x)
		out = append(out, &x)
	}
	add(func(x *Query) { x.Port ^= 443 ^ 500 })
	add(func(x *Query) { x.Protocol = map[string]string{"tcp": "udp", "udp": "tcp"}[q.Protocol] })
	add(func(x *Query) { x.From, x.To = q.To, q.From })
	for _, other := range []func(*Query) *Endpoint{func(x *Query) *Endpoint { return &x.From }, func(x *Query) *Endpoint { return &x.To }} {
		add(func(x *Query) { e := other(x); e.Namespace, e.External = "", "/x/other" })
		add(func(x *Query) { e := other(x); e.Namespace, e.External = "/a/b", "" })
		// One value less of a key, which only a comparison may look at.
		add(func(x *Query) {
			if e := other(x); len(e.Attributes) > 0 {
				e.Attributes = e.Attributes[1:]
			}
		})
	}
	return out
}

// checkExplanation: what decided is among the candidates that match.
func checkExplanation(t *testing.T, e Explanation, d Decision) {
	t.Helper()
	if d.Policy == "" {
		return
	}
	for _, c := range e.Candidates {
		if c.Policy == d.Policy {
			if !c.Matches || c.Failed != "" {
				t.Fatalf("%s decides, and is explained not to match: %s", c.Policy, c.Failed)
			}
			return
		}
	}
	t.Fatalf("%s decides, and is no candidate", d.Policy)
}
