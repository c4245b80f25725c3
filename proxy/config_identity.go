package proxy

import (
	"path/filepath"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/containers"
)

// IdentityConfig says where SVIDs come from.
type IdentityConfig struct {
	// Source is one of the Source constants.
	Source string      `yaml:"source"`
	SPIRE  SPIREConfig `yaml:"spire"`
	// WorkloadAPI is the address of the SPIFFE Workload API; "": what
	// SPIFFE_ENDPOINT_SOCKET says. SPIREBroker needs it, too.
	WorkloadAPI string `yaml:"workload_api"`
	// ServeWorkloadAPI is the path of the Unix socket where local programs get their SVIDs
	// by the SPIFFE Workload API; "": nowhere.
	ServeWorkloadAPI string `yaml:"serve_workload_api"`
	// Attributes are those that are found on request only: identity.OnRequest. Each of
	// their values makes a workload of its own.
	Attributes []string `yaml:"attributes"`
	// Containers are the sockets of the container runtimes that are asked for container.*,
	// image.* and k8s.*: see containers.ParseSocket.
	Containers []string `yaml:"containers"`
	// Cloud is the provider whose instance document this host shows when it enrols, for its
	// cloud.* attributes; CloudNone: it shows none.
	Cloud string `yaml:"cloud"`
	// CloudMetadata is address:port of the metadata service.
	CloudMetadata string `yaml:"cloud_metadata"`
}

// Runtimes are the sockets of Containers, which is valid.
func (c IdentityConfig) Runtimes() []containers.Socket {
	var out []containers.Socket
	for _, text := range c.Containers {
		if s, err := containers.ParseSocket(text); err == nil {
			out = append(out, s)
		}
	}
	return out
}

// The values of IdentityConfig.Source.
const (
	// SourceController: the controller's CA names workloads by Profiles.
	SourceController = "controller"
	// SourceSPIRE: the SPIRE agent of this host attests each process.
	SourceSPIRE = "spire"
	// SourceWorkloadAPI: every workload has the SVID that the proxy gets.
	SourceWorkloadAPI = "workload-api"
)

// SPIREConfig is about the SPIRE agent of this host.
type SPIREConfig struct {
	// API is by which of the agent's APIs processes are attested: one of the SPIREAPI constants.
	API string `yaml:"api"`
	// AdminSocket is the agent's admin_socket_path, where the Delegated Identity API is.
	AdminSocket string `yaml:"admin_socket"`
	// BrokerSocket is the agent's experimental.broker.socket_path.
	BrokerSocket string `yaml:"broker_socket"`
	// Hint and PathPrefix choose where a workload has several SVIDs (of the Workload API,
	// too): by the hint of the registration entry, by the first segments of the path.
	Hint       string `yaml:"hint"`
	PathPrefix string `yaml:"path_prefix"`
}

// The values of SPIREConfig.API.
const (
	// SPIREDelegated: the Delegated Identity API.
	SPIREDelegated = "delegated"
	// SPIREBroker: the SPIFFE Broker API, which is experimental: SPIRE may change it. The
	// proxy shows the agent its own SVID, from IdentityConfig.WorkloadAPI.
	SPIREBroker = "broker"
)

const (
	defaultBrokerSocket = "/run/spire/broker-sockets/broker.sock"
	defaultAdminSocket  = "/run/spire/sockets/admin.sock"
	endpointVariable    = "SPIFFE_ENDPOINT_SOCKET"
	// maxSocketPath is what fits into sockaddr_un (unix(7)), bytes.
	maxSocketPath = 107
)

// Rule has the fields of the sources' rules.
func (c SPIREConfig) Rule() (r struct{ Hint, PathPrefix string }) {
	r.Hint, r.PathPrefix = c.Hint, c.PathPrefix
	return r
}

// fill takes from the environment what SPIFFE programs take from there.
func (c *IdentityConfig) fill(env func(string) (string, bool)) {
	if c.WorkloadAPI == "" {
		c.WorkloadAPI, _ = env(endpointVariable)
	}
}

func (c IdentityConfig) validate(bad func(key, format string, args ...any)) {
	for _, key := range c.Attributes {
		if !slices.Contains(identity.OnRequest(), key) {
			bad("identity.attributes", "%q is not found on request; use some of %s", key, strings.Join(identity.OnRequest(), ", "))
		}
	}
	if s := c.ServeWorkloadAPI; s != "" && (!filepath.IsAbs(s) || len(s) > maxSocketPath) {
		bad("identity.serve_workload_api", "%q is not an absolute path of at most %d bytes; such as /run/symbolon/workload.sock", s, maxSocketPath)
	} else if s != "" && c.Source == SourceWorkloadAPI {
		bad("identity.serve_workload_api", "with identity.source workload-api every program would get the host's one identity; use spire or controller")
	}
	for _, text := range c.Containers {
		if _, err := containers.ParseSocket(text); err != nil {
			bad("identity.containers", "%v", err)
		}
	}
	switch c.Source {
	case SourceController:
		return
	case SourceSPIRE:
		c.validateSPIRE(bad)
	case SourceWorkloadAPI:
		c.validateWorkloadAPI(bad)
	default:
		bad("identity.source", "%q is unknown; use controller, spire or workload-api", c.Source)
		return
	}
	if p := c.SPIRE.PathPrefix; p != "" && (!strings.HasPrefix(p, "/") || strings.Contains(p, "//")) {
		bad("identity.spire.path_prefix", "%q is no beginning of a SPIFFE ID's path; such as /prod", p)
	}
}

func (c IdentityConfig) validateSPIRE(bad func(key, format string, args ...any)) {
	socket := func(key, path, named, such string) {
		if !filepath.IsAbs(path) || len(path) > maxSocketPath {
			bad(key, "%q is not an absolute path of at most %d bytes; use the agent's %s, such as %s", path, maxSocketPath, named, such)
		}
	}
	switch c.SPIRE.API {
	case SPIREDelegated:
		socket("identity.spire.admin_socket", c.SPIRE.AdminSocket, "admin_socket_path", defaultAdminSocket)
	case SPIREBroker:
		socket("identity.spire.broker_socket", c.SPIRE.BrokerSocket, "experimental.broker.socket_path", defaultBrokerSocket)
		c.validateWorkloadAPI(bad)
	default:
		bad("identity.spire.api", "%q is unknown; use delegated or broker", c.SPIRE.API)
	}
}

func (c IdentityConfig) validateWorkloadAPI(bad func(key, format string, args ...any)) {
	if a := c.WorkloadAPI; a == "" {
		bad("identity.workload_api", "is empty, and so is $%s; use the agent's socket, such as unix:///run/spire/agent.sock", endpointVariable)
	} else if err := workloadapi.ValidateAddress(a); err != nil {
		bad("identity.workload_api", "%q is no address (%v); such as unix:///run/spire/agent.sock", a, err)
	}
}
