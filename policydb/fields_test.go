package policydb

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestFieldChanges(t *testing.T) {
	for _, tt := range []struct {
		name, before, after string
		want                []FieldChange
	}{
		{"nothing", "subject: any\nverb: allow\nobject: any", "object: any\nverb: allow\nsubject: any", nil},
		{
			"fields of a policy",
			"subject: {app: web}\nverb: allow\nobject: any\nwith: [log]\nexpires: 2030-01-01T00:00:00Z",
			"subject: {app: web}\nverb: deny\nobject: any\nports: [tcp/1, udp/2]\nexpires: 2031-01-01T00:00:00Z",
			[]FieldChange{
				{"verb", "allow", "deny"}, {"ports", "", "[tcp/1, udp/2]"}, {"with", "[log]", ""},
				{"expires", "2030-01-01T00:00:00Z", "2031-01-01T00:00:00Z"},
			},
		},
		{
			"one term becomes two",
			"subject: {app: web}\nverb: allow\nobject: any", "subject: [{app: web}, {app: api}]\nverb: allow\nobject: any",
			[]FieldChange{{"subject[0]", "", "{app: web}"}, {"subject[1]", "", "{app: api}"}, {"subject", "{app: web}", ""}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := resources(t, policyYAML("/", "p", tt.before))[0]
			b := resources(t, policyYAML("/", "p", tt.after))[0]
			if diff := cmp.Diff(tt.want, FieldChanges(a, b)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}

	ns := func(attributes string) string {
		return "kind: Namespace\nname: /a\nmode: enforce\nattributes: {" + attributes + "}\n"
	}
	got := FieldChanges(resources(t, ns("app: {}, env: {values: [a]}, old: {}"))[0], resources(t, ns("app: {}, env: {values: [b, a]}, yes: {}"))[0])
	want := []FieldChange{{"attributes.env", "{values: [a]}", "{values: [a, b]}"}, {`attributes."yes"`, "", "{}"}, {"attributes.old", "{}", ""}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}

	test := func(lines string) string { return "kind: PolicyTest\nnamespace: /a\nname: t\ntests:\n" + lines }
	const x, y = "- {name: one, from: {app: a}, to: {app: b}, port: any, expect: deny}\n", "- {name: two, from: {app: a}, to: {app: b}, port: any, expect: deny}\n"
	got = FieldChanges(resources(t, test(x+y+y))[0], resources(t, test(y+"- {name: one, from: {app: a}, to: {app: c}, port: any, expect: deny}\n"))[0])
	want = []FieldChange{
		{"tests[two]#2", "{name: two, from: {app: a}, to: {app: b}, port: any, expect: deny}", ""},
		{"tests[one]", "{name: one, from: {app: a}, to: {app: b}, port: any, expect: deny}", "{name: one, from: {app: a}, to: {app: c}, port: any, expect: deny}"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
