package policydb

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// inForce is what drafts are held against.
const inForce = tree + `
kind: Policy
namespace: /acme/prod
name: web-to-db
subject: {app: web}
verb: allow
object: {app: db}
ports: [tcp/5432]
---
kind: External
namespace: /acme
name: office
labels: {ext: office}
addresses: {cidrs: [192.0.2.0/24]}
---
kind: Policy
namespace: /acme/prod
name: office-to-web
subject: {ext: office}
verb: allow
object: {app: web}
---
kind: Policy
namespace: /acme/prod
name: web-to-office
subject: {app: web}
verb: allow
object: {ext: office}
---
kind: Namespace
name: /plain
mode: enforce
protection: authenticated
---
kind: Policy
namespace: /plain
name: a-to-b
subject: {app: a}
verb: allow
object: {app: b}
---
`

func workload(namespace, attrs string) Endpoint {
	return Endpoint{Namespace: namespace, Attributes: attributes(attrs)}
}

func edge(from, to Endpoint, port uint16) Edge {
	return Edge{From: from, To: to, Protocol: "tcp", Port: port, Connections: 1}
}

func TestSimulate(t *testing.T) {
	web, db := workload("/acme/prod", "app=web"), workload("/acme/prod", "app=db")
	office := Endpoint{External: "/acme/office", Attributes: attributes("ext=office")}
	const policy, byDefault, noProxy = symbolonv1.Reason_REASON_POLICY, symbolonv1.Reason_REASON_DEFAULT, symbolonv1.Reason_REASON_PEER_UNPROTECTED
	const encrypted, authenticated = symbolonv1.Protection_PROTECTION_ENCRYPTED, symbolonv1.Protection_PROTECTION_AUTHENTICATED
	const webToDB, p = "/acme/prod/web-to-db", "/acme/prod/p"
	allowed := EdgeVerdict{Allow: true, Reason: policy, Protection: encrypted, ClientPolicy: webToDB, ServerPolicy: webToDB}
	denied := EdgeVerdict{Reason: byDefault}
	fromOffice, toOffice := edge(office, web, 80), edge(web, office, 443)
	fromOffice.FromAddress, toOffice.ToAddress = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.1")
	fromStrangers := edge(Endpoint{}, web, 80)
	fromStrangers.FromAddress = netip.MustParseAddr("198.51.100.7")
	toStrangers := edge(web, Endpoint{}, 443)
	toStrangers.ToAddress = netip.MustParseAddr("198.51.100.7")
	for _, test := range []struct {
		name  string
		edge  Edge
		draft string // beside what is in force
		want  Simulated
	}{
		{"nothing changes", edge(web, db, 5432), ``, Simulated{Unchanged, allowed, allowed}},
		{"another port is another edge", edge(web, db, 80), ``, Simulated{Unchanged, denied, denied}},
		{
			"newly denied, by a deny beside the allow", edge(web, db, 5432),
			"kind: Policy\nnamespace: /acme/prod\nname: p\nsubject: {app: web}\nverb: deny\nobject: {app: db}\n",
			Simulated{NewlyDenied, allowed, EdgeVerdict{Reason: policy, ClientPolicy: p, ServerPolicy: p}},
		},
		{
			"newly denied, by a parent", edge(web, db, 5432),
			"kind: Policy\nnamespace: /\nname: p\nsubject: any\nverb: deny\nobject: {app: db}\npropagate: true\n",
			Simulated{NewlyDenied, allowed, EdgeVerdict{Reason: policy, ClientPolicy: "/p", ServerPolicy: "/p"}},
		},
		{
			"observed is not enforced", edge(web, db, 5432),
			"kind: Policy\nnamespace: /acme/prod\nname: p\nsubject: {app: web}\nverb: deny\nobject: {app: db}\nmode: observe\n",
			Simulated{Unchanged, allowed, allowed},
		},
		{
			"newly allowed", edge(web, db, 80),
			"kind: Policy\nnamespace: /acme/prod\nname: p\nsubject: {app: web}\nverb: allow\nobject: {app: db}\nports: [tcp/80]\n",
			Simulated{NewlyAllowed, denied, EdgeVerdict{Allow: true, Reason: policy, Protection: encrypted, ClientPolicy: p, ServerPolicy: p}},
		},
		{
			"one side's allow is not enough", edge(web, workload("/plain", "app=b"), 80),
			"kind: Policy\nnamespace: /acme/prod\nname: p\nsubject: {app: web}\nverb: allow\nobject: {app: b}\n",
			Simulated{Unchanged, denied, EdgeVerdict{Reason: byDefault, ClientPolicy: p}},
		},
		{
			"newly encrypted", edge(workload("/plain", "app=a"), workload("/plain", "app=b"), 80),
			"kind: Policy\nnamespace: /plain\nname: p\nsubject: any\nverb: encrypt\nobject: any\n",
			Simulated{
				NewlyEncrypted,
				EdgeVerdict{Allow: true, Reason: policy, Protection: authenticated, ClientPolicy: "/plain/a-to-b", ServerPolicy: "/plain/a-to-b"},
				EdgeVerdict{Allow: true, Reason: policy, Protection: encrypted, ClientPolicy: "/plain/a-to-b", ServerPolicy: "/plain/a-to-b"},
			},
		},
		{
			"no longer encrypted", edge(web, db, 5432),
			"kind: Namespace\nname: /acme/prod\nmode: enforce\nprotection: authenticated\n",
			Simulated{NoLongerEncrypted, allowed, EdgeVerdict{Allow: true, Reason: policy, Protection: authenticated, ClientPolicy: webToDB, ServerPolicy: webToDB}},
		},
		{
			"from an External", fromOffice,
			"kind: Policy\nnamespace: /acme/prod\nname: p\nsubject: {ext: office}\nverb: deny\nobject: any\n",
			Simulated{NewlyDenied, EdgeVerdict{Allow: true, Reason: policy, ServerPolicy: "/acme/prod/office-to-web"}, EdgeVerdict{Reason: policy, ServerPolicy: p}},
		},
		{
			"to an External that must be encrypted to", toOffice,
			"kind: Policy\nnamespace: /acme/prod\nname: p\nsubject: any\nverb: encrypt\nobject: any\n",
			Simulated{
				NewlyDenied, EdgeVerdict{Allow: true, Reason: policy, ClientPolicy: "/acme/prod/web-to-office"},
				EdgeVerdict{Reason: symbolonv1.Reason_REASON_ENCRYPTION_UNAVAILABLE, ClientPolicy: p},
			},
		},
		{
			"an External with other labels", fromOffice,
			"kind: External\nnamespace: /acme\nname: office\nlabels: {ext: branch}\naddresses: {cidrs: [192.0.2.0/24]}\n",
			Simulated{NewlyDenied, EdgeVerdict{Allow: true, Reason: policy, ServerPolicy: "/acme/prod/office-to-web"}, EdgeVerdict{Reason: byDefault}},
		},
		{
			"an External with other addresses", fromOffice,
			"kind: External\nnamespace: /acme\nname: office\nlabels: {ext: office}\naddresses: {cidrs: [192.0.2.128/25]}\n",
			Simulated{NewlyDenied, EdgeVerdict{Allow: true, Reason: policy, ServerPolicy: "/acme/prod/office-to-web"}, unprotected},
		},
		{"a client without a proxy", fromStrangers, ``, Simulated{Unchanged, unprotected, unprotected}},
		{
			"a client without a proxy becomes an External", fromStrangers,
			"kind: External\nnamespace: /acme\nname: partner\nlabels: {ext: office}\naddresses: {cidrs: [198.51.100.0/24]}\n",
			Simulated{NewlyAllowed, EdgeVerdict{Reason: noProxy}, EdgeVerdict{Allow: true, Reason: policy, ServerPolicy: "/acme/prod/office-to-web"}},
		},
		{
			"a server without a proxy becomes an External, on its ports", toStrangers,
			"kind: External\nnamespace: /acme\nname: partner\nlabels: {ext: office}\naddresses: {cidrs: [198.51.100.0/24], ports: [tcp/443]}\n",
			Simulated{NewlyAllowed, unprotected, EdgeVerdict{Allow: true, Reason: policy, ClientPolicy: "/acme/prod/web-to-office"}},
		},
		{
			"a Service is no External", toStrangers,
			"kind: Service\nnamespace: /acme\nname: lb\naddresses: {cidrs: [198.51.100.7/32], ports: [tcp/443]}\n",
			Simulated{Unchanged, unprotected, unprotected},
		},
		{
			"a namespace that is not there", edge(workload("/gone", "app=web"), db, 5432), ``,
			Simulated{Unchanged, EdgeVerdict{Reason: symbolonv1.Reason_REASON_NO_POLICY, ServerPolicy: webToDB}, EdgeVerdict{Reason: symbolonv1.Reason_REASON_NO_POLICY, ServerPolicy: webToDB}},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			current := compile(t, inForce)
			set := make(map[Key]*symbolonv1.Resource)
			for _, r := range append(current.resources, resources(t, test.draft)...) {
				set[KeyOf(r)] = r
			}
			var all []*symbolonv1.Resource
			for _, r := range set {
				all = append(all, r)
			}
			draft, err := Compile(all, 8)
			if err != nil {
				t.Fatal(err)
			}
			got := Simulate(current.compiled, draft, []Edge{test.edge}, noon)
			if diff := cmp.Diff([]Simulated{test.want}, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestSimulateSharedNetwork: a client in a network of two Externals has the labels of
// both, and of one where the draft has no more.
func TestSimulateSharedNetwork(t *testing.T) {
	const two = inForce + `
kind: External
namespace: /acme
name: guests
labels: {tier: guest}
addresses: {cidrs: [192.0.2.0/24], ports: [tcp/1]}
---
kind: Policy
namespace: /acme/prod
name: no-guests
subject: {tier: guest}
verb: deny
object: any
`
	e := edge(Endpoint{External: "/acme/guests", Attributes: attributes("ext=office,tier=guest")}, workload("/acme/prod", "app=web"), 80)
	e.FromAddress = netip.MustParseAddr("192.0.2.1")
	got := Simulate(compile(t, two).compiled, compile(t, inForce).compiled, []Edge{e}, noon)
	want := []Simulated{{NewlyAllowed, EdgeVerdict{Reason: symbolonv1.Reason_REASON_POLICY, ServerPolicy: "/acme/prod/no-guests"}, EdgeVerdict{Allow: true, Reason: symbolonv1.Reason_REASON_POLICY, ServerPolicy: "/acme/prod/office-to-web"}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// TestSimulateTheEndOfLearn: what was let through by learn alone is newly denied,
// addresses that are nobody's included.
func TestSimulateTheEndOfLearn(t *testing.T) {
	const learn = symbolonv1.Reason_REASON_LEARN
	learning := compile(t, strings.Replace(inForce, "name: /acme/prod\nmode: enforce", "name: /acme/prod\nmode: learn", 1)).compiled
	enforced := compile(t, inForce).compiled
	web, db := workload("/acme/prod", "app=web"), workload("/acme/prod", "app=db")
	from, to := edge(Endpoint{}, web, 80), edge(web, Endpoint{}, 443)
	from.FromAddress, to.ToAddress = netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("198.51.100.7")
	edges := []Edge{edge(web, db, 5432), edge(db, web, 80), from, to}
	var got []Difference
	for i, x := range Simulate(learning, enforced, edges, noon) {
		got = append(got, x.Difference)
		if x.Difference == NewlyDenied && x.Before.Reason != learn {
			t.Errorf("edge %d was allowed by %v", i, x.Before)
		}
	}
	if diff := cmp.Diff([]Difference{Unchanged, NewlyDenied, NewlyDenied, NewlyDenied}, got); diff != "" {
		t.Error(diff)
	}
}
