package proxy

import (
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/cloud"
	"github.com/symbolon/symbolon/identity/containers"
	"github.com/symbolon/symbolon/internal/settings"
	"github.com/symbolon/symbolon/redirect"
)

// Config is proxy.yaml. Every key has a flag and an environment variable (Settings).
type Config struct {
	Controller ControllerConfig `yaml:"controller"`
	Identity   IdentityConfig   `yaml:"identity"`
	Redirect   RedirectConfig   `yaml:"redirect"`
	Tunnel     TunnelConfig     `yaml:"tunnel"`
	Limits     Limits           `yaml:"limits"`
	// Admin is where metrics, health and debugging are served: a loopback address.
	Admin string `yaml:"admin"`
	// Socket is the same for local tools, on a Unix socket; its name also tells
	// several proxies of one machine apart.
	Socket string `yaml:"socket"`
	// Flows is the file that records are appended to, "-" standard output, "" none.
	Flows string `yaml:"flows"`
	// LogLevel is debug, info, warn or error.
	LogLevel string `yaml:"log_level"`
	// DrainTimeout is how long open connections have to end when the proxy stops.
	DrainTimeout time.Duration `yaml:"drain_timeout"`
	// HandoverTimeout is how long a new process may take until it is ready to take
	// over (SIGHUP, SIGUSR2).
	HandoverTimeout time.Duration `yaml:"handover_timeout"`
	// QuietTimeout is how long an unprotected client may wait for the server to
	// speak first.
	QuietTimeout time.Duration `yaml:"quiet_timeout"`
}

// ControllerConfig says where the controller is.
type ControllerConfig struct {
	Address string `yaml:"address"`
	// JoinTokenFile holds a join token; needed for the first start only.
	JoinTokenFile string `yaml:"join_token_file"`
	// Join is how this host enrols: JoinToken, JoinX509PoP, or a cloud by whose instance
	// document. CertFile and KeyFile are the certificate of the second, CAFile the
	// controller's root for all but a token.
	Join     string `yaml:"join"`
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
	CAFile   string `yaml:"ca_file"`
}

// RedirectConfig says which connections the proxy takes.
type RedirectConfig struct {
	// Inbound is "redirect" or "tproxy", which leaves the client's port as it is.
	Inbound string `yaml:"inbound"`
	// PreserveSource lets local applications see the address of a remote client,
	// though not its port.
	PreserveSource      bool             `yaml:"preserve_source"`
	InboundPorts        redirect.PortSet `yaml:"inbound_ports"`
	ExcludeInboundPorts redirect.PortSet `yaml:"exclude_inbound_ports"`
	Outbound            []string         `yaml:"outbound"`
	ExcludeOutbound     []string         `yaml:"exclude_outbound"`
	OnExit              string           `yaml:"on_exit"`
	// Owner is how the process behind an outbound connection is found: "ebpf" by the
	// kernel's record of the connect call, "sock_diag" by who has the socket, "auto"
	// by the first if the kernel can.
	Owner string `yaml:"owner"`
}

// The values of RedirectConfig.Owner.
const (
	OwnerAuto     = "auto"
	OwnerEBPF     = "ebpf"
	OwnerSockDiag = "sock_diag"
)

// TunnelConfig is about the way to other proxies.
type TunnelConfig struct {
	// Reuse lets one tunnel serve several connections of a workload to the same
	// destination, one after another, where no balancer is in between.
	Reuse bool `yaml:"reuse"`
	// RecordLayer encrypts the data phase: "own" or "stock" (crypto/tls).
	RecordLayer string `yaml:"record_layer"`
	// PeerTimeout is after how long a peer counts as gone that does not acknowledge
	// what it was sent, applications included; 0 leaves that to the kernel.
	PeerTimeout time.Duration `yaml:"peer_timeout"`
	// IdleTimeout and HalfCloseTimeout are how long a connection may rest that is open
	// both ways, or one way; 0: for ever.
	IdleTimeout      time.Duration `yaml:"idle_timeout"`
	HalfCloseTimeout time.Duration `yaml:"half_close_timeout"`
	// KeyExchange are the groups to offer and accept, the best first: see KeyExchanges.
	KeyExchange []string `yaml:"key_exchange"`
	// FastOpen begins the TLS of new tunnels in their SYN, and takes such ones: see
	// mtls.Options and redirect.ConnectTunnel. Both hosts' net.ipv4.tcp_fastopen must be 3.
	FastOpen bool `yaml:"fast_open"`
}

// KeyExchanges are the values of TunnelConfig.KeyExchange.
var KeyExchanges = map[string]tls.CurveID{
	"X25519MLKEM768": tls.X25519MLKEM768, "SecP256r1MLKEM768": tls.SecP256r1MLKEM768,
	"X25519": tls.X25519, "P-256": tls.CurveP256,
}

// Curves are the groups of KeyExchange, for mtls.Options.
func (c TunnelConfig) Curves() []tls.CurveID {
	var ids []tls.CurveID
	for _, name := range c.KeyExchange {
		ids = append(ids, KeyExchanges[name])
	}
	return ids
}

// The bounds of TunnelConfig.PeerTimeout: below, a lossy link would do; above, the
// kernel is quicker.
const (
	minPeerTimeout = time.Second
	maxPeerTimeout = time.Hour
)

// DefaultConfig is what holds where nothing is said.
func DefaultConfig() Config {
	r := redirect.DefaultConfig()
	var outbound []string
	for _, p := range r.Outbound {
		outbound = append(outbound, p.String())
	}
	return Config{
		Controller: ControllerConfig{Join: JoinToken},
		Identity:   IdentityConfig{Source: SourceController, SPIRE: SPIREConfig{API: SPIREDelegated, AdminSocket: defaultAdminSocket, BrokerSocket: defaultBrokerSocket}, Cloud: CloudNone, CloudMetadata: cloud.DefaultAddress, Containers: containers.Defaults()},
		Redirect: RedirectConfig{
			Inbound: "redirect", InboundPorts: r.InboundPorts, ExcludeInboundPorts: r.ExcludeInbound,
			Outbound: outbound, OnExit: "closed", Owner: OwnerAuto,
		},
		Tunnel: TunnelConfig{Reuse: true, RecordLayer: "own", PeerTimeout: redirect.DefaultPeerTimeout,
			IdleTimeout: DefaultIdle.Open, HalfCloseTimeout: DefaultIdle.HalfClosed, KeyExchange: []string{"X25519MLKEM768", "X25519"}},
		Limits: DefaultLimits,
		Admin:  "127.0.0.1:15020", Socket: "/run/symbolon/proxy.sock", Flows: "-", LogLevel: "info",
		DrainTimeout: DefaultTimeouts.Drain, HandoverTimeout: 30 * time.Second, QuietTimeout: DefaultTimeouts.Quiet,
	}
}

// Settings are all keys, in the order of the file.
func Settings() []settings.Setting[Config] {
	type c = Config
	ports := func(key string, field func(*c) *redirect.PortSet) func(*c, string) error {
		return func(x *c, v string) (err error) {
			*field(x), err = redirect.ParsePorts(key, settings.Split(v)...)
			return err
		}
	}
	text := settings.Text[c]
	number := func(field func(*c) *int) func(*c, string) error {
		return func(x *c, v string) (err error) {
			*field(x), err = strconv.Atoi(v)
			return err
		}
	}
	return []settings.Setting[c]{
		{Key: "controller.address", Usage: "address:port of the controller", Set: text(func(x *c) *string { return &x.Controller.Address })},
		{Key: "controller.join_token_file", Usage: "file with the join token, for the first start", Set: text(func(x *c) *string { return &x.Controller.JoinTokenFile })},
		{Key: "controller.join", Usage: "how this host enrols: token, x509pop by a certificate that it has, or aws, gcp, azure by the cloud's instance document (default token)", Set: text(func(x *c) *string { return &x.Controller.Join })},
		{Key: "controller.cert_file", Usage: "that certificate and what is between it and its CA, PEM (x509pop)", Set: text(func(x *c) *string { return &x.Controller.CertFile })},
		{Key: "controller.key_file", Usage: "its key, PEM; it is not sent (x509pop)", Set: text(func(x *c) *string { return &x.Controller.KeyFile })},
		{Key: "controller.ca_file", Usage: "the controller's root, its ca.pem (all but token, which carries it)", Set: text(func(x *c) *string { return &x.Controller.CAFile })},
		{Key: "identity.source", Usage: "where SVIDs come from: controller, spire (each process attested by the SPIRE agent) or workload-api (one for all of the host) (default controller)", Set: text(func(x *c) *string { return &x.Identity.Source })},
		{Key: "identity.spire.api", Usage: "the SPIRE agent's API: delegated, or broker (experimental) (default delegated)", Set: text(func(x *c) *string { return &x.Identity.SPIRE.API })},
		{Key: "identity.spire.broker_socket", Usage: "the SPIRE agent's experimental.broker.socket_path, with identity.spire.api broker (default " + defaultBrokerSocket + ")", Set: text(func(x *c) *string { return &x.Identity.SPIRE.BrokerSocket })},
		{Key: "identity.spire.admin_socket", Usage: "the SPIRE agent's admin_socket_path (default " + defaultAdminSocket + ")", Set: text(func(x *c) *string { return &x.Identity.SPIRE.AdminSocket })},
		{Key: "identity.spire.hint", Usage: "of several SVIDs of a workload, the one whose entry has this hint", Set: text(func(x *c) *string { return &x.Identity.SPIRE.Hint })},
		{Key: "identity.spire.path_prefix", Usage: "of several SVIDs of a workload, the one whose path begins so, such as /prod", Set: text(func(x *c) *string { return &x.Identity.SPIRE.PathPrefix })},
		{Key: "identity.workload_api", Usage: "socket of the SPIFFE Workload API, such as unix:///run/spire/agent.sock (default $SPIFFE_ENDPOINT_SOCKET)", Set: text(func(x *c) *string { return &x.Identity.WorkloadAPI })},
		{Key: "identity.attributes", Usage: "attributes on request, which make workloads of processes: " + strings.Join(identity.OnRequest(), ", "), Set: settings.List(func(x *c) *[]string { return &x.Identity.Attributes })},
		{Key: "identity.containers", Usage: "sockets of container runtimes, which are asked for container.*, image.* and k8s.*: docker:PATH (Docker, Podman) or cri:PATH; none: nobody is asked (default " + strings.Join(containers.Defaults(), ",") + ")", Set: settings.List(func(x *c) *[]string { return &x.Identity.Containers })},
		{Key: "identity.cloud", Usage: "whose instance document is shown at enrolment, for the attributes cloud.*: aws, gcp, azure or none (default none)", Set: text(func(x *c) *string { return &x.Identity.Cloud })},
		{Key: "identity.cloud_metadata", Usage: "address:port of the cloud's metadata service (default " + cloud.DefaultAddress + ")", Set: text(func(x *c) *string { return &x.Identity.CloudMetadata })},
		{Key: "identity.serve_workload_api", Usage: "Unix socket where local programs get their SVIDs, with private keys, by the SPIFFE Workload API (default none)", Set: text(func(x *c) *string { return &x.Identity.ServeWorkloadAPI })},
		{Key: "redirect.inbound", Usage: "how inbound connections are taken: redirect, or tproxy to leave ports as they are (default redirect)", Set: text(func(x *c) *string { return &x.Redirect.Inbound })},
		{Key: "redirect.preserve_source", Usage: "let applications see a remote client's address: true or false (default false)", Set: settings.Bool(func(x *c) *bool { return &x.Redirect.PreserveSource })},
		{Key: "redirect.inbound_ports", Usage: `protected local ports: "all", or such as 5432,8000-8100`, Set: ports("redirect.inbound_ports", func(x *c) *redirect.PortSet { return &x.Redirect.InboundPorts })},
		{Key: "redirect.exclude_inbound_ports", Usage: "local ports reached as without a proxy (default 22)", Set: ports("redirect.exclude_inbound_ports", func(x *c) *redirect.PortSet { return &x.Redirect.ExcludeInboundPorts })},
		{Key: "redirect.outbound", Usage: "destinations to intercept, CIDRs (default all)", Set: settings.List(func(x *c) *[]string { return &x.Redirect.Outbound })},
		{Key: "redirect.exclude_outbound", Usage: "destinations to leave alone, CIDRs", Set: settings.List(func(x *c) *[]string { return &x.Redirect.ExcludeOutbound })},
		{Key: "redirect.on_exit", Usage: "what protected traffic does without the proxy: closed or open (default closed)", Set: text(func(x *c) *string { return &x.Redirect.OnExit })},
		{Key: "redirect.owner", Usage: "how clients' processes are found: auto, ebpf (do not start without) or sock_diag (default auto)", Set: text(func(x *c) *string { return &x.Redirect.Owner })},
		{Key: "tunnel.reuse", Usage: "let one tunnel serve several connections in turn: true or false (default true)", Set: settings.Bool(func(x *c) *bool { return &x.Tunnel.Reuse })},
		{Key: "tunnel.record_layer", Usage: "what encrypts the data: own, or stock for crypto/tls (default own)", Set: text(func(x *c) *string { return &x.Tunnel.RecordLayer })},
		{Key: "tunnel.idle_timeout", Usage: "how long an open connection may rest; 0s: for ever (default 0s)", Set: settings.Duration(func(x *c) *time.Duration { return &x.Tunnel.IdleTimeout })},
		{Key: "tunnel.half_close_timeout", Usage: "how long one may rest that one end has closed; 0s: for ever (default 1h)", Set: settings.Duration(func(x *c) *time.Duration { return &x.Tunnel.HalfCloseTimeout })},
		{Key: "tunnel.key_exchange", Usage: "key exchanges to offer and accept, the best first: X25519MLKEM768, SecP256r1MLKEM768 (less CPU), X25519, P-256 (default X25519MLKEM768,X25519)", Set: settings.List(func(x *c) *[]string { return &x.Tunnel.KeyExchange })},
		{Key: "tunnel.fast_open", Usage: "begin TLS in a new tunnel's SYN, by TCP Fast Open, with the first of tunnel.key_exchange only and without tickets: true or false (default false)", Set: settings.Bool(func(x *c) *bool { return &x.Tunnel.FastOpen })},
		{Key: "tunnel.peer_timeout", Usage: "after how long a peer that acknowledges nothing counts as gone; 0s: as the kernel thinks (default 2m)", Set: settings.Duration(func(x *c) *time.Duration { return &x.Tunnel.PeerTimeout })},
		{Key: "limits.connections", Usage: "open connections in all (default 100000)", Set: number(func(x *c) *int { return &x.Limits.Connections })},
		{Key: "limits.handshakes", Usage: "connections that wait for their authorization, each direction (default 8192)", Set: number(func(x *c) *int { return &x.Limits.Handshakes })},
		{Key: "limits.handshakes_per_source", Usage: "those inbound from one address (default 2048)", Set: number(func(x *c) *int { return &x.Limits.HandshakesPerSource })},
		{Key: "limits.handshakes_per_user", Usage: "those outbound of one user (default 4096)", Set: number(func(x *c) *int { return &x.Limits.HandshakesPerUser })},
		{Key: "limits.workload_share", Usage: "per cent of limits.connections that one workload may have (default 80)", Set: number(func(x *c) *int { return &x.Limits.WorkloadShare })},
		{Key: "admin", Usage: "loopback address:port of metrics and health (default 127.0.0.1:15020)", Set: text(func(x *c) *string { return &x.Admin })},
		{Key: "socket", Usage: "Unix socket of the debug commands (default /run/symbolon/proxy.sock)", Set: text(func(x *c) *string { return &x.Socket })},
		{Key: "flows", Usage: `file for flow records, "-" standard output, "" none (default -)`, Set: text(func(x *c) *string { return &x.Flows })},
		{Key: "log_level", Usage: "debug, info, warn or error (default info)", Set: text(func(x *c) *string { return &x.LogLevel })},
		{Key: "drain_timeout", Usage: "how long open connections have to end at a stop (default 10s)", Set: settings.Duration(func(x *c) *time.Duration { return &x.DrainTimeout })},
		{Key: "handover_timeout", Usage: "how long a new process may take to take over at a reload (default 30s)", Set: settings.Duration(func(x *c) *time.Duration { return &x.HandoverTimeout })},
		{Key: "quiet_timeout", Usage: "how long an unprotected client may be silent (default 200ms)", Set: settings.Duration(func(x *c) *time.Duration { return &x.QuietTimeout })},
	}
}

// LoadConfig puts the configuration together and validates it; see settings.Load.
func LoadConfig(file string, env func(string) (string, bool), flags map[string]string) (Config, error) {
	c := DefaultConfig()
	if err := settings.Load(&c, Settings(), file, env, flags); err != nil {
		return Config{}, err
	}
	c.Identity.fill(env)
	return c, c.Validate()
}

// Validate finds everything that is wrong. Errors: settings.ErrConfig.
func (c Config) Validate() error {
	var errs []error
	bad := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: %s: %s", settings.ErrConfig, key, fmt.Sprintf(format, args...)))
	}
	if host, _, err := net.SplitHostPort(c.Controller.Address); err != nil || host == "" {
		bad("controller.address", "%q is not address:port; such as 198.51.100.5:7443", c.Controller.Address)
	}
	c.Controller.validate(bad)
	c.Identity.validate(bad)
	c.validateCloud(bad)
	if c.Redirect.Inbound != "redirect" && c.Redirect.Inbound != "tproxy" {
		bad("redirect.inbound", "%q is unknown; use redirect or tproxy", c.Redirect.Inbound)
	}
	if c.Tunnel.RecordLayer != "own" && c.Tunnel.RecordLayer != "stock" {
		bad("tunnel.record_layer", "%q is unknown; use own or stock", c.Tunnel.RecordLayer)
	}
	for key, t := range map[string]time.Duration{"tunnel.idle_timeout": c.Tunnel.IdleTimeout, "tunnel.half_close_timeout": c.Tunnel.HalfCloseTimeout} {
		if t != 0 && t < sweepEvery {
			bad(key, "%v is too short; use %v or more, or 0s for no limit", t, sweepEvery)
		}
	}
	if len(c.Tunnel.KeyExchange) == 0 {
		bad("tunnel.key_exchange", "is empty; use some of %s", strings.Join(slices.Sorted(maps.Keys(KeyExchanges)), ", "))
	}
	for _, name := range c.Tunnel.KeyExchange {
		if _, ok := KeyExchanges[name]; !ok {
			bad("tunnel.key_exchange", "%q is unknown; use some of %s", name, strings.Join(slices.Sorted(maps.Keys(KeyExchanges)), ", "))
		}
	}
	if t := c.Tunnel.PeerTimeout; t != 0 && (t < minPeerTimeout || t > maxPeerTimeout) {
		bad("tunnel.peer_timeout", "%v is out of range; use %v to %v, or 0s to leave it to the kernel", t, minPeerTimeout, maxPeerTimeout)
	}
	if c.Redirect.OnExit != "closed" && c.Redirect.OnExit != "open" {
		bad("redirect.on_exit", "%q is unknown; use closed (nothing passes without the proxy) or open", c.Redirect.OnExit)
	}
	switch c.Redirect.Owner {
	case OwnerAuto, OwnerEBPF, OwnerSockDiag:
	default:
		bad("redirect.owner", "%q is unknown; use auto, ebpf or sock_diag", c.Redirect.Owner)
	}
	if _, err := c.Rules(); err != nil {
		errs = append(errs, fmt.Errorf("%w: %w", settings.ErrConfig, err))
	}
	if c.Admin != "" {
		if a, err := netip.ParseAddrPort(c.Admin); err != nil || !a.Addr().IsLoopback() {
			bad("admin", "%q is not a loopback address:port; such as 127.0.0.1:15020", c.Admin)
		}
	}
	switch c.LogLevel {
	case "debug", "info", "warn", "error":
	default:
		bad("log_level", "%q is unknown; use debug, info, warn or error", c.LogLevel)
	}
	for key, n := range map[string]int{
		limitConnections: c.Limits.Connections, limitHandshakes: c.Limits.Handshakes,
		limitPerSource: c.Limits.HandshakesPerSource, limitPerUser: c.Limits.HandshakesPerUser,
	} {
		if n < 1 || n > 10_000_000 {
			bad("limits."+key, "%d is out of range; use 1 to 10000000", n)
		}
	}
	if c.Limits.WorkloadShare < 1 || c.Limits.WorkloadShare > 100 {
		bad("limits."+limitShare, "%d is no share in per cent; use 1 to 99, or 100 for no limit", c.Limits.WorkloadShare)
	}
	if c.DrainTimeout < 0 {
		bad("drain_timeout", "%v is negative", c.DrainTimeout)
	}
	if c.HandoverTimeout <= 0 {
		bad("handover_timeout", "%v is no time; use such as 30s", c.HandoverTimeout)
	}
	if c.QuietTimeout < 0 || c.QuietTimeout > DefaultTimeouts.Handshake {
		bad("quiet_timeout", "%v is out of range; use 0s to %v", c.QuietTimeout, DefaultTimeouts.Handshake)
	}
	return errors.Join(errs...)
}

// Rules is the part that goes into the kernel.
func (c Config) Rules() (redirect.Config, error) {
	r := redirect.DefaultConfig()
	r.InboundPorts, r.ExcludeInbound = c.Redirect.InboundPorts, c.Redirect.ExcludeInboundPorts
	r.FailClosed = c.Redirect.OnExit != "open"
	r.Transparent, r.PreserveSource = c.Redirect.Inbound == "tproxy", c.Redirect.PreserveSource
	var err error
	if r.Outbound, err = redirect.ParsePrefixes("redirect.outbound", c.Redirect.Outbound...); err != nil {
		return r, err
	}
	if r.ExcludeOutbound, err = redirect.ParsePrefixes("redirect.exclude_outbound", c.Redirect.ExcludeOutbound...); err != nil {
		return r, err
	}
	return r, r.Validate()
}
