package spirelab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/symbolon/symbolon/internal/netlab"
)

const (
	// ServerPort is where agents reach the server, BundlePort its bundle endpoint
	// (https_spiffe).
	ServerPort, BundlePort = 8081, 8443

	serverUnit = "spire-server.service"
)

// ServerConfig describes a server.
type ServerConfig struct {
	TrustDomain string
	// Address is the host's, as agents and other servers reach it.
	Address string
	// Plugins is appended to the plugins of the configuration, in HCL: a
	// CredentialComposer, say.
	Plugins string
	// SVIDTTL is how long X.509-SVIDs are valid, such as "1h" (SPIRE's default).
	SVIDTTL string
}

// Server is a running SPIRE server, with the bundle endpoint.
type Server struct {
	ServerConfig
	Host *netlab.Host
	// Socket is the operator's API.
	Socket string

	program string
	dir     string
	daemon  *netlab.Daemon
}

// StartServer starts a server in the host and waits until it is healthy.
func StartServer(ctx context.Context, h *netlab.Host, c ServerConfig) (*Server, error) {
	program, err := Program("spire-server")
	if err != nil {
		return nil, err
	}
	dir, err := mkdir(h, "spire-server")
	if err != nil {
		return nil, err
	}
	s := &Server{ServerConfig: c, Host: h, Socket: filepath.Join(dir, "api.sock"), program: program, dir: dir}
	if s.SVIDTTL == "" {
		s.SVIDTTL = "1h"
	}
	if err := os.WriteFile(s.configFile(), []byte(s.configuration()), 0o600); err != nil {
		return nil, fmt.Errorf("spirelab: %w", err)
	}
	return s, s.Start(ctx)
}

// mkdir makes a directory for one daemon of a host: in memory, for there are keys.
func mkdir(h *netlab.Host, name string) (string, error) {
	memory, err := h.World().MemoryDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(memory, h.Name(), name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("spirelab: %w", err)
	}
	// Whatever the umask: workloads of any user come to the agent's socket.
	for _, d := range []string{filepath.Dir(dir), dir} {
		if err := os.Chmod(d, 0o755); err != nil {
			return "", fmt.Errorf("spirelab: %w", err)
		}
	}
	return dir, nil
}

func (s *Server) configFile() string { return filepath.Join(s.dir, "server.conf") }

func (s *Server) configuration() string {
	return fmt.Sprintf(`server {
	bind_address = "::"
	bind_port = %[1]d
	socket_path = %[2]q
	trust_domain = %[3]q
	data_dir = %[4]q
	log_level = "INFO"
	default_x509_svid_ttl = %[5]q
	federation {
		bundle_endpoint {
			address = "::"
			port = %[6]d
			refresh_hint = "10s"
			profile "https_spiffe" {}
		}
	}
	experimental { cache_reload_interval = "1s" }
}
plugins {
	DataStore "sql" {
		plugin_data {
			database_type = "sqlite3"
			connection_string = "%[4]s/datastore.sqlite3"
		}
	}
	KeyManager "disk" {
		plugin_data { keys_path = "%[4]s/keys.json" }
	}
	NodeAttestor "join_token" {
		plugin_data {}
	}
%[7]s}
`, ServerPort, s.Socket, s.TrustDomain, s.dir, s.SVIDTTL, BundlePort, s.Plugins)
}

// Start starts the server again on what it left.
func (s *Server) Start(ctx context.Context) (err error) {
	s.daemon, err = s.Host.Start(ctx, netlab.Service{
		Unit:    serverUnit,
		Command: []string{s.program, "run", "-config", s.configFile()},
		Ports:   []uint16{ServerPort, BundlePort},
		Ready: func(ctx context.Context) error {
			_, err := s.CLI(ctx, "healthcheck")
			return err
		},
	})
	return err
}

// Daemon is the running server.
func (s *Server) Daemon() *netlab.Daemon { return s.daemon }

// CLI runs a command of spire-server's against the server and returns what it says:
// CLI(ctx, "entry", "show").
func (s *Server) CLI(ctx context.Context, args ...string) (string, error) {
	words := len(args)
	for i, a := range args {
		if strings.HasPrefix(a, "-") {
			words = i
			break
		}
	}
	all := append(append(append([]string{}, args[:words]...), "-socketPath", s.Socket), args[words:]...)
	return s.Host.Output(ctx, s.program, all...)
}

// ID of a path in the server's trust domain.
func (s *Server) ID(path string) string { return "spiffe://" + s.TrustDomain + path }

// BundlePEM is the trust bundle's certificates.
func (s *Server) BundlePEM(ctx context.Context) (string, error) { return s.CLI(ctx, "bundle", "show") }

// BundleJSON is the trust bundle as a SPIFFE bundle document.
func (s *Server) BundleJSON(ctx context.Context) (string, error) {
	return s.CLI(ctx, "bundle", "show", "-format", "spiffe")
}

// BundleEndpoint is the URL where others fetch the bundle, and the SPIFFE ID that
// serves it.
func (s *Server) BundleEndpoint() (url, id string) {
	return "https://" + net.JoinHostPort(s.Address, fmt.Sprint(BundlePort)), s.ID("/spire/server")
}

// Federate makes the server fetch the other's bundle, beginning with what the other
// has now. Trust is one-way: both sides want it.
func (s *Server) Federate(ctx context.Context, other *Server) error {
	bundle, err := other.BundleJSON(ctx)
	if err != nil {
		return err
	}
	url, id := other.BundleEndpoint()
	return s.FederateWith(ctx, other.TrustDomain, url, id, bundle)
}

// FederateWith is Federate with whoever serves a bundle by https_spiffe; bundle is a
// SPIFFE bundle document.
func (s *Server) FederateWith(ctx context.Context, trustDomain, url, endpointID, bundle string) error {
	file := filepath.Join(s.dir, trustDomain+".bundle.json")
	if err := os.WriteFile(file, []byte(bundle), 0o600); err != nil {
		return fmt.Errorf("spirelab: %w", err)
	}
	_, err := s.CLI(ctx, "federation", "create", "-trustDomain", trustDomain, "-bundleEndpointURL", url,
		"-bundleEndpointProfile", "https_spiffe", "-endpointSpiffeID", endpointID,
		"-trustDomainBundlePath", file, "-trustDomainBundleFormat", "spiffe")
	return err
}

// Entry says which processes of an agent's host have which SPIFFE ID.
type Entry struct {
	Path      string   // of the SPIFFE ID: "/ns/prod/web"
	Selectors []string // all must match: "unix:path:/usr/bin/curl"
	// FederatesWith are trust domains whose bundles the workload gets as well.
	FederatesWith []string
	Hint          string
	DNSNames      []string
	// Downstream: its SVID gets CA certificates of the server.
	Downstream bool
	// SVIDTTL is how long its X.509-SVIDs are valid, seconds; 0: as the server has it.
	SVIDTTL int
}

// create makes the entry below parent, a SPIFFE ID, and returns its number.
func (s *Server) create(ctx context.Context, parent string, e Entry) (string, error) {
	args := []string{"entry", "create", "-output", "json", "-parentID", parent, "-spiffeID", s.ID(e.Path)}
	for _, x := range e.Selectors {
		args = append(args, "-selector", x)
	}
	for _, x := range e.FederatesWith {
		args = append(args, "-federatesWith", "spiffe://"+x)
	}
	for _, x := range e.DNSNames {
		args = append(args, "-dns", x)
	}
	if e.SVIDTTL > 0 {
		args = append(args, "-x509SVIDTTL", strconv.Itoa(e.SVIDTTL))
	}
	if e.Downstream {
		args = append(args, "-downstream")
	}
	if e.Hint != "" {
		args = append(args, "-hint", e.Hint)
	}
	out, err := s.CLI(ctx, args...)
	if err != nil {
		return "", err
	}
	var r struct {
		Results []struct {
			Status struct{ Message string }
			Entry  struct{ ID string }
		}
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return "", fmt.Errorf("spirelab: entry create: %w: %s", err, out)
	}
	if len(r.Results) != 1 || r.Results[0].Entry.ID == "" {
		return "", errors.New("spirelab: entry create: " + out)
	}
	return r.Results[0].Entry.ID, nil
}

// Delete deletes an entry by its number.
func (s *Server) Delete(ctx context.Context, entry string) error {
	_, err := s.CLI(ctx, "entry", "delete", "-entryID", entry)
	return err
}
