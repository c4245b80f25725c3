package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/internal/spirelab"
)

// A real SPIRE server loads the program, and what it signs carries the claims; also
// while the controller is away, and after both have been started anew.
func TestWithSPIRE(t *testing.T) {
	spirelab.Test(t)
	w := newWorld(t)
	s := newServer(t, w)
	s.start()
	s.until("spiffe://site-a.test/web", "app=web env=prod")
	if got := s.mint("spiffe://site-a.test/other"); got != "env=prod" {
		t.Errorf("another ID: %q", got)
	}
	w.halt()
	s.stop()
	s.start()
	if got := s.mint("spiffe://site-a.test/web"); got != "app=web env=prod" {
		t.Errorf("without the controller: %q", got)
	}
}

// server is a SPIRE server on loopback with the plugin.
type server struct {
	t       *testing.T
	program string
	dir     string // in memory, for there are keys
	process *exec.Cmd
}

func newServer(t *testing.T, w *world) *server {
	t.Helper()
	program, err := spirelab.Program("spire-server")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/dev/shm", "sl-composer-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &server{t: t, program: program, dir: dir}
	plugin := filepath.Join(dir, "symbolon-spire-composer")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", plugin, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	built, err := os.ReadFile(plugin)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(built)
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, sample, ok := strings.Cut(string(readme), "```hcl\n")
	sample, _, end := strings.Cut(sample, "```")
	if !ok || !end {
		t.Fatal("README.md has no sample")
	}
	// The sample with this world's names.
	for from, to := range map[string]string{
		"/usr/local/bin/symbolon-spire-composer": plugin,
		"SHA256_OF_THE_PROGRAM":                  hex.EncodeToString(sum[:]),
		"198.51.100.5:7443":                      w.server.Addr().String(),
		"/etc/spire/symbolon/ca.pem":             filepath.Join(w.cfg.DataDir, "ca.pem"),
		"/etc/spire/symbolon/claims.token":       filepath.Join(w.cfg.DataDir, "claims.token"),
		"/var/lib/spire/symbolon-claims":         filepath.Join(w.files, "claims.snapshot"),
		`"15s"`:                                  `"1s"`,
	} {
		if !strings.Contains(sample, from) {
			t.Fatalf("the sample in README.md lacks %s", from)
		}
		sample = strings.ReplaceAll(sample, from, to)
	}
	config := fmt.Sprintf(`server {
	bind_address = "127.0.0.1"
	bind_port = %d
	socket_path = %q
	trust_domain = "site-a.test"
	data_dir = %q
	log_level = "INFO"
}
plugins {
	DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = "%[3]s/datastore.sqlite3" } }
	KeyManager "disk" { plugin_data { keys_path = "%[3]s/keys.json" } }
	NodeAttestor "join_token" { plugin_data {} }
	%s
}
`, freePort(t), s.socket(), dir, sample)
	if err := os.WriteFile(s.config(), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *server) socket() string { return filepath.Join(s.dir, "api.sock") }
func (s *server) config() string { return filepath.Join(s.dir, "server.conf") }

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().(*net.TCPAddr).Port
}

func (s *server) start() {
	s.t.Helper()
	log, err := os.OpenFile(filepath.Join(s.t.ArtifactDir(), "spire-server.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	s.process = exec.Command(s.program, "run", "-config", s.config())
	s.process.Stdout, s.process.Stderr = log, log
	if err := s.process.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(s.stop)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		_, err := s.cli("healthcheck")
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			said, _ := os.ReadFile(log.Name())
			s.t.Fatalf("spire-server is not healthy: %v\n%s", err, said)
		}
	}
}

func (s *server) stop() {
	if s.process == nil {
		return
	}
	_ = s.process.Process.Signal(syscall.SIGTERM)
	_ = s.process.Wait()
	s.process = nil
}

func (s *server) cli(args ...string) (string, error) {
	// Not the test's context: cleaning up asks, too.
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, s.program, append(args, "-socketPath", s.socket())...).CombinedOutput()
	return string(out), err
}

// mint has an SVID signed, and reads its claims as a proxy would.
func (s *server) mint(id string) string {
	s.t.Helper()
	dir, err := os.MkdirTemp(s.dir, "mint-")
	if err != nil {
		s.t.Fatal(err)
	}
	if out, err := s.cli("x509", "mint", "-spiffeID", id, "-write", dir); err != nil {
		s.t.Fatalf("mint %s: %v: %s", id, err, out)
	}
	data, err := os.ReadFile(filepath.Join(dir, "svid.pem"))
	if err != nil {
		s.t.Fatal(err)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		s.t.Fatal("svid.pem has no certificate")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		s.t.Fatal(err)
	}
	claims, err := identity.ClaimsOf(leaf)
	if err != nil {
		s.t.Fatal(err)
	}
	return claims.String()
}

func (s *server) until(id, want string) {
	s.t.Helper()
	got := ""
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		if got = s.mint(id); got == want {
			return
		}
	}
	s.t.Fatalf("claims of %s: %q, want %q", id, got, want)
}
