package integration

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/fleet"
)

// held starts a client that keeps a connection to the server open, waits until it is,
// and returns where the client's words will come.
func (w *world) held(addr string) <-chan string {
	w.t.Helper()
	said := make(chan string, 1)
	go func() { said <- w.try(w.Client, "hold", addr) }()
	w.eventually("the connection is held", func() bool {
		var live []flow.Line
		if err := w.client.Debug(w.ctx(), "connections", &live); err != nil {
			w.t.Fatal(err)
		}
		return len(live) == 1 && live[0].BytesReceived > 0
	})
	return said
}

// Who leaves a group loses what the group may do: the SVID is issued anew without
// anybody connecting, and the connections that stood on the old one are cut.
func TestLeavingAGroupCuts(t *testing.T) {
	w := newBareWorld(t, "unshare", "mount")
	const group = "/etc/group"
	with, without := "root:x:0:\noperators:x:4242:root\n", "root:x:0:\n"
	var err error
	if w.client, err = w.fleet.Proxy(w.ctx(), w.Client, fleet.Enrolment{Namespace: "/acme/prod", Files: map[string]string{group: with}}); err != nil {
		t.Fatal(err)
	}
	if w.server, err = w.fleet.Proxy(w.ctx(), w.Server, fleet.Enrolment{Namespace: "/acme/prod"}); err != nil {
		t.Fatal(err)
	}
	w.echo(w.Server)
	w.apply("---\nkind: Policy\nnamespace: /acme/prod\nname: operators\nsubject: {app: client, os.group: operators}\nverb: allow\nobject: {app: echo}\n")
	said := w.held("10.2.0.2:7002")
	if err := w.client.SetFile(group, without); err != nil {
		t.Fatal(err)
	}
	w.expect("the held connection", <-said, "open\nreset")
	w.expect("a new one", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "reset")
	if err := w.client.SetFile(group, with); err != nil {
		t.Fatal(err)
	}
	// The file is looked at ten times a second.
	w.eventually("it is back in the group", func() bool { return w.try(w.Client, "echo", "10.2.0.2:7001", "hello") == "hello" })
}

// examples/quarantine, from end to end: a scanner finds a critical vulnerability in an
// executable; whoever runs that loses the internet, open connections included, and
// nothing else, until the finding is taken back.
func TestQuarantine(t *testing.T) {
	w := newBareWorld(t)
	internet := w.net.Host("internet")
	w.net.Link(w.Router, internet, []string{"198.51.100.1/24"}, []string{"198.51.100.2/24"})
	internet.DefaultRoute("198.51.100.1")
	program := self(t)
	// The example's API is this test's client, its internet has the test's ports.
	here := strings.NewReplacer("/opt/api/api-server", program, "os.user: api", "os.user: root", "ports: [tcp/443]", "",
		"port: tcp/443", "port: tcp/7002", "proc.exe: {prefix: /usr/lib/postgresql/}, os.user: postgres", "proc.unit: echo.service",
		"ports: [tcp/5432]", "", "port: tcp/5432", "port: tcp/7001", "name: api\nmatch: {", "name: api\nmatch: {proc.unit: client.service, ")
	files, err := filepath.Glob("../examples/quarantine/policy/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no example: %v", err)
	}
	var policy []string
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		policy = append(policy, here.Replace(string(b)))
	}
	w.fleet.Must(w.ctx(), "policy", "delete", "--yes", "profile:/acme/prod/client", "profile:/acme/prod/echo")
	w.apply(strings.Join(policy, "---\n"))
	w.enrol()
	w.echo(internet)
	w.echo(w.Server)
	w.expect("a healthy one reaches the internet", w.try(w.Client, "echo", "198.51.100.2:7001", "hello"), "hello")
	said := w.held("198.51.100.2:7002")

	b, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	findings := filepath.Join(t.TempDir(), "findings.yaml")
	text := fmt.Sprintf("scanner: trivy\nfindings:\n- exe_sha256: %x\n  attributes: {vuln.critical: [CVE-2026-1001]}\n", sha256.Sum256(b))
	if err := os.WriteFile(findings, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := w.fleet.Must(w.ctx(), "scan", "push", "-f", findings); err != nil {
		t.Fatal(err)
	}
	w.expect("its connection to the internet", <-said, "open\nreset")
	w.expect("a new one", w.try(w.Client, "echo", "198.51.100.2:7001", "hello"), "reset")
	w.expect("within the company", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
	if _, err := w.fleet.Must(w.ctx(), "scan", "remove", "--scanner", "trivy", "--yes"); err != nil {
		t.Fatal(err)
	}
	w.eventually("it is free again", func() bool { return w.try(w.Client, "echo", "198.51.100.2:7001", "hello") == "hello" })
}
