package cli

import (
	"context"
	"fmt"
	"runtime"
	"strings"

	"github.com/spf13/cobra"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func (a *app) statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the controller's state",
		Long: `Show the controller's version and trust domain, the policy generation in force, how
many hosts are enrolled and connected, when the CA expires, and how old everything is:
policy, SVIDs, hosts that are away, revocations, scans, bundles of other trust domains.

Hosts that are enrolled but not connected go on enforcing what they have; they do
not hear of changes. "symbolon host list" names them. How old a host's own things are,
'symbolon-proxy debug status' says there, with or without the controller.`,
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
	ages := s.GetAges()
	hosts := a.hostsCell(s)
	generation := fmt.Sprint(s.GetGeneration())
	if ages.GetPolicy() != nil {
		generation += ", made " + ago(a.Now(), ages.GetPolicy())
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
	if ages.GetRevoked() != nil {
		revocations.text += "; the last " + ago(a.Now(), ages.GetRevoked())
	}
	lines := []pair{
		{"controller", text(fmt.Sprintf("%s, started %s", s.GetVersion(), ago(a.Now(), s.GetStarted())))},
		{"trust domain", text(s.GetTrustDomain())},
		{"generation", text(generation)},
		{"hosts", hosts},
		{"workloads", text(fmt.Sprint(s.GetWorkloads()))},
		{"svids", a.svidAges(ages)},
		{"policies", text(fmt.Sprintf("%d in %d namespaces", s.GetPolicies(), s.GetNamespaces()))},
		{"ca", ca},
		{"revocations", revocations},
		{"scans", a.scanAges(ages)},
		{"flows", lost},
	}
	for _, d := range s.GetTrustDomains() {
		c := bundleCell(d)
		c.text += ", confirmed " + a.confirmed(d)
		lines = append(lines, pair{d.GetName(), c})
	}
	return a.pairs(lines...)
}

// hostsCell says how many hosts are here, and which has been away the longest.
func (a *app) hostsCell(s *symbolonv1.GetStatusResponse) cell {
	if s.GetHosts() == 0 {
		return text("none enrolled")
	}
	ages := s.GetAges()
	line := fmt.Sprintf("%d of %d connected", s.GetHostsConnected(), s.GetHosts())
	if n := ages.GetHostsBehind(); n > 0 {
		line += fmt.Sprintf(", %d with another generation", n)
	}
	if ages.GetAwaySince() != nil {
		line += fmt.Sprintf("; %s was last seen %s", ages.GetAwayId(), ago(a.Now(), ages.GetAwaySince()))
	}
	if s.GetHostsConnected() < s.GetHosts() || ages.GetHostsBehind() > 0 {
		return warn(line)
	}
	return yes(line)
}

// svidAges sums up the SVIDs that the controller has issued. One is renewed long before its
// end, so an end that is near means that something does not get through.
func (a *app) svidAges(s *symbolonv1.Ages) cell {
	var parts []string
	if s.GetSvidOldest() != nil {
		parts = append(parts, fmt.Sprintf("oldest issued %s, next end %s (%s)",
			ago(a.Now(), s.GetSvidOldest()), ago(a.Now(), s.GetSvidNextEnd()), s.GetSvidNextEndId()))
	}
	if s.GetHostSvidNextEnd() != nil {
		parts = append(parts, fmt.Sprintf("next end of a host's %s (%s)", ago(a.Now(), s.GetHostSvidNextEnd()), s.GetHostSvidNextEndId()))
	}
	if len(parts) == 0 {
		return text("none")
	}
	return text(strings.Join(parts, "; "))
}

func (a *app) scanAges(s *symbolonv1.Ages) cell {
	if s.GetScans() == 0 {
		return text("none")
	}
	return text(fmt.Sprintf("%d findings, the oldest pushed %s, next end %s", s.GetScans(), ago(a.Now(), s.GetScanOldest()), ago(a.Now(), s.GetScanNextEnd())))
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
