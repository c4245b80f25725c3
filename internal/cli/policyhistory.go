package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func (a *app) policyHistoryCommand() *cobra.Command {
	var last uint32
	cmd := &cobra.Command{
		Use:   "history",
		Short: "List the generations of policy: when, by whom, why",
		Long: `List the generations that the controller keeps, the newest first: when each was put
into force, who was let in to do it, how many resources it created (+), updated (~) and
deleted (-), and the --message that was given with it. The controller keeps the last 100,
or fewer if they were very large.`,
		Example: `  symbolon policy history --last 10
  symbolon policy history show 41
  symbolon policy rollback 41`,
		Args: cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error { return a.policyHistory(ctx, last) }),
	}
	cmd.Flags().Uint32Var(&last, "last", 0, "only the newest so many")
	a.outputFlag(cmd, listFormats...)
	cmd.AddCommand(a.policyHistoryShowCommand())
	return cmd
}

func (a *app) policyHistory(ctx context.Context, last uint32) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	resp, err := call(ctx, a, c.ListGenerations, &symbolonv1.ListGenerationsRequest{Last: last})
	if err != nil {
		return err
	}
	l := list{message: resp, empty: "no history"}
	for _, g := range resp.GetGenerations() {
		l.names = append(l.names, strconv.FormatUint(g.GetGeneration(), 10))
	}
	l.table = func(wide bool) *table {
		t := a.newTable(wide, "GENERATION", "WHEN", "CHANGES", "BY", "WHY")
		for _, g := range resp.GetGenerations() {
			number := text(strconv.FormatUint(g.GetGeneration(), 10))
			if g.GetGeneration() == resp.GetGeneration() {
				number = cell{number.text + " in force", green}
			}
			when, why := ago(a.Now(), g.GetTime()), reasonOf(g)
			if wide {
				when = absolute(a.Location, g.GetTime())
			} else {
				why = shorten(why, 60)
			}
			t.row(number, text(when), text(countsOf(g)), text(g.GetActor()), text(why))
		}
		return t
	}
	return a.printList(l)
}

// countsOf is "+2 ~1 -0".
func countsOf(g *symbolonv1.PolicyGeneration) string {
	return fmt.Sprintf("+%d ~%d -%d", g.GetCreated(), g.GetUpdated(), g.GetDeleted())
}

// reasonOf is the message, in one line, and what a rollback went back to.
func reasonOf(g *symbolonv1.PolicyGeneration) string {
	why := strings.Join(strings.Fields(g.GetMessage()), " ")
	if n := g.GetRollbackOf(); n != 0 {
		why = strings.TrimSuffix(fmt.Sprintf("rollback to %d: %s", n, why), ": ")
	}
	return why
}

func (a *app) policyHistoryShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show GENERATION",
		Short: "Show what one generation changed, or all of its resources",
		Long: `Show what a generation changed of the one before it, field by field. With -o yaml, print
all that was in force in it, in the form that "policy apply" takes; with -o json, both.`,
		Example: `  symbolon policy history show 41
  symbolon policy history show 41 -o yaml > before.yaml`,
		Args: cobra.ExactArgs(1),
		RunE: a.run(a.policyHistoryShow),
	}
	a.outputFlag(cmd, "table", "yaml", "json")
	return cmd
}

func (a *app) policyHistoryShow(ctx context.Context, args []string) error {
	number, err := parseGeneration(args[0])
	if err != nil {
		return err
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	resp, err := call(ctx, a, c.GetGeneration, &symbolonv1.GetGenerationRequest{Generation: number, Content: a.output != "table"})
	if err != nil {
		return err
	}
	switch a.output {
	case "json":
		return a.json(resp)
	case "yaml":
		return a.write([]byte(sanitize(resp.GetYaml(), true)))
	}
	g := resp.GetGeneration()
	a.say("generation %d, %s, by %s", g.GetGeneration(), absolute(a.Location, g.GetTime()), g.GetActor())
	if why := reasonOf(g); why != "" {
		a.say("%s", why)
	}
	for _, ch := range resp.GetChanges() {
		if err := a.printChange(ch); err != nil {
			return err
		}
	}
	if len(resp.GetChanges()) == 0 {
		a.say("it is where the history begins")
	}
	return nil
}

func parseGeneration(s string) (uint64, error) {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n == 0 {
		return 0, usagef("generation %q: want a number from \"symbolon policy history\"", s)
	}
	return n, nil
}

func (a *app) policyRollbackCommand() *cobra.Command {
	var (
		dryRun  bool
		message string
		base    uint64
	)
	cmd := &cobra.Command{
		Use:   "rollback GENERATION",
		Short: "Make a new generation equal to an old one",
		Long: `Make a new generation whose resources are those of an old one. It is checked as an
apply is, with the PolicyTests of then, and is in force whole or not at all. The history
goes on: a rollback can be rolled back.

The changes are shown and, without --yes, asked about. If somebody else changes policy
meanwhile, or generation --if-generation is not in force any more, nothing happens: exit
code 5.`,
		Example: `  symbolon policy rollback 41
  symbolon policy rollback --yes --message "42 cut the backups" 41
  symbolon policy rollback --dry-run 41`,
		Args: cobra.ExactArgs(1),
		RunE: a.run(func(ctx context.Context, args []string) error {
			number, err := parseGeneration(args[0])
			if err != nil {
				return err
			}
			return a.policyRollback(ctx, &symbolonv1.RollbackRequest{
				Generation: number, BaseGeneration: base, DryRun: dryRun, Message: message,
			})
		}),
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "check and show what would change; change nothing")
	cmd.Flags().Uint64Var(&base, "if-generation", 0, "only if this generation is in force (default: the one that is now)")
	messageFlag(cmd, &message)
	a.yesFlag(cmd)
	return cmd
}

func messageFlag(cmd *cobra.Command, message *string) {
	cmd.Flags().StringVarP(message, "message", "m", "", "why, for the history")
}

// policyRollback looks first, so that what is asked about is what is done.
func (a *app) policyRollback(ctx context.Context, req *symbolonv1.RollbackRequest) error {
	if !req.GetDryRun() && !a.yes && !isTerminal(a.Stdin) {
		return a.confirm("roll back to generation %d", req.GetGeneration())
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	if req.BaseGeneration == 0 {
		now, err := call(ctx, a, c.ListGenerations, &symbolonv1.ListGenerationsRequest{Last: 1})
		if err != nil {
			return err
		}
		req.BaseGeneration = now.GetGeneration()
	}
	look := &symbolonv1.RollbackRequest{Generation: req.GetGeneration(), BaseGeneration: req.GetBaseGeneration(), DryRun: true}
	resp, err := call(ctx, a, c.Rollback, look)
	if err != nil {
		return err
	}
	for _, w := range resp.GetWarnings() {
		a.warning("%s", w)
	}
	for _, ch := range resp.GetChanges() {
		if err := a.printChange(ch); err != nil {
			return err
		}
	}
	switch {
	case len(resp.GetChanges()) == 0:
		a.say("nothing would change: generation %d is equal to %d", req.GetBaseGeneration(), req.GetGeneration())
		return nil
	case req.GetDryRun():
		a.say("dry run: nothing was changed")
		return a.printTests(resp.GetTests())
	}
	if err := a.confirm("roll back from generation %d to %d", req.GetBaseGeneration(), req.GetGeneration()); err != nil {
		return err
	}
	if resp, err = call(ctx, a, c.Rollback, req); err != nil {
		return err
	}
	a.say("generation %d", resp.GetGeneration())
	return a.printTests(resp.GetTests())
}
