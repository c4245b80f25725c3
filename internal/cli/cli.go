package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// Env is the world that a run sees. The zero value of a field is replaced by the
// process's own.
type Env struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Getenv         func(string) string
	// Now and Location decide how times are shown.
	Now      func() time.Time
	Location *time.Location
	// Version of this build.
	Version string
}

// app is one run: what its commands share.
type app struct {
	Env
	out     *checkedWriter
	flags   connectionFlags
	color   string
	timeout time.Duration
	yes     bool
	output  string
	// started tells usage errors (cobra's, before a command runs) from others.
	started bool
}

// Main runs one command line, without the program's name, and returns its exit
// code.
func Main(ctx context.Context, args []string, env Env) int {
	a := newApp(env)
	root := a.rootCommand()
	root.SetArgs(args)
	ran, err := root.ExecuteContextC(ctx)
	if err != nil && !a.started {
		err = usagef("%w\nsee: %s --help", err, ran.CommandPath())
	}
	if err == nil && a.out.err != nil {
		err = &exitError{ExitUnreachable, fmt.Errorf("write the answer: %w", a.out.err)}
	}
	var exit *exitError
	if err != nil && !(errors.As(err, &exit) && exit.err == nil) {
		_, _ = fmt.Fprintf(a.Stderr, "%s %s\n", a.talkPainter().paint(cell{"error:", red}), sanitize(message(err), true))
	}
	return exitCode(err)
}

func newApp(env Env) *app {
	if env.Stdin == nil {
		env.Stdin = os.Stdin
	}
	if env.Stdout == nil {
		env.Stdout = os.Stdout
	}
	if env.Stderr == nil {
		env.Stderr = os.Stderr
	}
	if env.Getenv == nil {
		env.Getenv = os.Getenv
	}
	if env.Now == nil {
		env.Now = time.Now
	}
	if env.Location == nil {
		env.Location = time.Local
	}
	return &app{Env: env, out: &checkedWriter{w: env.Stdout}, color: "auto"}
}

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "symbolon",
		Short: "Operate Symbolon: who may talk to whom, by identity, encrypted",
		Long: `symbolon talks to a Symbolon controller: it enrols hosts, applies policy, explains
decisions and shows what connected to what.

Where the controller is, and what proves it and you:

  flag           environment           what
  --controller   SYMBOLON_CONTROLLER   host[:port] of the controller, port 7443
  --token-file   SYMBOLON_TOKEN_FILE   the file with the admin token
  --ca-file      SYMBOLON_CA_FILE      the file with the root certificate (ca.pem)

Flags win over the environment, that over the file that "symbolon config" writes,
and that over the places where a controller on this machine keeps them.

Exit codes: 0 done, or yes; 1 the answer is no (denied, differs, a test failed, not
found); 2 wrong usage or input; 3 no answer; 4 refused; 5 conflict.`,
		Example: `  symbolon status
  symbolon policy apply -f policies/
  symbolon explain --from app=web@/acme/prod --to app=db@/acme/prod --port 5432
  symbolon flows --follow --outcome deny`,
		Version:       a.Version,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			switch a.color {
			case "auto", "always", "never":
				return nil
			}
			return fmt.Errorf("--color %q: want auto, always or never", a.color)
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetIn(a.Stdin)
	root.SetOut(a.out)
	root.SetErr(a.Stderr)
	f := root.PersistentFlags()
	a.flags.register(f)
	f.StringVar(&a.color, "color", "auto", "colours: auto (on a terminal, unless NO_COLOR is set), always, never")
	f.DurationVar(&a.timeout, "timeout", 30*time.Second, "how long to wait for the controller's answer")
	root.AddCommand(
		a.statusCommand(), a.hostCommand(), a.namespaceCommand(), a.workloadCommand(), a.trustDomainCommand(), a.learnCommand(),
		a.policyCommand(), a.explainCommand(), a.flowsCommand(), a.simulateCommand(), a.scanCommand(),
		a.caCommand(), a.configCommand(), a.versionCommand(),
	)
	root.InitDefaultCompletionCmd()
	if completion, _, err := root.Find([]string{"completion"}); err == nil {
		completion.Example = "  symbolon completion bash > /etc/bash_completion.d/symbolon"
	}
	return root
}

// run marks the end of cobra's own checks; an error before it is wrong usage.
func (a *app) run(f func(ctx context.Context, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		a.started = true
		return f(cmd.Context(), args)
	}
}

// group is a command that only holds others.
func group(use, short, long, example string, children ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long, Example: example,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return fmt.Errorf("%s needs one of its commands: %s", cmd.CommandPath(), childNames(cmd))
		},
	}
	cmd.AddCommand(children...)
	return cmd
}

func childNames(cmd *cobra.Command) string {
	var s string
	for i, c := range cmd.Commands() {
		if i > 0 {
			s += ", "
		}
		s += c.Name()
	}
	return s
}

// say talks to the person, on stderr.
func (a *app) say(format string, args ...any) {
	_, _ = fmt.Fprintln(a.Stderr, sanitize(fmt.Sprintf(format, args...), true))
}

// warning is talk that should be seen.
func (a *app) warning(format string, args ...any) {
	_, _ = fmt.Fprintf(a.Stderr, "%s %s\n", a.talkPainter().paint(cell{"! warning:", yellow}),
		sanitize(fmt.Sprintf(format, args...), true))
}

func (a *app) painter() painter     { return painter{a.colored(a.Stdout)} }
func (a *app) talkPainter() painter { return painter{a.colored(a.Stderr)} }

// colored follows --color, NO_COLOR (https://no-color.org: set and not empty) and
// TERM=dumb.
func (a *app) colored(w io.Writer) bool {
	switch a.color {
	case "always":
		return true
	case "never":
		return false
	}
	return a.Getenv("NO_COLOR") == "" && a.Getenv("TERM") != "dumb" && isTerminal(w)
}

func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// checkedWriter remembers the first error, so that a full disk is not a success.
type checkedWriter struct {
	w   io.Writer
	err error
}

func (c *checkedWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	if err != nil && c.err == nil {
		c.err = err
	}
	return n, err
}
