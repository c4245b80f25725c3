package policydb

import (
	"testing"
)

const withExternal = tree + `kind: External
namespace: /acme
name: bank
labels: {ext: bank}
addresses: {fqdns: ["*.bank.example"], ports: [tcp/443, tcp/8443]}
---
kind: External
namespace: /acme/prod
name: office
labels: {ext: office}
addresses: {cidrs: [203.0.113.0/24], ports: [tcp/22]}
---
kind: Policy
namespace: /acme/prod
name: out
subject: {app: web}
verb: allow
object: {ext: bank}
ports: [tcp/443]
---
kind: Policy
namespace: /acme/prod
name: in
subject: {ext: office}
verb: allow
object: {app: web}
---
kind: Policy
namespace: /acme/prod
name: batch-out
subject: {app: batch}
verb: allow
object: {ext: bank}
fallback: true
---
kind: Policy
namespace: /acme/prod
name: batch-encrypts
subject: {app: batch}
verb: encrypt
object: any
---
`

func testYAML(test string) string {
	return "kind: PolicyTest\nnamespace: /acme/prod\nname: t\ntests:\n- {name: x, " + test + "}\n"
}

// A PolicyTest of an External goes by the one side that has policies, by the External's
// labels and by the ports that it has.
func TestPolicyTestsOfExternals(t *testing.T) {
	for test, want := range map[string]string{
		"from: {app: web}, to: /acme/bank, port: tcp/443, expect: allow, by: /acme/prod/out":                                         "",
		"from: {app: web}, to: /acme/bank, port: tcp/443, expect: allow, reason: policy, encrypted: false":                           "",
		"from: {app: web}, to: /acme/bank, port: tcp/443, expect: allow, reason: default":                                            "want allow with reason default, got allow by /acme/prod/out",
		"from: {app: web}, to: /acme/bank, port: any, expect: allow":                                                                 "at tcp/8443 want allow, got deny by default",
		"from: {app: web}, to: /acme/bank, port: tcp/80, expect: deny":                                                               "External /acme/bank does not have the port",
		"from: {app: web}, to: /acme/bank, port: tcp/8000-9000, expect: deny, reason: default":                                       "",
		"from: /acme/prod/office, to: {app: web}, port: any, expect: allow, by: /acme/prod/in":                                       "",
		"from: /acme/prod/office, to: {app: db}, port: tcp/443, expect: deny":                                                        "",
		"from: {app: batch}, to: /acme/bank, port: any, expect: deny, reason: encryption-unavailable":                                "",
		"from: {app: batch}, to: /acme/bank, port: any, expect: deny, reason: encryption-unavailable, by: /acme/prod/batch-encrypts": "",
		"from: {app: batch}, to: /acme/bank, port: any, expect: deny, reason: policy":                                                "want deny with reason policy, got deny by /acme/prod/batch-encrypts, which obliges to encrypt: encryption-unavailable",
		"from: {app: batch}, to: {ext: bank}, port: any, expect: allow, reason: fallback, encrypted: true":                           "",
		"from: {app: nobody}, to: /acme/bank, port: any, expect: deny, reason: encryption-unavailable":                               "want deny with reason encryption-unavailable, got deny by default",
		"from: /acme/bank, to: /acme/prod/office, port: any, expect: deny":                                                           "both ends are Externals",
		"from: {app: web}, to: /acme/bank, port: any, expect: allow, encrypted: true":                                                "nothing can be encrypted to or from an External",
		"from: {app: web}, to: /acme/bank, port: any, expect: allow, reason: encryption-unavailable":                                 "what cannot be encrypted is denied",
		"from: {app: web}, to: /acme/prod/bank, port: any, expect: allow":                                                            `no External "/acme/prod/bank" holds in /acme/prod`,
		"from: {app: web}, to: {app: api}, port: any, expect: deny, reason: default, by: /acme/prod/out":                             "a default is decided by no policy",
	} {
		db := newDB(t, withExternal)
		if _, err := Parse("test.yaml", []byte(testYAML(test))); err != nil {
			if want == "" {
				t.Errorf("%s: %v", test, err)
			}
			wantText(t, err.Error(), want)
			continue
		}
		if want != "" {
			wantText(t, refused(t, db, testYAML(test)), want)
			continue
		}
		commit(t, db, testYAML(test), 2)
	}
}

// An External that a test speaks of cannot go without it, and what a test says is read as
// it was written.
func TestAnExternalThatATestSpeaksOf(t *testing.T) {
	db := newDB(t, withExternal)
	const test = "from: {app: web}, to: /acme/bank, port: tcp/443, expect: allow, by: /acme/prod/out, reason: policy"
	commit(t, db, testYAML(test), 2)
	wantText(t, refused(t, db, "", Key{KindExternal, "/acme", "bank"}), "there is no External /acme/bank here")
	r := db.Snapshot().Get(KindPolicyTest, "/acme/prod", "t")
	wantText(t, string(FormatYAML(r)), "to: /acme/bank,", "reason: policy}")
	if again := parse(t, string(FormatYAML(r))); FormatYAML(again[0].Resource) == nil || string(FormatYAML(again[0].Resource)) != string(FormatYAML(r)) {
		t.Errorf("read back: %s", FormatYAML(again[0].Resource))
	}
	cases, err := db.Test(parse(t, policyYAML("/acme", "shut", "subject: any\nverb: deny\nobject: {app: web}")+
		policyYAML("/acme", "shut-in", "subject: {app: web}\nverb: deny\nobject: any\npropagate: true")), "")
	if err != nil || len(cases) != 1 || len(cases[0].Sides) != 1 {
		t.Fatalf("%+v, %v", cases, err)
	}
	wantText(t, cases[0].Failure, "want allow, got deny by /acme/shut-in")
}
