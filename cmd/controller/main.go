// Symbolon-controller is the control plane of a trust domain: it enrols hosts,
// signs SVIDs, distributes policy and answers operators (package controller).
//
// Configuration: flags, over SYMBOLON_ environment variables, over the file.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/symbolon/symbolon/controller"
	"github.com/symbolon/symbolon/internal/settings"
)

// defaultFile is read if it is there and no other is named.
const defaultFile = "/etc/symbolon/controller.yaml"

// version is set by the linker; else it is the module's.
var version string

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "symbolon-controller:", err)
		stop()
		os.Exit(exitCode(err))
	}
}

// exitCode is 2 for what the operator must change before another try, which
// systemd need not make (RestartPreventExitStatus).
func exitCode(err error) int {
	if errors.Is(err, controller.ErrConfig) || errors.Is(err, errUsage) {
		return 2
	}
	return 1
}

var errUsage = errors.New("usage")

func command() *cobra.Command {
	var file, level string
	cmd := &cobra.Command{
		Use:   "symbolon-controller",
		Short: "The control plane of a Symbolon trust domain",
		Long: `The control plane of a Symbolon trust domain.

The first start makes the certificate authority, the root namespace (which denies
everything), and DATA_DIR/admin.token, by which the symbolon command finds entry.`,
		Example: "  symbolon-controller --trust-domain acme.example --data-dir /var/lib/symbolon",
		Version: buildVersion(),
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("%w: unexpected argument %q", errUsage, args[0])
			}
			return nil
		},
		// Both are main's: usage is not shown for an error of the store.
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			file, err := settings.File(file, defaultFile)
			if err != nil {
				return err
			}
			cfg, err := controller.LoadConfig(file, os.LookupEnv, settings.Given(cmd.Flags(), controller.Settings()))
			if err != nil {
				return err
			}
			log, err := newLogger(level)
			if err != nil {
				return err
			}
			defer func() { _ = log.Sync() }() // stderr may not be able to
			return run(cmd.Context(), cfg, log)
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return fmt.Errorf("%w: %w", errUsage, err) })
	cmd.Flags().StringVar(&file, "config", "", "configuration file (default "+defaultFile+", if it is there)")
	cmd.Flags().StringVar(&level, "log-level", "info", "debug, info, warn or error")
	settings.AddFlags(cmd.Flags(), controller.Settings())
	return cmd
}

// newLogger writes JSON lines to stderr.
func newLogger(level string) (*zap.Logger, error) {
	config := zap.NewProductionConfig()
	l, err := zap.ParseAtomicLevel(level)
	if err != nil {
		return nil, fmt.Errorf("%w: --log-level: %w", errUsage, err)
	}
	config.Level = l
	config.EncoderConfig.TimeKey = "time"
	config.EncoderConfig.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	config.DisableStacktrace = true
	return config.Build()
}

// run serves until SIGTERM or an interrupt, and keeps systemd informed.
func run(ctx context.Context, cfg controller.Config, log *zap.Logger) error {
	notify := func(state string) {
		if _, err := daemon.SdNotify(false, state); err != nil {
			log.Warn("notify systemd", zap.Error(err))
		}
	}
	context.AfterFunc(ctx, func() { notify(daemon.SdNotifyStopping) })
	return controller.Run(ctx, cfg, controller.Options{Logger: log, Version: buildVersion()},
		func(*controller.Server) { notify(daemon.SdNotifyReady) })
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}
