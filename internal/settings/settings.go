// Package settings puts a daemon's configuration together: flags over environment
// over file over defaults, with one list of keys behind all of them.
package settings

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/pflag"
)

// EnvPrefix starts every environment variable of a Setting.
const EnvPrefix = "SYMBOLON_"

// ErrConfig: the configuration cannot be used; the text names the key and the remedy.
var ErrConfig = errors.New("configuration")

// Setting is one key of configuration C as flag and environment variable.
type Setting[C any] struct {
	// Key is its place in the file: "ca.svid_ttl".
	Key string
	// Usage is one line of help.
	Usage string
	// Set parses a flag's or variable's text.
	Set func(*C, string) error
}

// Flag is "ca-svid-ttl".
func (s Setting[C]) Flag() string { return strings.NewReplacer(".", "-", "_", "-").Replace(s.Key) }

// Env is "SYMBOLON_CA_SVID_TTL".
func (s Setting[C]) Env() string {
	return EnvPrefix + strings.ToUpper(strings.ReplaceAll(s.Key, ".", "_"))
}

// Text is a Setting's Set for a plain string.
func Text[C any](field func(*C) *string) func(*C, string) error {
	return func(c *C, v string) error { *field(c) = v; return nil }
}

// Duration is one for a time such as 30m.
func Duration[C any](field func(*C) *time.Duration) func(*C, string) error {
	return func(c *C, v string) (err error) { *field(c), err = time.ParseDuration(v); return err }
}

// Bool is one for true or false.
func Bool[C any](field func(*C) *bool) func(*C, string) error {
	return func(c *C, v string) (err error) { *field(c), err = strconv.ParseBool(v); return err }
}

// List is one for texts separated by commas.
func List[C any](field func(*C) *[]string) func(*C, string) error {
	return func(c *C, v string) error { *field(c) = Split(v); return nil }
}

// Split parts a list at its commas, without the white space around them.
func Split(v string) []string {
	var out []string
	for s := range strings.SplitSeq(v, ",") {
		if s = strings.TrimSpace(s); s != "" {
			out = append(out, s)
		}
	}
	return out
}

// AddFlags defines a flag for every setting.
func AddFlags[C any](flags *pflag.FlagSet, all []Setting[C]) {
	for _, s := range all {
		flags.String(s.Flag(), "", s.Usage+" ["+s.Env()+"]")
	}
}

// Given are the settings' flags that were set, by name.
func Given[C any](flags *pflag.FlagSet, all []Setting[C]) map[string]string {
	given := make(map[string]string)
	for _, s := range all {
		if f := flags.Lookup(s.Flag()); f != nil && f.Changed {
			given[f.Name] = f.Value.String()
		}
	}
	return given
}

// File is the configuration file to read: the one that was named, or else fallback
// if it is there, or else none. Errors: ErrConfig.
func File(named, fallback string) (string, error) {
	if named != "" {
		return named, nil
	}
	switch _, err := os.Stat(fallback); {
	case err == nil:
		return fallback, nil
	case errors.Is(err, fs.ErrNotExist):
		return "", nil
	default:
		return "", fmt.Errorf("%w: %w", ErrConfig, err)
	}
}

// Load changes c, which holds the defaults, by the file (none if its name is empty),
// the environment and the flags, the later over the earlier. Unknown keys of the
// file are errors, shown with their line, and so are flags that are no settings.
// Errors: ErrConfig.
func Load[C any](c *C, all []Setting[C], file string, env func(string) (string, bool), flags map[string]string) error {
	if file != "" {
		data, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrConfig, err)
		}
		if err := parse(data, c); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrConfig, file, err)
		}
	}
	known := make(map[string]bool)
	for _, s := range all {
		known[s.Flag()] = true
		if v, ok := env(s.Env()); ok {
			if err := s.Set(c, v); err != nil {
				return fmt.Errorf("%w: %s: %w", ErrConfig, s.Env(), err)
			}
		}
		if v, ok := flags[s.Flag()]; ok {
			if err := s.Set(c, v); err != nil {
				return fmt.Errorf("%w: --%s: %w", ErrConfig, s.Flag(), err)
			}
		}
	}
	for name := range flags {
		if !known[name] {
			return fmt.Errorf("%w: no such flag --%s", ErrConfig, name)
		}
	}
	return nil
}

// parse is strict: an unknown or repeated key is an error that shows its line.
func parse[C any](data []byte, c *C) error {
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
