package spire

import (
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"github.com/symbolon/symbolon/identity"
)

const patience = 30 * time.Second

var controllerTD = spiffeid.RequireTrustDomainFromString("controller.example")

// sourceOf is a Source at a.
func sourceOf(t *testing.T, a *testAgent, rule Rule) *Source {
	t.Helper()
	needRoot(t)
	s, err := New(Options{Controller: controllerTD, AdminSocket: a.socket, Rule: rule})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// watched is the stream of one workload.
func watched(t *testing.T, s *Source, w *identity.Workload) <-chan identity.Update {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	out := s.Watch(ctx, w)
	t.Cleanup(func() {
		cancel()
		for range out { // until it is closed
		}
	})
	return out
}

// until reads updates until one is as wanted.
func until(t *testing.T, updates <-chan identity.Update, what string, want func(identity.Update) bool) identity.Update {
	t.Helper()
	deadline := time.After(patience)
	var last identity.Update
	for {
		select {
		case u, ok := <-updates:
			if !ok {
				t.Fatalf("%s: the stream has ended", what)
			}
			if want(u) {
				return u
			}
			last = u
		case <-deadline:
			t.Fatalf("never %s; last %v, %v", what, last.Credential, last.Err)
		}
	}
}

func is(id string) func(identity.Update) bool {
	return func(u identity.Update) bool {
		return u.Err == nil && u.Credential != nil && u.Credential.SVID.ID.String() == id
	}
}

func fails(target error, words ...string) func(identity.Update) bool {
	return func(u identity.Update) bool {
		if !errors.Is(u.Err, target) || u.Credential != nil {
			return false
		}
		for _, w := range words {
			if !strings.Contains(u.Err.Error(), w) {
				return false
			}
		}
		return true
	}
}

func domains(c *identity.Credential) string {
	var out []string
	for _, b := range c.Bundles.Bundles() {
		out = append(out, b.TrustDomain().Name())
	}
	return strings.Join(out, " ")
}

// A workload gets its own SVID, follows its renewal, and loses it with its entry.
func TestSVIDOfAProcess(t *testing.T) {
	site := newRoot(t, "site.example")
	a := newTestAgent(t, site)
	p, other := sleeper(t), sleeper(t)
	a.sends[p.pid()] = one(site.svid("/prod/web", ""))
	a.sends[other.pid()] = one(site.svid("/prod/db", ""))
	s := sourceOf(t, a, Rule{})
	web, db := watched(t, s, p.w), watched(t, s, other.w)
	first := until(t, web, "web has an SVID", is("spiffe://site.example/prod/web"))
	until(t, db, "db has its own", is("spiffe://site.example/prod/db"))

	a.change(func() { a.sends[p.pid()] = one(site.svid("/prod/web", "")) })
	second := until(t, web, "it is renewed", is("spiffe://site.example/prod/web"))
	if first.Credential == second.Credential || first.Credential.SVID.Chain[0].Equal(second.Credential.SVID.Chain[0]) {
		t.Error("the same certificate again")
	}
	a.change(func() { a.sends[p.pid()] = nil })
	until(t, web, "its entry is gone", fails(identity.ErrWithdrawn, "registration entry"))
	a.change(func() { a.sends[p.pid()] = one(site.svid("/prod/web", "")) })
	until(t, web, "it is back", is("spiffe://site.example/prod/web"))
	if n := a.count(p.pid()); n != 1 {
		t.Errorf("%d subscriptions", n)
	}
}

// What was attested is one process: its end is the end of its SVID, whoever has its
// number next.
func TestExit(t *testing.T) {
	site := newRoot(t, "site.example")
	a := newTestAgent(t, site)
	p := sleeper(t)
	a.sends[p.pid()] = one(site.svid("/prod/web", ""))
	s := sourceOf(t, a, Rule{})
	web := watched(t, s, p.w)
	until(t, web, "it has an SVID", is("spiffe://site.example/prod/web"))
	p.kill()
	until(t, web, "its end is told", fails(identity.ErrEnded))
	// The agent goes on sending keys for a process that has ended (SPIRE does).
	a.change(func() { a.sends[p.pid()] = one(site.svid("/prod/web", "")) })
	select {
	case u := <-web:
		t.Errorf("after its end: %v %v", u.Credential, u.Err)
	case <-time.After(200 * time.Millisecond):
	}
	until(t, watched(t, s, p.w), "a dead process is refused", fails(identity.ErrEnded))
	if n := a.count(p.pid()); n != 1 {
		t.Errorf("the agent was asked %d times", n)
	}
}

// A number that another process has by now is not attested.
func TestReusedNumber(t *testing.T) {
	site := newRoot(t, "site.example")
	a := newTestAgent(t, site)
	p := sleeper(t)
	a.sends[p.pid()] = one(site.svid("/prod/web", ""))
	s := sourceOf(t, a, Rule{})
	before := *p.w
	before.Key.Process.Start -= 100
	until(t, watched(t, s, &before), "another start", fails(identity.ErrEnded))
	before = *p.w
	before.Key.Exe.Ino++
	until(t, watched(t, s, &before), "another program", fails(identity.ErrEnded))
	if n := a.count(p.pid()); n != 0 {
		t.Errorf("the agent was asked %d times", n)
	}
}

// The attack that attestation by number invites: connect, run a good program for the
// moment in which the agent looks, and come back.
func TestExecWhileAttested(t *testing.T) {
	site := newRoot(t, "site.example")
	a := newTestAgent(t, site)
	// python3 becomes sh, and python3 again.
	p := started(t, "python3", "-c", `import os,sys
print('ready', flush=True)
sys.stdin.readline()
os.execv('/bin/sh', ['sh', '-c', 'read x; exec "$0" -c "import sys; sys.stdin.readline()"', sys.executable])`)
	evil := exe(t, p.pid())
	seen := make(chan string, 16)
	a.attest = func(pid int) *svids {
		if a.count(pid) > 1 {
			return one(site.svid("/prod/evil", ""))
		}
		// The agent looks in the worst moment.
		p.goOn(t)
		await(t, "it runs the good program", func() bool { return exe(t, pid) != evil })
		seen <- exe(t, pid)
		p.goOn(t)
		await(t, "it is back", func() bool { return exe(t, pid) == evil })
		return one(site.svid("/prod/good", ""))
	}
	s := sourceOf(t, a, Rule{})
	updates := watched(t, s, p.w)
	// Attested anew, as what it is.
	until(t, updates, "it is attested as what it is", func(u identity.Update) bool {
		if u.Credential != nil && u.Credential.SVID.ID.Path() == "/prod/good" {
			t.Fatal("it has the good program's SVID")
		}
		return is("spiffe://site.example/prod/evil")(u)
	})
	if len(seen) == 0 {
		t.Error("the attack did not take place")
	}
}

// A process that executes another program is another workload. The same program anew is
// attested anew.
func TestExec(t *testing.T) {
	site := newRoot(t, "site.example")
	a := newTestAgent(t, site)
	p := started(t, "sh", "-c", `echo ready; read x; exec sh -c 'read x; exec sleep 1000'`)
	a.sends[p.pid()] = one(site.svid("/prod/web", ""))
	s := sourceOf(t, a, Rule{})
	web := watched(t, s, p.w)
	until(t, web, "it has an SVID", is("spiffe://site.example/prod/web"))
	a.change(func() { a.sends[p.pid()] = one(site.svid("/prod/again", "")) })
	until(t, web, "another", is("spiffe://site.example/prod/again"))
	p.goOn(t)
	until(t, web, "it is withdrawn", fails(identity.ErrWithdrawn, "anew"))
	until(t, web, "it is attested again", is("spiffe://site.example/prod/again"))
	if n := a.count(p.pid()); n != 2 {
		t.Errorf("%d subscriptions", n)
	}
	p.goOn(t)
	until(t, web, "it has ended as what it was", fails(identity.ErrEnded, "another program"))
}

// A process that executes its program anew while the agent is away has nothing until it is
// attested anew; also when bundles change, which has everybody judged again.
func TestExecWhileTheAgentIsAway(t *testing.T) {
	site, ours := newRoot(t, "site.example"), newRoot(t, "controller.example")
	a := newTestAgent(t, site)
	p := started(t, "sh", "-c", `echo ready; read x; exec sh -c 'read x'`)
	a.sends[p.pid()] = one(site.svid("/prod/web", ""))
	s := sourceOf(t, a, Rule{})
	web := watched(t, s, p.w)
	until(t, web, "it has an SVID", is("spiffe://site.example/prod/web"))
	a.stop()
	until(t, web, "the agent is away", func(u identity.Update) bool { return u.Credential != nil && u.Err != nil })
	p.goOn(t)
	until(t, web, "it is withdrawn", fails(identity.ErrWithdrawn, "anew"))
	a.change(func() { a.sends[p.pid()] = one(site.svid("/prod/other", "")) })
	td := spiffeid.RequireTrustDomainFromString("controller.example")
	for range 20 {
		s.SetBundle(td, []*x509.Certificate{ours.cert})
		time.Sleep(50 * time.Millisecond)
		s.SetBundle(td, nil)
		time.Sleep(50 * time.Millisecond)
		select {
		case u := <-web:
			if u.Credential != nil {
				t.Fatalf("it has the SVID of before: %s", u.Credential.SVID.ID)
			}
		default:
		}
	}
	a.start()
	until(t, web, "it is attested as what it is", func(u identity.Update) bool {
		if u.Credential != nil && u.Credential.SVID.ID.Path() == "/prod/web" {
			t.Fatal("it has the SVID of before")
		}
		return is("spiffe://site.example/prod/other")(u)
	})
}

// Two processes of one program and one user, which differ by what only the agent knows.
func TestEqualProgramsAreToldApart(t *testing.T) {
	site := newRoot(t, "site.example")
	a := newTestAgent(t, site)
	p, other := sleeper(t), sleeper(t)
	a.sends[p.pid()] = one(site.svid("/prod/web", ""))
	s := sourceOf(t, a, Rule{})
	m := identity.NewManager(s)
	t.Cleanup(m.Close)
	if p.w.Key.Program() != other.w.Key.Program() {
		t.Fatal("two programs")
	}
	c, err := m.Get(t.Context(), p.w)
	if err != nil || c.SVID.ID.Path() != "/prod/web" {
		t.Fatalf("%v, %v", c, err)
	}
	if c, err := m.Get(t.Context(), other.w); !errors.Is(err, identity.ErrNoCredential) {
		t.Errorf("one without an entry got %v, %v", c, err)
	}
	p.kill()
	await(t, "the Manager has let go of it", func() bool {
		for _, x := range m.Snapshot() {
			if x.Workload == p.w {
				return false
			}
		}
		return true
	})
	if c, err := m.Get(t.Context(), p.w); !errors.Is(err, identity.ErrNoCredential) || !errors.Is(err, identity.ErrEnded) {
		t.Errorf("a dead process got %v, %v", c, err)
	}
}

// Of several SVIDs a rule chooses, never their order.
func TestSeveralSVIDs(t *testing.T) {
	site := newRoot(t, "site.example")
	offered := []struct{ path, hint string }{{"/prod/web", "internal"}, {"/production/web", "external"}, {"/dev/web", ""}}
	for name, tc := range map[string]struct {
		rule Rule
		want string // path
		err  []string
	}{
		"no rule":             {Rule{}, "", []string{"spiffe://site.example/prod/web", "spiffe://site.example/dev/web", "identity.spire.hint", "identity.spire.path_prefix"}},
		"hint":                {Rule{Hint: "external"}, "/production/web", nil},
		"path":                {Rule{PathPrefix: "/prod"}, "/prod/web", nil},
		"path with a slash":   {Rule{PathPrefix: "/prod/"}, "/prod/web", nil},
		"both":                {Rule{Hint: "internal", PathPrefix: "/prod"}, "/prod/web", nil},
		"none fits":           {Rule{Hint: "internal", PathPrefix: "/dev"}, "", []string{`the hint "internal"`, "/dev"}},
		"more than one fits":  {Rule{PathPrefix: "/"}, "", []string{"narrower"}},
		"the whole path fits": {Rule{PathPrefix: "/dev/web"}, "/dev/web", nil},
	} {
		t.Run(name, func(t *testing.T) {
			a := newTestAgent(t, site)
			p := sleeper(t)
			m := &svids{}
			for _, o := range offered {
				m.X509Svids = append(m.X509Svids, site.svid(o.path, o.hint))
			}
			a.sends[p.pid()] = m
			updates := watched(t, sourceOf(t, a, tc.rule), p.w)
			if tc.err != nil {
				until(t, updates, "it is refused", fails(identity.ErrWithdrawn, tc.err...))
				return
			}
			until(t, updates, tc.want, is("spiffe://site.example"+tc.want))
		})
	}
}

// A workload believes its own trust domain, those it federates with, and the
// controller's; not all that the agent has.
func TestBundles(t *testing.T) {
	site, partner, stranger, ours := newRoot(t, "site.example"), newRoot(t, "partner.example"), newRoot(t, "stranger.example"), newRoot(t, controllerTD.Name())
	a := newTestAgent(t, site, partner, stranger)
	p := sleeper(t)
	a.sends[p.pid()] = &svids{X509Svids: one(site.svid("/web", "")).X509Svids, FederatesWith: []string{"spiffe://partner.example"}}
	s := sourceOf(t, a, Rule{})
	s.SetBundle(controllerTD, []*x509.Certificate{ours.cert})
	updates := watched(t, s, p.w)
	u := until(t, updates, "it has an SVID", is("spiffe://site.example/web"))
	if got, want := domains(u.Credential), "controller.example partner.example site.example"; got != want {
		t.Errorf("believes %s, want %s", got, want)
	}
	s.SetBundle(controllerTD, nil)
	u = until(t, updates, "the controller's goes", is("spiffe://site.example/web"))
	if got, want := domains(u.Credential), "partner.example site.example"; got != want {
		t.Errorf("believes %s, want %s", got, want)
	}
	a.change(func() { a.sends[p.pid()] = one(a.sends[p.pid()].X509Svids...) })
	u = until(t, updates, "federation ends", is("spiffe://site.example/web"))
	if got, want := domains(u.Credential), "site.example"; got != want {
		t.Errorf("believes %s, want %s", got, want)
	}
	// Its own roots are replaced: what they signed is nothing any more.
	next := newRoot(t, "site.example")
	a.change(func() { a.bundles["spiffe://site.example"] = next.cert.Raw })
	until(t, updates, "its roots are gone", fails(identity.ErrWithdrawn))
	a.change(func() { a.sends[p.pid()] = one(next.svid("/web", "")) })
	until(t, updates, "an SVID of the new root", is("spiffe://site.example/web"))
}

// The controller's CA must not name workloads of the agent's trust domain.
func TestOneTrustDomainOfTwo(t *testing.T) {
	site, ours := newRoot(t, controllerTD.Name()), newRoot(t, controllerTD.Name())
	a := newTestAgent(t, site)
	p := sleeper(t)
	a.sends[p.pid()] = one(site.svid("/web", ""))
	s := sourceOf(t, a, Rule{})
	td := controllerTD
	s.SetBundle(td, []*x509.Certificate{ours.cert})
	updates := watched(t, s, p.w)
	until(t, updates, "it is refused", fails(identity.ErrWithdrawn, "controller.example", "another trust_domain"))
	// The same roots, or a CA below them, are one authority.
	s.SetBundle(td, []*x509.Certificate{site.cert})
	u := until(t, updates, "one root for both", is("spiffe://controller.example/web"))
	if b, ok := u.Credential.Bundles.Get(td); !ok || len(b.X509Authorities()) != 1 {
		t.Error("more than the agent's root")
	}
	// While SPIRE's roots are rotated, the controller below it may hear of the next one first:
	// nobody is cut for that, and it is not believed.
	s.SetBundle(td, []*x509.Certificate{site.cert, ours.cert})
	late := sleeper(t)
	a.change(func() { a.sends[late.pid()] = one(site.svid("/late", "")) })
	u = until(t, watched(t, s, late.w), "the next root is known to one of them", is("spiffe://controller.example/late"))
	if b, ok := u.Credential.Bundles.Get(td); !ok || b.HasX509Authority(ours.cert) {
		t.Error("it believes a root that the agent does not know")
	}
	s.SetBundle(td, []*x509.Certificate{ours.cert})
	until(t, updates, "two authorities again", fails(identity.ErrWithdrawn, "another trust_domain"))
}

// Of its own trust domain, if another one tells us of it, the agent knows best: what the
// controller has fetched may be older.
func TestOwnDomainFromElsewhere(t *testing.T) {
	site, old := newRoot(t, "site.example"), newRoot(t, "site.example")
	a := newTestAgent(t, site)
	p := sleeper(t)
	a.sends[p.pid()] = one(site.svid("/web", ""))
	s := sourceOf(t, a, Rule{})
	td := spiffeid.RequireTrustDomainFromString("site.example")
	s.SetBundle(td, []*x509.Certificate{old.cert})
	u := until(t, watched(t, s, p.w), "it has an SVID", is("spiffe://site.example/web"))
	if b, ok := u.Credential.Bundles.Get(td); !ok || !b.HasX509Authority(site.cert) || b.HasX509Authority(old.cert) {
		t.Error("it believes roots that are not the agent's")
	}
}

// That the agent says nothing takes nothing away, and says why.
func TestAgentAway(t *testing.T) {
	site := newRoot(t, "site.example")
	a := newTestAgent(t, site)
	p, late := sleeper(t), sleeper(t)
	a.sends[p.pid()] = one(site.svid("/web", ""))
	a.sends[late.pid()] = one(site.svid("/late", ""))
	s := sourceOf(t, a, Rule{})
	updates := watched(t, s, p.w)
	until(t, updates, "it has an SVID", is("spiffe://site.example/web"))
	beside := func(words ...string) func(identity.Update) bool {
		return func(u identity.Update) bool {
			return u.Credential != nil && u.Err != nil && !errors.Is(u.Err, identity.ErrWithdrawn) && strings.Contains(u.Err.Error(), strings.Join(words, " "))
		}
	}
	await(t, "the status says that it answers", func() bool { return s.Status().Error == "" })
	answers := s.Status().Since
	a.stop()
	until(t, updates, "the agent is away", beside("cannot be reached at "+a.socket))
	waiting := watched(t, s, late.w)
	until(t, waiting, "another one has none", fails(identity.ErrWithdrawn, "cannot be reached", "admin_socket_path"))
	await(t, "the status says so", func() bool { return strings.Contains(s.Status().Error, "cannot be reached") })
	if away := s.Status().Since; answers.IsZero() || !away.After(answers) {
		t.Errorf("it answers since %v, and is away since %v", answers, away)
	}
	a.start()
	until(t, updates, "the agent is back", is("spiffe://site.example/web"))
	until(t, waiting, "the other has its own", is("spiffe://site.example/late"))

	for code, words := range map[codes.Code]string{
		codes.PermissionDenied: "authorized_delegates",
		codes.Unimplemented:    "SPIRE 1.10.2",
		codes.Internal:         "Internal",
	} {
		a.change(func() { a.refuse = code })
		until(t, updates, words, beside(words))
		a.change(func() { a.refuse = codes.OK })
		until(t, updates, "it answers again", is("spiffe://site.example/web"))
	}
	await(t, "the status says that it answers", func() bool {
		got := s.Status()
		return got.Error == "" && len(got.TrustDomains) == 1
	})
}

// An answer that is not usable takes away what there was.
func TestBadAnswers(t *testing.T) {
	site, partner := newRoot(t, "site.example"), newRoot(t, "partner.example")
	good := site.svid("/web", "")
	for name, tc := range map[string]struct {
		bad   *svids
		words string
	}{
		"another one's key":     {func() *svids { x := site.svid("/web", ""); x.X509SvidKey = good.X509SvidKey; return one(x) }(), "cannot be read"},
		"no certificate":        {func() *svids { x := site.svid("/web", ""); x.X509Svid.CertChain = nil; return one(x) }(), "cannot be read"},
		"another name inside":   {func() *svids { x := site.svid("/web", ""); x.X509Svid.Id.Path = "/db"; return one(x) }(), "the agent says"},
		"a host's name":         {one(site.svid("/symbolon/host/h1", "")), "not a workload"},
		"no workload's name":    {one(site.svid("", "")), ""},
		"a domain without root": {one(partner.svid("/web", "")), "no bundle"},
	} {
		t.Run(name, func(t *testing.T) {
			a := newTestAgent(t, site)
			p := sleeper(t)
			a.sends[p.pid()] = one(good)
			updates := watched(t, sourceOf(t, a, Rule{}), p.w)
			until(t, updates, "it has an SVID", is("spiffe://site.example/web"))
			a.change(func() { a.sends[p.pid()] = tc.bad })
			until(t, updates, tc.words, func(u identity.Update) bool {
				return u.Err != nil && strings.Contains(u.Err.Error(), tc.words)
			})
		})
	}
}

// After a restart a process begins with the SVID of before, if it is the same process.
func TestRestored(t *testing.T) {
	site, ours := newRoot(t, "site.example"), newRoot(t, controllerTD.Name())
	a := newTestAgent(t, site)
	p, dead := sleeper(t), sleeper(t)
	a.sends[p.pid()] = one(site.svid("/web", ""))
	a.sends[dead.pid()] = one(site.svid("/dead", ""))
	before := sourceOf(t, a, Rule{})
	m := identity.NewManager(before)
	defer m.Close()
	for _, x := range []*process{p, dead} {
		if _, err := m.Get(t.Context(), x.w); err != nil {
			t.Fatal(err)
		}
	}
	b, err := identity.MarshalKept(m.Keep())
	if err != nil {
		t.Fatal(err)
	}
	kept, err := identity.UnmarshalKept(b, time.Now())
	if err != nil || len(kept) != 2 {
		t.Fatalf("%d kept, %v", len(kept), err)
	}
	a.stop()
	dead.kill()

	after := sourceOf(t, a, Rule{})
	after.SetBundle(controllerTD, []*x509.Certificate{ours.cert})
	after.Restore(kept)
	updates := watched(t, after, p.w)
	u := until(t, updates, "it begins with its own", is("spiffe://site.example/web"))
	if got := domains(u.Credential); got != "controller.example site.example" {
		t.Errorf("believes %s", got)
	}
	until(t, watched(t, after, dead.w), "the dead one has none", fails(identity.ErrEnded))
	if n := len(after.Restored()); n != 1 { // whose process is never asked about again
		t.Errorf("%d wait", n)
	}
	a.start()
	a.change(func() { a.sends[p.pid()] = one(site.svid("/renamed", "")) })
	until(t, updates, "the agent has its say", is("spiffe://site.example/renamed"))
}

// Reissue has everything attested anew, and takes nothing away meanwhile.
func TestReissue(t *testing.T) {
	site := newRoot(t, "site.example")
	a := newTestAgent(t, site)
	p := sleeper(t)
	a.sends[p.pid()] = one(site.svid("/web", ""))
	s := sourceOf(t, a, Rule{})
	updates := watched(t, s, p.w)
	until(t, updates, "it has an SVID", is("spiffe://site.example/web"))
	s.Reissue()
	await(t, "it is attested again", func() bool { return a.count(p.pid()) == 2 })
	select {
	case u := <-updates:
		t.Errorf("the same again is news: %v, %v", u.Credential, u.Err)
	case <-time.After(200 * time.Millisecond):
	}
}

func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Error("never: " + what)
			return
		}
	}
}
