package netlab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Nginx is a web server that answers every path with one body.
type Nginx struct {
	Port uint16 // on IPv4 and IPv6
	Body string // of every answer; no line breaks or quotes
	// Directives are added to the server block, such as "access_log off;". A
	// location of theirs goes before the body.
	Directives string
	// Unit names the daemon; empty means nginx.service.
	Unit string
}

// Nginx starts nginx, its worker as www-data. Each answer says in the header
// X-Client-Address whom nginx took for the client.
func (h *Host) Nginx(ctx context.Context, n Nginx) (*Daemon, error) {
	unit := orDefault(n.Unit, "nginx.service")
	dir, err := h.world.mkdir(h.name, unit)
	if err != nil {
		return nil, fmt.Errorf("netlab: %w", err)
	}
	if strings.ContainsAny(n.Body, "\"$\\\n") {
		return nil, fmt.Errorf("netlab: nginx body %q would need quoting", n.Body)
	}
	config := filepath.Join(dir, "nginx.conf")
	text := fmt.Sprintf(`daemon off;
user www-data;
worker_processes 1;
pid %[1]s/nginx.pid;
error_log stderr warn;
events { worker_connections 8192; }
worker_rlimit_nofile 10000;
http {
    access_log %[1]s/access.log;
    default_type text/plain;
    client_body_temp_path %[1]s/client;
    proxy_temp_path %[1]s/proxy;
    fastcgi_temp_path %[1]s/fastcgi;
    uwsgi_temp_path %[1]s/uwsgi;
    scgi_temp_path %[1]s/scgi;
    server {
        listen 0.0.0.0:%[2]d backlog=4096;
        listen [::]:%[2]d ipv6only=on backlog=4096;
        %[3]s
        location / {
            add_header X-Client-Address $remote_addr;
            return 200 "%[4]s";
        }
    }
}
`, dir, n.Port, n.Directives, n.Body)
	if err := writeConfig(config, text); err != nil {
		return nil, fmt.Errorf("netlab: %w", err)
	}
	return h.Start(ctx, Service{
		Unit:    unit,
		Command: []string{"nginx", "-e", "stderr", "-p", dir, "-c", config},
		Ports:   []uint16{n.Port},
	})
}

// sshRunDir is where sshd locks in its unprivileged part; the path is compiled in.
const sshRunDir = "/run/sshd"

// SSHD is a running OpenSSH server: a protocol in which the server speaks first.
type SSHD struct {
	*Daemon
	Port uint16
	// Identity is a private key file that the server takes for root.
	Identity string
	// HostKey is the server's public key as in a known_hosts file, without the name.
	HostKey string
}

// SSHD starts sshd with keys of its own. The private keys are throw-away ones of
// this world, in files that only root can read. Whether root may log in is up to
// the machine's /etc/shadow: sshd refuses locked accounts.
func (h *Host) SSHD(ctx context.Context, port uint16) (*SSHD, error) {
	s := &SSHD{Port: port}
	dir, err := s.keys(ctx, h)
	if err != nil {
		return nil, fmt.Errorf("netlab: sshd on %s: %w", h.name, err)
	}
	path, err := Tool("sshd") // sshd re-executes itself and insists on a full path
	if err != nil {
		return nil, fmt.Errorf("netlab: %w", err)
	}
	s.Daemon, err = h.Start(ctx, Service{
		Unit: "ssh.service",
		Command: []string{path, "-D", "-e", "-f", "/dev/null",
			"-o", "HostKey=" + filepath.Join(dir, "host"),
			"-o", fmt.Sprintf("Port=%d", port),
			"-o", "PidFile=none",
			"-o", "UsePAM=no",
			"-o", "UseDNS=no",
			"-o", "PasswordAuthentication=no",
			"-o", "StrictModes=no", // /tmp is writable to all
			"-o", "MaxStartups=1000",
			"-o", "AuthorizedKeysFile=" + s.Identity + ".pub"},
		Ports: []uint16{port},
	})
	return s, err
}

// keys makes the host's and the user's key and the directory that sshd demands.
func (s *SSHD) keys(ctx context.Context, h *Host) (dir string, err error) {
	if dir, err = h.world.mkdir(h.name, "ssh.service"); err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return "", err
	}
	// Left in place: it belongs to the machine, and other worlds may be using it.
	if err := os.Mkdir(sshRunDir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	for _, name := range []string{"host", "user"} {
		file := filepath.Join(dir, name)
		// A daemon that is started again keeps its keys.
		if _, err := os.Stat(file); err == nil {
			continue
		}
		if _, err := h.Output(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "netlab", "-f", file); err != nil {
			return "", err
		}
	}
	pub, err := os.ReadFile(filepath.Join(dir, "host.pub"))
	if err != nil {
		return "", err
	}
	fields := strings.Fields(string(pub))
	if len(fields) < 2 {
		return "", fmt.Errorf("ssh-keygen wrote no public key: %q", pub)
	}
	s.HostKey = fields[0] + " " + fields[1]
	s.Identity = filepath.Join(dir, "user")
	return dir, nil
}
