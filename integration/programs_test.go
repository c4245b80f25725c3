package integration

import (
	"strings"
	"testing"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/netlab"
)

// clientProfiles name real client programs by their executables.
const clientProfiles = `---
kind: Profile
namespace: /acme/prod
name: shell-tools
match: {os.user: root, proc.exe: [/usr/bin/curl, /usr/bin/ssh-keyscan, /usr/bin/mariadb, /usr/bin/redis-cli, /usr/bin/redis-check-rdb]}
workload: tools
labels: {app: tools, env: prod}
---
kind: Profile
namespace: /acme/prod
name: psql
match: {proc.exe: {prefix: /usr/lib/postgresql/}, os.user: root}
workload: psql
labels: {app: psql, env: prod}
`

const secret = "TOP-SECRET-7c1f2a"

// Real programs at both ends, v4 and v6; and what passes between is TLS 1.3 with
// AES-256-GCM, in which no payload, name or attribute can be read.
func TestRealProgramsAndTheWire(t *testing.T) {
	w := newWorld(t, "nginx", "postgres", "initdb", "mariadbd", "mariadb", "redis-server", "redis-cli", "sshd", "ssh-keyscan", "curl", "psql", "tshark")
	profiles := clientProfiles
	for unit, app := range map[string]string{"nginx.service": "nginx", "postgresql.service": "postgres", "mariadb.service": "mariadb", "ssh.service": "sshd", "redis-server.service": "redis"} {
		profiles += profile(unit, app)
	}
	if _, err := w.Server.Nginx(w.ctx(), netlab.Nginx{Port: 80, Body: secret}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Server.Postgres(w.ctx(), 5432); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Server.MariaDB(w.ctx(), 3306); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Server.Redis(w.ctx(), 6379); err != nil {
		t.Fatal(err)
	}
	sshd, err := w.Server.SSHD(w.ctx(), 2222)
	if err != nil {
		t.Fatal(err)
	}
	w.apply(profiles + allow("psql", "psql", "postgres", "") + `---
kind: Policy
namespace: /acme/prod
name: tools
subject: {app: tools}
verb: allow
object: {app: [nginx, mariadb, sshd, redis]}
`)
	capture, err := w.Router.Capture("any", "tcp and not port 7443")
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, want string
		command    []string
	}{
		{"curl", secret, []string{"curl", "-sSg", "--max-time", "20", "http://ADDR:80/"}},
		{"psql", "42", []string{"psql", "-At", "-h", "HOST", "-U", "postgres", "-c", "select '" + secret + "', 6*7"}},
		{"mariadb speaks first", secret, []string{"mariadb", "--skip-ssl", "-h", "HOST", "-u", "app", "-N", "-e", "select '" + secret + "'"}},
		{"ssh speaks first", strings.Fields(sshd.HostKey)[1], []string{"ssh-keyscan", "-p", "2222", "HOST"}},
		{"redis", secret, []string{"redis-cli", "-h", "HOST", "echo", secret}},
	} {
		for _, addr := range []string{"10.2.0.2", "fd00:2::2"} {
			t.Run(tc.name+" "+addr, func(t *testing.T) {
				var args []string
				for _, a := range tc.command {
					bracketed := addr
					if strings.Contains(addr, ":") {
						bracketed = "[" + addr + "]"
					}
					args = append(args, strings.NewReplacer("ADDR", bracketed, "HOST", addr).Replace(a))
				}
				out, err := w.Client.Output(w.ctx(), args[0], args[1:]...)
				if err != nil || !strings.Contains(out, tc.want) {
					t.Errorf("%v: %q, %v; want %q in it", args, out, err, tc.want)
				}
			})
		}
	}
	// Nothing can be said in the clear by another program either.
	if r, err := w.Client.Run(w.ctx(), "curl", "-sS", "--max-time", "10", "http://10.2.0.2:5432/"); err != nil || r.ExitCode == 0 {
		t.Errorf("curl reached PostgreSQL: %+v, %v", r, err)
	}
	if l := w.recorded(w.client, "denied", to(5432, "deny")); l.Source.Workload != "tools" || l.Destination.Workload != "postgres" || l.Reason != "default" {
		t.Errorf("record: %+v", l)
	}
	if _, err := capture.Stop(); err != nil {
		t.Fatal(err)
	}
	checkWire(t, w, capture)
}

func checkWire(t *testing.T, w *world, capture *netlab.Capture) {
	t.Helper()
	if n, err := capture.Packets(); err != nil || n < 100 {
		t.Fatalf("the capture has %d packets (%v): it proves nothing", n, err)
	}
	for _, clear := range []string{
		secret, "select", "SSH-2.0", "SELECT", "HTTP/1.1", "GET /", // payload
		"spiffe://", "acme.example", "/acme/prod", "psql", "postgres", "nginx", // names
		"env", "prod", "role", "host.role", // attributes
	} {
		if found, err := capture.Contains([]byte(clear)); err != nil || found {
			t.Errorf("%q is on the wire in the clear (%v)", clear, err)
		}
	}
	rows, err := capture.Tshark(w.ctx(), "tls.handshake.type == 2", "tls.handshake.ciphersuite", "tls.handshake.extensions.supported_version")
	if err != nil || len(rows) < 4 { // tunnels are reused: fewer handshakes than connections
		t.Fatalf("%d ServerHellos (%v), want at least 4", len(rows), err)
	}
	for _, r := range rows {
		if r[0] != "0x1302" || r[1] != "0x0304" {
			t.Errorf("ServerHello with suite %s and version %s, want 0x1302 (TLS_AES_256_GCM_SHA384) and 0x0304 (TLS 1.3)", r[0], r[1])
		}
	}
	// Every byte of payload belongs to TLS: a stream that begins otherwise would not.
	streams, err := capture.Streams()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range streams {
		if len(s.Data) > 0 && (s.Data[0] < 20 || s.Data[0] > 23) {
			t.Errorf("the stream %s to %s begins with % x, which is not TLS", s.Src, s.Dst, s.Data[:min(8, len(s.Data))])
		}
	}
}

// Where policy asks for no encryption, both ends are proven all the same, and only
// then the bytes flow in the clear.
func TestAuthenticatedOnTheWire(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)
	w.apply(strings.Replace(basePolicy, "protection: encrypted", "protection: authenticated", 1) + allow("client-echo", "client", "echo", ""))
	capture, err := w.Router.Capture("any", "tcp port 7001")
	if err != nil {
		t.Fatal(err)
	}
	w.expect("echo", w.try(w.Client, "echo", "10.2.0.2:7001", secret), secret)
	// One policy that encrypts is enough.
	w.apply(`
kind: Policy
namespace: /acme/prod
name: encrypt-echo
subject: any
verb: encrypt
object: {app: echo}
`)
	w.expect("echo", w.try(w.Client, "echo", "10.2.0.2:7001", "ENCRYPTED-"+secret), "ENCRYPTED-"+secret)
	if _, err := capture.Stop(); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]bool{secret: true, "ENCRYPTED-": false, "spiffe://": false} {
		if found, err := capture.Contains([]byte(text)); err != nil || found != want {
			t.Errorf("%q on the wire: %v (%v), want %v", text, found, err, want)
		}
	}
	l := w.recorded(w.server, "encrypted", func(l *flow.Line) bool { return l.Protection == "encrypted" })
	if l.BytesSent != uint64(len("ENCRYPTED-"+secret)) {
		t.Errorf("record: %+v", l)
	}
}
