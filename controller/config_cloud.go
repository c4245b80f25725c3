package controller

import (
	"bytes"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/goccy/go-yaml"

	"github.com/symbolon/symbolon/controller/instance"
)

// CloudConfig says which clouds' instance documents are believed. What they say becomes
// cloud.* attributes; an entry with a namespace also lets hosts in by a document alone.
type CloudConfig struct {
	AWS   []AWSConfig   `yaml:"aws"`
	GCP   []GCPConfig   `yaml:"gcp"`
	Azure []AzureConfig `yaml:"azure"`
}

// AWSConfig is an entry for AWS.
type AWSConfig struct {
	instance.AWS    `yaml:",inline"`
	AdmissionConfig `yaml:",inline"`
}

// GCPConfig is an entry for Google's cloud.
type GCPConfig struct {
	instance.GCP    `yaml:",inline"`
	AdmissionConfig `yaml:",inline"`
}

// AzureConfig is an entry for Azure.
type AzureConfig struct {
	instance.Azure  `yaml:",inline"`
	AdmissionConfig `yaml:",inline"`
}

// AdmissionConfig says what hosts become that enrol by a document alone.
type AdmissionConfig struct {
	// Namespace and Labels are as of a join token. No namespace: a document alone lets
	// nobody in.
	Namespace string            `yaml:"namespace"`
	Labels    map[string]string `yaml:"labels"`
	// Reenrol lets an instance that was a host come back, as the same host, when it has
	// lost its key; docs/enrolment.md says who else can then.
	Reenrol bool `yaml:"reenrol"`
}

// authorities are all entries in the order of the configuration, with what hosts become
// by each.
func (c *CloudConfig) authorities() (out []instance.Authority, become []AdmissionConfig) {
	for i := range c.AWS {
		out, become = append(out, &c.AWS[i].AWS), append(become, c.AWS[i].AdmissionConfig)
	}
	for i := range c.GCP {
		out, become = append(out, &c.GCP[i].GCP), append(become, c.GCP[i].AdmissionConfig)
	}
	for i := range c.Azure {
		out, become = append(out, &c.Azure[i].Azure), append(become, c.Azure[i].AdmissionConfig)
	}
	return out, become
}

// cloudText reads a flag's or variable's YAML list.
func cloudText[T any](field func(*Config) *[]T, example string) func(*Config, string) error {
	return func(x *Config, v string) error {
		var list []T
		if err := yaml.NewDecoder(bytes.NewReader([]byte(v)), yaml.Strict()).Decode(&list); err != nil {
			return fmt.Errorf("want a YAML list such as %s: %s", example, strings.TrimSpace(yaml.FormatError(err, false, false)))
		}
		*field(x) = list
		return nil
	}
}

func (c *CloudConfig) validate(bad func(key, format string, args ...any)) {
	at := func(provider string, i int) func(key, format string, args ...any) {
		return func(key, format string, args ...any) {
			bad(fmt.Sprintf("enrolment.cloud.%s[%d].%s", provider, i, key), format, args...)
		}
	}
	for i, e := range c.AWS {
		bad := at("aws", i)
		anchors(bad, "certificates_file", e.CertificatesFile, "the regions' RSA-2048 certificates")
		named(bad, "accounts", e.Accounts, "123456789012")
		if e.StartedWithin < 0 {
			bad("started_within", "%v is negative; such as 15m", e.StartedWithin)
		}
		for _, a := range e.Accounts {
			if len(a) != 12 || strings.Trim(a, "0123456789") != "" {
				bad("accounts", "%q is not an account ID of 12 digits; write it in quotes", a)
			}
		}
		e.AdmissionConfig.validate(bad)
	}
	for i, e := range c.GCP {
		bad := at("gcp", i)
		anchors(bad, "jwks_file", e.JWKSFile, "Google's keys")
		named(bad, "projects", e.Projects, "acme-prod")
		e.AdmissionConfig.validate(bad)
	}
	for i, e := range c.Azure {
		bad := at("azure", i)
		anchors(bad, "certificates_file", e.CertificatesFile, "root and intermediate certificates")
		named(bad, "subscriptions", e.Subscriptions, "8d10da13-8125-4ba9-a717-bf7490507b3d")
		for _, n := range e.Names {
			if n == "" || n != strings.ToLower(n) || strings.ContainsAny(n, "*/: ") || !strings.Contains(n, ".") {
				bad("names", "%q is not a DNS name in lower case, such as metadata.azure.us; subdomains are included", n)
			}
		}
		e.AdmissionConfig.validate(bad)
	}
}

func anchors(bad func(key, format string, args ...any), key, file, what string) {
	if !filepath.IsAbs(file) {
		bad(key, "%q is not an absolute path to a file of %s", file, what)
	}
}

// named: without a list, everybody's machines would come in.
func named(bad func(key, format string, args ...any), key string, list []string, example string) {
	if len(list) == 0 {
		bad(key, "not set; name those whose instances are let in, such as [%q]", example)
	}
	for _, v := range list {
		if v == "" {
			bad(key, "one is empty; such as %q", example)
		}
	}
}

func (c AdmissionConfig) validate(bad func(key, format string, args ...any)) {
	if c.Namespace != "" && !strings.HasPrefix(c.Namespace, "/") {
		bad("namespace", "%q: want an absolute path such as /acme/prod, or none where documents only add attributes", c.Namespace)
	}
	if err := checkLabels(c.Labels); err != nil {
		bad("labels", "%v", err)
	}
	if c.Namespace == "" && (len(c.Labels) > 0 || c.Reenrol) {
		bad("namespace", "not set; labels and reenrol are for hosts that enrol by the document alone, and those need one")
	}
}
