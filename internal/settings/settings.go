// Package settings puts a daemon's configuration together: flags over environment
// over file over defaults, with one list of keys behind all of them.
package settings

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

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

// AddFlags defines a flag for every setting.
func AddFlags[C any](fs *pflag.FlagSet, all []Setting[C]) {
	for _, s := range all {
		fs.String(s.Flag(), "", s.Usage+" ["+s.Env()+"]")
	}
}

// Given are the flags that were set, by name, but for those that are no settings.
func Given(fs *pflag.FlagSet, besides ...string) map[string]string {
	given := make(map[string]string)
	fs.Visit(func(f *pflag.Flag) {
		if !slices.Contains(besides, f.Name) {
			given[f.Name] = f.Value.String()
		}
	})
	return given
}

// Load changes c, which holds the defaults, by the file (none if its name is empty),
// the environment and the flags, the later over the earlier. Unknown keys of the
// file are errors, shown with their line. Errors: ErrConfig.
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
	for _, s := range all {
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
	return nil
}

func parse[C any](data []byte, c *C) error {
	err := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict()).Decode(c)
	if err == nil || errors.Is(err, io.EOF) { // EOF: an empty file
		return nil
	}
	return errors.New(strings.TrimSpace(yaml.FormatError(err, false, true)))
}
