package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMain makes the test binary the controller, where a test runs it as one.
func TestMain(m *testing.M) {
	if os.Getenv("SYMBOLON_TEST_MAIN") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// program is the real thing, in a process of its own.
func program(t *testing.T, env []string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append([]string{"SYMBOLON_TEST_MAIN=1", "PATH=" + os.Getenv("PATH")}, env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// logLine waits for a JSON log line with a message.
func logLine(t *testing.T, lines *bufio.Scanner, message string) map[string]any {
	t.Helper()
	for lines.Scan() {
		var line map[string]any
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			t.Fatalf("not JSON: %s", lines.Text())
		}
		if line["msg"] == message {
			return line
		}
	}
	t.Fatalf("no log line %q: %v", message, lines.Err())
	return nil
}

// TestServesUntilSIGTERM: it is ready when it says so to systemd, serves over TLS
// by its own CA, ends with 0, and says no secret.
func TestServesUntilSIGTERM(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "notify")
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = notify.Close() }()
	_ = notify.SetReadDeadline(time.Now().Add(30 * time.Second))
	said := func() string {
		b := make([]byte, 256)
		n, err := notify.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}

	file := filepath.Join(dir, "controller.yaml")
	if err := os.WriteFile(file, []byte("trust_domain: file.example\nlisten: 127.0.0.1:0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(dir, "data")
	cmd := program(t, []string{"NOTIFY_SOCKET=" + socket, "SYMBOLON_DATA_DIR=" + data},
		"--config", file, "--trust-domain", "acme.example", "--log-level", "debug")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	lines := bufio.NewScanner(io.TeeReader(stderr, &log))
	serving := logLine(t, lines, "serving")
	if serving["trust_domain"] != "acme.example" { // the flag, over the file
		t.Errorf("serving %v", serving)
	}
	if got := said(); got != "READY=1" {
		t.Errorf("systemd heard %q", got)
	}

	pem, err := os.ReadFile(filepath.Join(data, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	defer transport.CloseIdleConnections()
	res, err := (&http.Client{Transport: transport}).Get("https://" + serving["address"].(string) + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusOK {
		t.Errorf("healthz: %s", res.Status)
	}

	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := said(); got != "STOPPING=1" {
		t.Errorf("systemd heard %q", got)
	}
	for lines.Scan() { // until the program closes it
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
	token, err := os.ReadFile(filepath.Join(data, "admin.token"))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(log.String(), strings.TrimSpace(string(token))) {
		t.Error("the admin token stands in the log")
	}
}

// TestRefusals end with 2 and one line that helps.
func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "controller.yaml")
	if err := os.WriteFile(file, []byte("trust_domain: acme.example\nlissen: 127.0.0.1:0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		args []string
		want string
	}{
		"unknown key":     {[]string{"--config", file}, "lissen"},
		"no such file":    {[]string{"--config", filepath.Join(dir, "none.yaml")}, "none.yaml"},
		"unknown flag":    {[]string{"--lissen", "x"}, "--lissen"},
		"bad log level":   {[]string{"--trust-domain", "acme.example", "--log-level", "loud"}, "--log-level"},
		"argument":        {[]string{"start"}, "start"},
		"etcd":            {[]string{"--trust-domain", "acme.example", "--store-kind", "etcd"}, "use bbolt"},
		"no trust domain": {[]string{"--data-dir", dir}, "trust_domain"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := program(t, nil, test.args...).CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.Contains(string(out), test.want) {
				t.Errorf("%v: %s; want exit code 2 and %q", err, out, test.want)
			}
		})
	}
}
