// Package examples holds what people copy; its test holds that it works.
package examples

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/symbolon/symbolon/controller"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/policydb"
	"github.com/symbolon/symbolon/proxy"
)

func noEnv(string) (string, bool) { return "", false }

// Each directory called policy applies as a whole to a fresh controller; its
// PolicyTests run and pass, and lint finds nothing.
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
			db := policydb.NewDB()
			plan, err := db.Plan(docs, nil, false)
			if err != nil {
				t.Fatal(err)
			}
			findings, _, err := db.LintCandidate(docs, "")
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range findings {
				// A rule for what is not there yet is what this one shows.
				if f.Code == policydb.LintNoKnownWorkload && f.Key.Ref() == "/acme/dev-never-reaches-prod" {
					continue
				}
				t.Errorf("lint: %s", &f)
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

// Whoever runs a program decides: the Profiles of an example give each label to what
// the example means, and to nobody else.
func TestProfilesOfExamples(t *testing.T) {
	for _, tt := range []struct {
		dir, namespace string
		attributes     map[string][]string
		want           string
	}{
		{"hadoop", "/acme/data", map[string][]string{"proc.unit": {"hadoop-namenode.service"}, "os.user": {"prod"}}, "app=hadoop os.user=prod"},
		{"hadoop", "/acme/data", map[string][]string{"proc.unit": {"session-1.scope"}, "os.user": {"alice"}, "os.group": {"myapp_users"}}, "os.group=myapp_users os.user=alice"},
		{"zones", "/acme/shop", map[string][]string{"proc.exe": {"/usr/sbin/nginx"}, "os.user": {"root"}, "host.zone": {"eu-1a"}}, "app=web host.zone=eu-1a os.user=root"},
		{"quarantine", "/acme/prod", map[string][]string{
			"proc.exe": {"/opt/api/api-server"}, "os.user": {"api"}, "vuln.critical": {"CVE-2026-1001"},
		}, "app=api os.user=api vuln=critical"},
		{"quarantine", "/acme/prod", map[string][]string{"proc.exe": {"/opt/api/api-server"}, "os.user": {"api"}, "vuln.low": {"CVE-2026-1002"}}, "app=api os.user=api"},
	} {
		docs := mustParse(t, "root", []byte("kind: Namespace\nname: /\nmode: enforce\ndefault: deny\n"))
		files, err := filepath.Glob(tt.dir + "/policy/*.yaml")
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			docs = append(docs, mustParse(t, file, data)...)
		}
		db := policydb.NewDB()
		plan, err := db.Plan(docs, nil, false)
		if err != nil {
			t.Fatal(err)
		}
		if err := db.Commit(plan, 1); err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, a := range db.Snapshot().Assign(tt.namespace, identity.NewAttributes(tt.attributes)).Claims {
			got = append(got, a.Key+"="+a.Value)
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%s: claims %q, want %q", tt.dir, got, tt.want)
		}
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
	for _, file := range []string{"quickstart/proxy.yaml", "spire/proxy.yaml"} {
		if _, err := proxy.LoadConfig(file, noEnv, nil); err != nil {
			t.Error(err)
		}
	}
}
