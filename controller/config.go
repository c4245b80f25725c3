package controller

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/controller/federation"
	"github.com/symbolon/symbolon/internal/settings"
)

// ErrConfig: the configuration cannot be used; the text names the key and the remedy.
var ErrConfig = settings.ErrConfig

// Config is controller.yaml. Every key has a flag and an environment variable
// (Settings).
type Config struct {
	// TrustDomain is the name that all IDs start with: "acme.example".
	TrustDomain string `yaml:"trust_domain"`
	// Listen is the one TLS port, "address:port".
	Listen string `yaml:"listen"`
	// Advertise lists further names and addresses that clients dial, for the
	// certificate. Listen's address and this machine's are there without it.
	Advertise []string `yaml:"advertise"`
	// DataDir holds the store, admin.token and ca.pem.
	DataDir string      `yaml:"data_dir"`
	Store   StoreConfig `yaml:"store"`
	CA      CAConfig    `yaml:"ca"`
	Edges   EdgesConfig `yaml:"edges"`
	// Federation is about other trust domains.
	Federation FederationConfig `yaml:"federation"`
	// Enrolment is in config_enrol.go.
	Enrolment EnrolmentConfig `yaml:"enrolment"`
}

// StoreConfig says where state is kept.
type StoreConfig struct {
	// Kind is "bbolt".
	Kind string `yaml:"kind"`
}

// CAConfig is about certificates.
type CAConfig struct {
	// SVIDTTL is how long an SVID is valid: for so long, hosts do without us.
	SVIDTTL time.Duration `yaml:"svid_ttl"`
	// RotateEvery is how often SVIDs are replaced.
	RotateEvery time.Duration `yaml:"rotate_every"`
	// KeyFile seals the CA's keys; empty: seal.key in DataDir.
	KeyFile string `yaml:"key_file"`
	// UpstreamCertFile and UpstreamKeyFile are the operator's own root or intermediate,
	// PEM: taken over at the first start, and not read afterwards.
	UpstreamCertFile string `yaml:"upstream_cert_file"`
	UpstreamKeyFile  string `yaml:"upstream_key_file"`
	// UpstreamSPIREWorkloadAPI and UpstreamSPIREServer are a SPIRE agent's Workload API
	// ("unix:///run/spire/agent/api.sock"), which gives this process the SVID of a downstream
	// entry, and the server that signs our intermediates by it ("address:port").
	UpstreamSPIREWorkloadAPI string `yaml:"upstream_spire_workload_api"`
	UpstreamSPIREServer      string `yaml:"upstream_spire_server"`
	// NextCertFile and NextKeyFile are the operator's CA that is to be the next one, PEM:
	// taken over when a rotation of the root is started, and not read otherwise.
	NextCertFile string `yaml:"next_cert_file"`
	NextKeyFile  string `yaml:"next_key_file"`
}

// EdgesConfig is about what is kept of who reached whom.
type EdgesConfig struct {
	// Retention is how long an edge is kept after it was last seen.
	Retention time.Duration `yaml:"retention"`
	// PerNamespace is how many edges are kept for each namespace.
	PerNamespace int `yaml:"per_namespace"`
}

// DefaultConfig is what holds where nothing is said. TrustDomain has no default.
func DefaultConfig() Config {
	return Config{
		Listen:     "0.0.0.0:7443",
		DataDir:    "/var/lib/symbolon",
		Store:      StoreConfig{Kind: "bbolt"},
		CA:         CAConfig{SVIDTTL: 24 * time.Hour, RotateEvery: 30 * time.Minute},
		Edges:      EdgesConfig{Retention: 30 * 24 * time.Hour, PerNamespace: 10_000},
		Federation: FederationConfig{Profile: profileSPIFFE, RefreshHint: federation.DefaultRefresh},
	}
}

const (
	minRotate = time.Minute
	// maxTTL is well below what is left of an intermediate when it is renewed.
	maxTTL = 30 * 24 * time.Hour

	minEdgeRetention = time.Hour
	minEdges         = 100
	maxEdges         = 1_000_000
)

// Validate finds everything that is wrong. Errors: ErrConfig.
func (c Config) Validate() error {
	var errs []error
	bad := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: %s: %s", ErrConfig, key, fmt.Sprintf(format, args...)))
	}
	if c.TrustDomain == "" {
		bad("trust_domain", "not set; give the name that all SPIFFE IDs start with, such as acme.example")
	} else if td, err := spiffeid.TrustDomainFromString(c.TrustDomain); err != nil || td.Name() != c.TrustDomain {
		bad("trust_domain", "%q is not a trust domain; use lower-case letters, digits, dots, dashes, such as acme.example", c.TrustDomain)
	} else if _, err := netip.ParseAddr(c.TrustDomain); err == nil {
		bad("trust_domain", "%q is an address, which a CA cannot be confined to; use a name, such as acme.example", c.TrustDomain)
	}
	if _, port, err := net.SplitHostPort(c.Listen); err != nil {
		bad("listen", "%q is not address:port; such as 0.0.0.0:7443", c.Listen)
	} else if n, err := strconv.ParseUint(port, 10, 16); err != nil {
		bad("listen", "port %q of %q is not a number up to 65535 (%d)", port, c.Listen, n)
	}
	for _, name := range c.Advertise {
		if !validSAN(name) {
			bad("advertise", "%q is neither an IP address nor a DNS name; leave the port out", name)
		}
	}
	if !filepath.IsAbs(c.DataDir) {
		bad("data_dir", "%q is not an absolute path; such as /var/lib/symbolon", c.DataDir)
	}
	switch c.Store.Kind {
	case "bbolt":
	case "etcd":
		bad("store.kind", "etcd is not available in this version; use bbolt")
	default:
		bad("store.kind", "%q is unknown; use bbolt", c.Store.Kind)
	}
	if c.CA.RotateEvery < minRotate {
		bad("ca.rotate_every", "%v is too short; use %v or more, such as 30m", c.CA.RotateEvery, minRotate)
	}
	if c.CA.SVIDTTL < 2*c.CA.RotateEvery {
		bad("ca.svid_ttl", "%v leaves no time to rotate every %v; use twice that or more, such as 24h", c.CA.SVIDTTL, c.CA.RotateEvery)
	}
	if c.CA.SVIDTTL > maxTTL {
		bad("ca.svid_ttl", "%v is too long; use %v or less", c.CA.SVIDTTL, maxTTL)
	}
	if c.CA.KeyFile != "" && !filepath.IsAbs(c.CA.KeyFile) {
		bad("ca.key_file", "%q is not an absolute path", c.CA.KeyFile)
	}
	for i, e := range c.Enrolment.X509PoP {
		e.validate(c.TrustDomain, func(key, format string, args ...any) {
			bad(fmt.Sprintf("enrolment.x509pop[%d].%s", i, key), format, args...)
		})
	}
	c.Enrolment.Cloud.validate(bad)
	for key, path := range map[string]string{
		"ca.upstream_cert_file": c.CA.UpstreamCertFile, "ca.upstream_key_file": c.CA.UpstreamKeyFile,
		"ca.next_cert_file": c.CA.NextCertFile, "ca.next_key_file": c.CA.NextKeyFile,
	} {
		if path != "" && !filepath.IsAbs(path) {
			bad(key, "%q is not an absolute path", path)
		}
	}
	if (c.CA.UpstreamCertFile == "") != (c.CA.UpstreamKeyFile == "") {
		bad("ca.upstream_cert_file", "it goes with ca.upstream_key_file; give both, or neither to have a CA made")
	}
	if (c.CA.NextCertFile == "") != (c.CA.NextKeyFile == "") {
		bad("ca.next_cert_file", "it goes with ca.next_key_file; give both, or neither to have the next root made")
	}
	c.CA.validateUpstreamSPIRE(c.TrustDomain, bad)
	if c.Edges.Retention < minEdgeRetention {
		bad("edges.retention", "%v is too short; use %v or more, such as 720h", c.Edges.Retention, minEdgeRetention)
	}
	if c.Edges.PerNamespace < minEdges || c.Edges.PerNamespace > maxEdges {
		bad("edges.per_namespace", "%d is out of range; use %d to %d", c.Edges.PerNamespace, minEdges, maxEdges)
	}
	c.Federation.validate(bad)
	return errors.Join(errs...)
}

// Paths under the data directory.

func (c Config) storeFile() string      { return filepath.Join(c.DataDir, "controller.db") }
func (c Config) adminTokenFile() string { return filepath.Join(c.DataDir, "admin.token") }

func (c Config) claimsTokenFile() string { return filepath.Join(c.DataDir, "claims.token") }
func (c Config) caFile() string          { return filepath.Join(c.DataDir, "ca.pem") }

func (c Config) keyFile() string {
	if c.CA.KeyFile != "" {
		return c.CA.KeyFile
	}
	return filepath.Join(c.DataDir, "seal.key")
}

func (c Config) trustDomain() spiffeid.TrustDomain {
	return spiffeid.RequireTrustDomainFromString(c.TrustDomain) // Validate saw it
}
