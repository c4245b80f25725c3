package controller

import (
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/symbolon/symbolon/internal/settings"
)

// FederationConfig is about the bundles of trust domains: serving one's own as a SPIFFE
// bundle endpoint, and fetching others' (kind TrustDomain).
type FederationConfig struct {
	// Listen is the endpoint's "address:port"; empty: there is none.
	Listen string `yaml:"listen"`
	// Profile is how the endpoint is authenticated: https_spiffe, by an SVID of the
	// controller's, or https_web, by CertFile and KeyFile.
	Profile string `yaml:"profile"`
	// CertFile and KeyFile are PEM, and read again when they change.
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
	// RefreshHint is how often others should ask.
	RefreshHint time.Duration `yaml:"refresh_hint"`
	// WebCAFile verifies others' https_web endpoints; empty: the system's roots do.
	WebCAFile string `yaml:"web_ca_file"`
}

const (
	profileSPIFFE = "https_spiffe"
	profileWeb    = "https_web"

	minRefreshHint, maxRefreshHint = 10 * time.Second, 24 * time.Hour
)

func (f *FederationConfig) validate(bad func(key, format string, args ...any)) {
	if f.Listen != "" {
		if _, port, err := net.SplitHostPort(f.Listen); err != nil {
			bad("federation.listen", "%q is not address:port; such as 0.0.0.0:8443", f.Listen)
		} else if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			bad("federation.listen", "port %q is not a number up to 65535", port)
		}
	}
	files := map[string]string{"federation.cert_file": f.CertFile, "federation.key_file": f.KeyFile}
	switch f.Profile {
	case profileSPIFFE:
		for key, file := range files {
			if file != "" {
				bad(key, "with profile https_spiffe the endpoint has an SVID; leave it out, or use https_web")
			}
		}
	case profileWeb:
		if f.Listen == "" {
			bad("federation.profile", "there is no endpoint to serve by it; set federation.listen, such as 0.0.0.0:8443")
		}
		for key, file := range files {
			if file == "" {
				bad(key, "not set; with profile https_web the endpoint needs a certificate and its key")
			} else if !filepath.IsAbs(file) {
				bad(key, "%q is not an absolute path", file)
			}
		}
	default:
		bad("federation.profile", "%q is unknown; use https_spiffe or https_web", f.Profile)
	}
	if f.RefreshHint < minRefreshHint || f.RefreshHint > maxRefreshHint {
		bad("federation.refresh_hint", "%v is out of range; use %v to %v, such as 5m", f.RefreshHint, minRefreshHint, maxRefreshHint)
	}
	if f.RefreshHint%time.Second != 0 {
		bad("federation.refresh_hint", "%v is not in whole seconds", f.RefreshHint)
	}
	if f.WebCAFile != "" && !filepath.IsAbs(f.WebCAFile) {
		bad("federation.web_ca_file", "%q is not an absolute path", f.WebCAFile)
	}
}

// webRoots verify others' https_web endpoints; nil: the system's.
func (f *FederationConfig) webRoots() (*x509.CertPool, error) {
	if f.WebCAFile == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(f.WebCAFile)
	if err != nil {
		return nil, fmt.Errorf("%w: federation.web_ca_file: %w", ErrConfig, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%w: federation.web_ca_file: %s holds no certificate in PEM", ErrConfig, f.WebCAFile)
	}
	return pool, nil
}

func federationSettings() []settings.Setting[Config] {
	type c = Config
	return []settings.Setting[c]{
		{Key: "federation.listen", Usage: "address:port to serve the SPIFFE bundle on, such as 0.0.0.0:8443 (default: not served)", Set: settings.Text(func(x *c) *string { return &x.Federation.Listen })},
		{Key: "federation.profile", Usage: "how it is authenticated: https_spiffe (default) or https_web", Set: settings.Text(func(x *c) *string { return &x.Federation.Profile })},
		{Key: "federation.cert_file", Usage: "certificate chain of an https_web endpoint, PEM", Set: settings.Text(func(x *c) *string { return &x.Federation.CertFile })},
		{Key: "federation.key_file", Usage: "its key, PEM", Set: settings.Text(func(x *c) *string { return &x.Federation.KeyFile })},
		{Key: "federation.refresh_hint", Usage: "how often others should ask for the bundle (default 5m)", Set: settings.Duration(func(x *c) *time.Duration { return &x.Federation.RefreshHint })},
		{Key: "federation.web_ca_file", Usage: "CAs that verify others' https_web endpoints, PEM (default: the system's)", Set: settings.Text(func(x *c) *string { return &x.Federation.WebCAFile })},
	}
}
