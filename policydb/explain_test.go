package policydb

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestExplainNamesTheFirstClauseThatFails(t *testing.T) {
	w := compile(t, tree+
		policyYAML("/", "a-subject", "subject: {app: [db, cache], env: prod}\nverb: allow\nobject: any\npropagate: true")+
		policyYAML("/", "b-absent", "subject: {vuln.level: {not: [critical]}}\nverb: allow\nobject: any\npropagate: true")+
		policyYAML("/", "c-object", "subject: any\nverb: allow\nobject: [{app: {prefix: gate}}, {tier: x}]\npropagate: true")+
		policyYAML("/", "d-ports", "subject: any\nverb: allow\nobject: any\nports: [tcp/443, tcp/8000-8100]\npropagate: true")+
		policyYAML("/", "e-where", "subject: any\nverb: allow\nobject: any\nwhere: {different: [zone], same: [env]}\npropagate: true")+
		policyYAML("/", "f-when", "subject: any\nverb: allow\nobject: any\nwhen: {days: sat, hours: \"08:00-12:00\", timezone: Europe/Oslo}\npropagate: true")+
		policyYAML("/", "g-expired", "subject: any\nverb: allow\nobject: any\nexpires: 2026-01-01T00:00:00Z\npropagate: true")+
		policyYAML("/", "h-stays", "subject: any\nverb: allow\nobject: any")+
		policyYAML("/", "i-not", "subject: {app: {not: [web]}}\nverb: deny\nobject: any\npropagate: true")+
		policyYAML("/", "j-missing", "subject: {app: {exists: false}}\nverb: deny\nobject: any\npropagate: true")+
		policyYAML("/acme/prod", "k-observed", "subject: {app: web}\nverb: allow\nobject: any\nmode: observe")+
		policyYAML("/acme/prod", "l-decides", "subject: {app: web}\nverb: allow\nobject: {app: api}\nfallback: true"))
	q := &Query{From: endpoint("app=web,env=prod,zone=a"), To: endpoint("app=api,env=dev,zone=b"), Protocol: "tcp", Port: 80}
	e := w.compiled.Explain(Client, q, noon)

	var got []string
	for _, c := range e.Candidates {
		s := c.Policy + ": " + c.Failed
		if c.Matches {
			s = c.Policy + " matches"
		}
		got = append(got, s)
	}
	want := []string{
		`/a-subject: subject: app is "web", want "cache", "db"`,
		`/b-absent: subject: there is no vuln.level`,
		`/c-object: object: app is "api", want prefix "gate" (the first of 2 alternatives; none matches)`,
		`/d-ports: ports: tcp/80 is not in tcp/443, tcp/8000-8100`,
		`/e-where: where: env is "prod" and "dev", want same`,
		`/f-when: when: Wed 14:00 is not in sat 08:00-12:00 Europe/Oslo`,
		`/g-expired: expires: it expired at 2026-01-01T00:00:00Z`,
		`/h-stays: propagate: it holds in its own namespace only`,
		`/i-not: subject: app is "web", want not "web"`,
		`/j-missing: subject: app is "web", want none`,
		`/acme/prod/k-observed matches`,
		`/acme/prod/l-decides matches`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	wantChain := []string{
		"/acme/prod: default inherit, protection inherit",
		"/acme: default inherit, protection inherit",
		"/: default deny, protection inherit",
	}
	if diff := cmp.Diff(wantChain, e.Chain); diff != "" {
		t.Errorf("chain: -want +got:\n%s", diff)
	}
	if diff := diffDecisions(e.Decision, w.compiled.Decide(Client, q, noon)); diff != "" {
		t.Error(diff)
	}
	// Each side is explained by its own chain.
	unknown := w.compiled.Explain(Server, &Query{From: q.From, To: endpoint("app=x@/elsewhere"), Protocol: "tcp", Port: 1}, noon)
	if len(unknown.Candidates) != 0 || !strings.Contains(fmt.Sprint(unknown.Chain), "/elsewhere") {
		t.Errorf("an unknown namespace: %+v", unknown)
	}
	external := w.compiled.Explain(Server, &Query{From: q.From, To: endpoint("ext=x!/acme/office"), Protocol: "tcp", Port: 1}, noon)
	if !strings.Contains(fmt.Sprint(external.Chain), "/acme/office") {
		t.Errorf("an External's own side: %+v", external)
	}
}
