package proxy

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"github.com/symbolon/symbolon/internal/settings"
)

const minimal = "controller: {address: 198.51.100.5:7443}\n"

func env(vars map[string]string) func(string) (string, bool) {
	return func(k string) (string, bool) { v, ok := vars[k]; return v, ok }
}

func file(t *testing.T, yaml string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "proxy.yaml")
	if err := os.WriteFile(name, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// keysOf lists the leaves of a configuration's YAML.
func keysOf(t reflect.Type, prefix string) (keys []string) {
	for f := range t.Fields() {
		name := prefix + f.Tag.Get("yaml")
		if f.Type.Kind() == reflect.Struct && f.Type.PkgPath() == t.PkgPath() {
			keys = append(keys, keysOf(f.Type, name+".")...)
			continue
		}
		keys = append(keys, name)
	}
	return keys
}

func TestEveryKeyHasAFlagAndAVariable(t *testing.T) {
	want := keysOf(reflect.TypeFor[Config](), "")
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	settings.AddFlags(flags, Settings())
	var got []string
	for _, s := range Settings() {
		got = append(got, s.Key)
		if f := flags.Lookup(strings.NewReplacer(".", "-", "_", "-").Replace(s.Key)); f == nil || !strings.Contains(f.Usage, s.Env()) {
			t.Errorf("%s: flag %+v", s.Key, f)
		}
		if s.Env() != "SYMBOLON_"+strings.ToUpper(strings.ReplaceAll(s.Key, ".", "_")) {
			t.Errorf("%s: variable %s", s.Key, s.Env())
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("keys of the file (-) and settings (+):\n%s", diff)
	}
}

// values are every key's, in the file and as text, other than the default.
var values = map[string][2]string{ // yaml, text
	"controller.address":             {"198.51.100.9:7443", "198.51.100.9:7443"},
	"controller.join_token_file":     {"/tmp/t", "/tmp/t"},
	"controller.join":                {"token", "token"},
	"controller.cert_file":           {"/tmp/c", "/tmp/c"},
	"controller.key_file":            {"/tmp/k", "/tmp/k"},
	"controller.ca_file":             {"/tmp/ca", "/tmp/ca"},
	"identity.source":                {"spire", "spire"},
	"identity.spire.admin_socket":    {"/tmp/a.sock", "/tmp/a.sock"},
	"identity.spire.api":             {"broker", "broker"},
	"identity.spire.broker_socket":   {"/tmp/b.sock", "/tmp/b.sock"},
	"identity.spire.hint":            {"tunnel", "tunnel"},
	"identity.spire.path_prefix":     {"/prod", "/prod"},
	"identity.workload_api":          {`"unix:///tmp/w.sock"`, "unix:///tmp/w.sock"},
	"identity.serve_workload_api":    {"/tmp/serve.sock", "/tmp/serve.sock"},
	"identity.cloud":                 {"gcp", "gcp"},
	"identity.cloud_metadata":        {"127.0.0.1:8080", "127.0.0.1:8080"},
	"identity.containers":            {"[docker:/tmp/d.sock, cri:/tmp/c.sock]", "docker:/tmp/d.sock,cri:/tmp/c.sock"},
	"identity.attributes":            {"[proc.args, proc.start]", "proc.args,proc.start"},
	"redirect.inbound":               {"tproxy", "tproxy"},
	"redirect.preserve_source":       {"true", "true"},
	"redirect.inbound_ports":         {"[5432, 8000-8100]", "5432, 8000-8100"},
	"redirect.exclude_inbound_ports": {"[22, 2222]", "22,2222"},
	"redirect.outbound":              {`[10.0.0.0/8, "fd00::/8"]`, "10.0.0.0/8,fd00::/8"},
	"redirect.exclude_outbound":      {"[10.9.0.0/16]", "10.9.0.0/16"},
	"redirect.on_exit":               {"open", "open"},
	"redirect.owner":                 {"ebpf", "ebpf"},
	"tunnel.reuse":                   {"false", "false"},
	"tunnel.record_layer":            {"stock", "stock"},
	"tunnel.peer_timeout":            {"30s", "30s"},
	"tunnel.idle_timeout":            {"8h", "8h"},
	"tunnel.half_close_timeout":      {"10m", "10m"},
	"tunnel.fast_open":               {"true", "true"},
	"tunnel.key_exchange":            {"[X25519, P-256]", "X25519,P-256"},
	"limits.connections":             {"500", "500"},
	"limits.handshakes":              {"50", "50"},
	"limits.handshakes_per_source":   {"5", "5"},
	"limits.handshakes_per_user":     {"7", "7"},
	"limits.workload_share":          {"30", "30"},
	"admin":                          {`"[::1]:9000"`, "[::1]:9000"},
	"socket":                         {"/tmp/s", "/tmp/s"},
	"flows":                          {"/tmp/f", "/tmp/f"},
	"log_level":                      {"debug", "debug"},
	"drain_timeout":                  {"3s", "3s"},
	"handover_timeout":               {"7s", "7s"},
	"quiet_timeout":                  {"1500ms", "1500ms"},
}

// Every key says the same in the file, in the environment and as a flag.
func TestKeysInEveryPlace(t *testing.T) {
	defaults, err := LoadConfig(file(t, minimal), env(nil), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range Settings() {
		v, ok := values[s.Key]
		if !ok {
			t.Errorf("%s has no value in this test", s.Key)
			continue
		}
		section, leaf, nested := strings.Cut(s.Key, ".")
		yaml := s.Key + ": " + v[0] + "\n"
		if nested {
			yaml = section + ": {" + strings.ReplaceAll(leaf, ".", ": {") + ": " + v[0] + strings.Repeat("}", strings.Count(s.Key, ".")) + "\n"
		}
		if section == "controller" {
			yaml = "controller: {" + leaf + ": " + v[0] + ", " + "address: 198.51.100.5:7443}\n"
		} else {
			yaml = minimal + yaml
		}
		if s.Key == "controller.address" {
			yaml = "controller: {address: " + v[0] + "}\n"
		}
		inFile, err := LoadConfig(file(t, yaml), env(nil), nil)
		if err != nil {
			t.Errorf("%s in the file: %v", s.Key, err)
			continue
		}
		inEnv, err := LoadConfig(file(t, minimal), env(map[string]string{s.Env(): v[1]}), nil)
		if err != nil {
			t.Errorf("%s: %v", s.Env(), err)
		}
		asFlag, err := LoadConfig(file(t, minimal), env(nil), map[string]string{s.Flag(): v[1]})
		if err != nil {
			t.Errorf("--%s: %v", s.Flag(), err)
		}
		if diff := cmp.Diff(inFile, inEnv, comparePorts); diff != "" {
			t.Errorf("%s: file (-) and environment (+):\n%s", s.Key, diff)
		}
		if diff := cmp.Diff(inFile, asFlag, comparePorts); diff != "" {
			t.Errorf("%s: file (-) and flag (+):\n%s", s.Key, diff)
		}
		if cmp.Equal(inFile, defaults, comparePorts) && s.Key != "controller.join" { // its other value needs files
			t.Errorf("%s: the value of this test changes nothing", s.Key)
		}
	}
}

var comparePorts = cmp.Exporter(func(t reflect.Type) bool { return strings.HasSuffix(t.PkgPath(), "/redirect") })

func TestPrecedence(t *testing.T) {
	name := file(t, minimal+"drain_timeout: 1s\nlog_level: warn\nflows: /file\n")
	c, err := LoadConfig(name, env(map[string]string{"SYMBOLON_DRAIN_TIMEOUT": "2s", "SYMBOLON_LOG_LEVEL": "error"}), map[string]string{"drain-timeout": "3s"})
	if err != nil {
		t.Fatal(err)
	}
	if c.DrainTimeout != 3*time.Second || c.LogLevel != "error" || c.Flows != "/file" || c.Socket != DefaultConfig().Socket {
		t.Errorf("flag %v, environment %q, file %q, default %q", c.DrainTimeout, c.LogLevel, c.Flows, c.Socket)
	}
}

// The mistakes of people: each error names the key, and what to write instead.
func TestMistakes(t *testing.T) {
	for _, tc := range []struct {
		name, yaml string
		want       []string
	}{
		{"an unknown key", minimal + "verbosity: 9\n", []string{"verbosity", "2", "^"}},
		{"an unknown key below", minimal + "redirect:\n  inbound_prots: [80]\n", []string{"inbound_prots", "3", "^"}},
		{"a key twice", minimal + "admin: 127.0.0.1:1\nadmin: 127.0.0.1:2\n", []string{"admin", "3"}},
		{"no YAML", "controller: {address: [\n", []string{"1"}},
		{"a list for a text", minimal + "socket: [a, b]\n", []string{"socket", "2"}},
		{"no address", "log_level: info\n", []string{"controller.address", "198.51.100.5:7443"}},
		{"an address without a port", "controller: {address: controller.example}\n", []string{"controller.address", "198.51.100.5:7443"}},
		{"an address without a host", `controller: {address: ":7443"}` + "\n", []string{"controller.address", "198.51.100.5:7443"}},
		{"an unknown API of the agent", minimal + "identity: {source: spire, spire: {api: admin}}\n", []string{"identity.spire.api", "delegated or broker"}},
		{"a broker socket by a relative path", minimal + "identity: {source: spire, workload_api: \"unix:///tmp/w.sock\", spire: {api: broker, broker_socket: b.sock}}\n", []string{"identity.spire.broker_socket", "absolute path", "broker.sock"}},
		{"a broker without an SVID of its own", minimal + "identity: {source: spire, spire: {api: broker}}\n", []string{"identity.workload_api", "SPIFFE_ENDPOINT_SOCKET"}},
		{"a socket by a relative path", minimal + "identity: {source: spire, spire: {admin_socket: admin.sock}}\n", []string{"identity.spire.admin_socket", "absolute path", "/run/spire/sockets/admin.sock"}},
		{"a path that is none", minimal + "identity: {source: spire, spire: {path_prefix: prod}}\n", []string{"identity.spire.path_prefix", "such as /prod"}},
		{"a relative socket to serve on", minimal + "identity: {serve_workload_api: w.sock}\n", []string{"identity.serve_workload_api", "absolute path"}},
		{"the host's identity for everybody", minimal + "identity: {source: workload-api, workload_api: unix:///run/a.sock, serve_workload_api: /run/w.sock}\n", []string{"identity.serve_workload_api", "one identity"}},
		{"no Workload API", minimal + "identity: {source: workload-api}\n", []string{"identity.workload_api", "SPIFFE_ENDPOINT_SOCKET", "unix:///"}},
		{"a Workload API without a scheme", minimal + "identity: {source: workload-api, workload_api: /run/a.sock}\n", []string{"identity.workload_api", "unix:///"}},
		{"another way to join", "controller: {address: 198.51.100.5:7443, join: tpm}\n", []string{"controller.join", "tpm", "x509pop"}},
		{"a certificate without its files", "controller: {address: 198.51.100.5:7443, join: x509pop, cert_file: c.pem}\n", []string{"controller.cert_file", "c.pem", "controller.key_file", "controller.ca_file"}},
		{"a cloud without the controller's root", "controller: {address: 198.51.100.5:7443, join: aws}\n", []string{"controller.ca_file", "aws", "ca.pem"}},
		{"another cloud", minimal + "identity: {cloud: oracle}\n", []string{"identity.cloud", "oracle", "aws, gcp, azure or none"}},
		{"two clouds", "controller: {address: 198.51.100.5:7443, join: aws, ca_file: /etc/ca.pem}\nidentity: {cloud: gcp}\n", []string{"identity.cloud", "gcp", "controller.join, aws"}},
		{"a runtime of no kind", minimal + "identity: {containers: [/run/docker.sock]}\n", []string{"identity.containers", "docker:/run/docker.sock"}},
		{"a runtime's relative socket", minimal + "identity: {containers: ['cri:c.sock']}\n", []string{"identity.containers", "absolute path"}},
		{"a metadata service far away", minimal + "identity: {cloud_metadata: 198.51.100.9:80}\n", []string{"identity.cloud_metadata", "198.51.100.9", "169.254.169.254:80"}},
		{"a metadata service by name", minimal + "identity: {cloud_metadata: metadata.google.internal:80}\n", []string{"identity.cloud_metadata", "metadata.google.internal"}},
		{"an attribute that is always there", minimal + "identity: {attributes: [proc.exe]}\n", []string{"identity.attributes", "proc.exe", "proc.args"}},
		{"an unknown source", minimal + "identity: {source: vault}\n", []string{"identity.source", "vault", "use controller"}},
		{"an unknown way", minimal + "redirect: {inbound: magic}\n", []string{"redirect.inbound", "magic", "use redirect or tproxy"}},
		{"a bad port", minimal + "redirect: {inbound_ports: [70000]}\n", []string{"70000"}},
		{"a reversed range", minimal + "redirect: {inbound_ports: [9-1]}\n", []string{"9-1"}},
		{"an address for a network", minimal + "redirect: {outbound: [10.0.0.1]}\n", []string{"redirect.outbound", "10.0.0.1/32"}},
		{"host bits", minimal + "redirect: {exclude_outbound: [10.0.0.1/8]}\n", []string{"redirect.exclude_outbound", "10.0.0.0/8"}},
		{"an unknown way to owners", minimal + "redirect: {owner: guess}\n", []string{"redirect.owner", "guess", "auto", "ebpf", "sock_diag"}},
		{"an unknown exit", minimal + "redirect: {on_exit: maybe}\n", []string{"redirect.on_exit", "maybe", "closed", "open"}},
		{"metrics for everybody", minimal + "admin: 0.0.0.0:15020\n", []string{"admin", "127.0.0.1:15020"}},
		{"metrics without a port", minimal + "admin: 127.0.0.1\n", []string{"admin", "127.0.0.1:15020"}},
		{"an unknown level", minimal + "log_level: loud\n", []string{"log_level", "loud", "debug, info, warn or error"}},
		{"a negative drain", minimal + "drain_timeout: -1s\n", []string{"drain_timeout", "-1s"}},
		{"no connections", minimal + "limits: {connections: 0}\n", []string{"limits.connections", "1 to"}},
		{"more than all", minimal + "limits: {workload_share: 101}\n", []string{"limits.workload_share", "101"}},
		{"no time to hand over", minimal + "handover_timeout: 0s\n", []string{"handover_timeout", "30s"}},
		{"no duration", minimal + "drain_timeout: soon\n", []string{"soon", "proxy.yaml"}},
		{"too much patience", minimal + "quiet_timeout: 1h\n", []string{"quiet_timeout", "1h", "use 0s to 10s"}},
		{"no rest at all", minimal + "tunnel: {idle_timeout: 10ms}\n", []string{"tunnel.idle_timeout", "10ms", "0s"}},
		{"no key exchange", minimal + "tunnel: {key_exchange: []}\n", []string{"tunnel.key_exchange", "X25519MLKEM768"}},
		{"an old key exchange", minimal + "tunnel: {key_exchange: [X25519, RSA]}\n", []string{"tunnel.key_exchange", "RSA", "X25519MLKEM768"}},
		{"too little patience", minimal + "tunnel: {peer_timeout: 10ms}\n", []string{"tunnel.peer_timeout", "10ms", "use 1s to 1h"}},
		{"no boolean", minimal + "tunnel: {reuse: perhaps}\n", []string{"2", "perhaps"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := LoadConfig(file(t, tc.yaml), env(nil), nil)
			if !errors.Is(err, settings.ErrConfig) {
				t.Fatalf("got %v, want a configuration error", err)
			}
			for _, part := range tc.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q does not say %q", err, part)
				}
			}
		})
	}
}

// All mistakes are told at once, and those outside the file say where they were made.
func TestMistakesElsewhere(t *testing.T) {
	_, err := LoadConfig(file(t, "log_level: loud\nadmin: here\nredirect: {on_exit: maybe}\n"), env(nil), nil)
	for _, key := range []string{"controller.address", "log_level", "admin", "redirect.on_exit"} {
		if err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("%v does not tell of %s", err, key)
		}
	}
	if _, err := LoadConfig(file(t, minimal), env(map[string]string{"SYMBOLON_DRAIN_TIMEOUT": "soon"}), nil); !errors.Is(err, settings.ErrConfig) || !strings.Contains(err.Error(), "SYMBOLON_DRAIN_TIMEOUT") {
		t.Errorf("in the environment: %v", err)
	}
	if _, err := LoadConfig(file(t, minimal), env(nil), map[string]string{"redirect-outbound": "everything"}); !errors.Is(err, settings.ErrConfig) || !strings.Contains(err.Error(), "redirect.outbound") {
		t.Errorf("as a flag: %v", err)
	}
	if _, err := LoadConfig(file(t, minimal), env(nil), map[string]string{"no-such": "x"}); !errors.Is(err, settings.ErrConfig) {
		t.Errorf("an unknown flag: %v", err)
	}
	if _, err := LoadConfig(filepath.Join(t.TempDir(), "none.yaml"), env(nil), nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}

// What we publish for copying loads.
func TestPublishedConfigurations(t *testing.T) {
	names, err := filepath.Glob("../examples/*/proxy.yaml")
	if err != nil || len(names) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	for _, name := range names {
		if _, err := LoadConfig(name, env(nil), nil); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Without a file, the environment is enough.
func TestNoFile(t *testing.T) {
	c, err := LoadConfig("", env(map[string]string{"SYMBOLON_CONTROLLER_ADDRESS": "198.51.100.5:7443"}), nil)
	if err != nil {
		t.Fatal(err)
	}
	rules, err := c.Rules()
	if err != nil {
		t.Fatal(err)
	}
	if !rules.FailClosed || rules.InboundPorts.Contains(0) || !rules.ExcludeInbound.Contains(22) || len(rules.Outbound) == 0 {
		t.Errorf("the defaults are %+v", rules)
	}
}

// Which cloud's document is shown follows from how the host enrols, or from what is asked
// beside.
func TestDocument(t *testing.T) {
	const address = "controller: {address: 198.51.100.5:7443, "
	for text, want := range map[string]string{
		minimal:                                "",
		minimal + "identity: {cloud: azure}\n": "azure",
		address + "join: gcp, ca_file: /ca}\n": "gcp",
		address + "join: gcp, ca_file: /ca}\nidentity: {cloud: gcp}\n": "gcp",
	} {
		c, err := LoadConfig(file(t, text), env(nil), nil)
		if err != nil || c.Document() != want {
			t.Errorf("%s: %q, %v; want %q", text, c.Document(), err, want)
		}
	}
}
