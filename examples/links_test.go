package examples

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	link = regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
	// A path of this repository in backquotes: below one of its directories.
	quoted = regexp.MustCompile("`((?:api|cmd|controller|docs|examples|flow|hack|identity|integration|internal|mtls|packaging|policydb|proxy|redirect)/[A-Za-z0-9_./-]+)`")
)

// TestDocumentsNameWhatIsThere: every link and every path in the documents leads to a
// file or a directory of the repository.
func TestDocumentsNameWhatIsThere(t *testing.T) {
	documents, err := filepath.Glob("../*.md")
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	checked := 0
	for _, document := range append(documents, more...) {
		text, err := os.ReadFile(document)
		if err != nil {
			t.Fatal(err)
		}
		check := func(name, path string) {
			checked++
			if _, err := os.Stat(path); err != nil {
				t.Errorf("%s names %s: %v", filepath.Base(document), name, err)
			}
		}
		for _, m := range link.FindAllSubmatch(text, -1) {
			check(string(m[1]), filepath.Join(filepath.Dir(document), string(m[1])))
		}
		for _, m := range quoted.FindAllSubmatch(text, -1) {
			if name := string(m[1]); !strings.Contains(name, "...") {
				check(name, filepath.Join("..", name))
			}
		}
	}
	if checked < 20 {
		t.Errorf("only %d names were found in %v", checked, documents)
	}
}
