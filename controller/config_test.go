package controller_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/symbolon/symbolon/controller"
)

func load(t *testing.T, file string, env, flags map[string]string) (controller.Config, error) {
	t.Helper()
	path := ""
	if file != "" {
		path = filepath.Join(t.TempDir(), "controller.yaml")
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return controller.LoadConfig(path, func(k string) (string, bool) { v, ok := env[k]; return v, ok }, flags)
}

func TestConfigPrecedence(t *testing.T) {
	file := `
trust_domain: file.example
listen: 0.0.0.0:7443
data_dir: /srv/symbolon
store: {kind: bbolt}
ca: {svid_ttl: 12h, rotate_every: 10m, key_file: /etc/symbolon/seal.key}
advertise: [controller.example]
edges: {retention: 48h, per_namespace: 200}
`
	got, err := load(t, file,
		map[string]string{"SYMBOLON_LISTEN": "127.0.0.1:1", "SYMBOLON_CA_SVID_TTL": "6h", "SYMBOLON_TOKEN_FILE": "the CLI's"},
		map[string]string{"listen": "127.0.0.1:2", "advertise": "a.example, 192.0.2.1", "edges-per-namespace": "500"})
	if err != nil {
		t.Fatal(err)
	}
	want := controller.Config{
		TrustDomain: "file.example", Listen: "127.0.0.1:2", DataDir: "/srv/symbolon",
		Advertise: []string{"a.example", "192.0.2.1"}, Store: controller.StoreConfig{Kind: "bbolt"},
		CA:    controller.CAConfig{SVIDTTL: 6 * time.Hour, RotateEvery: 10 * time.Minute, KeyFile: "/etc/symbolon/seal.key"},
		Edges: controller.EdgesConfig{Retention: 48 * time.Hour, PerNamespace: 500}, Federation: controller.DefaultConfig().Federation,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestConfigDefaults(t *testing.T) {
	got, err := load(t, "", nil, map[string]string{"trust-domain": "acme.example"})
	if err != nil {
		t.Fatal(err)
	}
	want := controller.DefaultConfig()
	want.TrustDomain = "acme.example"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	want.CA.SVIDTTL = 48 * time.Hour
	if part, err := load(t, "trust_domain: acme.example\nca: {svid_ttl: 48h}\n", nil, nil); err != nil || !cmp.Equal(want, part) {
		t.Errorf("one key of a section: %+v, %v", part, err)
	}
	want.CA.SVIDTTL = 24 * time.Hour
	if empty, err := load(t, "# nothing yet\n", map[string]string{"SYMBOLON_TRUST_DOMAIN": "acme.example"}, nil); err != nil || !cmp.Equal(want, empty) {
		t.Errorf("an empty file: %+v, %v", empty, err)
	}
}

// TestConfigRefuses: each error names the key and what to do.
func TestConfigRefuses(t *testing.T) {
	const ok = "trust_domain: acme.example\n"
	for name, test := range map[string]struct {
		file       string
		env, flags map[string]string
		words      []string
	}{
		"unknown key":         {file: ok + "lisen: x\n", words: []string{"lisen", "2"}},
		"unknown inner key":   {file: ok + "ca: {ttl: 1h}\n", words: []string{"ttl", "2"}},
		"repeated key":        {file: ok + ok, words: []string{"trust_domain", "2"}},
		"not YAML":            {file: "{", words: []string{"controller.yaml"}},
		"wrong type":          {file: ok + "ca: {svid_ttl: [1]}\n", words: []string{"2"}},
		"no trust domain":     {words: []string{"trust_domain", "acme.example"}},
		"bad trust domain":    {file: "trust_domain: Acme.Example\n", words: []string{"trust_domain", "lower-case"}},
		"IP trust domain":     {file: "trust_domain: 192.0.2.1\n", words: []string{"trust_domain", "address"}},
		"listen":              {file: ok + "listen: 7443\n", words: []string{"listen", "address:port"}},
		"port":                {file: ok + "listen: 0.0.0.0:x\n", words: []string{"listen", "port"}},
		"relative data_dir":   {file: ok + "data_dir: state\n", words: []string{"data_dir", "absolute"}},
		"relative key_file":   {file: ok + "ca: {key_file: k}\n", words: []string{"ca.key_file", "absolute"}},
		"etcd":                {file: ok + "store: {kind: etcd}\n", words: []string{"store.kind", "bbolt"}},
		"unknown store":       {file: ok + "store: {kind: mysql}\n", words: []string{"store.kind", "mysql", "bbolt"}},
		"upstream cert alone": {file: ok + "ca: {upstream_cert_file: /c}\n", words: []string{"ca.upstream_cert_file", "upstream_key_file"}},
		"relative upstream":   {file: ok + "ca: {upstream_cert_file: c, upstream_key_file: /k}\n", words: []string{"ca.upstream_cert_file", "absolute"}},
		"next cert alone":     {file: ok + "ca: {next_cert_file: /c}\n", words: []string{"ca.next_cert_file", "next_key_file"}},
		"relative next key":   {file: ok + "ca: {next_cert_file: /c, next_key_file: k}\n", words: []string{"ca.next_key_file", "absolute"}},
		"SPIRE's API alone":   {file: ok + "ca: {upstream_spire_workload_api: \"unix:///a\"}\n", words: []string{"ca.upstream_spire_server", "goes with"}},
		"SPIRE's API by TCP":  {file: ok + "ca: {upstream_spire_workload_api: \"/a\", upstream_spire_server: \"h:1\"}\n", words: []string{"ca.upstream_spire_workload_api", "unix:///run"}},
		"SPIRE without port":  {file: ok + "ca: {upstream_spire_workload_api: \"unix:///a\", upstream_spire_server: h}\n", words: []string{"ca.upstream_spire_server", "address:port"}},
		"SPIRE and a CA":      {file: ok + "ca: {upstream_spire_workload_api: \"unix:///a\", upstream_spire_server: \"h:1\", upstream_cert_file: /c, upstream_key_file: /k}\n", words: []string{"ca.upstream_spire_server", "not both"}},
		"rotate too often":    {file: ok + "ca: {rotate_every: 1s}\n", words: []string{"ca.rotate_every", "1m"}},
		"ttl below rotation":  {file: ok + "ca: {svid_ttl: 30m, rotate_every: 30m}\n", words: []string{"ca.svid_ttl", "twice"}},
		"ttl too long":        {file: ok + "ca: {svid_ttl: 8760h}\n", words: []string{"ca.svid_ttl", "or less"}},
		"advertise":           {file: ok + "advertise: [\"a.example:7443\"]\n", words: []string{"advertise", "port"}},
		"edges too short":     {file: ok + "edges: {retention: 1m}\n", words: []string{"edges.retention", "1h"}},
		"too few edges":       {file: ok + "edges: {per_namespace: 0}\n", words: []string{"edges.per_namespace", "100"}},
		"edges, not a number": {file: ok, flags: map[string]string{"edges-per-namespace": "many"}, words: []string{"--edges-per-namespace", "many"}},
		"environment":         {file: ok, env: map[string]string{"SYMBOLON_CA_SVID_TTL": "soon"}, words: []string{"SYMBOLON_CA_SVID_TTL", "soon"}},
		"flag":                {file: ok, flags: map[string]string{"ca-rotate-every": "soon"}, words: []string{"--ca-rotate-every", "soon"}},
		"unknown flag":        {file: ok, flags: map[string]string{"nope": ""}, words: []string{"--nope"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(t, test.file, test.env, test.flags)
			if !errors.Is(err, controller.ErrConfig) {
				t.Fatalf("err = %v, want ErrConfig", err)
			}
			for _, word := range test.words {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("err = %q, want it to say %q", err, word)
				}
			}
		})
	}
	if _, err := controller.LoadConfig("/nowhere/controller.yaml", os.LookupEnv, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no such file: %v", err)
	}
}

// TestSettingsCoverTheFile: every key has its flag, as promised.
func TestSettingsCoverTheFile(t *testing.T) {
	var flags []string
	for _, s := range controller.Settings() {
		flags = append(flags, s.Flag())
		if want := "SYMBOLON_" + strings.ToUpper(strings.ReplaceAll(s.Flag(), "-", "_")); s.Env() != want {
			t.Errorf("%s: environment %s, want %s", s.Key, s.Env(), want)
		}
	}
	want := []string{"trust-domain", "listen", "advertise", "data-dir", "store-kind", "ca-svid-ttl", "ca-rotate-every", "ca-key-file",
		"ca-upstream-cert-file", "ca-upstream-key-file", "ca-upstream-spire-workload-api", "ca-upstream-spire-server",
		"ca-next-cert-file", "ca-next-key-file", "enrolment-x509pop",
		"enrolment-cloud-aws", "enrolment-cloud-gcp", "enrolment-cloud-azure", "edges-retention", "edges-per-namespace",
		"federation-listen", "federation-profile", "federation-cert-file", "federation-key-file", "federation-refresh-hint", "federation-web-ca-file"}
	if diff := cmp.Diff(want, flags); diff != "" {
		t.Error(diff)
	}
}
