package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// configuration is plugin_data.
type configuration struct {
	// Controller is address:port.
	Controller string `hcl:"controller"`
	// TrustDomain is the controller's own, which its certificate is checked by.
	TrustDomain string `hcl:"trust_domain"`
	// CAFile is a copy of the controller's ca.pem, TokenFile of its claims.token. Both
	// are read anew each time, so they may be replaced.
	CAFile    string `hcl:"ca_file"`
	TokenFile string `hcl:"token_file"`
	// SnapshotFile is where the last good answer is kept.
	SnapshotFile string `hcl:"snapshot_file"`
	// Refresh is how often the controller is asked.
	Refresh string `hcl:"refresh"`

	trustDomain spiffeid.TrustDomain
	refresh     time.Duration
}

const (
	defaultRefresh         = 15 * time.Second
	minRefresh, maxRefresh = time.Second, time.Hour
	maxSnapshot            = 64 << 20 // bytes, on the wire and in the file
	requestTimeout         = 10 * time.Second
	temporarySuffix        = ".new"
)

var keys = []string{"controller", "trust_domain", "ca_file", "token_file", "snapshot_file", "refresh"}

// configure reads plugin_data, and finds everything that is wrong with it.
func configure(data string) (*configuration, error) {
	c := &configuration{Refresh: defaultRefresh.String()}
	var all map[string]any // the decoder passes over keys that it does not know
	if err := errors.Join(hcl.Decode(c, data), hcl.Decode(&all, data)); err != nil {
		return nil, fmt.Errorf("plugin_data: %w", err)
	}
	var errs []error
	bad := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("plugin_data: %s: %s", key, fmt.Sprintf(format, args...)))
	}
	for _, key := range slices.Sorted(maps.Keys(all)) {
		if !slices.Contains(keys, key) {
			bad(key, "is unknown; use %s", strings.Join(keys, ", "))
		}
	}
	if host, _, err := net.SplitHostPort(c.Controller); err != nil || host == "" {
		bad("controller", "%q is not address:port; such as 198.51.100.5:7443", c.Controller)
	}
	var err error
	if c.trustDomain, err = spiffeid.TrustDomainFromString(c.TrustDomain); err != nil {
		bad("trust_domain", "%q: %v; use the one in the controller's configuration", c.TrustDomain, err)
	}
	for key, path := range map[string]string{"ca_file": c.CAFile, "token_file": c.TokenFile, "snapshot_file": c.SnapshotFile} {
		if !filepath.IsAbs(path) {
			bad(key, "%q is not an absolute path", path)
		}
	}
	if c.refresh, err = time.ParseDuration(c.Refresh); err != nil || c.refresh < minRefresh || c.refresh > maxRefresh {
		bad("refresh", "%q: use %v to %v, such as %v", c.Refresh, minRefresh, maxRefresh, defaultRefresh)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return c, nil
}

// readAll reads at most maxSnapshot bytes.
func readAll(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxSnapshot+1))
	if err == nil && len(b) > maxSnapshot {
		err = fmt.Errorf("more than %d bytes", maxSnapshot)
	}
	return b, err
}
