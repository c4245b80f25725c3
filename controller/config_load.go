package controller

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
)

// EnvPrefix starts every environment variable of a Setting.
const EnvPrefix = "SYMBOLON_"

// Setting is one configuration key as flag and environment variable.
type Setting struct {
	// Key is its place in the file: "ca.svid_ttl".
	Key string
	// Usage is one line of help.
	Usage string
	set   func(*Config, string) error
}

// Flag is "ca-svid-ttl".
func (s Setting) Flag() string { return strings.NewReplacer(".", "-", "_", "-").Replace(s.Key) }

// Env is "SYMBOLON_CA_SVID_TTL".
func (s Setting) Env() string {
	return EnvPrefix + strings.ToUpper(strings.ReplaceAll(s.Key, ".", "_"))
}

// Settings are all keys, in the order of the file.
func Settings() []Setting {
	text := func(field func(*Config) *string) func(*Config, string) error {
		return func(c *Config, v string) error { *field(c) = v; return nil }
	}
	duration := func(field func(*Config) *time.Duration) func(*Config, string) error {
		return func(c *Config, v string) (err error) { *field(c), err = time.ParseDuration(v); return err }
	}
	return []Setting{
		{"trust_domain", "trust domain, such as acme.example", text(func(c *Config) *string { return &c.TrustDomain })},
		{"listen", "address:port to listen on (default 0.0.0.0:7443)", text(func(c *Config) *string { return &c.Listen })},
		{"advertise", "further names and addresses for the certificate, separated by commas", func(c *Config, v string) error {
			c.Advertise = nil
			for name := range strings.SplitSeq(v, ",") {
				if name = strings.TrimSpace(name); name != "" {
					c.Advertise = append(c.Advertise, name)
				}
			}
			return nil
		}},
		{"data_dir", "directory of all state (default /var/lib/symbolon)", text(func(c *Config) *string { return &c.DataDir })},
		{"store.kind", "where state is kept: bbolt", text(func(c *Config) *string { return &c.Store.Kind })},
		{"ca.svid_ttl", "how long an SVID is valid (default 24h)", duration(func(c *Config) *time.Duration { return &c.CA.SVIDTTL })},
		{"ca.rotate_every", "how often SVIDs are replaced (default 30m)", duration(func(c *Config) *time.Duration { return &c.CA.RotateEvery })},
		{"ca.key_file", "file that seals the CA's keys (default DATA_DIR/seal.key)", text(func(c *Config) *string { return &c.CA.KeyFile })},
	}
}

// LoadConfig puts together the defaults, the file (none if its name is empty), the
// environment and the flags that were given, by name, the later over the earlier,
// and validates. Unknown keys of the file are errors. Errors: ErrConfig.
func LoadConfig(file string, env func(string) (string, bool), flags map[string]string) (Config, error) {
	c := DefaultConfig()
	if file != "" {
		data, err := os.ReadFile(file)
		if err != nil {
			return Config{}, fmt.Errorf("%w: %w", ErrConfig, err)
		}
		if err := parseConfig(data, &c); err != nil {
			return Config{}, fmt.Errorf("%w: %s: %w", ErrConfig, file, err)
		}
	}
	known := make(map[string]bool)
	for _, s := range Settings() {
		known[s.Flag()] = true
		if v, ok := env(s.Env()); ok {
			if err := s.set(&c, v); err != nil {
				return Config{}, fmt.Errorf("%w: %s: %w", ErrConfig, s.Env(), err)
			}
		}
		if v, ok := flags[s.Flag()]; ok {
			if err := s.set(&c, v); err != nil {
				return Config{}, fmt.Errorf("%w: --%s: %w", ErrConfig, s.Flag(), err)
			}
		}
	}
	for name := range flags {
		if !known[name] {
			return Config{}, fmt.Errorf("%w: no such flag --%s", ErrConfig, name)
		}
	}
	return c, c.Validate()
}

// parseConfig is strict: an unknown or repeated key is an error that shows its line.
func parseConfig(data []byte, c *Config) error {
	var anything any
	if err := yaml.Unmarshal(data, &anything); err == nil && anything == nil {
		return nil // nothing but comments; decoded, it would set everything to zero
	}
	err := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict()).Decode(c)
	if err == nil {
		return nil
	}
	return errors.New(strings.TrimSpace(yaml.FormatError(err, false, true)))
}
