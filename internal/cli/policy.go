package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func (a *app) policyCommand() *cobra.Command {
	return group("policy", "Apply, compare and show policy",
		`Policy is YAML: Namespaces, Profiles, Policies, Externals, Services and PolicyTests
(docs/policy.md). All commands take every kind. A reference is [kind:]/namespace/name;
the kind is Policy where it is not said.`,
		`  symbolon policy lint -f policies/
  symbolon policy diff -f policies/
  symbolon policy apply -f policies/
  symbolon policy get /acme/prod/web-may-call-api
  symbolon policy history`,
		a.policyApplyCommand(), a.policyDiffCommand(), a.policyListCommand(),
		a.policyGetCommand(), a.policyDeleteCommand(),
		a.policyTestCommand(), a.policyLintCommand(),
		a.policyHistoryCommand(), a.policyRollbackCommand())
}

// applyFlags are what apply and diff share.
type applyFlags struct {
	files   []string
	dryRun  bool
	strict  bool
	prune   bool
	message string
}

func (f *applyFlags) register(cmd *cobra.Command) {
	filesFlag(cmd, &f.files)
	cmd.Flags().BoolVar(&f.strict, "strict", false, "warnings are errors")
	cmd.Flags().BoolVar(&f.prune, "prune", false, "delete what the namespaces declared in the files hold beyond the files")
}

func filesFlag(cmd *cobra.Command, files *[]string) {
	cmd.Flags().StringArrayVarP(files, "file", "f", nil, "file, directory, or - for stdin (repeatable)")
	cobra.CheckErr(cmd.MarkFlagFilename("file", "yaml", "yml"))
}

func (a *app) policyApplyCommand() *cobra.Command {
	var f applyFlags
	cmd := &cobra.Command{
		Use:   "apply -f FILE|DIR|-",
		Short: "Apply files: one generation, or nothing",
		Long: `Apply every document in the files. A directory stands for all *.yaml and *.yml in it,
at any depth, except hidden ones. The controller checks everything, and runs the
PolicyTests, before it changes anything: either all of it is in force as one new
generation, or nothing is. What is not in the files stays as it is, unless --prune: then
each namespace that the files declare (kind: Namespace) holds afterwards what is in the
files and nothing else. Namespaces below it that are not declared are left alone.

An error shows the file, the line and a caret.`,
		Example: `  symbolon policy apply -f policies/
  symbolon policy apply --strict -f web.yaml -f db.yaml
  symbolon policy apply --prune --message "CR-1204: no more FTP" -f policies/
  generate-policy | symbolon policy apply -f -`,
		Args: cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error {
			resp, err := a.apply(ctx, f)
			if err != nil {
				return err
			}
			if a.output == "json" {
				return a.json(resp)
			}
			note := fmt.Sprintf("generation %d", resp.GetGeneration())
			if f.dryRun {
				note = "dry run: nothing was changed"
			}
			return a.printChanges(resp, note)
		}),
	}
	f.register(cmd)
	cmd.Flags().BoolVar(&f.dryRun, "dry-run", false, "check and show what would change; change nothing")
	messageFlag(cmd, &f.message)
	a.outputFlag(cmd, "table", "json")
	return cmd
}

func (a *app) policyDiffCommand() *cobra.Command {
	f := applyFlags{dryRun: true}
	cmd := &cobra.Command{
		Use:   "diff -f FILE|DIR|-",
		Short: "Show what an apply would change",
		Long: `Show, field by field, what applying the files would change, after all checks and
PolicyTests. With --prune that includes what it would delete. Exit code 0: nothing would
change; 1: something would.`,
		Example: `  symbolon policy diff -f policies/
  symbolon policy diff --prune -f policies/`,
		Args: cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error {
			resp, err := a.apply(ctx, f)
			if err != nil {
				return err
			}
			return a.printDiff(resp)
		}),
	}
	f.register(cmd)
	a.outputFlag(cmd, "table", "json")
	return cmd
}

func (a *app) apply(ctx context.Context, f applyFlags) (*symbolonv1.ApplyResponse, error) {
	if len(f.files) == 0 {
		return nil, usagef("-f is needed: a file, a directory, or - for stdin")
	}
	files, err := a.collect(f.files)
	if err != nil {
		return nil, err
	}
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	return call(ctx, a, c.Apply, &symbolonv1.ApplyRequest{Files: files, DryRun: f.dryRun, Strict: f.strict, Prune: f.prune, Message: f.message})
}

// printChanges lists the changes, one a line, and ends with exit code 1 if a test
// failed (in a dry run; otherwise the controller would have refused).
func (a *app) printChanges(resp *symbolonv1.ApplyResponse, note string) error {
	for _, w := range resp.GetWarnings() {
		a.warning("%s", w)
	}
	t := newTable(a.out, a.painter(), "CHANGE", "RESOURCE")
	for _, ch := range resp.GetChanges() {
		t.row(changeCell(ch.GetType()), text(formatRef(ch.GetKind(), ch.GetNamespace(), ch.GetName())))
	}
	if len(resp.GetChanges()) > 0 {
		if err := t.flush(); err != nil {
			return err
		}
	}
	if note != "" {
		a.say("%s", note)
	}
	return a.printTests(resp.GetTests())
}

func changeCell(t symbolonv1.ChangeType) cell {
	switch t {
	case symbolonv1.ChangeType_CHANGE_TYPE_CREATED:
		return cell{"+ created", green}
	case symbolonv1.ChangeType_CHANGE_TYPE_UPDATED:
		return cell{"~ updated", yellow}
	case symbolonv1.ChangeType_CHANGE_TYPE_DELETED:
		return cell{"- deleted", red}
	case symbolonv1.ChangeType_CHANGE_TYPE_UNCHANGED:
		return cell{"= unchanged", faint}
	default:
		return text(word(t))
	}
}

// printTests says how the PolicyTests went; one that failed is a negative answer.
func (a *app) printTests(tests []*symbolonv1.TestResult) error {
	failed := 0
	for _, t := range tests {
		if !t.GetPassed() {
			failed++
			_, _ = fmt.Fprintf(a.Stderr, "%s %s: %s\n", a.talkPainter().paint(no("failed")),
				sanitize(t.GetTest(), false), sanitize(t.GetMessage(), true))
		}
	}
	if len(tests) > 0 {
		a.say("%d of %d tests passed", len(tests)-failed, len(tests))
	}
	if failed > 0 {
		return errNegative
	}
	return nil
}

func (a *app) printDiff(resp *symbolonv1.ApplyResponse) error {
	resp.Changes = slices.DeleteFunc(resp.Changes, func(ch *symbolonv1.Change) bool {
		return ch.GetType() == symbolonv1.ChangeType_CHANGE_TYPE_UNCHANGED
	})
	for _, w := range resp.GetWarnings() {
		a.warning("%s", w)
	}
	if a.output == "json" {
		if err := a.json(resp); err != nil {
			return err
		}
	} else {
		for _, ch := range resp.GetChanges() {
			if err := a.printChange(ch); err != nil {
				return err
			}
		}
	}
	if err := a.printTests(resp.GetTests()); err != nil {
		return err
	}
	if len(resp.GetChanges()) > 0 {
		return errNegative
	}
	a.say("nothing would change")
	return nil
}

func (a *app) printChange(ch *symbolonv1.Change) error {
	p := a.painter()
	var b strings.Builder
	b.WriteString(p.paint(changeCell(ch.GetType())) + " " +
		p.paint(cell{formatRef(ch.GetKind(), ch.GetNamespace(), ch.GetName()), bold}) + "\n")
	for _, f := range ch.GetFields() {
		if f.GetBefore() != "" {
			b.WriteString(p.paint(cell{"  - " + f.GetPath() + ": " + f.GetBefore(), red}) + "\n")
		}
		if f.GetAfter() != "" {
			b.WriteString(p.paint(cell{"  + " + f.GetPath() + ": " + f.GetAfter(), green}) + "\n")
		}
	}
	return a.write([]byte(b.String()))
}
