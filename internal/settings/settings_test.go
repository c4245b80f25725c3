package settings_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"github.com/symbolon/symbolon/internal/settings"
)

// config has one of each sort of setting.
type config struct {
	Name   string   `yaml:"name"`
	Ports  []string `yaml:"ports"`
	Server server   `yaml:"server"`
}

type server struct {
	DialTimeout time.Duration `yaml:"dial_timeout"`
	Address     string        `yaml:"address"`
}

func defaults() config {
	return config{Name: "default", Ports: []string{"1", "2"}, Server: server{time.Second, "default:1"}}
}

var all = []settings.Setting[config]{
	{Key: "name", Usage: "what it is called", Set: settings.Text(func(c *config) *string { return &c.Name })},
	{Key: "ports", Usage: "a list", Set: settings.List(func(c *config) *[]string { return &c.Ports })},
	{Key: "server.dial_timeout", Usage: "a time", Set: settings.Duration(func(c *config) *time.Duration { return &c.Server.DialTimeout })},
	{Key: "server.address", Usage: "an address", Set: settings.Text(func(c *config) *string { return &c.Server.Address })},
}

// write makes a file; empty: there is none.
func write(t *testing.T, text string) string {
	t.Helper()
	if text == "" {
		return ""
	}
	file := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func lookup(env map[string]string) func(string) (string, bool) {
	return func(k string) (string, bool) { v, ok := env[k]; return v, ok }
}

func TestPrecedence(t *testing.T) {
	const file = "name: file\nports: [3]\nserver: {dial_timeout: 3s, address: 'file:1'}\n"
	for name, test := range map[string]struct {
		file       string
		env, flags map[string]string
		want       config
	}{
		"defaults":                           {want: defaults()},
		"a file of comments changes nothing": {file: "# name: file\n", want: defaults()},
		"file over defaults":                 {file: file, want: config{"file", []string{"3"}, server{3 * time.Second, "file:1"}}},
		"what the file leaves out stays, in sections too": {
			file: "server: {address: 'file:1'}\n", want: config{"default", []string{"1", "2"}, server{time.Second, "file:1"}},
		},
		"environment over file": {
			file: file, env: map[string]string{"SYMBOLON_NAME": "env", "SYMBOLON_PORTS": "4, 5", "SYMBOLON_SERVER_DIAL_TIMEOUT": "4s"},
			want: config{"env", []string{"4", "5"}, server{4 * time.Second, "file:1"}},
		},
		"flags over environment": {
			file: file, env: map[string]string{"SYMBOLON_NAME": "env", "SYMBOLON_SERVER_DIAL_TIMEOUT": "4s"},
			flags: map[string]string{"name": "flag", "server-address": "flag:1"},
			want:  config{"flag", []string{"3"}, server{4 * time.Second, "flag:1"}},
		},
		"empty is a value": {
			file: file, env: map[string]string{"SYMBOLON_PORTS": ""}, flags: map[string]string{"name": ""},
			want: config{"", nil, server{3 * time.Second, "file:1"}},
		},
		"other programs' variables": {env: map[string]string{"SYMBOLON_TOKEN_FILE": "x", "NAME": "y"}, want: defaults()},
	} {
		t.Run(name, func(t *testing.T) {
			c := defaults()
			if err := settings.Load(&c, all, write(t, test.file), lookup(test.env), test.flags); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, c); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestRefusals say what is wrong and where; all are ErrConfig.
func TestRefusals(t *testing.T) {
	for name, test := range map[string]struct {
		file       string
		env, flags map[string]string
		words      []string
	}{
		"unknown key":          {file: "name: x\n\nnaem: y\n", words: []string{"c.yaml", "3", "naem"}},
		"unknown key inside":   {file: "server:\n  address: 'x:1'\n  addr: 'x:1'\n", words: []string{"3", "addr"}},
		"key twice":            {file: "name: x\nname: y\n", words: []string{"2", "name"}},
		"flag's spelling":      {file: "server: {dial-timeout: 1s}\n", words: []string{"1", "dial-timeout"}},
		"wrong type":           {file: "name: x\nserver: [1]\n", words: []string{"2"}},
		"no duration":          {file: "server: {dial_timeout: soon}\n", words: []string{"soon"}},
		"no YAML":              {file: "name: [\n", words: []string{"c.yaml"}},
		"environment":          {env: map[string]string{"SYMBOLON_SERVER_DIAL_TIMEOUT": "soon"}, words: []string{"SYMBOLON_SERVER_DIAL_TIMEOUT", "soon"}},
		"flag":                 {flags: map[string]string{"server-dial-timeout": "soon"}, words: []string{"--server-dial-timeout", "soon"}},
		"flag that is none":    {flags: map[string]string{"nope": "x"}, words: []string{"--nope"}},
		"a key is no flag":     {flags: map[string]string{"server.address": "x"}, words: []string{"--server.address"}},
		"environment, not hid": {env: map[string]string{"SYMBOLON_SERVER_DIAL_TIMEOUT": "soon"}, flags: map[string]string{"server-dial-timeout": "1s"}, words: []string{"SYMBOLON_SERVER_DIAL_TIMEOUT"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := defaults()
			err := settings.Load(&c, all, write(t, test.file), lookup(test.env), test.flags)
			if !errors.Is(err, settings.ErrConfig) {
				t.Fatalf("err = %v, want ErrConfig", err)
			}
			for _, word := range test.words {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("err = %q, want it to say %q", err, word)
				}
			}
		})
	}
	c := defaults()
	err := settings.Load(&c, all, filepath.Join(t.TempDir(), "none.yaml"), lookup(nil), nil)
	if !errors.Is(err, settings.ErrConfig) || !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "none.yaml") {
		t.Errorf("no such file: %v", err)
	}
}

func TestFile(t *testing.T) {
	there := write(t, "name: x\n")
	gone := filepath.Join(t.TempDir(), "gone.yaml")
	for _, test := range []struct{ named, fallback, want string }{
		{gone, there, gone}, // Load says that it is not there
		{there, gone, there},
		{"", there, there},
		{"", gone, ""},
	} {
		if got, err := settings.File(test.named, test.fallback); got != test.want || err != nil {
			t.Errorf("File(%q, %q) = %q, %v, want %q", test.named, test.fallback, got, err, test.want)
		}
	}
	// Neither there nor absent: to go on without it could mean other settings.
	if got, err := settings.File("", filepath.Join(there, "below-a-file.yaml")); !errors.Is(err, settings.ErrConfig) {
		t.Errorf("File = %q, %v, want ErrConfig", got, err)
	}
}

// TestGiven takes the flags that were set, to whatever value, and none that is not a
// setting.
func TestGiven(t *testing.T) {
	flags := pflag.NewFlagSet("x", pflag.ContinueOnError)
	flags.String("config", "", "the program's own")
	settings.AddFlags(flags, all)
	if err := flags.Parse([]string{"--config", "c", "--name=", "--server-dial-timeout", "1s"}); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"name": "", "server-dial-timeout": "1s"}
	if diff := cmp.Diff(want, settings.Given(flags, all)); diff != "" {
		t.Error(diff)
	}
}

// TestAddFlags: each flag's help names its environment variable.
func TestAddFlags(t *testing.T) {
	flags := pflag.NewFlagSet("x", pflag.ContinueOnError)
	settings.AddFlags(flags, all)
	for _, s := range all {
		f := flags.Lookup(s.Flag())
		if f == nil || f.DefValue != "" || !strings.Contains(f.Usage, s.Usage) || !strings.Contains(f.Usage, s.Env()) {
			t.Errorf("%s: flag %+v", s.Key, f)
		}
	}
	if s := all[2]; s.Flag() != "server-dial-timeout" || s.Env() != "SYMBOLON_SERVER_DIAL_TIMEOUT" {
		t.Errorf("%s: flag %s, environment %s", s.Key, s.Flag(), s.Env())
	}
}

func TestSplit(t *testing.T) {
	for in, want := range map[string][]string{
		"": nil, " , ": nil, "a": {"a"}, " a,b , c,": {"a", "b", "c"}, "a b": {"a b"},
	} {
		if diff := cmp.Diff(want, settings.Split(in)); diff != "" {
			t.Errorf("Split(%q): %s", in, diff)
		}
	}
}
