package controller

import (
	"bytes"
	"fmt"
	"path"
	"path/filepath"
	"strings"

	"github.com/goccy/go-yaml"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// EnrolmentConfig says how hosts may come in beside join tokens.
type EnrolmentConfig struct {
	// X509PoP lists the CAs whose certificates are let in, the first that fits.
	X509PoP []X509PoPConfig `yaml:"x509pop"`
	// Cloud is in config_cloud.go.
	Cloud CloudConfig `yaml:"cloud"`
}

// X509PoPConfig is one CA, and what hosts become by its certificates.
type X509PoPConfig struct {
	// CAFile has its roots, PEM.
	CAFile string `yaml:"ca_file"`
	// Namespace and Labels are as of a join token.
	Namespace string            `yaml:"namespace"`
	Labels    map[string]string `yaml:"labels"`
	// SPIFFEIDs are patterns, of which an X509-SVID's ID must fit one: "*" is one
	// segment of the path, "/**" at the end is anything below. None: any certificate of
	// the CA's that is for client authentication will do, and makes one host per key.
	SPIFFEIDs []string `yaml:"spiffe_ids"`
}

// x509popText reads a flag's or variable's YAML: "[{ca_file: /etc/ca.pem, namespace: /acme}]".
func x509popText(x *Config, v string) error {
	var list []X509PoPConfig
	if err := yaml.NewDecoder(bytes.NewReader([]byte(v)), yaml.Strict()).Decode(&list); err != nil {
		return fmt.Errorf("want a YAML list such as [{ca_file: /etc/symbolon/hosts.pem, namespace: /acme}]: %s", strings.TrimSpace(yaml.FormatError(err, false, false)))
	}
	x.Enrolment.X509PoP = list
	return nil
}

func (c X509PoPConfig) validate(trustDomain string, bad func(key, format string, args ...any)) {
	if !filepath.IsAbs(c.CAFile) {
		bad("ca_file", "%q is not an absolute path to a file of root certificates", c.CAFile)
	}
	if !strings.HasPrefix(c.Namespace, "/") {
		bad("namespace", "%q: want an absolute path such as /acme/prod", c.Namespace)
	}
	if err := checkLabels(c.Labels); err != nil {
		bad("labels", "%v", err)
	}
	for _, p := range c.SPIFFEIDs {
		if _, err := path.Match(p, ""); err != nil || !strings.HasPrefix(p, "spiffe://") {
			bad("spiffe_ids", "%q is not a pattern such as spiffe://example.org/spire/agent/**", p)
			continue
		}
		name, _, _ := strings.Cut(strings.TrimPrefix(p, "spiffe://"), "/")
		if td, err := spiffeid.TrustDomainFromString(name); err != nil {
			bad("spiffe_ids", "%q does not begin with a trust domain; patterns are for the path", p)
		} else if td.Name() == trustDomain {
			bad("spiffe_ids", "%q is of this trust domain, whose SVIDs are no way into it", p)
		}
	}
}

// matchID tells whether an ID fits a pattern of X509PoPConfig.SPIFFEIDs.
func matchID(pattern, id string) bool {
	if above, ok := strings.CutSuffix(pattern, "/**"); ok {
		n := strings.Count(above, "/")
		parts := strings.Split(id, "/")
		if len(parts) <= n+1 {
			return false
		}
		pattern, id = above, strings.Join(parts[:n+1], "/")
	}
	ok, err := path.Match(pattern, id)
	return ok && err == nil
}
