package policydb

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

const named = tree + `
kind: External
namespace: /
name: internet
labels: {ext: internet}
addresses: {cidrs: [0.0.0.0/0, "::/0"]}
---
kind: External
namespace: /acme
name: cards
labels: {ext: cards}
addresses: {fqdns: ["*.pay.example.com", pay.example.com], ports: [tcp/443]}
---
kind: External
namespace: /acme
name: cards-eu
labels: {ext: cards-eu}
addresses: {fqdns: ["*.eu.pay.example.com", api.pay.example.com], ports: [tcp/443]}
---
kind: External
namespace: /acme/prod
name: mine
labels: {ext: mine}
addresses: {fqdns: ["*.pay.example.com"]}
---
kind: External
namespace: /acme
name: one
labels: {ext: one}
addresses: {cidrs: [203.0.113.1/32]}
---
kind: Service
namespace: /acme
name: lb
addresses: {cidrs: [198.51.100.0/24], fqdns: [api.internal]}
---
`

func TestANameIsAnExternalOfTheWholeAddress(t *testing.T) {
	c := compile(t, named).compiled
	for _, x := range []struct {
		addr, names string
		port        uint16
		want        string
	}{
		{"203.0.113.9", "", 443, "/internet"},
		{"203.0.113.9", "www.example.com", 443, "/internet"},
		{"203.0.113.9", "pay.example.com", 443, "/acme/cards"},
		{"2001:db8::9", "pay.example.com", 443, "/acme/cards"},
		{"203.0.113.9", "pay.example.com", 80, "/internet"}, // another port
		{"203.0.113.9", "x.pay.example.com", 443, "/acme/cards"},
		{"203.0.113.9", "x.pay.example.com", 80, "/acme/prod/mine"},
		{"203.0.113.9", "a.b.pay.example.com", 443, "/acme/cards"},
		{"203.0.113.9", "xpay.example.com", 443, "/internet"}, // no label's end
		{"203.0.113.9", "pay.example.com.evil.org", 443, "/internet"},
		{"203.0.113.9", "x.eu.pay.example.com", 443, "/acme/cards-eu"}, // the longer wildcard
		{"203.0.113.9", "api.pay.example.com", 443, "/acme/cards-eu"},  // a whole name before any
		{"203.0.113.9", "x.eu.pay.example.com pay.example.com", 443, "/acme/cards"},
		{"203.0.113.1", "pay.example.com", 443, "/acme/one"},                     // a network of the same length first
		{"203.0.113.9", "api.internal", 443, "service /acme/lb"},                 // a Service by name
		{"203.0.113.9", "api.internal pay.example.com", 443, "service /acme/lb"}, // before an External by name
		{"203.0.113.1", "api.internal", 443, "/acme/one"},
		{"198.51.100.7", "pay.example.com", 443, "service /acme/lb"}, // nobody is talked out of a tunnel by DNS
	} {
		m, service := c.Destination("/acme/prod", netip.MustParseAddr(x.addr), "tcp", x.port, strings.Fields(x.names)...)
		got := ""
		if service != "" {
			got = "service " + service
		} else if m != nil {
			got = m.Ref
		}
		if got != x.want {
			t.Errorf("%s %q/%d: %s, want %s", x.addr, x.names, x.port, got, x.want)
		}
	}
	// A client is never anybody by a name.
	if m, _ := c.Source("/acme/prod", netip.MustParseAddr("203.0.113.9")); m == nil || m.Ref != "/internet" {
		t.Errorf("source: %+v", m)
	}
	// An address that two names share is both, in whatever order they come.
	for _, names := range [][]string{{"pay.example.com", "api.pay.example.com"}, {"api.pay.example.com", "pay.example.com"}} {
		m, _ := c.Destination("/acme/prod", netip.MustParseAddr("203.0.113.9"), "tcp", 443, names...)
		if m == nil || m.Ref != "/acme/cards" || m.Labels.String() != "ext=cards ext=cards-eu" {
			t.Errorf("%v: %+v", names, m)
		}
	}
	if got := fmt.Sprint(c.Names()); got != "[api.internal api.pay.example.com pay.example.com]" {
		t.Errorf("to resolve: %s", got)
	}
	for ns, want := range map[string]bool{"/acme": true, "/acme/prod": true, "/": false, "/nowhere": false} {
		if got := c.NamesMatter(ns); got != want {
			t.Errorf("names matter in %s: %t", ns, got)
		}
	}
}

// DNS rebinding: whoever answers for a public name does not lead into one's own networks,
// unless the External says that its names have such addresses.
func TestANamesPrivateAddressCountsOnlyIfTheExternalSaysSo(t *testing.T) {
	const external = tree + "kind: External\nnamespace: /acme\nname: db\nlabels: {ext: db}\naddresses: {fqdns: [db.example.com, \"*.db.example.com\"]}\n"
	public := compile(t, external).compiled
	private := compile(t, strings.Replace(external, `.com"]}`, `.com"], private: true}`, 1)).compiled
	for addr, own := range map[string]bool{
		"10.1.2.3": true, "172.31.255.255": true, "192.168.0.1": true, "100.64.0.1": true, "100.127.255.255": true, "fd00::1": true, "fec0::1": true,
		"::ffff:10.1.2.3": true, "0.0.0.1": true, "64:ff9b::a01:203": true, "64:ff9b::7f00:1": true, "64:ff9b::a9fe:a9fe": true, "64:ff9b:1::1": true,
		"172.32.0.1": false, "100.128.0.1": false, "11.0.0.1": false, "203.0.113.9": false, "2001:db8::9": false, "64:ff9b::808:808": false,
	} {
		a := netip.MustParseAddr(addr)
		for _, name := range []string{"db.example.com", "x.db.example.com"} {
			m, _ := public.Destination("/acme/prod", a, "tcp", 443, name)
			if (m == nil) != own || public.HasName("/acme/prod", name, a, "tcp", 443) == own || (public.PublicOnly("/acme/prod", a, "tcp", 443, name) != "") != own {
				t.Errorf("%s has %s: %+v", name, addr, m)
			}
			if m, _ := private.Destination("/acme/prod", a, "tcp", 443, name); m == nil {
				t.Errorf("%s has %s, which is expected, and is nothing", name, addr)
			}
		}
		if got := public.NameMayOpen("/acme/prod", a, "tcp", 443); got == own {
			t.Errorf("a name may open %s: %t", addr, got)
		}
	}
	// To go by a name alone, as explain does, is to take it for public.
	if m, _ := public.Destination("/acme/prod", netip.Addr{}, "tcp", 443, "db.example.com"); m == nil {
		t.Error("nothing is known of the name")
	}
	for text, want := range map[string]string{
		strings.Replace(external, "fqdns: [db.example.com, \"*.db.example.com\"]", "cidrs: [203.0.113.0/24], private: true", 1):                                                                                       "private is about names",
		strings.Replace(strings.Replace(external, "External", "Service", 1), "labels: {ext: db}\naddresses: {fqdns: [db.example.com, \"*.db.example.com\"]", "addresses: {fqdns: [db.example.com], private: true", 1): "a Service may have private addresses anyhow",
		strings.Replace(external, `.com"]}`, `.com"], private: yes}`, 1):                                                                                                                                              "want true or false",
	} {
		if _, err := Parse("test.yaml", []byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func TestWhenAClientsWordForANameIsAskedFor(t *testing.T) {
	c := compile(t, named).compiled
	for _, x := range []struct {
		ns, addr, names string
		port            uint16
		want            bool
	}{
		{"/acme/prod", "203.0.113.9", "", 443, true},
		{"/acme", "203.0.113.9", "", 443, true},
		{"/acme", "203.0.113.9", "", 80, false}, // no External by name has the port
		{"/acme/prod", "203.0.113.9", "", 80, true},
		{"/", "203.0.113.9", "", 443, false},
		{"/acme", "203.0.113.1", "", 443, false}, // it is one address's
		{"/acme", "203.0.113.9", "pay.example.com", 443, false},
		{"/acme", "203.0.113.9", "x.pay.example.com", 443, true}, // a whole name would be better
		{"/acme", "203.0.113.9", "api.internal", 443, false},
		{"/acme", "198.51.100.7", "", 443, false},
	} {
		if got := c.NameMayOpen(x.ns, netip.MustParseAddr(x.addr), "tcp", x.port, strings.Fields(x.names)...); got != x.want {
			t.Errorf("%+v: %t", x, got)
		}
	}
	for name, want := range map[string]bool{
		"pay.example.com": true, "x.pay.example.com": true, "api.internal": false, "example.com": false, "": false,
		"*.pay.example.com": true, "X.pay.example.com": false, "x..pay.example.com": false, strings.Repeat("a.", 200) + "pay.example.com": false,
	} {
		if got := c.HasName("/acme", name, netip.MustParseAddr("203.0.113.9"), "tcp", 443); got != want {
			t.Errorf("%q: %t", name, got)
		}
	}
}

// Rule 8: a name is no proof. Who answers for one that may be reached can lead to any
// address, but not past a deny on the network that it is in.
func TestRule8ANameLeadsPastNoDeny(t *testing.T) {
	w := compile(t, named+
		policyYAML("/acme/prod", "cards", "subject: {app: web}\nverb: allow\nobject: {ext: cards}")+
		policyYAML("/", "no-internet", "subject: {tier: secret}\nverb: deny\nobject: {ext: internet}\npropagate: true"))
	for own, want := range map[string]string{
		"app=web@/acme/prod":             "allow policy /acme/prod/cards",
		"app=web,tier=secret@/acme/prod": "deny policy /no-internet",
		"app=db@/acme/prod":              "deny default",
	} {
		e := endpoint(own)
		m, _ := w.compiled.Destination("/acme/prod", netip.MustParseAddr("203.0.113.9"), "tcp", 443, "pay.example.com")
		if got := say(w.compiled.DecideExternal(&e, m, "tcp", 443, noon)); got != want {
			t.Errorf("%s: %s, want %s", own, got, want)
		}
	}
}

func TestRule8NoDenyByNameIsTaken(t *testing.T) {
	const cards = "kind: External\nnamespace: /acme\nname: cards\nlabels: {ext: cards}\naddresses: {fqdns: [pay.example.com]}\n"
	deny := strings.TrimSuffix(policyYAML("/acme/prod", "d", "subject: any\nverb: deny\nobject: {ext: cards}"), "---\n")
	base := strings.TrimSuffix(tree, "---\n")
	db := newDB(t, base+"---\n"+deny)
	wantText(t, refused(t, db, cards), "External /acme/cards has names only, and is the object of the deny /acme/prod/d: a name is no proof")
	db = newDB(t, base+"---\n"+cards)
	wantText(t, refused(t, db, deny), "the object of this deny is External /acme/cards, which has names (fqdns) only: a name is no proof")
	wantText(t, refused(t, db, strings.Replace(deny, "verb: deny", "verb: deny\nmode: observe", 1)), "a name is no proof")
	for name, fine := range map[string]string{
		"an allow":      strings.Replace(deny, "deny", "allow", 1),
		"everybody":     strings.Replace(deny, "{ext: cards}", "any", 1),
		"nobody known":  strings.Replace(deny, "{ext: cards}", "{ext: {exists: false}}", 1),
		"another's":     strings.Replace(deny, "{ext: cards}", "{ext: other}", 1),
		"has a network": strings.Replace(cards, "fqdns:", "cidrs: [192.0.2.0/24], fqdns:", 1) + "---\n" + deny,
	} {
		if _, err := db.Plan(parse(t, fine), nil, false); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTooManyNames(t *testing.T) {
	var names []string
	for i := range maxExactNames + 1 {
		names = append(names, fmt.Sprintf("n%d.example.com", i))
	}
	yaml := func(names []string) string {
		return "kind: External\nnamespace: /acme\nname: many\naddresses: {fqdns: [" + strings.Join(names, ", ") + "]}\n"
	}
	db := newDB(t, strings.TrimSuffix(tree, "---\n"))
	wantText(t, refused(t, db, yaml(names)), "there would be 4097 names in all, the limit is 4096")
	if _, err := db.Plan(parse(t, yaml(names[1:])), nil, false); err != nil {
		t.Error(err)
	}
}

func TestNamesThatCannotBeReadAreNotCompiled(t *testing.T) {
	bad := &symbolonv1.Resource{Namespace: "/acme", Name: "x", Kind: &symbolonv1.Resource_External{External: &symbolonv1.External{
		Addresses: &symbolonv1.Addresses{Fqdns: []string{"a b"}},
	}}}
	if _, err := Compile(append(resources(t, strings.TrimSuffix(tree, "---\n")), bad), 1); err == nil {
		t.Error("a name that is none was taken")
	}
}

// An edge to an External by name is judged by its names, which address it was last seen with
// being beside the point.
func TestSimulateKnowsExternalsByName(t *testing.T) {
	allow := policyYAML("/acme/prod", "cards", "subject: {app: web}\nverb: allow\nobject: {ext: cards}")
	e := Edge{
		From: endpoint("app=web@/acme/prod"), To: endpoint("ext=cards!/acme/cards"), ToAddress: netip.MustParseAddr("203.0.113.9"),
		Protocol: "tcp", Port: 443, Allowed: true,
	}
	before := compile(t, named+allow).compiled
	for _, x := range []struct {
		draft string
		want  Difference
	}{
		{named + allow, Unchanged},
		{named, NewlyDenied},
		{strings.Replace(named, "[\"*.pay.example.com\", pay.example.com]", "[other.example.com]", 1) + allow, NewlyDenied},
		{strings.Replace(named, "name: cards\n", "name: renamed\n", 1) + allow, Unchanged},
	} {
		if got := Simulate(before, compile(t, x.draft).compiled, []Edge{e}, noon)[0]; got.Difference != x.want {
			t.Errorf("%v, want %v: %+v", got.Difference, x.want, got)
		}
	}
}
