package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func (a *app) simulateCommand() *cobra.Command {
	var (
		f     applyFlags
		since time.Duration
	)
	cmd := &cobra.Command{
		Use:   "simulate -f FILE|DIR|-",
		Short: "Show what a draft would have made of recorded connections",
		Long: `Decide what was recorded of who reached whom (symbolon flows --edges) twice: by the
policy in force, and by what "policy apply" of the files would put in force. Nothing is
changed. Each edge that fares differently is shown with its connections and with what
decides, before and after: newly denied, newly allowed, newly encrypted, no longer
encrypted.

Workloads are taken with the attributes that they had; a Profile in the files changes
no one. An address outside is taken for the External that each of the two makes of it;
of many, the last one seen stands for all.

Exit code 0: nothing is newly denied; 1: something is.`,
		Example: `  symbolon simulate -f policies/ --since 24h
  symbolon simulate -f - -o json < draft.yaml`,
		Args: cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error { return a.simulate(ctx, f, since) }),
	}
	f.register(cmd)
	cmd.Flags().DurationVar(&since, "since", 0, "only what was seen in so much of the past, such as 24h; 0: all that is kept")
	a.outputFlag(cmd, "table", "json", "yaml")
	return cmd
}

func (a *app) simulate(ctx context.Context, f applyFlags, since time.Duration) error {
	if len(f.files) == 0 {
		return usagef("-f is needed: a file, a directory, or - for stdin")
	}
	if since < 0 {
		return usagef("--since %v: want 0 or more", since)
	}
	files, c, err := a.filesAndClient(f.files)
	if err != nil {
		return err
	}
	req := &symbolonv1.SimulateRequest{Files: files, Strict: f.strict}
	if since > 0 {
		req.Since = durationpb.New(since)
	}
	resp, err := call(ctx, a, c.Simulate, req)
	if err != nil {
		return err
	}
	if err := a.show(resp, func() error { return a.printSimulation(resp) }); err != nil {
		return err
	}
	for _, n := range resp.GetCounts() {
		if n.GetType() == symbolonv1.SimulatedType_SIMULATED_TYPE_NEWLY_DENIED && n.GetEdges() > 0 {
			return errNegative
		}
	}
	return nil
}

func (a *app) printSimulation(resp *symbolonv1.SimulateResponse) error {
	for _, w := range resp.GetWarnings() {
		a.warning("%s", w)
	}
	t := newTable(a.out, a.painter(), "CHANGE", "FROM", "TO", "PORT", "CONNECTIONS", "LAST", "BEFORE", "AFTER")
	for _, e := range resp.GetEdges() {
		t.row(simulatedCell(e.GetType()), text(edgeEndName(e.GetFrom())), text(edgeEndName(e.GetTo())),
			text(fmt.Sprintf("%s/%d", e.GetProtocol(), e.GetPort())), text(fmt.Sprint(e.GetConnections())),
			text(ago(a.Now(), e.GetLast())), text(simulatedText(e.GetBefore())), text(simulatedText(e.GetAfter())))
	}
	if len(resp.GetEdges()) > 0 {
		if err := t.flush(); err != nil {
			return err
		}
	}
	listed := uint64(0)
	for _, n := range resp.GetCounts() {
		a.say("%s: %d edges, %d connections", simulatedWord(n.GetType()), n.GetEdges(), n.GetConnections())
		listed += n.GetEdges()
	}
	if more := listed - min(listed, uint64(len(resp.GetEdges()))); more > 0 {
		a.warning("%d more edges are not listed", more)
	}
	a.say("unchanged: %d edges, %d connections", resp.GetUnchanged(), resp.GetUnchangedConnections())
	return nil
}

func simulatedWord(t symbolonv1.SimulatedType) string {
	switch t {
	case symbolonv1.SimulatedType_SIMULATED_TYPE_NEWLY_DENIED:
		return "newly denied"
	case symbolonv1.SimulatedType_SIMULATED_TYPE_NEWLY_ALLOWED:
		return "newly allowed"
	case symbolonv1.SimulatedType_SIMULATED_TYPE_NEWLY_ENCRYPTED:
		return "newly encrypted"
	case symbolonv1.SimulatedType_SIMULATED_TYPE_NO_LONGER_ENCRYPTED:
		return "no longer encrypted"
	default:
		return word(t)
	}
}

func simulatedCell(t symbolonv1.SimulatedType) cell {
	s := simulatedWord(t)
	switch t {
	case symbolonv1.SimulatedType_SIMULATED_TYPE_NEWLY_DENIED:
		return no(s)
	case symbolonv1.SimulatedType_SIMULATED_TYPE_NO_LONGER_ENCRYPTED:
		return warn(s)
	default:
		return yes(s)
	}
}

// simulatedText is a verdict with what decided it: "deny by /acme/p", "allow,
// encrypted (default)".
func simulatedText(v *symbolonv1.SimulatedVerdict) string {
	s := "deny"
	if v.GetAllow() {
		s = "allow"
		if p := word(v.GetProtection()); p != "" {
			s += ", " + p
		}
	}
	by := flowPolicy(&symbolonv1.FlowRecord{ClientPolicy: v.GetClientPolicy(), ServerPolicy: v.GetServerPolicy()})
	if r := v.GetReason(); r != symbolonv1.Reason_REASON_POLICY || by == "" {
		s += " (" + word(r) + ")"
	}
	if by != "" {
		s += " by " + by
	}
	return s
}
