package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/spf13/pflag"
)

// defaultPort of the controller (design: ports).
const defaultPort = "7443"

// fileConfig is the file that "symbolon config" writes. It names files; it never
// holds the token itself.
type fileConfig struct {
	Controller string `yaml:"controller,omitempty"`
	TokenFile  string `yaml:"token_file,omitempty"`
	CAFile     string `yaml:"ca_file,omitempty"`
}

// connectionFlags are the flags of the same names with dashes.
type connectionFlags struct {
	fileConfig
}

func (c *connectionFlags) register(f *pflag.FlagSet) {
	f.StringVar(&c.Controller, "controller", "", "address of the controller, host[:port]")
	f.StringVar(&c.TokenFile, "token-file", "", "file that holds the admin token")
	f.StringVar(&c.CAFile, "ca-file", "", "file that holds the controller's root certificate, PEM")
}

// setting is one value and where it came from.
type setting struct {
	Key    string `json:"key"`
	Value  string `json:"value"`
	Source string `json:"source"`
}

// settings in force: controller, token file, CA file, in this order.
type settings [3]setting

func (s settings) controller() string { return s[0].Value }
func (s settings) tokenFile() string  { return s[1].Value }
func (s settings) caFile() string     { return s[2].Value }

// configPath is $XDG_CONFIG_HOME/symbolon/config.yaml, by default below
// ~/.config (XDG Base Directory Specification).
func (a *app) configPath() (string, error) {
	dir := a.Getenv("XDG_CONFIG_HOME")
	if !filepath.IsAbs(dir) { // the specification: relative paths are to be ignored
		home := a.Getenv("HOME")
		if home == "" {
			return "", usagef("neither XDG_CONFIG_HOME nor HOME is set")
		}
		dir = filepath.Join(home, ".config")
	}
	return filepath.Join(dir, "symbolon", "config.yaml"), nil
}

// readConfig returns the zero fileConfig where there is no file. Unknown keys are
// errors, as in every file of ours.
func readConfig(path string) (fileConfig, error) {
	var c fileConfig
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return c, usagef("read configuration: %w", err)
	}
	if err := yaml.UnmarshalWithOptions(data, &c, yaml.Strict()); err != nil {
		return c, usagef("%s: %s", path, yaml.FormatError(err, false, true))
	}
	return c, nil
}

// writeConfig replaces the file at once, or not at all.
func writeConfig(path string, c fileConfig) error {
	data, err := yaml.Marshal(c)
	if err != nil {
		return fmt.Errorf("format configuration: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return usagef("write configuration: %w", err)
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".config-*") // 0600
	if err != nil {
		return usagef("write configuration: %w", err)
	}
	defer func() { _ = os.Remove(tmp.Name()) }() // gone already after the rename
	_, err = tmp.Write(data)
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return usagef("write configuration: %w", err)
	}
	return nil
}

// resolve applies flags > environment > file > the data directory of a controller
// on this machine.
func (a *app) resolve() (settings, error) {
	path, err := a.configPath()
	var file fileConfig
	if err == nil {
		file, err = readConfig(path)
		if err != nil {
			return settings{}, err
		}
	}
	pick := func(key, flag, env, inFile, fallback string) setting {
		switch value := a.Getenv(env); {
		case flag != "":
			return setting{key, flag, "flag"}
		case value != "":
			return setting{key, value, env}
		case inFile != "":
			return setting{key, inFile, path}
		}
		return setting{key, fallback, "default"}
	}
	return settings{
		pick("controller", a.flags.Controller, "SYMBOLON_CONTROLLER", file.Controller, "127.0.0.1:"+defaultPort),
		pick("token_file", a.flags.TokenFile, "SYMBOLON_TOKEN_FILE", file.TokenFile, "/var/lib/symbolon/admin.token"),
		pick("ca_file", a.flags.CAFile, "SYMBOLON_CA_FILE", file.CAFile, "/var/lib/symbolon/ca.pem"),
	}, nil
}

// hostPort adds the default port. An IPv6 address may stand with or without
// brackets.
func hostPort(address string) (string, error) {
	bad := func() (string, error) {
		return "", usagef("controller address %q: want host or host:port, without a scheme", address)
	}
	if address == "" || strings.ContainsAny(address, "/@ ") {
		return bad()
	}
	if net.ParseIP(address) != nil {
		return net.JoinHostPort(address, defaultPort), nil
	}
	if !strings.ContainsAny(address, ":[]") {
		return net.JoinHostPort(address, defaultPort), nil
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		if inner := strings.Trim(address, "[]"); address == "["+inner+"]" && net.ParseIP(inner) != nil {
			return net.JoinHostPort(inner, defaultPort), nil
		}
		return bad()
	}
	if host == "" || port == "" {
		return bad()
	}
	return address, nil
}
