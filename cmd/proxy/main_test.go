package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/symbolon/symbolon/proxy"
)

// TestMain makes the test binary the proxy, where a test runs it as one.
func TestMain(m *testing.M) {
	if os.Getenv("SYMBOLON_TEST_MAIN") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// program is the real thing, in a process of its own. Tests give it nothing that it
// could load into the kernel.
func program(t *testing.T, env []string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append([]string{"SYMBOLON_TEST_MAIN=1", "PATH=" + os.Getenv("PATH")}, env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// TestExitCodes: 2 and one line that helps for what the operator must change, 1 for
// what failed.
func TestExitCodes(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	typo := write("typo.yaml", "controller: {address: '198.51.100.5:7443'}\nredirect:\n  on_exti: open\n")
	good := write("good.yaml", "controller: {address: '198.51.100.5:7443'}\n")
	const address = "--controller-address=198.51.100.5:7443"
	for name, test := range map[string]struct {
		env, args []string
		code      int
		want      string
	}{
		"no controller":       {nil, nil, 2, "controller.address"},
		"no such file":        {nil, []string{"--config", dir + "/none.yaml"}, 2, "none.yaml"},
		"unknown key":         {nil, []string{"--config", typo}, 2, "on_exti"},
		"unknown flag":        {nil, []string{"--on-exti", "open"}, 2, "--on-exti"},
		"argument":            {nil, []string{"start"}, 2, "start"},
		"bad value":           {nil, []string{address, "--redirect-on-exit", "ajar"}, 2, "use closed"},
		"bad environment":     {[]string{"SYMBOLON_QUIET_TIMEOUT=soon"}, []string{address}, 2, "SYMBOLON_QUIET_TIMEOUT"},
		"flag over the file":  {nil, []string{"--config", good, "--tunnel-reuse", "perhaps"}, 2, "--tunnel-reuse"},
		"no such source":      {nil, []string{address, "--identity-source", "vault"}, 2, "use controller, spire or workload-api"},
		"relative socket":     {nil, []string{address, "--identity-source", "spire", "--identity-spire-admin-socket", "a.sock"}, 2, "absolute path"},
		"admin for everybody": {nil, []string{address, "--admin", "0.0.0.0:15020"}, 2, "loopback"},
		"debug: no page":      {nil, []string{"debug"}, 2, "arg"},
		"debug: unknown page": {nil, []string{"debug", "keys"}, 2, "keys"},
		"debug: unknown flag": {nil, []string{"debug", "status", "--sockte", "x"}, 2, "--sockte"},
		"debug: no proxy":     {nil, []string{"debug", "status", "--socket", dir + "/none.sock"}, 1, "no proxy runs here"},
		"cleanup: argument":   {nil, []string{"cleanup", "now"}, 2, "now"},
		"forget: argument":    {nil, []string{"forget", "me"}, 2, "me"},
		"forget: nothing":     {nil, []string{"forget", "--socket", dir + "/none.sock"}, 0, ""},
		"version":             {nil, []string{"version"}, 0, "symbolon-proxy"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := program(t, test.env, test.args...)
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				t.Fatal(err)
			}
			if code := cmd.ProcessState.ExitCode(); code != test.code || !bytes.Contains(out, []byte(test.want)) {
				t.Errorf("exit code %d: %s; want %d and %q", code, out, test.code, test.want)
			}
			if bytes.Contains(out, []byte("Usage:")) || bytes.Contains(out, []byte("goroutine")) {
				t.Errorf("more than what helps: %s", out)
			}
		})
	}
}

// TestHelpMentionsEverySetting, by flag and by environment variable, and every
// command.
func TestHelpMentionsEverySetting(t *testing.T) {
	help := func(args ...string) string {
		t.Helper()
		c := command()
		var out bytes.Buffer
		c.SetOut(&out)
		c.SetErr(io.Discard)
		c.SetArgs(append(args, "--help"))
		if err := c.ExecuteContext(context.Background()); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	root := help()
	if len(proxy.Settings()) < 16 {
		t.Errorf("%d settings", len(proxy.Settings()))
	}
	for _, s := range proxy.Settings() {
		if !strings.Contains(root, "--"+s.Flag()+" ") || !strings.Contains(root, "["+s.Env()+"]") {
			t.Errorf("the help lacks --%s or %s", s.Flag(), s.Env())
		}
	}
	for _, c := range command().Commands() {
		if !strings.Contains(root, "  "+c.Name()+" ") {
			t.Errorf("the help lacks %s", c.Name())
		}
		if own := help(c.Name()); len(own) < 40 {
			t.Errorf("%s --help: %q", c.Name(), own)
		}
	}
	for _, page := range debugPages {
		if !strings.Contains(help("debug"), "\n  "+page) {
			t.Errorf("the help of debug lacks %s", page)
		}
	}
}
