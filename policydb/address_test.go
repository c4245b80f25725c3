package policydb

import (
	"net/netip"
	"testing"
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
		m, ok := w.compiled.External(c.ns, netip.MustParseAddr(c.addr), c.protocol, c.port)
		got := ""
		if ok {
			got = m.Ref
		}
		if got != c.want {
			t.Errorf("%s, %s %s/%d: %q, want %q", c.ns, c.addr, c.protocol, c.port, got, c.want)
		}
	}
	m, _ := w.compiled.External("/acme", netip.MustParseAddr("203.0.113.5"), "tcp", 443)
	if m.Labels.String() != "ext=office" {
		t.Errorf("labels %s", m.Labels)
	}
	if _, ok := w.compiled.External("/acme", netip.Addr{}, "tcp", 443); ok {
		t.Error("no address at all is an External")
	}
	if ref, ok := w.compiled.Service("/acme/prod", netip.MustParseAddr("198.51.100.7"), "tcp", 443); !ok || ref != "/acme/lb" {
		t.Errorf("service %q", ref)
	}
	if ref, ok := w.compiled.Service("/acme/prod", netip.MustParseAddr("198.51.100.7"), "tcp", 80); ok {
		t.Errorf("service %q on another port", ref)
	}
	addr := netip.MustParseAddr("203.0.113.9")
	if n := testing.AllocsPerRun(100, func() { w.compiled.External("/acme/prod", addr, "tcp", 443) }); n != 0 {
		t.Errorf("External allocates %v times", n)
	}
}
