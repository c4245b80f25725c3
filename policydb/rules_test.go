package policydb

import (
	"math/rand"
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// The rules are those of docs/policy.md, by number.

func policyYAML(ns, name, rest string) string {
	return "kind: Policy\nnamespace: " + ns + "\nname: " + name + "\n" + rest + "\n---\n"
}

const (
	encrypted     = symbolonv1.Protection_PROTECTION_ENCRYPTED
	authenticated = symbolonv1.Protection_PROTECTION_AUTHENTICATED
	unspecified   = symbolonv1.Protection_PROTECTION_UNSPECIFIED
)

func TestRule1EachSideIsJudgedByItsOwnChain(t *testing.T) {
	w := compile(t, tree+`
kind: Namespace
name: /acme/shop
mode: enforce
---
`+policyYAML("/acme/prod", "own", "subject: {app: web}\nverb: allow\nobject: {app: api}")+
		policyYAML("/acme", "common", "subject: {app: web}\nverb: allow\nobject: {app: db}\npropagate: true"))
	// A policy of one namespace opens that side only.
	w.want(Client, "app=web@/acme/prod", "app=api@/acme/shop", 443, "allow policy /acme/prod/own")
	w.want(Server, "app=web@/acme/prod", "app=api@/acme/shop", 443, "deny default")
	// One at a common ancestor opens both.
	w.want(Client, "app=web@/acme/prod", "app=db@/acme/shop", 443, "allow policy /acme/common")
	w.want(Server, "app=web@/acme/prod", "app=db@/acme/shop", 443, "allow policy /acme/common")
}

func TestRule2OnlyWhatPropagatesReachesDown(t *testing.T) {
	w := compile(t, tree+
		policyYAML("/acme", "stays", "subject: any\nverb: allow\nobject: {app: a}")+
		policyYAML("/acme", "goes", "subject: any\nverb: allow\nobject: {app: b}\npropagate: true")+
		policyYAML("/acme/prod", "below", "subject: any\nverb: allow\nobject: {app: c}\npropagate: true"))
	w.want(Server, "app=x", "app=a@/acme", 1, "allow policy /acme/stays")
	w.want(Server, "app=x", "app=a@/acme/prod", 1, "deny default")
	w.want(Server, "app=x", "app=b@/acme/prod", 1, "allow policy /acme/goes")
	w.want(Server, "app=x", "app=c@/acme", 1, "deny default") // never upwards
}

func TestRule2SelectorsPortsAndWhereAllMatch(t *testing.T) {
	w := compile(t, tree+
		policyYAML("/", "p", `subject: [{app: web, env: prod}, {tier: {prefix: ops-}}]
verb: allow
object: {app: [api, db]}
where: {same: [env], different: [cloud.zone]}
ports: [tcp/443, tcp/8000-8100]
propagate: true`))
	const to = "app=api,env=prod,cloud.zone=b"
	for _, c := range []struct {
		name, from, to string
		port           uint16
		allow          bool
	}{
		{"all", "app=web,env=prod,cloud.zone=a", to, 443, true},
		{"second alternative", "tier=ops-1,env=prod,cloud.zone=a", to, 443, true},
		{"list", "app=web,env=prod,cloud.zone=a", "app=db,env=prod,cloud.zone=b", 443, true},
		{"range first", "app=web,env=prod,cloud.zone=a", to, 8000, true},
		{"range last", "app=web,env=prod,cloud.zone=a", to, 8100, true},
		{"beside range", "app=web,env=prod,cloud.zone=a", to, 8101, false},
		{"half a term", "app=web,cloud.zone=a", to, 443, false},
		{"halves of two terms", "app=web,tier=dev,cloud.zone=a", to, 443, false},
		{"other object", "app=web,env=prod,cloud.zone=a", "app=cache,env=prod,cloud.zone=b", 443, false},
		{"same differs", "app=web,env=prod,cloud.zone=a", "app=api,env=dev,cloud.zone=b", 443, false},
		{"different is same", "app=web,env=prod,cloud.zone=b", to, 443, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if d := w.ask(Client, c.from, c.to, c.port); d.Allow != c.allow {
				t.Errorf("got %q", say(d))
			}
		})
	}
	if q := (&Query{From: endpoint("app=web,env=prod,cloud.zone=a"), To: endpoint(to), Protocol: "udp", Port: 443}); w.compiled.Decide(Client, q, noon).Allow {
		t.Error("a tcp port opened udp")
	}
}

func TestRule2ExpiryAndWindows(t *testing.T) {
	w := compile(t, tree+
		policyYAML("/", "expiring", "subject: any\nverb: allow\nobject: {app: a}\nexpires: 2026-07-15T13:00:00Z\npropagate: true")+
		policyYAML("/", "hours", "subject: any\nverb: allow\nobject: {app: b}\nwhen: {days: mon-fri, hours: \"08:00-12:30\", timezone: UTC}\npropagate: true"))
	d := w.want(Server, "app=x", "app=a", 1, "allow policy /expiring")
	if want := noon.Add(time.Hour); !d.Until.Equal(want) {
		t.Errorf("until %s, want %s", d.Until, want)
	}
	d = w.want(Server, "app=x", "app=b", 1, "allow policy /hours")
	if want := noon.Add(30 * time.Minute); !d.Until.Equal(want) {
		t.Errorf("until %s, want %s", d.Until, want)
	}
	w.now = noon.Add(time.Hour)
	w.want(Server, "app=x", "app=a", 1, "deny default")
	d = w.want(Server, "app=x", "app=b", 1, "deny default")
	if d.Until.IsZero() {
		t.Error("a decision that a window closed must end when it opens")
	}
}

func TestRule3ParentOverrules(t *testing.T) {
	w := compile(t, tree+
		policyYAML("/", "no-dev-to-prod", "subject: {env: dev}\nverb: deny\nobject: {env: prod}\npropagate: true")+
		policyYAML("/acme", "broad", "subject: {app: web}\nverb: allow\nobject: any\npropagate: true")+
		policyYAML("/acme/prod", "dev-please", "subject: {env: dev}\nverb: allow\nobject: {env: prod}")+
		policyYAML("/acme/prod", "narrow", "subject: {app: web}\nverb: deny\nobject: {app: db}")+
		policyYAML("/acme/prod", "cache", "subject: {app: job}\nverb: allow\nobject: {app: cache}"))
	w.want(Server, "env=dev", "env=prod", 1, "deny policy /no-dev-to-prod")
	// A broad allow at a parent cannot be narrowed below.
	w.want(Server, "app=web", "app=db", 1, "allow policy /acme/broad")
	// What the parents leave open is delegated.
	w.want(Server, "app=job", "app=cache", 1, "allow policy /acme/prod/cache")
}

func TestRule3DenyBeatsAllowWithinANamespace(t *testing.T) {
	w := compile(t, tree+
		policyYAML("/acme/prod", "a-allow", "subject: any\nverb: allow\nobject: {app: db}")+
		policyYAML("/acme/prod", "z-deny", "subject: {env: dev}\nverb: deny\nobject: any"))
	w.want(Server, "env=dev", "app=db", 1, "deny policy /acme/prod/z-deny")
	w.want(Server, "env=qa", "app=db", 1, "allow policy /acme/prod/a-allow")
}

func TestRule4FallbackThenDefault(t *testing.T) {
	w := compile(t, `
kind: Namespace
name: /
mode: enforce
default: deny
attributes: {app: {}}
---
kind: Namespace
name: /acme
mode: enforce
default: allow
---
kind: Namespace
name: /acme/prod
mode: enforce
default: inherit
---
`+policyYAML("/", "root-fallback", "subject: any\nverb: allow\nobject: {app: a}\nfallback: true\npropagate: true")+
		policyYAML("/acme", "mid-fallback", "subject: any\nverb: deny\nobject: {app: [a, b]}\nfallback: true\npropagate: true")+
		policyYAML("/acme/prod", "leaf-allow", "subject: any\nverb: allow\nobject: {app: b}\nfallback: true")+
		policyYAML("/acme/prod", "leaf-deny", "subject: {app: evil}\nverb: deny\nobject: {app: b}\nfallback: true")+
		policyYAML("/acme/prod", "decides", "subject: {app: boss}\nverb: allow\nobject: any"))
	// From leaf to root: the deepest fallback that matches.
	w.want(Server, "app=x", "app=a", 1, "deny fallback /acme/mid-fallback")
	w.want(Server, "app=x", "app=b", 1, "allow fallback /acme/prod/leaf-allow")
	w.want(Server, "app=evil", "app=b", 1, "deny fallback /acme/prod/leaf-deny")
	// A policy that is no fallback comes first, wherever it stands.
	w.want(Server, "app=boss", "app=a", 1, "allow policy /acme/prod/decides")
	// Nothing matched: the nearest default that is not inherit.
	w.want(Server, "app=x", "app=c", 1, "allow default")
	w.want(Server, "app=x", "app=c@/", 1, "deny default")
}

func TestRule4AnUnknownNamespaceDenies(t *testing.T) {
	w := compile(t, `
kind: Namespace
name: /
mode: enforce
default: allow
---
kind: Namespace
name: /acme/prod
mode: enforce
default: allow
`)
	w.want(Client, "app=x@/elsewhere", "app=y@/", 1, "deny no-policy")
	w.want(Client, "app=x@/acme/prod", "app=y@/", 1, "deny no-policy") // /acme is missing in between
	w.want(Client, "app=x!/some/external", "app=y@/", 1, "deny no-policy")
	w.want(Client, "app=x@", "app=y@/", 1, "deny no-policy")
	w.want(Client, "app=x@/", "app=y@/elsewhere", 1, "allow default")
	empty, err := Compile(nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	if d := empty.Decide(Server, &Query{To: Endpoint{Namespace: "/"}, Protocol: "tcp", Port: 1}, noon); d.Allow || d.Reason != symbolonv1.Reason_REASON_NO_POLICY {
		t.Errorf("no policies at all: %q", say(d))
	}
}

func TestRule5ObligationsAreTheUnion(t *testing.T) {
	w := compile(t, `
kind: Namespace
name: /
mode: enforce
default: allow
protection: authenticated
attributes: {app: {}}
---
kind: Namespace
name: /safe
mode: enforce
protection: encrypted
---
kind: Namespace
name: /safe/below
mode: enforce
---
`+policyYAML("/", "a-decides", "subject: any\nverb: allow\nobject: {app: [a, c]}\npropagate: true")+
		policyYAML("/", "obliges", "subject: {app: web}\nverb: encrypt\nobject: any\npropagate: true")+
		policyYAML("/", "records", "subject: {app: job}\nverb: log\nobject: any\npropagate: true")+
		policyYAML("/", "z-carries", "subject: any\nverb: allow\nobject: {app: c}\nwith: [encrypt, log]\npropagate: true"))
	for _, c := range []struct {
		from, to, want string
		protection     symbolonv1.Protection
		log            bool
	}{
		{"app=x@/", "app=a@/", "allow policy /a-decides", authenticated, false},
		{"app=web@/", "app=a@/", "allow policy /a-decides", encrypted, false}, // verb: encrypt
		{"app=web@/", "app=z@/", "allow default", encrypted, false},           // grants nothing, obliges
		{"app=job@/", "app=a@/", "allow policy /a-decides", authenticated, true},
		{"app=x@/", "app=c@/", "allow policy /a-decides", encrypted, true}, // not the one that decides
		{"app=x@/", "app=a@/safe", "allow policy /a-decides", encrypted, false},
		{"app=x@/", "app=a@/safe/below", "allow policy /a-decides", encrypted, false}, // inherited
	} {
		d := w.want(Server, c.from, c.to, 1, c.want)
		if d.Protection != c.protection || d.Log != c.log {
			t.Errorf("%s to %s: %s log=%t, want %s log=%t", c.from, c.to, d.Protection, d.Log, c.protection, c.log)
		}
	}
}

func TestRule5AnExternalCannotBeEncryptedTo(t *testing.T) {
	w := compile(t, tree+
		policyYAML("/", "office", "subject: any\nverb: allow\nobject: {ext: [office, bank]}\npropagate: true")+
		policyYAML("/", "bank-needs", "subject: any\nverb: encrypt\nobject: {ext: bank}\npropagate: true")+
		policyYAML("/", "from-office", "subject: {ext: office}\nverb: allow\nobject: any\nwith: [encrypt]\npropagate: true"))
	// The namespace's protection is where it starts, not an obligation.
	d := w.want(Client, "app=web", "ext=office!/office", 443, "allow policy /office")
	if d.Protection != unspecified {
		t.Errorf("protection to an External: %s", d.Protection)
	}
	w.want(Client, "app=web", "ext=bank!/bank", 443, "deny encryption-unavailable /bank-needs")
	w.want(Server, "ext=office!/office", "app=web", 443, "deny encryption-unavailable /from-office")
	// What is denied anyway keeps its own reason.
	w.want(Client, "app=web", "ext=other!/other", 443, "deny default")
}

func TestRule6MissingAndMultiValuedAttributes(t *testing.T) {
	for _, c := range []struct {
		clause, attributes string
		matches            bool
	}{
		{"app: a", "app=a", true},
		{"app: a", "", false},
		{"app: a", "app=b,app=a", true}, // one of several is enough
		{"app: [a, b]", "app=b", true},
		{"app: {not: [a]}", "", false}, // not needs the key
		{"app: {not: [a]}", "app=b", true},
		{"app: {not: [a]}", "app=b,app=a", false}, // and none of its values
		{"app: {not: [a, b]}", "app=c,app=d", true},
		{"app: {prefix: we}", "app=web", true},
		{"app: {prefix: we}", "app=owe", false},
		{"app: {prefix: we}", "", false},
		{"app: {prefix: we}", "app=api,app=web", true},
		{"app: {exists: true}", "app=", true}, // an empty value is a value
		{"app: {exists: true}", "", false},
		{"app: {exists: false}", "", true},
		{"app: {exists: false}", "app=a", false},
		{`app: ""`, "app=", true},
		{`app: ""`, "", false},
	} {
		w := compile(t, tree+policyYAML("/acme/prod", "p", "subject: {"+c.clause+"}\nverb: allow\nobject: any"))
		if d := w.ask(Client, c.attributes+"@/acme/prod", "app=x", 1); d.Allow != c.matches {
			t.Errorf("{%s} on %q: %t, want %t", c.clause, c.attributes, d.Allow, c.matches)
		}
	}
}

func TestRule6WhereNeedsBothSides(t *testing.T) {
	w := compile(t, tree+
		policyYAML("/acme/prod", "same", "subject: {app: s}\nverb: allow\nobject: any\nwhere: {same: [zone]}")+
		policyYAML("/acme/prod", "different", "subject: {app: d}\nverb: allow\nobject: any\nwhere: {different: [zone]}"))
	for _, c := range []struct {
		from, to string
		allow    bool
	}{
		{"app=s,zone=1", "zone=1", true},
		{"app=s,zone=1", "zone=2", false},
		{"app=s,zone=1,zone=2", "zone=2,zone=3", true},
		{"app=s", "tier=x", false}, // both missing are not the same
		{"app=s,zone=1", "tier=x", false},
		{"app=d,zone=1", "zone=2", true},
		{"app=d,zone=1", "zone=1", false},
		{"app=d,zone=1,zone=2", "zone=2,zone=3", false}, // one in common
		{"app=d", "zone=1", false},
		{"app=d,zone=1", "tier=x", false},
	} {
		if d := w.ask(Client, c.from, c.to, 1); d.Allow != c.allow {
			t.Errorf("%s to %s: %q", c.from, c.to, say(d))
		}
	}
}

func TestRule7ObserveNeverChangesAVerdict(t *testing.T) {
	w := compile(t, tree+
		policyYAML("/acme/prod", "allows", "subject: {app: web}\nverb: allow\nobject: {app: [api, db]}")+
		policyYAML("/acme/prod", "b-try-deny", "subject: {app: web}\nverb: deny\nobject: {app: db}\nmode: observe")+
		policyYAML("/acme/prod", "c-try-allow", "subject: {app: job}\nverb: allow\nobject: {app: db}\nmode: observe")+
		policyYAML("/acme/prod", "a-try-same", "subject: {app: web}\nverb: allow\nobject: {app: api}\nmode: observe\nwith: [encrypt, log]"))
	w.want(Client, "app=web", "app=db", 1, "allow policy /acme/prod/allows would deny /acme/prod/b-try-deny")
	w.want(Client, "app=job", "app=db", 1, "deny default would allow /acme/prod/c-try-allow")
	d := w.want(Client, "app=web", "app=api", 1, "allow policy /acme/prod/allows") // the same verdict: nothing to tell
	if d.Log {
		t.Error("an observed policy obliged")
	}
	// A parent's enforced verdict stands above an observed one below.
	w = compile(t, tree+
		policyYAML("/", "stop", "subject: any\nverb: deny\nobject: any\npropagate: true")+
		policyYAML("/acme/prod", "try", "subject: any\nverb: allow\nobject: any\nmode: observe"))
	w.want(Client, "app=web", "app=db", 1, "deny policy /stop")
	// An observed obligation would close the way to an External.
	w = compile(t, tree+
		policyYAML("/", "open", "subject: any\nverb: allow\nobject: any\npropagate: true")+
		policyYAML("/", "try", "subject: any\nverb: encrypt\nobject: any\nmode: observe\npropagate: true"))
	w.want(Client, "app=web", "ext=x!/x", 1, "allow policy /open would deny /try")
}

func TestRule8WindowsInTheirZoneAndUntil(t *testing.T) {
	w := compile(t, tree+
		policyYAML("/acme/prod", "office", "subject: any\nverb: allow\nobject: any\nwhen: {days: mon-fri, hours: \"08:00-12:00\", timezone: Europe/Oslo}"))
	// July: Oslo is two hours ahead of UTC.
	for _, c := range []struct {
		at    string
		allow bool
	}{
		{"2026-07-15T05:59:59Z", false}, {"2026-07-15T06:00:00Z", true}, {"2026-07-15T09:59:59Z", true},
		{"2026-07-15T10:00:00Z", false}, {"2026-07-18T07:00:00Z", false}, // a Saturday
		{"2026-01-15T06:30:00Z", false}, {"2026-01-15T07:00:00Z", true}, // January: one hour
	} {
		now, err := time.Parse(time.RFC3339, c.at)
		if err != nil {
			t.Fatal(err)
		}
		w.now = now
		d := w.ask(Client, "app=a", "app=b", 1)
		if d.Allow != c.allow {
			t.Errorf("at %s: %q", c.at, say(d))
		}
		if !d.Until.After(now) || d.Until.After(now.Add(24*time.Hour)) {
			t.Errorf("at %s: until %s", c.at, d.Until)
		}
	}
	// Where no window is in play, nothing ends.
	if d := compile(t, tree).ask(Client, "app=a", "app=b", 1); !d.Until.IsZero() {
		t.Errorf("until %s", d.Until)
	}
}

func TestRule9OrderNeverMatters(t *testing.T) {
	w := compile(t, tree+
		policyYAML("/acme/prod", "b", "subject: any\nverb: allow\nobject: {app: [x, z]}")+
		policyYAML("/acme/prod", "a", "subject: any\nverb: allow\nobject: {app: x}")+
		policyYAML("/acme/prod", "d", "subject: {app: bad}\nverb: deny\nobject: any")+
		policyYAML("/acme/prod", "c", "subject: {app: bad}\nverb: deny\nobject: {app: x}")+
		policyYAML("/acme", "e", "subject: any\nverb: encrypt\nobject: {app: x}\npropagate: true"))
	rng := rand.New(rand.NewSource(1))
	for range 50 {
		rng.Shuffle(len(w.resources), func(i, j int) { w.resources[i], w.resources[j] = w.resources[j], w.resources[i] })
		c, err := Compile(w.resources, 1)
		if err != nil {
			t.Fatal(err)
		}
		w.compiled = c
		w.want(Client, "app=web", "app=x", 1, "allow policy /acme/prod/a")
		w.want(Client, "app=web", "app=z", 1, "allow policy /acme/prod/b")
		w.want(Client, "app=bad", "app=x", 1, "deny policy /acme/prod/c")
	}
}
