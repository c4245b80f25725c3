package policydb

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestTheManualsExamplesApply: what docs/policy.md shows can be applied as it stands.
func TestTheManualsExamplesApply(t *testing.T) {
	manual, err := os.ReadFile("../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	var examples []string
	for _, m := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllSubmatch(manual, -1) {
		examples = append(examples, string(m[1]))
	}
	if len(examples) < 7 {
		t.Fatalf("%d examples were found", len(examples))
	}
	db := newDB(t, strings.Join(examples, "---\n"))
	if n := len(db.Snapshot().List(KindPolicyTest, "")); n != 1 {
		t.Errorf("%d PolicyTests ran", n)
	}
	// The error that it shows is the one that is made.
	_, err = Parse("web.yaml", []byte("kind: Policy\nnamespace: /acme\nname: p\nsubjct: {app: web}\nverb: allow\nobject: any\n"))
	if err == nil || !strings.Contains(string(manual), err.Error()) {
		t.Errorf("the manual does not show:\n%v", err)
	}
}
