package redirect

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
)

// Cleanup removes every trace of this package from the calling thread's network
// namespace: chains and jumps in all tables of both backends and families, routes
// and routing rules, and all sets. It needs no configuration, and does nothing where there is nothing.
// Connections that were being proxied are cut. Parts that fail do not keep it from
// the others.
func Cleanup(ctx context.Context) error {
	// First, since only our rules keep what the applications answer on this host.
	errs := []error{endClientLegs()}
	found := false
	for _, backend := range []Backend{BackendNFT, BackendLegacy, BackendDefault} {
		for _, is4 := range []bool{true, false} {
			f, err := newFamily(is4, backend)
			if err != nil {
				continue // not installed: its rules cannot be there
			}
			found = true
			for _, table := range []string{"filter", "nat", "mangle", "raw"} {
				if backend == BackendLegacy && !f.legacyTable(table) {
					continue
				}
				if err := removeChains(ctx, f, table); !isUnsupported(err) {
					errs = append(errs, err)
				}
			}
		}
	}
	if !found {
		errs = append(errs, &MissingToolError{"iptables", "iptables"})
	}
	errs = append(errs, removeRoutes())
	ipset, err := findTool("ipset", "ipset")
	switch {
	case err == nil:
		errs = append(errs, destroySets(ctx, ipset))
	case !isMissingTool(err):
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// isUnsupported says that the kernel was built without this backend: then nothing
// of ours can be in it.
func isUnsupported(err error) bool {
	var te *ToolError
	return errors.As(err, &te) && strings.Contains(te.Stderr, "Protocol not supported")
}

// uses says whether the table can be listed without bringing it into being.
func (f family) uses(ctx context.Context, table string) bool {
	version, err := run(ctx, "", f.command, "--version")
	return err == nil && !strings.Contains(version, "legacy") || f.legacyTable(table)
}

// legacyTable says whether the kernel has this table of the legacy backend in use.
// To list it would create it, and with it hooks that every packet passes.
func (f family) legacyTable(table string) bool {
	names, err := os.ReadFile(f.tableNames)
	return err == nil && slices.Contains(strings.Fields(string(names)), table)
}
