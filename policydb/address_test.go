package policydb

import (
	"net/netip"
	"testing"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func TestAnAddressIsTheExternalWithTheLongestPrefix(t *testing.T) {
	w := compile(t, tree+`
kind: Namespace
name: /acme/shop
mode: enforce
---
kind: External
namespace: /
name: internet
labels: {ext: internet}
addresses: {cidrs: [0.0.0.0/0, "::/0"]}
---
kind: External
namespace: /acme
name: office
labels: {ext: office}
addresses: {cidrs: [203.0.113.0/24, "2001:db8::/32"]}
---
kind: External
namespace: /acme/prod
name: printer
labels: {ext: printer}
addresses: {cidrs: [203.0.113.9/32], ports: [tcp/631]}
---
kind: External
namespace: /acme/prod
name: office-again
labels: {ext: mine}
addresses: {cidrs: [203.0.113.0/24]}
---
kind: External
namespace: /acme/prod
name: b-web
addresses: {cidrs: [198.51.100.0/24], ports: [tcp/443]}
---
kind: External
namespace: /acme/prod
name: a-mail
addresses: {cidrs: [198.51.100.0/24], ports: [tcp/25]}
---
kind: Service
namespace: /acme
name: lb
addresses: {cidrs: [198.51.100.7/32], ports: [tcp/443]}
`)
	for _, c := range []struct {
		ns, addr, protocol string
		port               uint16
		want               string
	}{
		{"/acme/prod", "8.8.8.8", "tcp", 443, "/internet"},
		{"/acme/prod", "203.0.113.5", "tcp", 443, "/acme/office"}, // of equal prefixes the one nearest to the root
		{"/acme/prod", "203.0.113.9", "tcp", 631, "/acme/prod/printer"},
		{"/acme/prod", "203.0.113.9", "tcp", 443, "/acme/office"}, // the longer prefix is of another port
		{"/acme/prod", "203.0.113.9", "udp", 631, "/acme/office"},
		{"/acme/prod", "::ffff:203.0.113.9", "tcp", 631, "/acme/prod/printer"},
		{"/acme/prod", "2001:db8::1", "tcp", 443, "/acme/office"},
		{"/acme/prod", "2001:db9::1", "tcp", 443, "/internet"},
		{"/acme/prod", "fe80::1%eth0", "tcp", 443, "/internet"},
		{"/acme/prod", "198.51.100.1", "tcp", 25, "/acme/prod/a-mail"},
		{"/acme/prod", "198.51.100.1", "tcp", 443, "/acme/prod/b-web"},
		{"/acme/shop", "203.0.113.9", "tcp", 631, "/acme/office"}, // another branch
		{"/", "203.0.113.9", "tcp", 631, "/internet"},
		{"/elsewhere", "8.8.8.8", "tcp", 443, ""},
	} {
		m, _ := w.compiled.Destination(c.ns, netip.MustParseAddr(c.addr), c.protocol, c.port)
		got := ""
		if m != nil {
			got = m.Ref
		}
		if got != c.want {
			t.Errorf("%s, %s %s/%d: %q, want %q", c.ns, c.addr, c.protocol, c.port, got, c.want)
		}
	}
	m, _ := w.compiled.Destination("/acme", netip.MustParseAddr("203.0.113.5"), "tcp", 443)
	if m == nil || m.Labels.String() != "ext=office" {
		t.Errorf("office: %+v", m)
	}
	if m, _ := w.compiled.Destination("/acme", netip.Addr{}, "tcp", 443); m != nil {
		t.Error("no address at all is an External")
	}
	for _, c := range []struct {
		name, addr, service string
		port                uint16
	}{
		{"the Service wins over a wider External", "198.51.100.7", "/acme/lb", 443},
		{"and has its ports only", "198.51.100.7", "", 80},
	} {
		if _, ref := w.compiled.Destination("/acme/prod", netip.MustParseAddr(c.addr), "tcp", c.port); ref != c.service {
			t.Errorf("%s: service %q, want %q", c.name, ref, c.service)
		}
	}
	addr := netip.MustParseAddr("203.0.113.9")
	if n := testing.AllocsPerRun(100, func() { w.compiled.Destination("/acme/prod", addr, "tcp", 443) }); n != 0 {
		t.Errorf("Destination allocates %v times", n)
	}
	// Whoever calls does so from any port: the printer's 631 is where it listens.
	if m, ok := w.compiled.Source("/acme/prod", addr); !ok || m.Ref != "/acme/prod/printer" {
		t.Errorf("source: %+v", m)
	}
}

// A balancer's address is a Service to who dials it, and an External when its health
// checks call: at the same length the tunnel wins, so that nobody falls back on
// plain text.
func TestServiceWinsOverExternalOfTheSameLength(t *testing.T) {
	for _, order := range []string{"a", "z"} {
		docs, err := Parse("t.yaml", []byte("kind: Namespace\nname: /\nmode: enforce\ndefault: deny\n---\n"+
			"kind: Service\nnamespace: /\nname: lb\naddresses: {cidrs: [10.0.0.1/32], ports: [tcp/80]}\n---\n"+
			"kind: External\nnamespace: /\nname: "+order+"\naddresses: {cidrs: [10.0.0.1/32]}\n"))
		if err != nil {
			t.Fatal(err)
		}
		var all []*symbolonv1.Resource
		for _, d := range docs {
			all = append(all, d.Resource)
		}
		c, err := Compile(all, 1)
		if err != nil {
			t.Fatal(err)
		}
		addr := netip.MustParseAddr("10.0.0.1")
		if ext, ref := c.Destination("/", addr, "tcp", 80); ext != nil || ref != "/lb" {
			t.Errorf("port 80: %+v, %q; want the Service", ext, ref)
		}
		if ext, _ := c.Destination("/", addr, "tcp", 81); ext == nil {
			t.Error("port 81: want the External")
		}
		if _, ok := c.Source("/", addr); !ok {
			t.Error("as a client it is no External")
		}
	}
}

// Two Externals may share a network where their ports are disjoint. Who calls from
// there is both, or the deny on one of them would depend on its name.
func TestASourceIsAllExternalsOfItsNetwork(t *testing.T) {
	const shared = `
kind: Namespace
name: /acme/shop
mode: enforce
---
kind: External
namespace: /acme
name: mail
labels: {ext: mail, zone: a}
addresses: {cidrs: [198.51.100.0/24], ports: [tcp/25]}
---
kind: External
namespace: /acme
name: web
labels: {ext: web, zone: a}
addresses: {cidrs: [198.51.100.0/24], ports: [tcp/443]}
---
kind: External
namespace: /acme/shop
name: other
labels: {ext: other}
addresses: {cidrs: [198.51.100.0/24]}
---
kind: External
namespace: /acme/shop
name: one
labels: {ext: one}
addresses: {cidrs: [198.51.100.9/32], ports: [tcp/1]}
---
kind: Policy
namespace: /acme
name: mail-in
subject: {ext: mail}
verb: allow
object: any
propagate: true
---
kind: Policy
namespace: /acme
name: no-web-in
subject: {ext: web}
verb: deny
object: any
propagate: true
`
	w := compile(t, tree+shared)
	addr := netip.MustParseAddr("198.51.100.7")
	m, ok := w.compiled.Source("/acme/prod", addr)
	if !ok || m.Ref != "/acme/mail" || m.Labels.String() != "ext=mail ext=web zone=a" {
		t.Fatalf("source: %+v", m)
	}
	q := &Query{
		From: Endpoint{External: m.Ref, Attributes: m.Labels}, To: endpoint("app=web@/acme/prod"), Protocol: "tcp", Port: 80,
	}
	if d := w.compiled.Decide(Server, q, noon); d.Allow || d.Policy != "/acme/no-web-in" {
		t.Errorf("the deny was missed: %s", say(d))
	}
	// As a destination it is one of them, by port.
	for port, want := range map[uint16]string{25: "ext=mail zone=a", 443: "ext=web zone=a"} {
		if m, _ := w.compiled.Destination("/acme/prod", addr, "tcp", port); m == nil || m.Labels.String() != want {
			t.Errorf("port %d: %+v, want %s", port, m, want)
		}
	}
	// A namespace below adds nothing to the same network, and decides alone on a
	// longer prefix.
	if m, _ := w.compiled.Source("/acme/shop", addr); m == nil || m.Labels.String() != "ext=mail ext=web zone=a" {
		t.Errorf("seen from below: %+v", m)
	}
	if m, _ := w.compiled.Source("/acme/shop", netip.MustParseAddr("198.51.100.9")); m == nil || m.Labels.String() != "ext=one" {
		t.Errorf("a longer prefix: %+v", m)
	}
	if n := testing.AllocsPerRun(100, func() { w.compiled.Source("/acme/prod", addr) }); n != 0 {
		t.Errorf("Source allocates %v times", n)
	}
}
