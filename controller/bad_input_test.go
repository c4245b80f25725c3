package controller_test

import (
	"fmt"
	"strings"
	"testing"

	"connectrpc.com/connect"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// policyWith is a policy with one line more.
func policyWith(line string) string {
	return "kind: Policy\nnamespace: /acme\nname: x\nsubject: {app: web}\nverb: allow\nobject: {app: db}\n" + line + "\n"
}

// TestBadInput is every kind of wrong file that was thought of: each is refused with
// file, line and caret, over the real API, and the generation that runs is untouched.
func TestBadInput(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	running := w.resources("")
	external := func(name, cidr string) string {
		return "kind: External\nnamespace: /acme\nname: " + name + "\naddresses: {cidrs: [" + cidr + "]}\n"
	}
	bomb := "a: &a [x, x, x, x, x, x, x, x, x]\n"
	for c := 'b'; c <= 'i'; c++ {
		bomb += fmt.Sprintf("%c: &%c [%s*%c]\n", c, c, strings.Repeat(fmt.Sprintf("*%c, ", c-1), 8), c-1)
	}
	for name, test := range map[string]struct {
		content string
		words   []string
	}{
		"typo in a key":                    {policyWith("objekt: any"), []string{"x.yaml:7:1", "objekt", "object"}},
		"typo in a label":                  {policyWith("where: {same: [ap]}"), []string{"x.yaml:7:", `"ap"`, "app"}},
		"typo in an operator":              {strings.Replace(policyWith(""), "{app: db}", "{app: {nott: [db]}}", 1), []string{"x.yaml:6:", "nott", "not"}},
		"typo in a verb":                   {strings.Replace(policyWith(""), "verb: allow", "verb: alow", 1), []string{"x.yaml:5:7", "alow", "allow"}},
		"typo in a port":                   {policyWith("ports: [tcpp/443]"), []string{"x.yaml:7:9", "tcpp/443"}},
		"port out of range":                {policyWith("ports: [tcp/443-70000]"), []string{"x.yaml:7:9", "70000"}},
		"typo in a kind":                   {strings.Replace(policyWith(""), "Policy", "Polcy", 1), []string{"x.yaml:1:7", "Polcy", "Policy"}},
		"an empty map as selector":         {strings.Replace(policyWith(""), "{app: web}", "{}", 1), []string{"x.yaml:4:10", "any"}},
		"an empty list as selector":        {strings.Replace(policyWith(""), "{app: db}", "[]", 1), []string{"x.yaml:6:9", "any"}},
		"a namespace that does not exist":  {strings.Replace(policyWith(""), "/acme", "/acmee", 1), []string{"x.yaml:2:12", "/acmee", `"/acme"`}},
		"a cycle":                          {"kind: Policy\nsubject: &s [*s]\n", []string{"x.yaml:2:10", "anchors"}},
		"an anchors bomb":                  {bomb, []string{"x.yaml:1:4", "anchors"}},
		"overlapping Externals":            {external("a", "203.0.113.0/24") + "---\n" + external("b", "203.0.113.0/24"), []string{"x.yaml:", "203.0.113.0/24", "External /acme/"}},
		"encrypt: yes":                     {policyWith("encrypt: yes"), []string{"x.yaml:7:1", `"encrypt"`, "with: [encrypt]"}},
		"a key twice":                      {policyWith("verb: deny"), []string{"x.yaml:7:1", "twice"}},
		"a deep nest":                      {policyWith("when: " + strings.Repeat("[", 1000)), []string{"x.yaml:7:", "nested"}},
		"not YAML":                         {"kind: [Policy\n", []string{"x.yaml:1:"}},
		"bytes that are not text":          {"kind: \xff\xfe\n", []string{"x.yaml:1:7", "UTF-8"}},
		"the same resource twice":          {policyWith("") + "---\n" + policyWith(""), []string{"x.yaml:", "twice"}},
		"one mistake among what is good":   {policyWith("") + "---\n" + strings.Replace(policyWith("tags: [a]"), "name: x", "name: y", 1), []string{"x.yaml:15:1", "tags"}},
		"a label that is not in the value": {"kind: Namespace\nname: /acme\nmode: enforced\n", []string{"x.yaml:3:7", "enforced", "enforce"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := w.tryApply(&symbolonv1.ApplyRequest{Files: []*symbolonv1.SourceFile{{Name: "x.yaml", Content: []byte(test.content)}}})
			wantCode(t, err, connect.CodeInvalidArgument, append(test.words, "^")...)
			w.unchanged(running)
		})
	}
	t.Run("a file of 50 MB", func(t *testing.T) {
		content := []byte(strings.Repeat("#"+strings.Repeat(" ", 99)+"\n", 500_000))
		_, err := w.tryApply(&symbolonv1.ApplyRequest{Files: []*symbolonv1.SourceFile{{Name: "x.yaml", Content: content}}})
		wantCode(t, err, connect.CodeInvalidArgument, "x.yaml", "48 MiB", "8 MiB", "divide it")
		w.unchanged(running)
	})
}

// unchanged holds that what runs is what did before.
func (w *world) unchanged(before *symbolonv1.ListResourcesResponse) {
	w.t.Helper()
	if now := w.resources(""); now.GetGeneration() != before.GetGeneration() || len(now.GetResources()) != len(before.GetResources()) {
		w.t.Errorf("generation %d with %d resources, before %d with %d", now.GetGeneration(), len(now.GetResources()), before.GetGeneration(), len(before.GetResources()))
	}
}

// TestAHundredThousandPolicies in one apply are one generation; one mistake in them is
// none, and is found.
func TestAHundredThousandPolicies(t *testing.T) {
	if testing.Short() {
		t.Skip("some ten seconds of CPU")
	}
	const n, inFile = 100_000, 25_000
	w := newWorld(t)
	w.apply(tree)
	before := w.resources("")
	files := func(last string) []*symbolonv1.SourceFile {
		var out []*symbolonv1.SourceFile
		for i := 0; i < n; i += inFile {
			var b strings.Builder
			for j := i; j < i+inFile; j++ {
				verb := "allow"
				if j == n-1 {
					verb = last
				}
				fmt.Fprintf(&b, "---\nkind: Policy\nnamespace: /acme\nname: p-%06d\nsubject: {app: app-%d}\nverb: %s\nobject: {app: app-%d}\n", j, j, verb, j+1)
			}
			out = append(out, &symbolonv1.SourceFile{Name: fmt.Sprintf("%d.yaml", i/inFile), Content: []byte(b.String())})
		}
		return out
	}
	_, err := w.tryApply(&symbolonv1.ApplyRequest{Files: files("alow")[3:]})
	wantCode(t, err, connect.CodeInvalidArgument, fmt.Sprintf("3.yaml:%d:7", 7*inFile-1), "alow", "^")
	w.unchanged(before)
	res, err := w.tryApply(&symbolonv1.ApplyRequest{Files: files("allow")})
	if err != nil {
		t.Fatal(err)
	}
	if res.GetGeneration() != before.GetGeneration()+1 || len(res.GetChanges()) != n {
		t.Errorf("generation %d after %d, %d changes", res.GetGeneration(), before.GetGeneration(), len(res.GetChanges()))
	}
}
