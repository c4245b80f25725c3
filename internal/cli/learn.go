package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func (a *app) learnCommand() *cobra.Command {
	return group("learn", "Learn policy from what a namespace does",
		`A namespace in learn lets through what it would deny, and records it; what a parent's deny
stands against stays denied. From what was
seen, suggest makes policies that allow just that; accept puts them into force, and with
--enforce ends learning in the same moment. While it learns, a namespace is open: not for
longer than it takes.`,
		`  symbolon learn start /acme/prod
  symbolon learn status
  symbolon learn suggest /acme/prod --keys app,tier > learned.yaml
  symbolon learn accept /acme/prod -f learned.yaml --enforce`,
		a.learnStartCommand(), a.learnStatusCommand(), a.learnSuggestCommand(), a.learnAcceptCommand())
}

func (a *app) learnStartCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "start NAMESPACE",
		Short: "Let through and record what a namespace would deny",
		Long: `Put a namespace into learn. It applies to its own side of a connection only: a peer that
enforces denies as before. Namespaces below keep their own mode.`,
		Example: `  symbolon learn start /acme/prod`,
		Args:    cobra.ExactArgs(1),
		RunE: a.run(func(ctx context.Context, args []string) error {
			if err := checkNamespace(args[0]); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			resp, err := call(ctx, a, c.StartLearn, &symbolonv1.StartLearnRequest{Namespace: args[0]})
			if err != nil {
				return err
			}
			a.say("%s learns, and denies only what a namespace above denies: generation %d", args[0], resp.GetGeneration())
			return nil
		}),
	}
}

func (a *app) learnStatusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "List the namespaces in learn, and what was seen there",
		Long: `List the namespaces in learn. An edge is who reached whom on which port: ALLOWED by
policy, LET THROUGH by learn alone, or DENIED, by the other side for instance. What was seen
before learn start does not count.`,
		Example: `  symbolon learn status`,
		Args:    cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			resp, err := call(ctx, a, c.ListLearning, &symbolonv1.ListLearningRequest{})
			if err != nil {
				return err
			}
			l := list{message: resp, empty: "no namespace is in learn"}
			for _, n := range resp.GetNamespaces() {
				l.names = append(l.names, n.GetNamespace())
			}
			l.table = func(wide bool) *table {
				t := a.newTable(wide, "NAMESPACE", "ALLOWED", "LET THROUGH", "DENIED", "|", "STARTED", "FIRST", "LAST")
				for _, n := range resp.GetNamespaces() {
					t.row(text(n.GetNamespace()), text(fmt.Sprint(n.GetAllowed())), text(fmt.Sprint(n.GetLetThrough())), text(fmt.Sprint(n.GetDenied())),
						text(moment(n.GetStarted().AsTime(), n.Started != nil)), text(moment(n.GetFirst().AsTime(), n.First != nil)), text(moment(n.GetLast().AsTime(), n.Last != nil)))
				}
				return t
			}
			return a.printList(l)
		}),
	}
	a.outputFlag(cmd, listFormats...)
	return cmd
}

func moment(t time.Time, known bool) string {
	if !known {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// learnFlags are what a suggestion is made of.
type learnFlags struct {
	keys  []string
	since time.Duration
}

func (f *learnFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringSliceVar(&f.keys, "keys", nil, "attribute keys that policies may use (default: every label)")
	cmd.Flags().DurationVar(&f.since, "since", 0, "how much of the past counts (default: since learn start)")
}

func (f *learnFlags) past() (*durationpb.Duration, error) {
	switch {
	case f.since < 0:
		return nil, usagef("--since %v: want more than 0", f.since)
	case f.since == 0:
		return nil, nil
	}
	return durationpb.New(f.since), nil
}

func (a *app) learnSuggestCommand() *cobra.Command {
	var f learnFlags
	cmd := &cobra.Command{
		Use:   "suggest NAMESPACE",
		Short: "Print policies that allow what was seen",
		Long: `Print policies that allow what was seen, and nothing that was denied, as a file to read,
edit and accept. Comments say which edges each rests on, what it would allow beyond them,
and which edges rest on addresses only. Fewer --keys make fewer and wider policies.`,
		Example: `  symbolon learn suggest /acme/prod
  symbolon learn suggest /acme/prod --keys app,tier --since 24h > learned.yaml`,
		Args: cobra.ExactArgs(1),
		RunE: a.run(func(ctx context.Context, args []string) error {
			since, err := f.past()
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			resp, err := call(ctx, a, c.SuggestPolicies, &symbolonv1.SuggestPoliciesRequest{Namespace: args[0], Keys: f.keys, Since: since})
			if err != nil {
				return err
			}
			if a.output == "json" {
				return a.json(resp)
			}
			a.say("edges covered: %d, allowed already: %d, not covered: %d, denied: %d",
				resp.GetCovered(), resp.GetAlready(), resp.GetUncovered(), resp.GetDenied())
			return a.write([]byte(sanitize(resp.GetYaml(), true)))
		}),
	}
	f.register(cmd)
	a.outputFlag(cmd, "yaml", "json")
	return cmd
}

func (a *app) learnAcceptCommand() *cobra.Command {
	var f learnFlags
	req := &symbolonv1.AcceptSuggestionRequest{}
	var files []string
	cmd := &cobra.Command{
		Use:   "accept NAMESPACE",
		Short: "Apply what was suggested: one generation, or nothing",
		Long: `Apply a suggestion: the one in -f, as it was printed or as you have edited it, or one
that is made anew of what was seen until now. With --enforce the namespace enforces from
the same generation on, and what no policy allows is cut.`,
		Example: `  symbolon learn accept /acme/prod -f learned.yaml --enforce
  symbolon learn accept /acme/prod --keys app --dry-run`,
		Args: cobra.ExactArgs(1),
		RunE: a.run(func(ctx context.Context, args []string) (err error) {
			req.Namespace, req.Keys = args[0], f.keys
			if req.Since, err = f.past(); err != nil {
				return err
			}
			if len(files) > 0 && (len(f.keys) > 0 || f.since != 0) {
				return usagef("-f is a finished suggestion: leave out --keys and --since")
			}
			if req.Files, err = a.collect(files); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			resp, err := call(ctx, a, c.AcceptSuggestion, req)
			if err != nil {
				return err
			}
			note := fmt.Sprintf("generation %d", resp.GetApplied().GetGeneration())
			if req.GetDryRun() {
				note = "dry run: nothing was changed"
			}
			return a.printChanges(resp.GetApplied(), note)
		}),
	}
	f.register(cmd)
	filesFlag(cmd, &files)
	cmd.Flags().BoolVar(&req.Enforce, "enforce", false, "end learning: the namespace enforces")
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "check and show what would change; change nothing")
	messageFlag(cmd, &req.Message)
	return cmd
}
