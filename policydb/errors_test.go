package policydb

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files of testdata anew")

// TestSyntaxErrors holds what Parse says of each file of testdata/syntax to the
// golden file beside it: people read these texts.
func TestSyntaxErrors(t *testing.T) {
	golden(t, "testdata/syntax", func(t *testing.T, file string, data []byte) error {
		_, err := Parse(file, data)
		var se *SyntaxErrors
		if !errors.As(err, &se) {
			t.Fatalf("want SyntaxErrors, got %T: %v", err, err)
		}
		for _, e := range se.Errors {
			if e.Line < 1 || e.Column < 1 || !strings.Contains(e.Excerpt, "^") {
				t.Errorf("an error without its place: %#v", e)
			}
		}
		return err
	})
}

// TestPlanErrors does the same for files that are well formed but cannot be applied.
func TestPlanErrors(t *testing.T) {
	golden(t, "testdata/plan", func(t *testing.T, file string, data []byte) error {
		docs, err := Parse(file, data)
		if err != nil {
			t.Fatal(err)
		}
		db := newDB(t, tree)
		db.TrustDomain = "acme.example"
		before := db.Snapshot()
		p, err := db.Plan(docs, nil, false)
		var ve *ValidationErrors
		if p != nil || !errors.As(err, &ve) {
			t.Fatalf("want ValidationErrors, got %v, %T: %v", p, err, err)
		}
		if db.Snapshot() != before {
			t.Error("a refused plan changed the set")
		}
		return err
	})
}

func golden(t *testing.T, dir string, try func(*testing.T, string, []byte) error) {
	files, err := filepath.Glob(dir + "/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no files in %s: %v", dir, err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".yaml")
		t.Run(name, func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := try(t, name+".yaml", data).Error() + "\n"
			if strings.ContainsFunc(got, func(r rune) bool { return r < ' ' && r != '\n' && r != '\t' }) {
				t.Errorf("control characters in %q", got)
			}
			path := strings.TrimSuffix(file, ".yaml") + ".golden"
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestFilesBeyondTheBounds(t *testing.T) {
	if _, err := Parse("big.yaml", make([]byte, 50<<20)); err == nil || !strings.Contains(err.Error(), "at most 8 MiB") {
		t.Errorf("50 MiB: %v", err)
	}
	if _, err := Parse("big.yaml", []byte("kind: Policy\nname: "+strings.Repeat("x", maxDocumentBytes))); err == nil || !strings.Contains(err.Error(), "larger than 1024 KiB") {
		t.Errorf("a large document: %v", err)
	}
	many := "kind: Policy\nsubject: {app: [" + strings.Repeat("x, ", maxDocumentTokens) + "x]}\n"
	if _, err := Parse("big.yaml", []byte(many)); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("many tokens: %v", err)
	}
	wrongs := strings.Repeat("kind: Nonsense\n---\n", 1000)
	var se *SyntaxErrors
	if _, err := Parse("big.yaml", []byte(wrongs)); !errors.As(err, &se) || len(se.Errors) != maxErrors || se.Omitted != 950 {
		t.Errorf("1000 errors: %v", err)
	}
}
