package cli

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// Whoever cannot prove to be the controller does not get the token.
func TestTokenIsNotSentToAnImpostor(t *testing.T) {
	for name, opts := range map[string]leafOptions{
		"a host's certificate":          {uris: []string{"spiffe://acme.example/symbolon/host/h1"}},
		"a workload's certificate":      {uris: []string{"spiffe://acme.example/acme/prod/web"}},
		"a workload called controller":  {uris: []string{"spiffe://acme.example/acme/symbolon/controller"}},
		"no SPIFFE ID":                  {},
		"another scheme":                {uris: []string{"https://acme.example/symbolon/controller"}},
		"two IDs":                       {uris: []string{controllerID, "spiffe://acme.example/acme/prod/web"}},
		"an expired certificate":        {uris: []string{controllerID}, notAfter: now.Add(-time.Second)},
		"not a server's certificate":    {uris: []string{controllerID}, noEKU: true},
		"a path that only begins alike": {uris: []string{controllerID + "/x"}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorldWith(t, newPKI(t, opts))
			populate(w.admin)
			for _, args := range [][]string{{"status"}, {"flows"}} {
				r := w.run(args...)
				if r.code != ExitRefused || !strings.Contains(r.stderr, errNotController.Error()) {
					t.Errorf("%s: exit code %d, want %d; stderr %q", args, r.code, ExitRefused, r.stderr)
				}
			}
			if w.admin.calls != 0 {
				t.Error("a request was sent")
			}
		})
	}
}

func TestAnotherCAIsRefused(t *testing.T) {
	w := newWorld(t)
	other := newPKI(t, leafOptions{uris: []string{controllerID}})
	w.env["SYMBOLON_CA_FILE"] = w.write("other.pem", string(other.rootPEM))
	if r := w.run("status"); r.code != ExitRefused || w.admin.calls != 0 {
		t.Errorf("exit code %d, %d calls; stderr %q", r.code, w.admin.calls, r.stderr)
	}
}

func TestWrongTokenIsRefused(t *testing.T) {
	w := newWorld(t)
	w.env["SYMBOLON_TOKEN_FILE"] = w.write("wrong", "another-token")
	for _, args := range [][]string{{"status"}, {"flows"}, {"host", "list"}} {
		r := w.run(args...)
		if r.code != ExitRefused {
			t.Errorf("%s: exit code %d, want %d", args, r.code, ExitRefused)
		}
		if strings.Contains(r.stderr+r.stdout, "another-token") {
			t.Errorf("%s: the token was printed", args)
		}
	}
}

func TestBadTokenFileIsNotPrinted(t *testing.T) {
	w := newWorld(t)
	w.env["SYMBOLON_TOKEN_FILE"] = w.write("two-lines", "secret-one\nsecret-two\n")
	r := w.run("status")
	if r.code != ExitUsage || strings.Contains(r.stderr, "secret-") {
		t.Errorf("exit code %d, stderr %q", r.code, r.stderr)
	}
}

func TestReadableTokenFileIsWarnedOf(t *testing.T) {
	w := newWorld(t)
	populate(w.admin)
	if err := os.Chmod(w.env["SYMBOLON_TOKEN_FILE"], 0o644); err != nil {
		t.Fatal(err)
	}
	if r := w.run("status"); r.code != ExitOK || !strings.Contains(r.stderr, "can be read by others") {
		t.Errorf("exit code %d, stderr %q", r.code, r.stderr)
	}
}

// A host names itself at enrolment; the operator's terminal must not obey it.
func TestTerminalControlSequencesAreShownNotSent(t *testing.T) {
	evil := "\x1b]0;owned\x07\u009b31m\u202etxt\xff\r\nok"
	w := newWorld(t)
	w.admin.hosts = &symbolonv1.ListHostsResponse{Hosts: []*symbolonv1.Host{{Id: "h", Hostname: strings.ToValidUTF8(evil, "?"), Error: "\x1b[2J"}}}
	w.admin.list = &symbolonv1.ListResourcesResponse{
		Yaml:      "name: \x1b[2J\n",
		Resources: []*symbolonv1.Resource{{Namespace: "/a", Name: "x", Kind: &symbolonv1.Resource_Policy{Policy: &symbolonv1.Policy{}}}},
	}
	w.admin.applied = &symbolonv1.ApplyResponse{Warnings: []string{evil[:20]}, Tests: []*symbolonv1.TestResult{{Test: "\x1b[2J", Message: "\x1b[2J"}}}
	file := w.write("p.yaml", "x")
	for _, args := range [][]string{
		{"host", "list"},
		{"host", "list", "-o", "wide"},
		{"host", "list", "-o", "json"},
		{"host", "list", "-o", "yaml"},
		{"host", "show", "h"},
		{"policy", "get", "/a/x"},
		{"policy", "list", "-o", "yaml"},
		{"policy", "apply", "-f", file},
	} {
		r := w.run(args...)
		for _, c := range r.stdout + r.stderr {
			if c != '\n' && c != '\t' && !unicode.IsPrint(c) {
				t.Errorf("%v: %U reached the terminal", args, c)
			}
		}
		if args[0] == "host" && args[len(args)-1] == "json" {
			var doc struct{ Hosts []struct{ Hostname string } }
			if err := json.Unmarshal([]byte(r.stdout), &doc); err != nil || doc.Hosts[0].Hostname != strings.ToValidUTF8(evil, "?") {
				t.Errorf("JSON does not keep the value: %v %+v", err, doc)
			}
		}
	}
}

func TestSanitize(t *testing.T) {
	for in, want := range map[string]string{
		"plain ü ✓":    "plain ü ✓",
		"a\x1b[0mb":    `a\x1b[0mb`,
		"a\nb":         `a\x0ab`,
		"\xff\u202e":   `\xff\u202e`,
		"\ufffd":       "\ufffd",
		"\U000e0001 x": `\U000e0001 x`,
		"\u009b":       `\u009b`,
		"tab\tand\x00": `tab\x09and\x00`,
	} {
		if got := sanitize(in, false); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	if got := sanitize("a\n\tb\r", true); got != "a\n\tb\\x0d" {
		t.Errorf("multiline: %q", got)
	}
}

func FuzzSanitize(f *testing.F) {
	f.Add("a\x1b[0m\xff\u202e\n")
	f.Fuzz(func(t *testing.T, s string) {
		for _, r := range sanitize(s, false) {
			if !unicode.IsPrint(r) && r != unicode.ReplacementChar {
				t.Fatalf("%q: %U came through", s, r)
			}
		}
		doc, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var before, after string
		if err := errors.Join(json.Unmarshal(doc, &before), json.Unmarshal(escapeJSON(doc), &after)); err != nil || before != after {
			t.Fatalf("%q: escapes change the value: %q, %v", s, after, err)
		}
	})
}

func TestSettingsPrecedence(t *testing.T) {
	w := newWorld(t)
	populate(w.admin)
	address, token, ca := w.env["SYMBOLON_CONTROLLER"], w.env["SYMBOLON_TOKEN_FILE"], w.env["SYMBOLON_CA_FILE"]
	clear(w.env)
	w.env["XDG_CONFIG_HOME"] = filepath.Join(w.dir, "xdg")

	if r := w.run("config", "--controller", address, "--token-file", token, "--ca-file", ca); r.code != ExitOK {
		t.Fatalf("config: exit code %d: %s", r.code, r.stderr)
	}
	path := filepath.Join(w.dir, "xdg", "symbolon", "config.yaml")
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info, err)
	}
	if r := w.run("status"); r.code != ExitOK {
		t.Errorf("from the file: exit code %d: %s", r.code, r.stderr)
	}
	w.env["SYMBOLON_CONTROLLER"] = "127.0.0.1:1"
	if r := w.run("status"); r.code != ExitUnreachable {
		t.Errorf("the environment over the file: exit code %d", r.code)
	}
	if r := w.run("status", "--controller", address); r.code != ExitOK {
		t.Errorf("a flag over the environment: exit code %d: %s", r.code, r.stderr)
	}
	r := w.run("config")
	want := "KEY          VALUE" + strings.Repeat(" ", len(token)-5) + "   FROM\n" // the token's path is the longest
	if !strings.HasPrefix(r.stdout, want) || !strings.Contains(r.stdout, "127.0.0.1:1") ||
		!strings.Contains(r.stdout, "SYMBOLON_CONTROLLER\n") || !strings.Contains(r.stdout, path+"\n") {
		t.Errorf("config shows:\n%s", r.stdout)
	}
	if r := w.run("config", "-o", "json"); !json.Valid([]byte(r.stdout)) {
		t.Errorf("config -o json: %q", r.stdout)
	}
	// What is not given stays.
	if r := w.run("config", "--controller", "[2001:db8::1]"); r.code != ExitOK {
		t.Fatalf("config: %s", r.stderr)
	}
	c, err := readConfig(path)
	if want := (fileConfig{"[2001:db8::1]:7443", token, ca}); err != nil || c != want {
		t.Errorf("%+v, %v; want %+v", c, err, want)
	}
}

func TestUnknownConfigKeyIsAnError(t *testing.T) {
	w := newWorld(t)
	w.write(".config/symbolon/config.yaml", "controler: x\n")
	r := w.run("status")
	if r.code != ExitUsage || !strings.Contains(r.stderr, "controler") {
		t.Errorf("exit code %d, stderr %q", r.code, r.stderr)
	}
}

func TestHostPort(t *testing.T) {
	for in, want := range map[string]string{
		"ctl":             "ctl:7443",
		"ctl:1":           "ctl:1",
		"192.0.2.1":       "192.0.2.1:7443",
		"2001:db8::1":     "[2001:db8::1]:7443",
		"[2001:db8::1]":   "[2001:db8::1]:7443",
		"[2001:db8::1]:2": "[2001:db8::1]:2",
		"":                "", ":7443": "", "ctl:": "", "https://ctl": "", "user@ctl": "", "a b": "", "[x]": "",
	} {
		got, err := hostPort(in)
		if got != want || (err != nil) != (want == "") {
			t.Errorf("%q: %q, %v; want %q", in, got, err, want)
		}
	}
}

type fullDisk struct{}

func (fullDisk) Write([]byte) (int, error) { return 0, errString("no space left on device") }

func TestAnswerThatCannotBeWrittenIsNotASuccess(t *testing.T) {
	w := newWorld(t)
	populate(w.admin)
	var talk strings.Builder
	code := Main(t.Context(), []string{"status"}, Env{
		Stdout: fullDisk{}, Stderr: &talk,
		Getenv: func(k string) string { return w.env[k] }, Now: func() time.Time { return now },
	})
	if code != ExitUnreachable || !strings.Contains(talk.String(), "no space left") {
		t.Errorf("exit code %d, stderr %q", code, talk.String())
	}
}

func TestNoColor(t *testing.T) {
	w := newWorld(t)
	populate(w.admin)
	if r := w.run("status"); strings.Contains(r.stdout, "\x1b") {
		t.Error("colours on a pipe")
	}
	a := newApp(Env{Getenv: func(k string) string { return map[string]string{"NO_COLOR": "1"}[k] }})
	if a.colored(os.Stdout) {
		t.Error("colours against NO_COLOR")
	}
}
