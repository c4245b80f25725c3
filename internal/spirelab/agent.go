package spirelab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/symbolon/symbolon/internal/netlab"
)

const agentUnit = "spire-agent.service"

// AgentConfig describes an agent.
type AgentConfig struct {
	// Delegates are the paths of the SPIFFE IDs, in the server's trust domain, whose
	// workloads may ask for others' SVIDs (the Delegated Identity API).
	Delegates []string
	// Brokers likewise, for the SPIFFE Broker API on BrokerSocket, by process id.
	Brokers []string
}

// Agent is a running SPIRE agent.
type Agent struct {
	AgentConfig
	Host   *netlab.Host
	Server *Server
	// Socket is the Workload API, for everyone on the host; AdminSocket the Delegated
	// Identity API, BrokerSocket the Broker API, for root.
	Socket, AdminSocket, BrokerSocket string

	program string
	dir     string
	daemon  *netlab.Daemon
}

// Agent starts an agent of the server in the host, attested by a join token, and waits
// until it is healthy.
func (s *Server) Agent(ctx context.Context, h *netlab.Host, c AgentConfig) (*Agent, error) {
	program, err := Program("spire-agent")
	if err != nil {
		return nil, err
	}
	dir, err := mkdir(h, "spire-agent")
	if err != nil {
		return nil, err
	}
	a := &Agent{
		AgentConfig: c, Host: h, Server: s, program: program, dir: dir,
		Socket: filepath.Join(dir, "api", "api.sock"), AdminSocket: filepath.Join(dir, "admin", "admin.sock"),
		BrokerSocket: filepath.Join(dir, "broker", "broker.sock"),
	}
	bundle, err := s.BundlePEM(ctx)
	if err != nil {
		return nil, err
	}
	token, err := s.joinToken(ctx, a.ID())
	if err != nil {
		return nil, err
	}
	for _, f := range []struct{ path, text string }{
		{a.bundleFile(), bundle}, {a.tokenFile(), token}, {a.configFile(), a.configuration()},
	} {
		if err := os.WriteFile(f.path, []byte(f.text), 0o600); err != nil {
			return nil, fmt.Errorf("spirelab: %w", err)
		}
	}
	return a, a.Start(ctx)
}

func (s *Server) joinToken(ctx context.Context, id string) (string, error) {
	out, err := s.CLI(ctx, "token", "generate", "-output", "json", "-spiffeID", id)
	if err != nil {
		return "", err
	}
	var t struct{ Value string }
	// What it said is not repeated: it may be a token all the same.
	if err := json.Unmarshal([]byte(out), &t); err != nil {
		return "", fmt.Errorf("spirelab: token generate: %w", err)
	}
	if t.Value == "" {
		return "", errors.New("spirelab: token generate gave none")
	}
	return t.Value, nil
}

// ID is the host's SPIFFE ID, the parent of its entries.
func (a *Agent) ID() string { return a.Server.ID("/host/" + a.Host.Name()) }

func (a *Agent) configFile() string { return filepath.Join(a.dir, "agent.conf") }
func (a *Agent) bundleFile() string { return filepath.Join(a.dir, "bootstrap.pem") }
func (a *Agent) tokenFile() string  { return filepath.Join(a.dir, "join.token") }

func (a *Agent) configuration() string {
	delegates, broker := "[", ""
	for _, path := range a.Delegates {
		delegates += fmt.Sprintf("%q, ", a.Server.ID(path))
	}
	for _, path := range a.Brokers {
		broker += fmt.Sprintf("{ id = %q, allowed_reference_types = [{ type_url = \"type.googleapis.com/spiffe.broker.WorkloadPIDReference\" }] }, ", a.Server.ID(path))
	}
	if broker != "" {
		broker = fmt.Sprintf("broker { socket_path = %q\n brokers = [%s] }", a.BrokerSocket, broker)
	}
	return fmt.Sprintf(`agent {
	data_dir = "%[1]s/data"
	log_level = "INFO"
	server_address = %[2]q
	server_port = %[3]d
	trust_domain = %[4]q
	trust_bundle_path = %[5]q
	join_token_file = %[6]q
	socket_path = %[7]q
	admin_socket_path = %[8]q
	authorized_delegates = %[9]s]
	experimental {
		sync_interval = "1s"
		%[10]s
	}
}
plugins {
	NodeAttestor "join_token" {
		plugin_data {}
	}
	KeyManager "disk" {
		plugin_data { directory = "%[1]s/data" }
	}
	WorkloadAttestor "unix" {
		plugin_data { discover_workload_path = true }
	}
}
`, a.dir, a.Server.Address, ServerPort, a.Server.TrustDomain, a.bundleFile(), a.tokenFile(), a.Socket, a.AdminSocket, delegates, broker)
}

// Start starts the agent again on what it left: its keys, and so without a token.
func (a *Agent) Start(ctx context.Context) (err error) {
	a.daemon, err = a.Host.Start(ctx, netlab.Service{
		Unit:    agentUnit,
		Command: []string{a.program, "run", "-config", a.configFile()},
		Ready: func(ctx context.Context) error {
			// Cheaper than a program that only finds that nobody is there yet.
			if _, err := os.Stat(a.Socket); err != nil {
				return err
			}
			_, err := a.Host.Output(ctx, a.program, "healthcheck", "-socketPath", a.Socket)
			return err
		},
	})
	return err
}

// Daemon is the running agent.
func (a *Agent) Daemon() *netlab.Daemon { return a.daemon }

// Entry makes an entry for processes of the agent's host and returns its number.
func (a *Agent) Entry(ctx context.Context, e Entry) (string, error) {
	return a.Server.create(ctx, a.ID(), e)
}

// Given is what the Workload API gives a process.
type Given struct {
	IDs       []string // SPIFFE IDs of its SVIDs, sorted
	Federated []string // trust domains whose bundles come with them, as SPIFFE IDs, sorted
}

// Fetch asks the agent's Workload API as any workload of the host does: by the program
// spire-agent, run by the user (in the form of netlab.Cmd). No identity is an error.
func (a *Agent) Fetch(ctx context.Context, user string) (Given, error) {
	c := a.Host.Command(ctx, a.program, "api", "fetch", "x509", "-socketPath", a.Socket, "-timeout", "5s", "-output", "json")
	c.User = user
	out, err := c.Output()
	if err != nil {
		return Given{}, err
	}
	var answer struct {
		SVIDs []struct {
			ID string `json:"spiffe_id"`
		} `json:"svids"`
		Federated map[string]string `json:"federated_bundles"`
	}
	// The output itself has the private key, and is not repeated in an error.
	if err := json.Unmarshal(out, &answer); err != nil {
		return Given{}, fmt.Errorf("spirelab: api fetch x509: %w", err)
	}
	g := Given{Federated: slices.Sorted(maps.Keys(answer.Federated))}
	for _, s := range answer.SVIDs {
		g.IDs = append(g.IDs, s.ID)
	}
	slices.Sort(g.IDs)
	return g, nil
}

// Program is the path of spire-agent, by which a unix:path selector knows Fetch.
func (a *Agent) Program() string { return a.program }

// Write has SPIRE's own client write the caller's SVID, key and bundle into a new directory
// in memory, as svid.0.pem, svid.0.key and bundle.0.pem, and returns it.
func (a *Agent) Write(ctx context.Context, name string) (dir string, err error) {
	memory, err := a.Host.World().MemoryDir()
	if err != nil {
		return "", err
	}
	dir = filepath.Join(memory, name)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("spirelab: %w", err)
	}
	_, err = a.Host.Output(ctx, a.program, "api", "fetch", "x509", "-socketPath", a.Socket, "-timeout", "5s", "-silent", "-write", dir)
	return dir, err
}
