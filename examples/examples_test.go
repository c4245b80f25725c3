// Package examples holds what people copy; its test holds that it works.
package examples

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/symbolon/symbolon/controller"
	"github.com/symbolon/symbolon/policydb"
	"github.com/symbolon/symbolon/proxy"
)

func noEnv(string) (string, bool) { return "", false }

// Each directory called policy applies as a whole, without a warning, to a fresh
// controller; its PolicyTests run and pass.
func TestPoliciesApply(t *testing.T) {
	dirs, err := filepath.Glob("*/policy")
	if err != nil || len(dirs) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	for _, dir := range dirs {
		t.Run(dir, func(t *testing.T) {
			docs := mustParse(t, "root", []byte("kind: Namespace\nname: /\nmode: enforce\ndefault: deny\nprotection: encrypted\n"))
			err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
				if err != nil || d.IsDir() {
					return err
				}
				data, err := os.ReadFile(path)
				if err == nil {
					docs = append(docs, mustParse(t, path, data)...)
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			plan, err := policydb.NewDB().Plan(docs, nil, false)
			if err != nil {
				t.Fatal(err)
			}
			if len(plan.TestResults) == 0 {
				t.Error("no PolicyTest ran")
			}
			for _, r := range plan.TestResults {
				if !r.GetPassed() {
					t.Errorf("%s: %s", r.GetTest(), r.GetMessage())
				}
			}
		})
	}
}

func mustParse(t *testing.T, file string, data []byte) []policydb.Document {
	t.Helper()
	docs, err := policydb.Parse(file, data)
	if err != nil {
		t.Fatal(err)
	}
	return docs
}

func TestConfigurationsLoad(t *testing.T) {
	if _, err := controller.LoadConfig("quickstart/controller.yaml", noEnv, nil); err != nil {
		t.Error(err)
	}
	if _, err := proxy.LoadConfig("quickstart/proxy.yaml", noEnv, nil); err != nil {
		t.Error(err)
	}
}
