package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func (a *app) caStatusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what signs identities, and who still has older ones",
		Long: `Show the root that hosts trust, the intermediate that signs SVIDs, until when they are
valid, and the last rotation. After one, hosts are named that still have SVIDs of an
earlier intermediate, as far as the controller knows. Those are as good as any until
they end. A workload that has stopped is counted until its last SVID has ended.`,
		Example: `  symbolon ca status
  symbolon ca status -o json`,
		Args: cobra.NoArgs,
		RunE: a.run(a.caStatus),
	}
	a.outputFlag(cmd, "table", "json", "yaml")
	return cmd
}

func (a *app) caStatus(ctx context.Context, _ []string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	s, err := call(ctx, a, c.GetCA, &symbolonv1.GetCARequest{})
	if err != nil {
		return err
	}
	switch a.output {
	case "json":
		return a.json(s)
	case "yaml":
		return a.yaml(s)
	}
	made := "made by the controller"
	if s.GetUpstream() {
		made = "the operator's"
	}
	renewal := "ends with what has signed it"
	if at := s.GetIntermediateRenewal(); at != nil {
		renewal = "replaced by itself " + ago(a.Now(), at)
	}
	rotated := "never"
	if at := s.GetRotated(); at != nil {
		by := s.GetRotatedBy()
		if by == "" {
			by = "itself, near the end of the one before"
		}
		rotated = fmt.Sprintf("%s, by %s", ago(a.Now(), at), by)
	}
	lines := []pair{
		{"trust domain", text(s.GetTrustDomain())},
		{"root", text(fmt.Sprintf("%s, %s, %s", s.GetRoot().GetSubject(), s.GetRoot().GetKey(), made))},
		{"  ends", a.ending(s.GetRoot())},
		{"  serial", text(s.GetRoot().GetSerial())},
		{"  pin", text(s.GetPin())},
		{"intermediate", text(fmt.Sprintf("%s, %s", s.GetIntermediate().GetSubject(), s.GetIntermediate().GetKey()))},
		{"  ends", a.ending(s.GetIntermediate())},
		{"  serial", text(s.GetIntermediate().GetSerial())},
		{"  renewal", text(renewal)},
		{"  rotated", text(rotated)},
		{"SVIDs", text("valid for " + span(s.GetSvidTtl().AsDuration()))},
	}
	if until := s.GetEarlierUntil(); until != nil {
		earlier := yes("known of no host; the last one that there could be ends " + ago(a.Now(), until))
		if n := len(s.GetBehind()); n > 0 {
			earlier = warn(fmt.Sprintf("%d hosts; the last ends %s at the latest", n, ago(a.Now(), until)))
		}
		lines = append(lines, pair{"  of earlier", earlier})
	}
	for _, b := range s.GetBehind() {
		what := fmt.Sprintf("%d workloads", b.GetWorkloads())
		if b.GetHostSvid() {
			what = "its own, " + what
		}
		where := "connected"
		if !b.GetConnected() {
			where = "away"
		}
		lines = append(lines, pair{"    " + b.GetHostId(), text(fmt.Sprintf("%s, %s: %s, until %s", b.GetHostname(), where, what, ago(a.Now(), b.GetUntil())))})
	}
	return a.pairs(lines...)
}

func (a *app) ending(c *symbolonv1.CACertificate) cell {
	at := fmt.Sprintf("%s (%s)", ago(a.Now(), c.GetNotAfter()), absolute(a.Location, c.GetNotAfter()))
	if c.GetNotAfter().AsTime().Before(a.Now()) {
		return no("ended " + at)
	}
	return text(at)
}

func (a *app) caRotateCommand() *cobra.Command {
	var intermediate bool
	cmd := &cobra.Command{
		Use:   "rotate --intermediate",
		Short: "Have a new intermediate sign identities",
		Long: `Make a new intermediate under the same root. It signs from then on, and the key of the
old one is gone. Connected hosts get all of their SVIDs anew, those that are away when
they come back; until then, what they have is good. No connection is cut, and nothing
has to be done on any host. "symbolon ca status" shows who is left.

The old intermediate itself is not withdrawn: who has a copy of its key can sign until
it ends, for this trust domain. Only a new root ends that, and the root cannot be rotated
in this version.`,
		Example: `  symbolon ca rotate --intermediate`,
		Args:    cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error {
			if !intermediate {
				return usagef("--intermediate is needed: the root cannot be rotated in this version")
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			resp, err := call(ctx, a, c.RotateIntermediate, &symbolonv1.RotateIntermediateRequest{})
			if err != nil {
				return err
			}
			if err := a.write([]byte(resp.GetIntermediate().GetSerial() + "\n")); err != nil {
				return err
			}
			a.say("the new intermediate signs; %d connected hosts get their SVIDs anew", resp.GetHostsConnected())
			if n := resp.GetHostsAway(); n > 0 {
				a.warning("%d hosts are away, and get theirs when they come back", n)
			}
			return nil
		}),
	}
	cmd.Flags().BoolVar(&intermediate, "intermediate", false, "the intermediate, under the same root")
	return cmd
}
