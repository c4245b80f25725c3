package cli

import (
	"context"
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func (a *app) statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the controller's state",
		Long: `Show the controller's version and trust domain, the policy generation in force, how
many hosts are enrolled and connected, and when the CA expires.

Hosts that are enrolled but not connected go on enforcing what they have; they do
not hear of changes. "symbolon host list" names them.`,
		Example: `  symbolon status
  symbolon status -o json`,
		Args: cobra.NoArgs,
		RunE: a.run(a.status),
	}
	a.outputFlag(cmd, "table", "json", "yaml")
	return cmd
}

func (a *app) status(ctx context.Context, _ []string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	s, err := call(ctx, a, c.GetStatus, &symbolonv1.GetStatusRequest{})
	if err != nil {
		return err
	}
	switch a.output {
	case "json":
		return a.json(s)
	case "yaml":
		return a.yaml(s)
	}
	hosts := yes(fmt.Sprintf("%d of %d connected", s.GetHostsConnected(), s.GetHosts()))
	if s.GetHosts() == 0 {
		hosts = text("none enrolled")
	} else if s.GetHostsConnected() < s.GetHosts() {
		hosts = warn(fmt.Sprintf("%d of %d connected", s.GetHostsConnected(), s.GetHosts()))
	}
	ca := text(fmt.Sprintf("expires %s (%s)", ago(a.Now(), s.GetCaNotAfter()), absolute(a.Location, s.GetCaNotAfter())))
	if s.GetCaNotAfter() != nil && s.GetCaNotAfter().AsTime().Before(a.Now()) {
		ca = no(fmt.Sprintf("expired %s", ago(a.Now(), s.GetCaNotAfter())))
	}
	lost := text("none lost")
	if n := s.GetFlowsLost(); n > 0 {
		lost = warn(fmt.Sprintf("%d records lost", n))
	}
	revocations := text(fmt.Sprintf("%d, known to all connected hosts", s.GetRevocations()))
	if s.GetRevocations() == 0 {
		revocations = text("none")
	}
	if n := s.GetHostsWithoutRevocations(); n > 0 {
		revocations = warn(fmt.Sprintf("%d, not acknowledged by %d connected hosts", s.GetRevocations(), n))
	}
	lines := []pair{
		{"controller", text(fmt.Sprintf("%s, started %s", s.GetVersion(), ago(a.Now(), s.GetStarted())))},
		{"trust domain", text(s.GetTrustDomain())},
		{"generation", text(fmt.Sprint(s.GetGeneration()))},
		{"hosts", hosts},
		{"workloads", text(fmt.Sprint(s.GetWorkloads()))},
		{"policies", text(fmt.Sprintf("%d in %d namespaces", s.GetPolicies(), s.GetNamespaces()))},
		{"ca", ca},
		{"revocations", revocations},
		{"flows", lost},
	}
	for _, d := range s.GetTrustDomains() {
		c := bundleCell(d)
		c.text += ", confirmed " + a.confirmed(d)
		lines = append(lines, pair{d.GetName(), c})
	}
	return a.pairs(lines...)
}

// pair is a line of a thing shown by itself.
type pair struct {
	key   string
	value cell
}

func (a *app) pairs(pairs ...pair) error {
	width := 0
	for _, p := range pairs {
		width = max(width, len(p.key))
	}
	for _, p := range pairs {
		if p.value.text == "" {
			p.value.text = "-"
		}
		if _, err := fmt.Fprintf(a.out, "%-*s  %s\n", width, p.key, a.painter().paint(p.value)); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program",
		Long: `Print the version of this program and of the Go that built it. "symbolon status"
prints the controller's.`,
		Example: `  symbolon version`,
		Args:    cobra.NoArgs,
		RunE: a.run(func(context.Context, []string) error {
			_, err := fmt.Fprintf(a.out, "symbolon %s (%s, %s/%s)\n", a.Version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		}),
	}
}
