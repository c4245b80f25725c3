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
they end. A workload that has stopped is counted until its last SVID has ended. While the
root is rotated, the hosts are named that the next step waits for.`,
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
	if s.GetUpstreamSpire() != nil {
		made = fmt.Sprintf("SPIRE's, one of %d", s.GetRoots())
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
	if u := s.GetUpstreamSpire(); u != nil {
		lines = append(lines, pair{"SPIRE agent", a.upstreamAgent(u)}, pair{"SPIRE server", a.upstreamServer(u, s.GetIntermediate())})
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
	if r := s.GetRootRotation(); r != nil {
		lines = append(lines, a.rootRotation(r)...)
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
	var intermediate, root bool
	var steps rootSteps
	cmd := &cobra.Command{
		Use:   "rotate --intermediate | --root [--sign | --finish | --abort] [--force]",
		Short: "Have a new intermediate, or a new root, sign identities",
		Long: `Rotate what signs identities. Both get all SVIDs anew on every host, without a
connection being cut for that and with nothing to do there.

--intermediate: a new one under the same root, in one step. It signs from then on, and the
key of the old one is gone. The old one itself is not withdrawn: who has a copy of its key
can sign until it ends, for this trust domain. Only a new root ends that.

--root, in steps; each can be given again, and "symbolon ca status" shows where it is and
which hosts it waits for:

  --root            publish: the next root is made (or taken from ca.next_cert_file), and
                    every host believes both. It signs nothing yet
  --root --sign     the new root signs. Refused until every host has acknowledged it. The
                    old root's key is gone; its certificate still counts
  --root --finish   the old root counts no more: what it ever signed is refused, and
                    connections under that are cut. Refused while hosts have such SVIDs
  --root --abort    give the next root up, before it signs

--force takes a step whoever it waits for, and says what that costs whom. Hosts whose SVID
has ended, or who are revoked, are not waited for.`,
		Example: `  symbolon ca rotate --intermediate
  symbolon ca rotate --root
  symbolon ca status
  symbolon ca rotate --root --sign
  symbolon ca rotate --root --finish`,
		Args: cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error {
			switch {
			case intermediate == root:
				return usagef("say what to rotate: --intermediate or --root")
			case root:
				return a.caRotateRoot(ctx, steps)
			case steps.any():
				return usagef("--sign, --finish, --abort and --force go with --root")
			}
			return a.caRotateIntermediate(ctx)
		}),
	}
	f := cmd.Flags()
	f.BoolVar(&intermediate, "intermediate", false, "the intermediate, under the same root")
	f.BoolVar(&root, "root", false, "the root, in steps")
	f.BoolVar(&steps.sign, "sign", false, "with --root: have the next one sign")
	f.BoolVar(&steps.finish, "finish", false, "with --root: end the belief in the old one")
	f.BoolVar(&steps.abort, "abort", false, "with --root: give the next one up")
	f.BoolVar(&steps.force, "force", false, "with --sign or --finish: whoever is not ready")
	return cmd
}

func (a *app) caRotateIntermediate(ctx context.Context) error {
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
}

func (a *app) upstreamAgent(u *symbolonv1.UpstreamSPIRE) cell {
	if why := u.GetAgentError(); why != "" {
		return no(fmt.Sprintf("%s: %s (since %s)", u.GetWorkloadApi(), why, ago(a.Now(), u.GetAgentSince())))
	}
	return yes(fmt.Sprintf("%s, since %s", u.GetWorkloadApi(), ago(a.Now(), u.GetAgentSince())))
}

// upstreamServer counts from the intermediate: a controller that was restarted has one, and
// has not asked yet.
func (a *app) upstreamServer(u *symbolonv1.UpstreamSPIRE, intermediate *symbolonv1.CACertificate) cell {
	signed := "signed " + ago(a.Now(), intermediate.GetNotBefore())
	if why := u.GetError(); why != "" {
		return no(fmt.Sprintf("%s, %s; failing since %s: %s", u.GetServer(), signed, ago(a.Now(), u.GetFailingSince()), why))
	}
	return yes(u.GetServer() + ", " + signed)
}
