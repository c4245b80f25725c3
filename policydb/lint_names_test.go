package policydb

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func outsideYAML(kind, ns, name, addresses string) string {
	s := "kind: " + kind + "\nnamespace: " + ns + "\nname: " + name + "\naddresses: {" + addresses + "}\n"
	if kind == KindExternal {
		s += "labels: {ext: " + name + "}\n"
	}
	return s + "---\n"
}

func TestLintOfNamesAndNetworks(t *testing.T) {
	ext := func(ns, name, addresses string) string { return outsideYAML(KindExternal, ns, name, addresses) }
	lb := func(ns, name, addresses string) string { return outsideYAML(KindService, ns, name, addresses) }
	for _, tt := range []struct {
		name, text string
		want       []string
	}{
		{"names that are well", ext("/acme", "a", `fqdns: [pay.example.com, "*.cards.example.com"], cidrs: [203.0.113.0/24]`) + ext("/acme", "b", `fqdns: ["*.example.org"]`), nil},
		{"a wildcard without TCP", ext("/acme", "a", `fqdns: ["*.example.com"], ports: [udp/53, udp/443]`),
			[]string{"error never-matches External /acme/a"}},
		{"a whole name without TCP", ext("/acme", "a", `fqdns: [a.example.com], ports: [udp/53]`), nil},
		{"any private address, by whoever answers", ext("/acme", "a", `fqdns: ["*.example.com"], private: true`),
			[]string{"warning private-name External /acme/a"}},
		{"a private name that does not count", ext("/acme", "a", `fqdns: [db.corp.internal, nas.home.arpa, internal.example.com]`),
			[]string{"warning private-name External /acme/a", "warning private-name External /acme/a"}},
		{"a private name that counts", ext("/acme", "a", `fqdns: [db.corp.internal], private: true`), nil},
		{"a bare name", ext("/acme", "a", `fqdns: [redis], private: true`), []string{"warning bare-name External /acme/a"}},
		{"the same name above", ext("/acme", "a", `fqdns: [a.example.com]`) + ext("/acme/prod", "a", `fqdns: [a.example.com], ports: [tcp/443]`),
			[]string{"warning shadowed External /acme/prod/a by /acme/a"}},
		{"the same wildcard and network above", ext("/acme", "a", `fqdns: ["*.example.com"], cidrs: ["2001:db8::/32"], ports: [tcp/1-500]`) +
			ext("/acme/prod", "a", `fqdns: ["*.example.com"], cidrs: ["2001:DB8::/32"], ports: [tcp/443, tcp/80]`),
			[]string{"warning shadowed External /acme/prod/a by /acme/a", "warning shadowed External /acme/prod/a by /acme/a"}},
		{"the same above, on fewer ports", ext("/acme", "a", `fqdns: [a.example.com], ports: [tcp/443]`) + ext("/acme/prod", "a", `fqdns: [a.example.com], ports: [tcp/80, tcp/443]`), nil},
		{"the same beside", "kind: Namespace\nname: /acme/dev\nmode: enforce\n---\n" +
			ext("/acme/dev", "a", `fqdns: [a.example.com], cidrs: [203.0.113.0/24]`) + ext("/acme/prod", "a", `fqdns: [a.example.com], cidrs: [203.0.113.0/24]`), nil},
		{"a Service's", lb("/acme", "lb", `fqdns: [a.example.com], cidrs: [203.0.113.0/24]`) + ext("/acme", "a", `fqdns: [a.example.com], cidrs: [203.0.113.0/24, 203.0.113.0/25]`),
			[]string{"warning shadowed External /acme/a by /acme/lb", "warning shadowed External /acme/a by /acme/lb"}},
		{"a Service's of a namespace below", lb("/acme/prod", "lb", `cidrs: [203.0.113.0/24]`) + ext("/acme", "a", `cidrs: [203.0.113.0/24]`), nil},
		{"taken out of a wildcard", ext("/acme", "a", `fqdns: ["*.example.com"]`) + ext("/acme/prod", "b", `fqdns: [x.y.example.com, example.com]`) + ext("/acme/prod", "c", `fqdns: ["*.z.example.com"]`),
			[]string{"warning overlapping-names External /acme/prod/b by /acme/a", "warning overlapping-names External /acme/prod/c by /acme/a"}},
		{"taken out with the same labels", ext("/acme", "a", `fqdns: ["*.example.com"]`) + strings.Replace(ext("/acme", "b", `fqdns: [x.example.com]`), "ext: b", "ext: [a, b]", 1), nil},
		{"taken out on other ports", ext("/acme", "a", `fqdns: ["*.example.com"], ports: [tcp/443]`) + ext("/acme", "b", `fqdns: [x.example.com], ports: [tcp/80]`), nil},
	} {
		got := lintOf(t, tt.text)
		slices.Sort(got)
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: -want +got:\n%s", tt.name, diff)
		}
	}
}
