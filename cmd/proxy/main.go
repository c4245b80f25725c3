// Command symbolon-proxy is the host daemon: it takes the host's TCP connections,
// and lets through what policy allows.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/symbolon/symbolon/internal/settings"
	"github.com/symbolon/symbolon/proxy"
	"github.com/symbolon/symbolon/redirect"
)

// version is set by the linker (Makefile).
var version = "devel"

// defaultFile is read if it is there and no other is named.
const defaultFile = "/etc/symbolon/proxy.yaml"

// Exit codes.
const (
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "symbolon-proxy:", err)
		stop()
		os.Exit(exitCode(err))
	}
}

// exitCode is exitUsage for what the operator must change before another try, which
// systemd need not make (RestartPreventExitStatus).
func exitCode(err error) int {
	if errors.Is(err, settings.ErrConfig) || errors.Is(err, errUsage) {
		return exitUsage
	}
	return exitFailed
}

var errUsage = errors.New("usage")

// arguments makes what is wrong with a command's arguments wrong usage.
func arguments(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return fmt.Errorf("%w: %w", errUsage, err)
		}
		return nil
	}
}

func command() *cobra.Command {
	var file string
	root := &cobra.Command{
		Use:   "symbolon-proxy",
		Short: "Take the host's TCP connections, and let through what policy allows",
		Long: `symbolon-proxy takes every TCP connection of this host (iptables REDIRECT), finds
out which workload is talking, joins hands with the proxy at the other end over
mutual TLS, decides by policy on both sides, and only then lets bytes through.

Configuration: flags, over environment (SYMBOLON_...), over the file. It needs to
be root, or CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH.

SIGHUP or SIGUSR2 start it anew beside itself: the new process takes over sockets,
policy and certificates, the old one lets its connections end. SIGTERM stops it;
under systemd the next start takes over the same.

While it is dead, protected connections are refused (redirect.on_exit: closed);
'symbolon-proxy cleanup' takes the rules out of the kernel.

Exit codes: 0 stopped by a signal; 1 failed; 2 wrong usage or configuration.`,
		Example: `  symbolon-proxy --config /etc/symbolon/proxy.yaml
  symbolon-proxy --controller-address 198.51.100.5:7443 \
      --controller-join-token-file /etc/symbolon/join.token`,
		Args:          arguments(cobra.NoArgs),
		SilenceErrors: true, SilenceUsage: true, // both are main's
		RunE: func(cmd *cobra.Command, _ []string) error {
			file, err := settings.File(file, defaultFile)
			if err != nil {
				return err
			}
			cfg, err := proxy.LoadConfig(file, os.LookupEnv, settings.Given(cmd.Flags(), proxy.Settings()))
			if err != nil {
				return err
			}
			return run(cmd.Context(), cfg)
		},
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return fmt.Errorf("%w: %w", errUsage, err) })
	root.Flags().StringVar(&file, "config", "", "configuration file (default "+defaultFile+", if it is there)")
	settings.AddFlags(root.Flags(), proxy.Settings())
	root.AddCommand(cleanupCommand(), forgetCommand(), debugCommand(), versionCommand())
	return root
}

func cleanupCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "cleanup",
		Short: "Remove every trace of the proxy from the kernel",
		Long: `Removes the iptables chains, jumps, ipsets, routes and routing rules of the proxy from
this network namespace, whatever configuration made them. Stop the proxy first, or it will put
them back. Afterwards the host's connections pass unprotected.`,
		Example: "  systemctl stop symbolon-proxy && symbolon-proxy cleanup",
		Args:    arguments(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return redirect.Cleanup(cmd.Context()) },
	}
}

func forgetCommand() *cobra.Command {
	socket := proxy.DefaultConfig().Socket
	c := &cobra.Command{
		Use:   "forget",
		Short: "Forget this host's enrolment",
		Long: `The host's key lives in memory only: the proxy's, and between two runs of it the
kernel's (the user keyring of root), until the host's SVID ends or the machine
reboots. This removes it from there; the next start needs a new join token.`,
		Example: "  symbolon-proxy forget",
		Args:    arguments(cobra.NoArgs),
		RunE:    func(*cobra.Command, []string) error { return forget(socket) },
	}
	c.Flags().StringVar(&socket, "socket", socket, "the proxy's socket, which names it")
	return c
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: arguments(cobra.NoArgs),
		Run: func(cmd *cobra.Command, _ []string) {
			goVersion := "unknown Go"
			if info, ok := debug.ReadBuildInfo(); ok {
				goVersion = info.GoVersion
			}
			fmt.Fprintf(cmd.OutOrStdout(), "symbolon-proxy %s (%s)\n", version, goVersion)
		},
	}
}
