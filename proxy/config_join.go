package proxy

import (
	"path/filepath"
	"slices"
	"strings"

	"github.com/symbolon/symbolon/identity/cloud"
)

// The values of ControllerConfig.Join, beside those of cloud.Providers.
const (
	JoinToken   = "token"
	JoinX509PoP = "x509pop"
)

// CloudNone is the value of IdentityConfig.Cloud by which no document is asked for.
const CloudNone = "none"

// Document is the cloud whose document this host enrols with; "": none.
func (c Config) Document() string {
	switch {
	case slices.Contains(cloud.Providers(), c.Controller.Join):
		return c.Controller.Join
	case c.Identity.Cloud != CloudNone:
		return c.Identity.Cloud
	}
	return ""
}

func (c ControllerConfig) validate(bad func(key, format string, args ...any)) {
	const ca = "the controller's ca.pem, by which it is told from an impostor"
	need := func(key, file, what string) {
		if !filepath.IsAbs(file) {
			bad("controller."+key, "%q is not an absolute path; %s needs %s", file, c.Join, what)
		}
	}
	switch {
	case c.Join == JoinToken:
	case c.Join == JoinX509PoP:
		need("cert_file", c.CertFile, "the certificate to enrol with, PEM")
		need("key_file", c.KeyFile, "its key, PEM")
		need("ca_file", c.CAFile, ca)
	case slices.Contains(cloud.Providers(), c.Join):
		need("ca_file", c.CAFile, ca)
	default:
		bad("controller.join", "%q is unknown; use token, x509pop, %s", c.Join, strings.Join(cloud.Providers(), ", "))
	}
}

func (c Config) validateCloud(bad func(key, format string, args ...any)) {
	if c.Identity.Cloud != CloudNone && !slices.Contains(cloud.Providers(), c.Identity.Cloud) {
		bad("identity.cloud", "%q is unknown; use %s or %s", c.Identity.Cloud, strings.Join(cloud.Providers(), ", "), CloudNone)
	} else if document := c.Document(); c.Identity.Cloud != CloudNone && document != c.Identity.Cloud {
		bad("identity.cloud", "%s is another cloud than controller.join, %s: one machine is one's; leave it out", c.Identity.Cloud, document)
	}
	if !cloud.ValidAddress(c.Identity.CloudMetadata) {
		bad("identity.cloud_metadata", "%q is not address:port on this machine or its link; such as %s", c.Identity.CloudMetadata, cloud.DefaultAddress)
	}
}
