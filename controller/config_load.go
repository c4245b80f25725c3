package controller

import (
	"strconv"
	"time"

	"github.com/symbolon/symbolon/internal/settings"
)

// Settings are all keys, in the order of the file.
func Settings() []settings.Setting[Config] {
	type c = Config
	return append([]settings.Setting[c]{
		{Key: "trust_domain", Usage: "trust domain, such as acme.example", Set: settings.Text(func(x *c) *string { return &x.TrustDomain })},
		{Key: "listen", Usage: "address:port to listen on (default 0.0.0.0:7443)", Set: settings.Text(func(x *c) *string { return &x.Listen })},
		{Key: "advertise", Usage: "further names and addresses for the certificate, separated by commas", Set: settings.List(func(x *c) *[]string { return &x.Advertise })},
		{Key: "data_dir", Usage: "directory of all state (default /var/lib/symbolon)", Set: settings.Text(func(x *c) *string { return &x.DataDir })},
		{Key: "store.kind", Usage: "where state is kept: bbolt", Set: settings.Text(func(x *c) *string { return &x.Store.Kind })},
		{Key: "ca.svid_ttl", Usage: "how long an SVID is valid (default 24h)", Set: settings.Duration(func(x *c) *time.Duration { return &x.CA.SVIDTTL })},
		{Key: "ca.rotate_every", Usage: "how often SVIDs are replaced (default 30m)", Set: settings.Duration(func(x *c) *time.Duration { return &x.CA.RotateEvery })},
		{Key: "ca.key_file", Usage: "file that seals the CA's keys (default DATA_DIR/seal.key)", Set: settings.Text(func(x *c) *string { return &x.CA.KeyFile })},
		{Key: "ca.upstream_cert_file", Usage: "the operator's own CA, PEM: its certificate, then its issuers up to the root (first start only)", Set: settings.Text(func(x *c) *string { return &x.CA.UpstreamCertFile })},
		{Key: "ca.upstream_key_file", Usage: "its private key, PEM, mode 0600: sealed into the store at the first start, not read afterwards", Set: settings.Text(func(x *c) *string { return &x.CA.UpstreamKeyFile })},
		{Key: "ca.upstream_spire_workload_api", Usage: "have a SPIRE server sign: the Workload API of the agent here, such as unix:///run/spire/agent/api.sock (docs/spire.md)", Set: settings.Text(func(x *c) *string { return &x.CA.UpstreamSPIREWorkloadAPI })},
		{Key: "ca.upstream_spire_server", Usage: "that SPIRE server's address:port; the controller's entry is made with -downstream", Set: settings.Text(func(x *c) *string { return &x.CA.UpstreamSPIREServer })},
		{Key: "ca.next_cert_file", Usage: "the operator's CA that is to be the next one, PEM, as ca.upstream_cert_file (read by 'symbolon ca rotate --root' only)", Set: settings.Text(func(x *c) *string { return &x.CA.NextCertFile })},
		{Key: "ca.next_key_file", Usage: "its private key, PEM, mode 0600: sealed into the store then", Set: settings.Text(func(x *c) *string { return &x.CA.NextKeyFile })},
		{Key: "enrolment.x509pop", Usage: "CAs whose certificates enrol hosts, as YAML: [{ca_file: FILE, namespace: PATH, labels: {}, spiffe_ids: []}]", Set: x509popText},
		{Key: "enrolment.cloud.aws", Usage: "AWS accounts whose instance documents are believed, as YAML: [{certificates_file: FILE, accounts: [], regions: [], started_within: 0s, namespace: PATH, labels: {}, reenrol: false}]",
			Set: cloudText(func(x *c) *[]AWSConfig { return &x.Enrolment.Cloud.AWS }, `[{certificates_file: /etc/symbolon/aws.pem, accounts: ["123456789012"]}]`)},
		{Key: "enrolment.cloud.gcp", Usage: "GCP projects whose instance tokens are believed, as YAML: [{jwks_file: FILE, projects: [], regions: [], namespace: PATH, labels: {}, reenrol: false}]",
			Set: cloudText(func(x *c) *[]GCPConfig { return &x.Enrolment.Cloud.GCP }, "[{jwks_file: /etc/symbolon/google.json, projects: [acme-prod]}]")},
		{Key: "enrolment.cloud.azure", Usage: "Azure subscriptions whose attested documents are believed, as YAML: [{certificates_file: FILE, subscriptions: [], names: [], namespace: PATH, labels: {}, reenrol: false}]",
			Set: cloudText(func(x *c) *[]AzureConfig { return &x.Enrolment.Cloud.Azure }, "[{certificates_file: /etc/symbolon/azure.pem, subscriptions: [8d10da13-8125-4ba9-a717-bf7490507b3d]}]")},
		{Key: "edges.retention", Usage: "how long it is kept who reached whom (default 720h)", Set: settings.Duration(func(x *c) *time.Duration { return &x.Edges.Retention })},
		{Key: "edges.per_namespace", Usage: "how many edges are kept for each namespace (default 10000)", Set: func(x *c, v string) (err error) {
			x.Edges.PerNamespace, err = strconv.Atoi(v)
			return err
		}},
	}, federationSettings()...)
}

// LoadConfig puts the configuration together and validates it; see settings.Load.
// Errors: ErrConfig.
func LoadConfig(file string, env func(string) (string, bool), flags map[string]string) (Config, error) {
	c := DefaultConfig()
	if err := settings.Load(&c, Settings(), file, env, flags); err != nil {
		return Config{}, err
	}
	return c, c.Validate()
}
