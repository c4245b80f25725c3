package proxy

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/policydb"
)

// crowd is a policy for many clients of db, app-0 and on, of which some are denied.
func crowd(t testing.TB, apps int, generation uint64, denied ...int) *policydb.Compiled {
	t.Helper()
	var b strings.Builder
	b.WriteString(strings.SplitAfter(baseline, "name: /prod\nmode: enforce\n")[0])
	for i := range apps {
		verb := "allow"
		if slices.Contains(denied, i) {
			verb = "deny"
		}
		fmt.Fprintf(&b, "---\nkind: Policy\nnamespace: /prod\nname: app-%d\nsubject: {app: app-%d}\nverb: %s\nobject: {app: db}\n", i, i, verb)
	}
	docs, err := policydb.Parse("crowd.yaml", []byte(b.String()))
	if err != nil {
		t.Fatal(err)
	}
	var rs []*symbolonv1.Resource
	for _, d := range docs {
		rs = append(rs, d.Resource)
	}
	return must(policydb.Compile(rs, generation))(t)
}

// asks is one connection of app-i with db, by the real decision. Its peer's
// certificate and everything but the question is its own.
func asks(me *party, app int, cut func()) *live {
	attributes := identity.NewAttributes(map[string][]string{"app": {fmt.Sprintf("app-%d", app)}})
	q := &policydb.Query{
		From:     policydb.Endpoint{Namespace: "/prod", Attributes: attributes},
		To:       policydb.Endpoint{Namespace: "/prod", Attributes: identity.NewAttributes(map[string][]string{"app": {"db"}})},
		Protocol: tcp, Port: uint16(5432 + app),
	}
	return &live{
		question: question{kind: fromTunnel, near: me, namespace: "/prod", attributes: attributes.Hash(), port: uint16(5432 + app)},
		judge: func(c *policydb.Compiled, now time.Time) (bool, time.Time) {
			d := c.Decide(policydb.Server, q, now)
			return d.Allow, d.Until
		},
		notAfter: time.Now().Add(time.Hour + time.Duration(app)*time.Second),
		cut:      cut,
	}
}

// One policy of a hundred flips: a hundred of ten thousand connections are cut, and as
// many decisions are made as there are questions.
func TestSeverHundredOfTenThousand(t *testing.T) {
	const apps, each, flipped = 100, 100, 7
	var tab table
	open, closed := crowd(t, apps, 1), crowd(t, apps, 2, flipped)
	tab.setPolicy(open, func() {}, time.Now())
	var me party
	conns := make([]*live, 0, apps*each)
	for i := range apps * each {
		l := asks(&me, i%apps, func() {})
		tab.add(l, time.Now())
		conns = append(conns, l)
	}
	before := tab.judged.Load()
	began := time.Now()
	cut := tab.setPolicy(closed, func() {}, began)
	took := time.Since(began)
	t.Logf("of %d connections %d were cut, by %d decisions, in %v", len(conns), cut, tab.judged.Load()-before, took)
	if n := tab.judged.Load() - before; n != apps {
		t.Errorf("%d decisions for %d questions", n, apps)
	}
	if took > patience {
		t.Errorf("it took %v", took)
	}
	if cut != each {
		t.Errorf("%d were cut, want %d", cut, each)
	}
	for i, l := range conns {
		want := symbolonv1.Reason_REASON_UNSPECIFIED
		if i%apps == flipped {
			want = symbolonv1.Reason_REASON_POLICY_CHANGED
		}
		if why := l.cutReason(); why != want {
			t.Fatalf("connection %d of app-%d: %v, want %v", i, i%apps, why, want)
		}
	}
	// Whoever has been cut goes, and nothing of it stays.
	for _, l := range conns {
		tab.remove(l)
	}
	if len(tab.groups)+len(tab.byParty)+len(tab.expiring.items)+len(tab.uncertain.items)+tab.size() != 0 {
		t.Errorf("left behind: %d groups, %d parties, %d and %d in queues, %d connections",
			len(tab.groups), len(tab.byParty), len(tab.expiring.items), len(tab.uncertain.items), tab.size())
	}
}

// A credential touches its own party's connections, and the clock only what is due.
func TestWhatCannotBeTouchedIsNotJudged(t *testing.T) {
	var tab table
	tab.setPolicy(crowd(t, 10, 1), func() {}, time.Now())
	var one, other party
	now := time.Now()
	for i := range 1000 {
		me := &one
		if i%2 == 1 {
			me = &other
		}
		tab.add(asks(me, i%10, func() {}), now)
	}
	for what, c := range map[string]struct {
		change func()
		want   uint64
	}{
		"a credential":       {func() { tab.changed(&one, now) }, 5},
		"a stranger's":       {func() { tab.changed(&party{}, now) }, 0},
		"a sweep":            {func() { tab.sweep(now.Add(time.Minute)) }, 0},
		"the same policy":    {func() { tab.setPolicy(tab.policy, func() {}, now) }, 10},
		"expired peers (10)": {func() { tab.sweep(now.Add(2 * time.Hour)) }, 0},
	} {
		before := tab.judged.Load()
		c.change()
		if n := tab.judged.Load() - before; n != c.want {
			t.Errorf("%s: %d decisions, want %d", what, n, c.want)
		}
	}
}

// A question's time comes once for all of its connections; until then nothing is asked.
func TestSweepAsksEachQuestionWhenItIsDue(t *testing.T) {
	var tab table
	c := must(policydb.Compile(nil, 1))(t)
	start := time.Now()
	tab.setPolicy(c, func() {}, start)
	var conns [3][]*live
	for i := range 30 {
		until := start.Add(time.Duration(i%3+1) * time.Hour)
		l := &live{
			question: question{kind: fromAddress, port: uint16(i%3 + 1)},
			judge:    func(_ *policydb.Compiled, now time.Time) (bool, time.Time) { return now.Before(until), until },
			cut:      func() {},
		}
		tab.add(l, start)
		conns[i%3] = append(conns[i%3], l)
	}
	for hour := range 4 {
		before := tab.judged.Load()
		for _, minute := range []int{0, 30, 59} {
			tab.sweep(start.Add(time.Duration(hour)*time.Hour + time.Duration(minute)*time.Minute))
		}
		if n := tab.judged.Load() - before; n != uint64(min(hour, 1)) {
			t.Errorf("hour %d: %d decisions", hour, n)
		}
		for i, ls := range conns {
			for _, l := range ls {
				if cut := l.cutReason() != 0; cut != (hour > i) {
					t.Errorf("hour %d: a connection until hour %d is cut: %v", hour, i+1, cut)
				}
			}
		}
	}
}

// An answer by an older policy that comes late puts nothing off.
func TestALateAnswerPutsNothingOff(t *testing.T) {
	var tab table
	first, second := must(policydb.Compile(nil, 1))(t), must(policydb.Compile(nil, 2))(t)
	now := time.Now()
	reached, go1 := make(chan struct{}), make(chan struct{})
	var slow atomic.Bool
	l := &live{cut: func() {}, judge: func(c *policydb.Compiled, _ time.Time) (bool, time.Time) {
		if c == first {
			if slow.Load() {
				close(reached)
				<-go1
			}
			return true, now.Add(time.Hour)
		}
		return true, now.Add(time.Minute)
	}}
	tab.setPolicy(first, func() {}, now)
	tab.add(l, now)
	slow.Store(true)
	var wg sync.WaitGroup
	wg.Go(func() { tab.setPolicy(first, func() {}, now) })
	<-reached
	tab.setPolicy(second, func() {}, now)
	close(go1)
	wg.Wait()
	if due := l.group.due; !due.Equal(now.Add(time.Minute)) {
		t.Errorf("asked again in %v, want a minute", due.Sub(now))
	}
}

// While connections come and go, policies flip and credentials change, at every moment
// that nothing is under way only what is allowed is open; and what is always allowed is
// never cut.
func TestNothingSlipsBetweenCheckAndChange(t *testing.T) {
	const apps = 8
	policies := []*policydb.Compiled{crowd(t, apps, 1), crowd(t, apps, 2, 1, 3), crowd(t, apps, 3, 3, 5)}
	denied := [][]int{nil, {1, 3}, {3, 5}}
	var tab table
	tab.setPolicy(policies[0], func() {}, time.Now())
	mes := make([]party, 3)
	for round := range 60 {
		var wg sync.WaitGroup
		all := make([][]*live, 6)
		for g := range all {
			wg.Go(func() {
				rng := rand.New(rand.NewSource(int64(round*100 + g)))
				for range 40 {
					l := asks(&mes[rng.Intn(3)], rng.Intn(apps), func() {})
					tab.add(l, time.Now())
					if rng.Intn(3) == 0 {
						tab.remove(l)
						continue
					}
					all[g] = append(all[g], l)
				}
			})
		}
		wg.Go(func() {
			for i := range 3 {
				tab.setPolicy(policies[(round+i)%3], func() {}, time.Now())
			}
		})
		wg.Go(func() {
			for i := range 5 {
				tab.changed(&mes[i%3], time.Now())
				tab.sweep(time.Now())
			}
		})
		wg.Wait()
		closed := denied[(round+2)%3]
		for _, l := range slices.Concat(all...) {
			app := int(l.question.port) - 5432
			cut := l.cutReason() != 0
			if !cut && slices.Contains(closed, app) {
				t.Fatalf("round %d: app-%d is denied, and open", round, app)
			}
			if cut && app%2 == 0 {
				t.Fatalf("round %d: app-%d was cut, which no policy denies", round, app)
			}
			tab.remove(l)
		}
		if tab.size() != 0 || len(tab.groups) != 0 {
			t.Fatalf("round %d: %d connections in %d groups are left", round, tab.size(), len(tab.groups))
		}
	}
}

// Whatever a decision can depend on tells two questions apart.
func TestQuestionsAreWhatDecisionsDependOn(t *testing.T) {
	var a, b party
	base := question{kind: fromTunnel, near: &a, namespace: "/prod", attributes: sha256.Sum256([]byte("x")), port: 1, protection: encrypted}
	for name, change := range map[string]func(*question){
		"direction":    func(q *question) { q.kind = toTunnel },
		"own workload": func(q *question) { q.near = &b },
		"other local":  func(q *question) { q.far = &b },
		"certificate":  func(q *question) { q.endpoint = new(mtls.Endpoint) },
		"namespace":    func(q *question) { q.namespace = "/dev" },
		"attributes":   func(q *question) { q.attributes = sha256.Sum256([]byte("y")) },
		"protection":   func(q *question) { q.protection = authenticated },
		"port":         func(q *question) { q.port = 2 },
	} {
		q := base
		if change(&q); q == base {
			t.Errorf("another %s is the same question", name)
		}
	}
	if n := len((&question{near: &a, far: &a}).parties()); n != 1 {
		t.Errorf("a workload that calls itself is %d parties", n)
	}
}

func TestQueue(t *testing.T) {
	rng := rand.New(rand.NewSource(1))
	start := time.Now()
	var q queue[*group]
	all := make([]*group, 200)
	for i := range all {
		all[i] = &group{due: start.Add(time.Duration(rng.Intn(1000)) * time.Second)}
		q.put(all[i])
	}
	for _, g := range all {
		switch rng.Intn(4) {
		case 0:
			q.drop(g)
			q.drop(g) // once more is nothing
			g.due = time.Time{}
		case 1:
			g.due = start.Add(time.Duration(rng.Intn(1000)) * time.Second)
			q.put(g)
		case 2:
			g.due = time.Time{} // no time: not in it
			q.put(g)
		}
	}
	want := slices.DeleteFunc(slices.Clone(all), func(g *group) bool { return g.due.IsZero() })
	slices.SortFunc(want, func(a, b *group) int { return a.due.Compare(b.due) })
	if _, ok := q.due(want[0].due.Add(-1)); ok {
		t.Error("out before its time")
	}
	for i, w := range want {
		g, ok := q.due(start.Add(time.Hour))
		if !ok || !g.due.Equal(w.due) || g.place != 0 {
			t.Fatalf("%d: %v after %v, want %v", i, ok, g, w)
		}
	}
	if len(q.items) != 0 {
		t.Errorf("%d are left", len(q.items))
	}
}

// Two thousand real connections, of which a new policy denies a hundred: those are
// reset at both ends, and the others go on.
func TestSeverAmongRealConnections(t *testing.T) {
	if testing.Short() {
		t.Skip("two thousand handshakes one after the other")
	}
	const staying, going = 1900, 100
	w := newWorld(t)
	const second = "---\nkind: Policy\nnamespace: /prod\nname: batch-calls-db\nsubject: {app: batch}\nverb: allow\nobject: {app: db}\n"
	w.policy(baseline + second)
	w.app.handle(func(c *net.TCPConn) { _, _ = io.Copy(c, c) })
	web := mtls.NewEndpoint(w.web(), mtls.Options{})
	batch := mtls.NewEndpoint(w.ca.workload("/prod/batch", map[string][]string{"app": {"batch"}}), mtls.Options{})
	dial := func(e *mtls.Endpoint) *mtls.Conn {
		ctx := w.ctx()
		c, err := mtls.Dial(ctx, w.call(w.app.addr), e, func(*mtls.Peer) (*symbolonv1.Open, error) {
			return mtls.NewOpen(mtls.NewFlowID(), w.app.addr, encrypted, 1), nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.ReadVerdict(ctx); err != nil {
			t.Fatal(err)
		}
		return c
	}
	var stays, goes []*mtls.Conn
	for i := range staying + going {
		if i%(staying/going+1) == 0 {
			goes = append(goes, dial(batch))
		} else {
			stays = append(stays, dial(web))
		}
	}
	eventually(t, "all are open", func() bool { return w.p.table.size() == staying+going })
	before := w.p.table.judged.Load()
	began := time.Now()
	w.policy(baseline + strings.Replace(second, "verb: allow", "verb: deny", 1))
	applied := time.Since(began)
	for _, c := range goes {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("what is denied ends with %v, want a reset", err)
		}
	}
	t.Logf("%d of %d connections: applied in %v by %d decisions, all reset after %v",
		going, staying+going, applied, w.p.table.judged.Load()-before, time.Since(began))
	if n := w.p.table.judged.Load() - before; n != 2 {
		t.Errorf("%d decisions for 2 questions", n)
	}
	for range going {
		if r := w.records.next(); r.Reason != "policy-changed" || r.Outcome != "deny" {
			t.Fatalf("recorded %s %s (%s)", r.Outcome, r.Reason, r.Detail)
		}
	}
	w.records.none()
	for _, c := range stays {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		speaks(t, c)
	}
	if n := w.p.table.size(); n != staying {
		t.Errorf("%d connections are open, want %d", n, staying)
	}
}

// TestRule10OpenConnectionsAreJudgedAgain, whichever change could touch them; the newly
// denied are cut, with their reason, and the others are not. (The rules are those of
// docs/policy.md; 1 to 9 are policydb's.)
func TestRule10OpenConnectionsAreJudgedAgain(t *testing.T) {
	ca := newAuthority(t, "acme.example")
	svid := func(app string, valid time.Duration) *identity.Credential {
		l := ca.leaf("/prod/"+app, map[string][]string{"app": {app}})
		l.NotAfter = time.Now().Add(valid)
		return ca.credential(l, identity.NewSVID)
	}
	const long = 24 * time.Hour
	inHours := func(h int) string { return time.Now().Add(time.Duration(h) * time.Hour).UTC().Format(time.RFC3339) }
	changed, expired := symbolonv1.Reason_REASON_POLICY_CHANGED, symbolonv1.Reason_REASON_SVID_EXPIRED
	for _, tc := range []struct {
		name      string
		policy    string
		own, peer time.Duration // validity
		change    func(w *world10)
		cut       symbolonv1.Reason // of the connection that the change could touch
	}{
		{"nothing", baseline, long, long, func(w *world10) { w.table.sweep(w.now) }, 0},
		{"the same policy", baseline, long, long, func(w *world10) { w.set(t, baseline+w.beside) }, 0},
		{"the policy", baseline, long, long, func(w *world10) { w.set(t, denied+w.beside) }, changed},
		{"an attribute", baseline, long, long, func(w *world10) { w.rotate(svid("cache", long)) }, changed},
		{"the certificate, not the claims", baseline, long, long, func(w *world10) { w.rotate(svid("db", long)) }, 0},
		{"a window's end", baseline + "expires: " + inHours(1) + "\n", long, long, func(w *world10) { w.later(2 * time.Hour) }, changed},
		{"before a window's end", baseline + "expires: " + inHours(3) + "\n", long, long, func(w *world10) { w.later(2 * time.Hour) }, 0},
		{"our certificate's end", baseline, time.Hour, long, func(w *world10) { w.later(2 * time.Hour) }, expired},
		{"our certificate's end, renewed in time", baseline, time.Hour, long, func(w *world10) { w.rotate(svid("db", long)); w.later(2 * time.Hour) }, 0},
		{"the peer's certificate's end", baseline, long, time.Hour, func(w *world10) { w.later(2 * time.Hour) }, expired},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := &world10{now: time.Now(), table: new(table), beside: "---\nkind: Policy\nnamespace: /prod\nname: batch-calls-spool\nsubject: {app: batch}\nverb: allow\nobject: {app: spool}\n"}
			w.set(t, tc.policy+w.beside)
			w.me = w.parties.get(&identity.Workload{Key: identity.Key{UID: 1}}, svid("db", tc.own), w.now)
			other := w.parties.get(&identity.Workload{Key: identity.Key{UID: 2}}, svid("spool", long), w.now)
			web, batch := w.open(w.me, "web", tc.peer), w.open(other, "batch", long)
			tc.change(w)
			if web.cutReason() != tc.cut {
				t.Errorf("cut for %v, want %v", web.cutReason(), tc.cut)
			}
			if why := batch.cutReason(); why != 0 {
				t.Errorf("the one beside it was cut for %v", why)
			}
		})
	}
}

// world10 is a table, its parties and a clock.
type world10 struct {
	table   *table
	parties parties
	me      *party
	now     time.Time
	beside  string
}

func (w *world10) set(t *testing.T, yaml string) {
	t.Helper()
	docs, err := policydb.Parse("test.yaml", []byte(yaml))
	if err != nil {
		t.Fatal(err)
	}
	var rs []*symbolonv1.Resource
	for _, d := range docs {
		rs = append(rs, d.Resource)
	}
	w.table.setPolicy(must(policydb.Compile(rs, 1))(t), func() {}, w.now)
}

func (w *world10) rotate(c *identity.Credential) {
	w.table.changed(w.parties.update(w.me.key, c), w.now)
}

func (w *world10) later(d time.Duration) {
	w.now = w.now.Add(d)
	w.table.sweep(w.now)
}

// open is a connection of app with me, as a client of this host's without a tunnel:
// what counts is the certificate that me has now.
func (w *world10) open(me *party, app string, peer time.Duration) *live {
	from := policydb.Endpoint{Namespace: "/prod", Attributes: identity.NewAttributes(map[string][]string{"app": {app}})}
	l := &live{
		question: question{kind: fromTunnel, near: me, namespace: "/prod", attributes: from.Attributes.Hash(), port: 5432},
		judge: func(c *policydb.Compiled, now time.Time) (bool, time.Time) {
			d := c.Decide(policydb.Server, &policydb.Query{From: from, To: me.endpoint(c), Protocol: tcp, Port: 5432}, now)
			return d.Allow, d.Until
		},
		expires: me.expires, notAfter: w.now.Add(peer), cut: func() {},
	}
	w.table.add(l, w.now)
	return l
}
