package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/symbolon/symbolon/internal/netlab"
)

// Ports and addresses are the same in every pair of hosts.
const (
	clientAddr = "10.1.0.1"
	serverAddr = "10.1.0.2"

	backendPort = 7000
	plainPort   = 8000 // the client's side of a peer listens here, on loopback
	tlsPort     = 8443 // the server's side here

	maxDescriptors = 20000 // of a process of a peer, and the hard limit of many machines
)

var (
	// near is what the load generator connects to where a peer has to be addressed.
	near    = fmt.Sprintf("127.0.0.1:%d", plainPort)
	middle  = fmt.Sprintf("%s:%d", serverAddr, tlsPort)
	backend = fmt.Sprintf("127.0.0.1:%d", backendPort)
	// remote is what the load generator connects to where nothing has to be known.
	remote = fmt.Sprintf("%s:%d", serverAddr, backendPort)
)

// startPair writes a configuration for each side and starts both, the server's first.
// command has the directory of its side and the configuration file.
func startPair(ctx context.Context, p *pair, unit string, clientConf, serverConf string, command func(dir, conf string) []string) error {
	start := func(h *netlab.Host, conf string, port uint16) (*netlab.Daemon, error) {
		dir := filepath.Join(h.World().Dir(), h.Name(), unit)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		file := filepath.Join(dir, "conf")
		if err := os.WriteFile(file, []byte(conf), 0o644); err != nil {
			return nil, err
		}
		return h.Start(ctx, netlab.Service{Unit: unit, Command: command(dir, file), Ports: []uint16{port}})
	}
	var err error
	if p.serverSide, err = start(p.server, serverConf, tlsPort); err != nil {
		return err
	}
	p.clientSide, err = start(p.client, clientConf, plainPort)
	return err
}

func startHAProxy(ctx context.Context, l *lab, p *pair) error {
	c := l.certificates
	common := fmt.Sprintf(`global
    maxconn %d
    tune.bufsize 65536
    ssl-default-bind-ciphersuites TLS_AES_256_GCM_SHA384
    ssl-default-server-ciphersuites TLS_AES_256_GCM_SHA384
    ssl-default-bind-options ssl-min-ver TLSv1.3
    ssl-default-server-options ssl-min-ver TLSv1.3
defaults
    mode tcp
    timeout connect 10s
    timeout client 10m
    timeout server 10m
listen bench
    backlog 4096
`, maxDescriptors/2-200)
	client := fmt.Sprintf("    bind %s\n    server far %s ssl verify required ca-file %s crt %s sni str(%s) verifyhost %s\n", near, middle, c.CA, c.ClientPair, serverName, serverName)
	server := fmt.Sprintf("    bind %s ssl crt %s ca-file %s verify required\n    server app %s\n", middle, c.ServerPair, c.CA, backend)
	return startPair(ctx, p, "haproxy.service", common+client, common+server, func(_, conf string) []string {
		return []string{"haproxy", "-db", "-f", conf}
	})
}

// nginxStream starts nginx with buffers of that size; 16k is its default.
func nginxStream(buffer string) func(context.Context, *lab, *pair) error {
	return func(ctx context.Context, l *lab, p *pair) error {
		module, err := streamModule()
		if err != nil {
			return err
		}
		c := l.certificates
		config := func(server string) string {
			return fmt.Sprintf(`load_module %s;
daemon off;
user www-data;
worker_processes auto;
error_log stderr warn;
worker_rlimit_nofile %d;
events { worker_connections %d; }
stream {
    proxy_buffer_size %s;
    proxy_connect_timeout 10s;
    proxy_timeout 10m;
    server {
%s    }
}
`, module, maxDescriptors, maxDescriptors, buffer, server)
		}
		client := fmt.Sprintf(`        listen %s backlog=4096;
        proxy_pass %s;
        proxy_ssl on;
        proxy_ssl_protocols TLSv1.3;
        proxy_ssl_conf_command Ciphersuites TLS_AES_256_GCM_SHA384;
        proxy_ssl_certificate %s;
        proxy_ssl_certificate_key %s;
        proxy_ssl_trusted_certificate %s;
        proxy_ssl_verify on;
        proxy_ssl_server_name on;
        proxy_ssl_name %s;
`, near, middle, c.ClientCert, c.ClientKey, c.CA, serverName)
		server := fmt.Sprintf(`        listen %s ssl backlog=4096;
        proxy_pass %s;
        ssl_protocols TLSv1.3;
        ssl_conf_command Ciphersuites TLS_AES_256_GCM_SHA384;
        ssl_certificate %s;
        ssl_certificate_key %s;
        ssl_client_certificate %s;
        ssl_verify_client on;
        ssl_session_cache shared:bench:10m;
`, middle, backend, c.ServerCert, c.ServerKey, c.CA)
		return startPair(ctx, p, "nginx.service", config(client), config(server), func(dir, conf string) []string {
			return []string{"nginx", "-e", "stderr", "-p", dir, "-g", "pid " + filepath.Join(dir, "pid") + ";", "-c", conf}
		})
	}
}

// streamModules is where distributions put nginx's stream module.
var streamModules = []string{"/usr/lib/nginx/modules/ngx_stream_module.so", "/usr/lib64/nginx/modules/ngx_stream_module.so"}

func streamModule() (string, error) {
	for _, file := range streamModules {
		if _, err := os.Stat(file); err == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("nginx has no stream module: apt-get install libnginx-mod-stream")
}

func startStunnel(ctx context.Context, l *lab, p *pair) error {
	c := l.certificates
	const common = `foreground = yes
pid =
debug = 3
sslVersion = TLSv1.3
ciphersuites = TLS_AES_256_GCM_SHA384
socket = a:SO_REUSEADDR=1
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
verifyChain = yes
libwrap = no
[bench]
`
	client := fmt.Sprintf("client = yes\naccept = %s\nconnect = %s\ncert = %s\nkey = %s\nCAfile = %s\nsni = %s\ncheckHost = %s\n", near, middle, c.ClientCert, c.ClientKey, c.CA, serverName, serverName)
	server := fmt.Sprintf("accept = %s\nconnect = %s\ncert = %s\nkey = %s\nCAfile = %s\n", middle, backend, c.ServerCert, c.ServerKey, c.CA)
	return startPair(ctx, p, "stunnel.service", common+client, common+server, func(_, conf string) []string {
		return []string{"stunnel", conf}
	})
}

func startGo(ctx context.Context, l *lab, p *pair) (err error) {
	c := l.certificates
	p.serverSide, err = p.server.Start(ctx, netlab.Service{
		Unit: "relay.service", Ports: []uint16{tlsPort},
		Command: []string{l.exe, "relay", "-listen", middle, "-target", backend, "-ca", c.CA, "-cert", c.ServerCert, "-key", c.ServerKey},
	})
	if err != nil {
		return err
	}
	p.clientSide, err = p.client.Start(ctx, netlab.Service{
		Unit: "relay.service", Ports: []uint16{plainPort},
		Command: []string{l.exe, "relay", "-client", "-listen", near, "-target", middle, "-ca", c.CA, "-cert", c.ClientCert, "-key", c.ClientKey},
	})
	return err
}
