package policydb

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// everything has each kind with each of its keys: the example of docs/policy.md.
const everythingFile = "testdata/everything.yaml"

func everything(t testing.TB) []byte {
	t.Helper()
	data, err := os.ReadFile(everythingFile)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestFormatIsCanonical(t *testing.T) {
	docs, err := Parse("everything.yaml", everything(t))
	if err != nil {
		t.Fatal(err)
	}
	var got []byte
	for _, d := range docs {
		got = append(append(got, "---\n"...), FormatYAML(d.Resource)...)
	}
	const path = "testdata/everything.golden"
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	var kindsSeen []string
	for _, d := range docs {
		kindsSeen = append(kindsSeen, KindOf(d.Resource))
		roundTrip(t, d.Resource)
	}
	for _, k := range Kinds() {
		if !slices.Contains(kindsSeen, k) {
			t.Errorf("%s has no %s", everythingFile, k)
		}
	}
}

// TestOrderOfWordsIsNotAChange: what means the same reads as the same.
func TestOrderOfWordsIsNotAChange(t *testing.T) {
	a := resources(t, policyYAML("/acme", "p", "subject: {app: [b, a, a], env: prod}\nverb: allow\nobject: any\nports: [udp/53, tcp/443]\nwhen: {days: \"sat,fri,thu\", timezone: UTC}"))
	b := resources(t, policyYAML("/acme", "p", "object: any\nports: [tcp/443, udp/53]\nverb: allow\nmode: enforce\nsubject:\n  env: [prod]\n  app: [a, b]\nwhen: {days: thu-sat, timezone: UTC}"))
	if diff := cmp.Diff(a, b, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestQuotedStringsComeBack(t *testing.T) {
	for _, s := range []string{
		"", " ", "a b", "yes", "No", "null", "~", "true", "1", "1.0", "007", "0x1f", "1e3", ".inf", "-", "- a", "a: b", "a #b", "#", "{", "[a", "*a", "&a", "!a",
		"|", ">", "%", "@", "`", "'", `"`, `\`, "ü", "日本", "a=b", "=", "/usr/bin/x", "203.0.113.0/24", "1.2.3.4", "2027-01-01", "12:30", "<<", "---", "...", "?", "? a",
		"\u00a0", "\u2028", "\u2029", "\ufeff", "\U000e0001", "\U0001F600", "a\\u0041", "<&>", ",", "a,b", "10:20:30", "+1", "_", "y", "0", "-1", "a'b\"c",
	} {
		r := &symbolonv1.Resource{Namespace: "/acme", Name: "p", Kind: &symbolonv1.Resource_Policy{Policy: &symbolonv1.Policy{
			Subject: &symbolonv1.Selector{Terms: []*symbolonv1.Term{{Clauses: []*symbolonv1.Clause{
				{Key: "app", Operator: &symbolonv1.Clause_In{In: &symbolonv1.Values{Values: []string{s}}}},
				{Key: "env", Operator: &symbolonv1.Clause_Not{Not: &symbolonv1.Values{Values: []string{s}}}},
			}}}},
			Object: &symbolonv1.Selector{Any: true}, Verb: symbolonv1.Verb_VERB_ALLOW, Mode: symbolonv1.Mode_MODE_ENFORCE,
		}}}
		roundTrip(t, r)
	}
}

// roundTrip: Parse(FormatYAML(r)) is r, for r that is canonical.
func roundTrip(t testing.TB, r *symbolonv1.Resource) {
	t.Helper()
	text := FormatYAML(r)
	docs, err := Parse("formatted.yaml", text)
	if err != nil || len(docs) != 1 {
		t.Fatalf("%d documents, %v, in:\n%s", len(docs), err, text)
	}
	if !proto.Equal(r, docs[0].Resource) {
		t.Fatalf("-was +read back:\n%s\n%s", cmp.Diff(r, docs[0].Resource, protocmp.Transform()), text)
	}
}

// FuzzParse: no bytes make it panic, and what it reads it writes so that it reads
// the same again.
func FuzzParse(f *testing.F) {
	f.Add(everything(f))
	for _, dir := range []string{"testdata/syntax", "testdata/plan"} {
		files, err := filepath.Glob(dir + "/*.yaml")
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 64<<10 {
			t.Skip("large documents cost time and show nothing more")
		}
		docs, err := Parse("fuzz.yaml", data)
		if err != nil {
			_ = err.Error()
			return
		}
		for _, d := range docs {
			roundTrip(t, d.Resource)
			if got := d.at(problem{[]any{"name"}, mistake{"m", ""}}); got.Line < d.Line {
				t.Fatalf("an error in a document of line %d is placed at %d", d.Line, got.Line)
			}
		}
	})
}
