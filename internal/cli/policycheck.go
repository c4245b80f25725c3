package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func (a *app) policyTestCommand() *cobra.Command {
	var files []string
	var namespace string
	cmd := &cobra.Command{
		Use:   "test [-f FILE|DIR|-]",
		Short: "Run the PolicyTests, on what is in force or on files",
		Long: `Run all PolicyTests on the controller: against what is in force, or, with -f, against
what would be after an apply of the files. Nothing is changed. Each test that fails is
shown with the port on which it did, what decided on each side, and why the policies that
would have decided otherwise did not. Exit code 0: all passed; 1: some did not.`,
		Example: `  symbolon policy test
  symbolon policy test -f policies/ --namespace /acme/prod`,
		Args: cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error { return a.policyTest(ctx, files, namespace) }),
	}
	filesFlag(cmd, &files)
	a.namespaceFlag(cmd, &namespace, "only tests of this namespace and those below it")
	a.outputFlag(cmd, "table", "json")
	return cmd
}

func (a *app) policyTest(ctx context.Context, paths []string, namespace string) error {
	files, c, err := a.filesAndClient(paths)
	if err != nil {
		return err
	}
	resp, err := call(ctx, a, c.TestPolicy, &symbolonv1.TestPolicyRequest{Files: files, Namespace: namespace})
	if err != nil {
		return err
	}
	if a.output == "json" {
		if err := a.json(resp); err != nil {
			return err
		}
	}
	failed := 0
	for _, t := range resp.GetCases() {
		if t.GetPassed() {
			continue
		}
		failed++
		if a.output != "json" {
			if err := a.printCase(t); err != nil {
				return err
			}
		}
	}
	a.say("%d of %d tests passed", len(resp.GetCases())-failed, len(resp.GetCases()))
	if failed > 0 {
		return errNegative
	}
	return nil
}

// printCase shows a failed test and what decided.
func (a *app) printCase(t *symbolonv1.TestCase) error {
	p := a.painter()
	var b strings.Builder
	line := func(format string, args ...any) { b.WriteString(p.paint(text(fmt.Sprintf(format, args...))) + "\n") }
	b.WriteString(p.paint(no("failed")) + " " + p.paint(cell{formatRef("PolicyTest", t.GetNamespace(), t.GetPolicyTest()) + ": " + t.GetName(), bold}) + "\n")
	if t.GetFile() != "" {
		line("  %s:%d", t.GetFile(), t.GetLine())
	}
	line("  %s", t.GetMessage())
	for _, side := range t.GetSides() {
		verdict := "deny"
		if side.GetAllow() {
			verdict = "allow"
		}
		by := word(side.GetReason())
		if side.GetPolicy() != "" {
			by = side.GetPolicy() + " (" + by + ")"
		}
		line("  %s: %s by %s", side.GetSide(), verdict, by)
		shown, left := 0, 0
		for _, c := range side.GetCandidates() {
			// Those of the other verdict are why somebody expected it.
			other := c.GetVerb() == symbolonv1.Verb_VERB_ALLOW && !side.GetAllow() || c.GetVerb() == symbolonv1.Verb_VERB_DENY && side.GetAllow()
			switch {
			case !other:
			case shown == maxCandidates:
				left++
			case c.GetMatches():
				shown++
				line("    %s %s matches too, and does not decide", word(c.GetVerb()), c.GetPolicy())
			default:
				shown++
				line("    %s %s does not match: %s", word(c.GetVerb()), c.GetPolicy(), c.GetFailed())
			}
		}
		if left > 0 {
			line("    and %d more", left)
		}
	}
	return a.write([]byte(b.String()))
}

// maxCandidates bounds the policies shown beside a failed test's verdict.
const maxCandidates = 5

func (a *app) policyLintCommand() *cobra.Command {
	var files []string
	var namespace string
	var strict bool
	cmd := &cobra.Command{
		Use:   "lint [-f FILE|DIR|-]",
		Short: "Find policy that is valid and hardly meant",
		Long: `Find policy that is valid and hardly meant: in what is in force, or, with -f, in what
would be after an apply of the files; then only what the files touch is told of.

  narrows-parent     a deny below an allow that decides before it
  never-matches      conditions that exclude each other; a wildcard without TCP ports
  shadowed           another policy always decides first, or says the same already; another
                     External or a Service always has the address
  duplicate          two policies say the same
  too-broad          an allow to or from anybody, on any port
  no-known-workload  a label that no Profile and no External gives
  expired            a policy whose time is over
  weak-profile       a Profile by a program that any user may run
  foreign-label      an allow that another trust domain's workloads can meet
  private-name       a name that leads into private networks, or should and does not
  bare-name          a name without a dot, for which search domains do not count
  overlapping-names  a name that is taken out of another External's wildcard
  not-compared       there are too many policies to compare each with each

Exit code 0: nothing, or warnings only; 1: errors; with --strict, 1 for warnings too.`,
		Example: `  symbolon policy lint
  symbolon policy lint --strict -f policies/`,
		Args: cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error { return a.policyLint(ctx, files, namespace, strict) }),
	}
	filesFlag(cmd, &files)
	a.namespaceFlag(cmd, &namespace, "only this namespace and those below it")
	cmd.Flags().BoolVar(&strict, "strict", false, "exit code 1 for warnings too")
	a.outputFlag(cmd, "table", "json")
	return cmd
}

func (a *app) policyLint(ctx context.Context, paths []string, namespace string, strict bool) error {
	files, c, err := a.filesAndClient(paths)
	if err != nil {
		return err
	}
	resp, err := call(ctx, a, c.LintPolicy, &symbolonv1.LintPolicyRequest{Files: files, Namespace: namespace})
	if err != nil {
		return err
	}
	if a.output == "json" {
		if err := a.json(resp); err != nil {
			return err
		}
	}
	errors := 0
	for _, f := range resp.GetFindings() {
		if f.GetSeverity() == symbolonv1.LintSeverity_LINT_SEVERITY_ERROR {
			errors++
		}
		if a.output != "json" {
			if err := a.printFinding(f); err != nil {
				return err
			}
		}
	}
	all := len(resp.GetFindings()) + int(resp.GetOmitted())
	switch {
	case all == 0:
		a.say("nothing found")
	case resp.GetOmitted() > 0:
		a.say("%d findings, of which the first %d are shown; %d errors among those", all, len(resp.GetFindings()), errors)
	default:
		a.say("%d findings, %d of them errors", all, errors)
	}
	if errors > 0 || strict && all > 0 {
		return errNegative
	}
	return nil
}

// printFinding is the place, the line with a caret where there is one, and the remedy.
func (a *app) printFinding(f *symbolonv1.LintFinding) error {
	p := a.painter()
	look := warn("warning")
	if f.GetSeverity() == symbolonv1.LintSeverity_LINT_SEVERITY_ERROR {
		look = no("error")
	}
	var b strings.Builder
	if f.GetFile() != "" {
		b.WriteString(p.paint(text(fmt.Sprintf("%s:%d:%d: ", f.GetFile(), f.GetLine(), f.GetColumn()))))
	}
	b.WriteString(p.paint(look) + " " + p.paint(cell{f.GetCode(), bold}) + " " +
		p.paint(text(formatRef(f.GetKind(), f.GetNamespace(), f.GetName())+": "+f.GetMessage())) + "\n")
	if f.GetExcerpt() != "" {
		b.WriteString(sanitize(f.GetExcerpt(), true) + "\n")
	}
	if f.GetRemedy() != "" {
		b.WriteString(p.paint(cell{"  " + strings.ReplaceAll(f.GetRemedy(), "\n", " "), faint}) + "\n")
	}
	return a.write([]byte(b.String()))
}
